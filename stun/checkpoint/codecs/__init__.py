"""Quantised forms of weights, a module a family: what a code is worth, the code of zero, and which tensors make up a weight."""
