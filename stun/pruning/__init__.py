"""The pruning job. In: a checkpoint, calibration tokens, a plan. Out: masks, updated weights, a new checkpoint, a summary."""
