"""Serving. In: a checkpoint and an installed runtime, which is started. Out: whether it generates this package's own tokens."""
