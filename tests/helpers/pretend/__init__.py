"""A pretend CUDA device, for tests on machines without one.

`device.start()` before stun or transformers are imported, `device.connect()` after. Tensors on `cuda:0` are wrappers that say so
and hold an ordinary tensor. Every operation is checked as CUDA would: all tensors on one device but for zero-dimensional ones,
no numpy, no sums without a fixed order, collectives only of contiguous device tensors in dtypes that NCCL knows. Kernels
(operations that are no views) and host syncs are counted. Copies that may run beside the computation run as late as events
allow, so that a buffer that is used too early shows as wrong bytes. CUDA's own numerics, memory limits and speed do not show.
"""
