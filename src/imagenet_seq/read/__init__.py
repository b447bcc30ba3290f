"""The read stage: how a source is read on this machine."""
