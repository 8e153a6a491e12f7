"""Settings of torch that belong to whoever calls a job from Python."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch


@contextmanager
def torch_restored() -> Iterator[None]:
    """Context after which torch has the caller's number of threads and arithmetic again (stun.runtime.gpus.set_arithmetic)."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    threads, attention, is_deterministic = torch.get_num_threads(), cuda.cudnn_sdp_enabled(), cudnn.deterministic
    precision = has_tf32 = None
    with suppress(RuntimeError):  # set by the caller for single kinds of operations, by torch's newer settings: not readable
        precision = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        has_tf32 = cudnn.allow_tf32
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cuda.enable_cudnn_sdp(attention)
        cudnn.deterministic = is_deterministic
        # Written only where they differ: writing sets the newer settings too.
        if precision is not None and torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
        if has_tf32 is not None and cudnn.allow_tf32 != has_tf32:
            cudnn.allow_tf32 = has_tf32


@contextmanager
def own_modes(device: torch.device) -> Iterator[None]:
    """Context in which the caller's modes do not count: autocast would round a run's products, inference mode forbids its writes,
    and a default device would take what it makes for the CPU."""
    with ExitStack() as modes:
        for kind in {"cpu", device.type}:
            modes.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            modes.enter_context(torch.device("cpu"))
        yield
