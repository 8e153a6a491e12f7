"""Tensors of the pretend device, and the checks and counts of every operation on them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.pretend import streams
from helpers.pretend.records import CHOSEN, COLLECTIVES, CONTEXTS, Fault, context, current, hold, note

_NCCL = {torch.int8, torch.uint8, torch.bool, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32}
_NCCL |= {torch.float64, torch.float8_e4m3fn, torch.float8_e5m2}
_SYNCS = {"_local_scalar_dense": 1, "nonzero": 1, "masked_select": 1, "bincount": 2, "_unique2": 1, "unique_dim": 1}
_SYNCS |= {"equal": 1, "is_nonzero": 1, "linalg_eigh": 1, "_linalg_eigh": 1}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}  # their indices may be on the host
_MOVES = {"copy_", "_to_copy"}
_NEW = {"empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like"}
_NO_KERNEL = {*_NEW, "detach", "alias", "view", "_unsafe_view", "_reshape_alias", "is_same_size"}
_UNORDERED = {"index_add", "index_add_", "scatter_add", "scatter_add_", "put_"}  # atomic additions, of floats in any order
_NESTED = (tuple, list)
_CPU = torch.device("cpu")
_POISON = 0xFF  # of new memory, in every byte: NaN, or -1; what is never written shows
_pinned: dict[int, weakref.finalize] = {}


class PretendTensor(torch.Tensor):
    """Tensor that says it is on a GPU; `inner` holds its values."""

    inner: torch.Tensor
    index: int
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, index: int = 0):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device("cuda", index),
        )
        made.inner, made.index = inner, index
        return made

    def __repr__(self, **_) -> str:
        return f"PretendTensor({self.inner!r})"

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise Fault("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def record_stream(self, _) -> None:
        """Memory is never used again while something refers to it."""

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        return _dispatch(function, arguments, keywords or {})


class PretendMode(TorchDispatchMode):
    """Makes what is asked for on cuda, in the thread that it is entered in."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # a wrapper of dynamo's around every call would take a fifth of the time

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return _dispatch(function, arguments, keywords or {})


def on_gpu(inner: torch.Tensor, index: int) -> PretendTensor:
    """The tensor as one of that GPU."""
    hold(inner)
    return PretendTensor(inner, index)


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """The host tensor itself, whose memory is pinned from now on."""
    storage = tensor.untyped_storage()
    key = storage._cdata
    if key not in _pinned:
        _pinned[key] = weakref.finalize(storage, _pinned.pop, key, None)
    return tensor


def is_pinned(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, PretendTensor) and tensor.untyped_storage()._cdata in _pinned


@cache
def _described(function) -> tuple[str, str, bool]:
    """Namespace, name, and whether the operation is a kernel: no view, and not memory alone."""
    space, name = function._schema.name.split("::")
    is_view = any(result.alias_info is not None and not result.alias_info.is_write for result in function._schema.returns)
    return space, name, not is_view and name not in _NO_KERNEL


def _leaves(values: Iterable, flat: list) -> list[object]:
    """`flat` with arguments of an operation, out of their lists; torch's own trees would take most of the time."""
    for value in values:
        if type(value) in _NESTED:
            _leaves(value, flat)
        else:
            flat.append(value)
    return flat


def _mapped(function: Callable, values: Iterable) -> list:
    return [_mapped(function, value) if type(value) in _NESTED else function(value) for value in values]


def _devices(flat: list, kind: str) -> list[torch.device]:
    return [leaf for leaf in flat if isinstance(leaf, torch.device) and leaf.type == kind]


def _dispatch(function, arguments: tuple, keywords: dict):
    space, name, is_kernel = _described(function)
    flat = _leaves(keywords.values(), _leaves(arguments, []))
    ours, plain = [], []
    for leaf in flat:
        if type(leaf) is PretendTensor:
            ours.append(leaf)
        elif isinstance(leaf, torch.Tensor):
            plain.append(leaf)
    wanted = _devices(flat, "cuda") if keywords else []
    if not ours and not wanted:
        return _on_host(function, arguments, keywords)
    if space == "c10d":
        return _collective(function, name, arguments, keywords, ours, plain)
    _check(function, name, arguments, ours, plain)
    index = ours[0].index if ours else current() if wanted[0].index is None else wanted[0].index
    if index not in CONTEXTS:
        context(index)
    if name == "_fused_sdp_choice":
        return 0
    if name == "copy_":
        return _copy(arguments, keywords)
    if is_kernel:
        streams.catch_up()
        note("kernels", name)
    found = _run(function, arguments, keywords)
    if name in _NEW:
        found.flatten().view(torch.uint8).fill_(_POISON)
    return _result(name, found, flat, arguments, ours, index, keywords.get("non_blocking", False))


def _on_host(function, arguments: tuple, keywords: dict):
    if not keywords.get("pin_memory"):
        return function(*arguments, **keywords)
    return pin(function(*arguments, **{**keywords, "pin_memory": False}))


def _check(function, name: str, arguments: tuple, ours: list, plain: list) -> None:
    """Raises Fault for tensors of several devices, and for sums whose order is not fixed."""
    if len(ours) > 1 and len({tensor.index for tensor in ours}) > 1 and name not in _MOVES:
        raise Fault(f"{function}: tensors on several GPUs")
    for other in plain:
        is_index = name in _INDEXING and other is not arguments[0]
        if name not in _MOVES and other.dim() and not is_index and other.device.type != "meta":
            shape = tuple(other.shape)
            raise Fault(
                f"{function}: expected all tensors to be on the same device, found cuda and {other.device}, shape {shape}"
            )
    is_sum = name in _UNORDERED or (name.startswith("scatter_reduce") and arguments[4] in ("sum", "mean", "prod"))
    if ours and ours[0].is_floating_point() and (is_sum or (name == "bincount" and len(arguments) > 1)):
        raise Fault(f"{function}: adds floats in no fixed order on CUDA")


def _inside(leaf: object) -> object:
    """What an operation is given in the place of this argument."""
    if type(leaf) is PretendTensor:
        return leaf.inner
    return _CPU if type(leaf) is torch.device and leaf.type == "cuda" else leaf


def _run(function, arguments: tuple, keywords: dict):
    if keywords.get("pin_memory"):
        raise Fault(f"{function}: only dense CPU tensors can be pinned")
    with torch._C._DisableTorchDispatch():
        named = zip(keywords, _mapped(_inside, keywords.values()), strict=True)
        return function(*_mapped(_inside, arguments), **dict(named))


def _result(name: str, found: object, flat: list, arguments: tuple, ours: list, index: int, non_blocking: bool):
    """What an operation returns, on the GPU unless it goes to the host; counts the syncs."""
    if name in _SYNCS:
        note("syncs", name, _SYNCS[name])
    if name in _INDEXING and any(
        isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in arguments[1] or ()
    ):
        note("syncs", "boolean index")
    if name == "_to_copy" and (_devices(flat, "cpu") or _devices(flat, "meta")):
        if _devices(flat, "cpu"):
            note("syncs", "copy to host")
        return found
    if name == "_to_copy" and not ours and not (non_blocking and is_pinned(arguments[0])):
        note("syncs", "copy from pageable memory")
    if name in ("_local_scalar_dense", "is_same_size", "equal"):
        return found

    def up(value: object) -> object:
        if type(value) is PretendTensor or not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return value
        for tensor in ours:
            if tensor.inner is value:  # in place, or out=
                return tensor
        return on_gpu(value, index)

    if isinstance(found, tuple):
        return tuple(map(up, found))
    return _mapped(up, found) if isinstance(found, list) else up(found)


def _copy(arguments: tuple, keywords: dict):
    """copy_, which may go from one device to another."""
    target, source = arguments[:2]
    non_blocking = keywords.get("non_blocking", arguments[2] if len(arguments) > 2 else False)
    inner, values = _inside(target), _inside(source)
    to_host, from_host = not isinstance(target, PretendTensor), not isinstance(source, PretendTensor)
    is_queued = (to_host or from_host) and non_blocking and is_pinned(target if to_host else source)
    if not is_queued or streams.of_thread() is streams.DEFAULT:
        streams.catch_up()  # a copy on another stream comes after those before it all the same, and may be as late as they
    note("kernels", "copy_")
    if is_queued:
        is_late = to_host and streams.of_thread() is streams.DEFAULT  # what was computed by now, seen after a sync
        values = values.clone() if is_late else values
        streams.queue_copy(lambda: _plain_copy(inner, values), to_host)
        return target
    if to_host or from_host:
        note("syncs", "blocking copy to host" if to_host else "blocking copy to gpu")
    _plain_copy(inner, values)
    return target


def _plain_copy(target: torch.Tensor, source: torch.Tensor) -> None:
    with torch._C._DisableTorchDispatch():
        target.copy_(source)


def _collective(function: Callable, name: str, arguments: tuple, keywords: dict, ours: list, plain: list):
    """A collective, by gloo on what the tensors hold. Raises Fault for what NCCL does not take."""
    streams.catch_up()
    if plain:
        raise Fault(f"{function}: tensors on GPU and CPU in one collective")
    for tensor in ours:
        if tensor.device.index != CHOSEN["bound"]:
            raise Fault(f"{function}: tensor on {tensor.device}, communicator bound to {CHOSEN['bound']}")
        if tensor.dtype not in _NCCL:
            raise Fault(f"{function}: NCCL does not know {tensor.dtype}")
        if not tensor.inner.is_contiguous():
            raise Fault(f"{function}: NCCL wants contiguous tensors, strides {tensor.stride()}")
    COLLECTIVES.append(f"{name} {[tuple(tensor.shape) for tensor in ours][:2]} {ours[0].dtype}")
    note("kernels", f"c10d.{name}")
    known = {id(tensor.inner): tensor for tensor in ours}
    found = _run(function, arguments, keywords)
    up = lambda value: known.get(id(value), value)  # noqa: E731
    return tuple(_mapped(up, found)) if isinstance(found, tuple) else _mapped(up, [found])[0]
