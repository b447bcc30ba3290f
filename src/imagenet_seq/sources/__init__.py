"""Datasets of every format, recognised by their content and read through one index."""
