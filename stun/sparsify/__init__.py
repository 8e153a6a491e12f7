"""Sparsification of single matrices. In: weights and what their inputs were. Out: masks and updated weights."""

# Shapes: O outputs and D inputs of a matrix, whose output is W x. A Gram matrix G [D, D] is the sum of x x^T over the tokens that
# a matrix was given; the output error of a weight change dW is tr(dW G dW^T).
