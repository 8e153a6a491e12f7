"""Evaluation. In: a checkpoint of any size, questions, texts. Out: exact match, perplexity, distance from the dense model."""
