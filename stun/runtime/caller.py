"""Settings of torch that belong to whoever calls a job from Python."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _newer() -> list[object]:
    """Places of torch's newer settings of precision, the more general ones first."""
    backends = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    return [backends, backends.cuda.matmul, cudnn, cudnn.conv, cudnn.rnn, mkldnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


def _older() -> list[object]:
    """Values of the older settings: of products, and of cuDNN; None where torch says none, since the newer ones differ."""
    values = []
    for read in (torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32):
        try:
            values.append(read())
        except RuntimeError:
            values.append(None)
    return values


@contextmanager
def torch_restored() -> Iterator[None]:
    """Context after which torch has the caller's number of threads and arithmetic again (stun.runtime.gpus.set_arithmetic)."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    threads, attention, is_deterministic = torch.get_num_threads(), cuda.cudnn_sdp_enabled(), cudnn.deterministic
    newer, older = [place.fp32_precision for place in _newer()], _older()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cuda.enable_cudnn_sdp(attention)
        cudnn.deterministic = is_deterministic
        if newer != [place.fp32_precision for place in _newer()] or older != _older():
            precision, has_tf32 = older  # which set newer ones too, so they come first
            if precision is not None:
                torch.set_float32_matmul_precision(precision)
            if has_tf32 is not None:
                cudnn.allow_tf32 = has_tf32
            for place, value in zip(_newer(), newer, strict=True):
                place.fp32_precision = value


@contextmanager
def own_modes(device: torch.device) -> Iterator[None]:
    """Context in which the caller's modes do not count: autocast would round a run's products, inference mode forbids its writes,
    a default device would take what it makes for the CPU, and kernels of attention that the caller chose have other last bits."""
    dtype = torch.get_default_dtype()
    with ExitStack() as modes:
        modes.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        modes.enter_context(sdpa_kernel(_ATTENTION))
        for kind in {"cpu", device.type}:
            modes.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            modes.enter_context(torch.device("cpu"))
        yield
