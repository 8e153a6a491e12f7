"""Checkpoints. In: a folder in the hub's layout. Out: headers, tensors on request, and files written whole or not at all."""
