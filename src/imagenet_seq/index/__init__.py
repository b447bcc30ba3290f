"""The index stage: a dataset on disk becomes columns over its samples."""
