"""Formats of datasets: recognised by content, and described by one kind of index."""
