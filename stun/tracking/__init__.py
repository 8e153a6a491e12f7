"""Tracking. In: a job's numbers. Out: Weights & Biases and TensorBoard."""
