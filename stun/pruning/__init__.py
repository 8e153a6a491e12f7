"""Pruning job. In: a checkpoint, calibration tokens, a plan. Out: pruned weights, a new checkpoint, a summary."""
