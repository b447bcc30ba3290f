"""The plan stage: which blocks are read in which order, which samples are in which batch."""
