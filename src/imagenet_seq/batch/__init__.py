"""The batch stage: rows become batches, delivered in the order of the plan."""
