"""Single weights: which of a matrix go, and what becomes of the rest. Tensors in, tensors out.

Shapes: O outputs and D inputs of a matrix, whose output is W x. Gram matrices [D, D] are the sums of x x^T over the tokens a
matrix saw; the output error of a change dW is then tr(dW G dW^T).
"""
