"""The decode stage: what is made of each sample, in the core and in Python."""
