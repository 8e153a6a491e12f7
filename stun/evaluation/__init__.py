"""Evaluation. In: a checkpoint of any size, rows, texts. Out: exact match, perplexity, distance from the dense model."""
