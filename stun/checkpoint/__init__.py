"""Checkpoints on disk. In: a folder in the hub's layout. Out: headers, tensors on request, and files written atomically."""
