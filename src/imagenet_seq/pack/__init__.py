"""Packing: the only writer."""
