"""Tracking. In: a job's metrics. Out: Weights & Biases and TensorBoard."""
