"""One module for each format; nothing outside it knows the format."""
