"""Memory of the GPU that is no tensor's."""

from __future__ import annotations

import torch


def outside_tensors() -> int:
    """Bytes in use on the GPU beside those that torch's allocator holds: the context, loaded kernels, workspaces of libraries."""
    torch.cuda.synchronize()
    free, whole = torch.cuda.mem_get_info()
    return whole - free - torch.cuda.memory_reserved()
