"""The pretend device takes the place of torch.cuda: `start`, then imports, then `connect`."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed

from helpers.pretend import streams
from helpers.pretend.records import CHOSEN, MEMORY, Fault, context, current, note, set_current
from helpers.pretend.tensors import PretendMode, PretendTensor, is_pinned, on_gpu, pin

_SOURCE = Path(__file__).with_name("guard.cpp")
_MEMORY = 141 * 10**9  # bytes
_attention = torch.nn.functional.scaled_dot_product_attention


def missing() -> str:
    """Why there can be no pretend device here; "" if there can."""
    if torch.version.cuda:
        return "a torch with CUDA has no place for a pretend device"
    return "" if shutil.which("g++") else "g++ compiles the pretend device's guard, and is not installed"


def guard() -> Path:
    """Compiled guard, made in the user's cache where it is not there yet (some seconds)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stun-tests"
    root, version = Path(torch.__file__).parent, f"{torch.__version__} {_SOURCE.read_text()}"
    file = cache / f"guard-{hashlib.sha256(version.encode()).hexdigest()[:16]}.so"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        made = file.with_suffix(f".{os.getpid()}")
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
        options = ["-O1", "-shared", "-fPIC", "-std=c++20", abi, f"-I{root}/include", f"-L{root}/lib"]
        subprocess.run(["g++", *options, str(_SOURCE), "-lc10", "-o", str(made)], check=True)
        os.replace(made, file)
    return file


def start() -> None:
    """Pretend from here on, in this thread and in those that are started later."""
    torch.ops.load_library(str(guard()))
    for name, value in _cuda().items():
        setattr(torch.cuda, name, value)
    torch.version.cuda = "13.0"
    torch.set_num_threads(1)  # so that the CPU that computes in the GPU's place gives the same bits everywhere
    torch.set_num_threads = lambda number: CHOSEN.update(threads=number)
    torch.nn.functional.scaled_dot_product_attention = _attend
    torch.Generator = _Generator
    torch.Tensor.pin_memory = lambda tensor, *_: pin(tensor.clone())
    torch.Tensor.is_pinned = lambda tensor, *_: is_pinned(tensor)
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, partial(_made, getattr(torch, name)))
    run = threading.Thread.run

    def run_pretending(thread: threading.Thread) -> None:
        with PretendMode():
            run(thread)

    threading.Thread.run = run_pretending
    PretendMode().__enter__()


def connect() -> None:
    """Replace what has no stand-in below torch's dispatcher, once stun is imported."""
    import stun.preflight.activations
    import stun.pruning.describe
    import stun.sparsify.select

    stun.preflight.activations._ATTENTION = _attention
    stun.sparsify.select.smallest_per_row_gpu = _smallest_per_row
    stun.pruning.describe.cannot_compile = lambda device: ""
    torch.distributed.init_process_group = partial(_init_process_group, torch.distributed.init_process_group)


def device_count() -> int:
    """Number of GPUs in CUDA_VISIBLE_DEVICES, 1 where it is not set."""
    return len([number for number in os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",") if number])


def _name(*_) -> str:
    return os.environ.get("PRETEND_GPU", "NVIDIA H200")


def _properties(*_) -> SimpleNamespace:
    return SimpleNamespace(name=_name(), total_memory=_MEMORY, major=9, minor=0, multi_processor_count=132)


def _set_device(device: int | str | torch.device) -> None:
    number = device if isinstance(device, int) else torch.device(device).index or 0
    if number >= device_count():
        raise Fault(f"CUDA error: invalid device ordinal {number}, {device_count()} visible")
    set_current(number)


def _cuda() -> dict[str, object]:
    """What torch.cuda is given."""
    return {
        "is_available": lambda: device_count() > 0,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": device_count,
        "set_device": _set_device,
        "current_device": current,
        "get_device_name": _name,
        "get_device_properties": _properties,
        "get_device_capability": lambda *_: (9, 0),
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": streams.synchronize,
        "Stream": streams.Stream,
        "Event": streams.Event,
        "stream": streams.on_stream,
        "current_stream": lambda *_: streams.of_thread(),
        "default_stream": lambda *_: streams.DEFAULT,
        "memory_allocated": lambda *_: MEMORY["now"],
        "memory_reserved": lambda *_: MEMORY["now"],
        "max_memory_allocated": lambda *_: MEMORY["peak"],
        "reset_peak_memory_stats": lambda *_: MEMORY.update(peak=MEMORY["now"]),
        "mem_get_info": lambda *_: (_MEMORY - MEMORY["now"], _MEMORY),
        "empty_cache": lambda: None,
    }


def _attend(query, key, value, attn_mask=None, **keywords):
    """Attention as one kernel, computed by the CPU's."""
    if not isinstance(query, PretendTensor):
        return _attention(query, key, value, attn_mask=attn_mask, **keywords)
    tensors = [query, key, value, *([] if attn_mask is None else [attn_mask])]
    if not all(isinstance(tensor, PretendTensor) for tensor in tensors):
        raise Fault("attention: tensors on GPU and CPU")
    streams.catch_up()
    note("kernels", "attention")
    inner = [tensor.inner for tensor in tensors]
    with torch._C._DisableTorchDispatch():
        return on_gpu(_attention(*inner, **keywords), query.device.index)


def _made(function, data, *rest, device=None, **keywords):
    """torch.tensor and torch.as_tensor."""
    if isinstance(data, PretendTensor):
        return data if device is None else data.to(device)
    found = function(data, *rest, **keywords)
    return found if device is None else found.to(device)


class _Generator(torch.Generator):
    """A generator of any device, on the CPU."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")

    def __init__(self, device="cpu"):
        super().__init__()


def _smallest_per_row(scores_OD: torch.Tensor, count_O: torch.Tensor) -> torch.Tensor:
    """The Triton kernel's mask, as one kernel."""
    from stun.sparsify.select import _smallest_per_row as select

    if not (isinstance(scores_OD, PretendTensor) and isinstance(count_O, PretendTensor)):
        raise Fault("select: scores and counts must be on the GPU")
    streams.catch_up()
    note("kernels", "select")
    scores = scores_OD.inner.float().contiguous()
    mask = torch.from_numpy(select(scores.view(torch.int32).numpy(), count_O.inner.numpy()))
    return on_gpu(mask, scores_OD.device.index)


def _init_process_group(init, backend: str | None = None, device_id: torch.device | None = None, **keywords) -> None:
    """gloo in the place of NCCL, after its checks."""
    if backend != "nccl":
        raise Fault(f"GPUs want NCCL, not {backend}")
    if device_id is not None and (device_id.index or 0) >= device_count():
        raise Fault(f"CUDA error: invalid device ordinal: {device_id}, {device_count()} visible")
    CHOSEN["bound"] = current() if device_id is None else device_id.index or 0
    context(CHOSEN["bound"])
    init("gloo", **keywords)
