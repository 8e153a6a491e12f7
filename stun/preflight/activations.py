"""Activation memory of a micro-batch in a layer, from counting allocations while the layer runs on the meta device.

No model family needs a formula of its own. Memory that libraries allocate inside one operation is not counted.
"""

import weakref
from contextlib import nullcontext
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
import torch.fx.experimental._config
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import Cache

from stun.model.architecture import Architecture
from stun.model.precision import compute_dtype
from stun.model.tensor_names import experts_of
from stun.runtime.threads import workers_on
from stun.stream.expert_parallel import tokens_together
from stun.stream.layer_stream import States, handed_on

_ATTENTION = torch.nn.functional.scaled_dot_product_attention


class _Fused(TorchFunctionMode):
    """Attention with the memory of torch's fused kernels, which never hold all scores. GPUs always use them, CPUs if keys and
    values have the same width; the meta device has none."""

    def __init__(self, is_gpu: bool):
        super().__init__()
        self.is_gpu = is_gpu

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function is _ATTENTION:
            query, _, value = arguments[:3]
            if self.is_gpu or query.shape[-1] == value.shape[-1]:
                return query.new_empty(*query.shape[:-1], value.shape[-1])
        return function(*arguments, **(keywords or {}))


class Allocations(TorchDispatchMode):
    """Context that counts bytes of the tensors created in it: `now` held, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        inputs = {id(storage) for storage in _storages((arguments, keywords))}
        result = function(*arguments, **(keywords or {}))
        for storage in _storages(result):
            if id(storage) not in self._seen and id(storage) not in inputs:
                self._add(storage)
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = id(storage), storage.nbytes()

        def freed(_: weakref.ref) -> None:
            self.now -= nbytes
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, freed)
        self.now += nbytes


def _storages(values: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class _Exchange:
    """The allocations of stun.stream.expert_parallel.Exchange for a micro-batch, with equally many tokens per expert."""

    def __init__(self, num_experts: int, world: int, device: torch.device):
        self.num_experts, self.world, self.device, self.workers = num_experts, world, device, workers_on(device)

    def forward(self, module: nn.Module, hidden_TD, index_TK, weights_TK) -> torch.Tensor:
        rows_ND = hidden_TD.repeat_interleave(index_TK.shape[1], 0)
        received_ND = rows_ND if self.world == 1 else torch.empty_like(rows_ND)
        del rows_ND
        served_ND = torch.empty_like(received_ND)
        local_experts = max(1, self.num_experts // self.world)
        rows_nD = received_ND[: -(-len(received_ND) // local_experts)]
        inner = [self._inner(module, rows_nD) for _ in range(min(self.workers, local_experts) - 1)]
        for _ in range(local_experts - len(inner)):
            rows_nI = self._inner(module, rows_nD)
            module._apply_gate(rows_nI) if module.has_gate else module.act_fn(rows_nI)
        del inner
        _back_ND = served_ND if self.world == 1 else torch.empty_like(served_ND)
        output_TD, size = torch.empty_like(hidden_TD), tokens_together(self.device, hidden_TD.shape[1], index_TK.shape[1])
        _pieces = [
            torch.empty_like(hidden_TD[:size], dtype=torch.float32).repeat(2 * index_TK.shape[1], 1) for _ in range(self.workers)
        ]
        return output_TD

    @staticmethod
    def _inner(module: nn.Module, rows_nD: torch.Tensor) -> torch.Tensor:
        weight = (module.gate_up_proj if module.has_gate else module.up_proj)[0]
        return rows_nD @ (weight if weight.shape[0] == rows_nD.shape[1] else weight.T)


@torch.no_grad()
def _entered(arch: Architecture, batch: int, length: int, dtype: torch.dtype, **options) -> States:
    """States of B x T tokens before the first layer of a model of zeros, which take no memory."""
    tokens_BT = torch.zeros(batch, length, dtype=torch.int64)
    weight_VD = torch.zeros((), dtype=dtype).expand(arch.info(arch.embedding).shape)
    with arch.zeros_outside() if arch.probe.reads_outside else nullcontext():
        hidden_BTD, arguments = arch.enter(tokens_BT, weight_VD, **options)
    return States([hidden_BTD], [arguments], 1)


@dataclass(frozen=True)
class Activations:
    """Peak bytes of one micro-batch beside weights and hidden states, in each of `layers`. `arguments` (masks, rotary embeddings)
    are held for the whole stream, `caches` (of all layers) until the next token. `carried` is the most that layers hand on."""

    layers: list[int]
    arguments: int
    caches: int
    carried: int


_traces: weakref.WeakKeyDictionary[Architecture, dict[tuple, Activations]] = weakref.WeakKeyDictionary()


def trace_layers(arch: Architecture, batch: int, length: int, device: torch.device, world: int, **options) -> Activations:
    """Activations of B x T tokens on one of `world` ranks; with `use_cache=True` caches too. An architecture is traced once for
    each of these: estimates of many settings ask again and again."""
    known, key = _traces.setdefault(arch, {}), (batch, length, device, world, *options.items())
    if key not in known:
        known[key] = _traced(arch, batch, length, device, world, **options)
    return known[key]


def _traced(arch: Architecture, batch: int, length: int, device: torch.device, world: int, **options) -> Activations:
    """The same, from equal layers once each."""
    states, traced, traces = _entered(arch, batch, length, compute_dtype(arch, device), **options), {}, []
    storage_bytes = {id(entry): entry.nbytes() for entry in _storages(states.arguments) if entry.device.type != "meta"}
    hidden_BTD, carried, handed = _on_meta(states.hidden[0]), {}, [0]
    for index, layer in enumerate(arch.decoder.layers):
        states = replace(states, hidden=[hidden_BTD], carried=[carried])
        hidden_BTD, arguments = states.inputs(0, index)
        shapes = tuple((name, tuple(weight.shape)) for name, weight in layer.named_parameters())
        kind = (shapes, tuple((name, getattr(value, "shape", None)) for name, value in arguments.items()))
        if kind not in traced:
            traced[kind] = _trace(arch, index, hidden_BTD, arguments, device, world)
        *bytes_taken, output = traced[kind]
        traces.append(bytes_taken)
        carried = handed_on(arch.probe, index, carried, arguments, output)
        handed.append(sum(tensor.nbytes for tensor in carried.values()))
        hidden_BTD = output[0] if isinstance(output, tuple) else output
    caches = sum(cached for _, cached in traces)
    return Activations([peak for peak, _ in traces], sum(storage_bytes.values()), caches, max(handed))


def _on_meta(values: object) -> object:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), values)


@torch.no_grad()
def _trace(
    arch: Architecture, index: int, hidden_BTD: torch.Tensor, arguments: dict, device: torch.device, world: int
) -> tuple[int, int, object]:
    """Peak bytes of a layer's run, bytes of its cache, and its output on the meta device."""
    dtype, experts = compute_dtype(arch, device), arch.layers[index].num_experts
    layer = arch.build_layer(index, experts).to("meta", dtype)
    experts_module = experts_of(layer)
    if experts_module:
        experts_module[1].exchange = _Exchange(experts, world, device)
    caches = {name: value for name, value in arguments.items() if isinstance(value, Cache)}
    on_meta = _on_meta({**arguments, **dict.fromkeys(caches)}) | caches
    # Of entries that are picked by their values, as many as there are at most.
    picks_all = patch.object(torch.fx.experimental._config, "meta_nonzero_assume_all_nonzero", True)
    with _Fused(device.type == "cuda"), picks_all, Allocations() as allocations:
        output = layer(hidden_BTD, **on_meta)
    held = [_of_layer(cache, index) for cache in caches.values()]
    return allocations.peak, sum(storage.nbytes() for storage in _storages(held)), output


def _of_layer(cache: Cache, index: int) -> list:
    """What a cache holds of one layer: its entry in each of the cache's lists, of which some families have their own."""
    entries = [entry for own in vars(cache).values() if isinstance(own, list) for entry in own[index : index + 1]]
    return [entry if isinstance(entry, (torch.Tensor, list)) else vars(entry) for entry in entries]
