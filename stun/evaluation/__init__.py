"""Evaluation of checkpoints of any size: exact match, perplexity, distance from the dense model."""
