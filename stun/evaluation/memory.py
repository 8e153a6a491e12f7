"""Memory of an evaluation: rows at once, and layers that can be held in memory."""

from dataclasses import dataclass

from stun.config import StunError
from stun.model.architecture import Architecture, expert_infos
from stun.model.layer_layout import LayerLayout
from stun.model.precision import compute_dtype
from stun.preflight.activations import trace_layers
from stun.preflight.hardware import free_memory
from stun.runtime.device_copies import read_ahead
from stun.runtime.ranks import Ranks
from stun.runtime.units import size
from stun.stream.embeddings import outside_bytes

_USED = 0.8  # share of the free memory that is used: allocators round up and libraries allocate too
_MOST = 256  # rows at once; more do not make products faster
_PARTS = 8  # micro-batches at least, so that ranks have equal work


def _largest_power(most: float) -> int:
    """Largest power of two <= `most`, at least 1. Free memory varies between runs, and results should not vary with it."""
    return 1 << max(0, int(most).bit_length() - 1)


def _layer_bytes(arch: Architecture, layout: LayerLayout, ranks: Ranks) -> tuple[int, int, int, int]:
    """Bytes of a layer's weights: on one rank as stored, on one rank in the compute dtype, on all ranks as stored; and of those
    that exist in the compute dtype too while the layer runs, which are those outside the experts, and one expert."""
    dense = [arch.info(name) for name in layout.dense]
    expert, local_experts = expert_infos(arch, layout), -(-layout.num_experts // ranks.world)
    dtype = compute_dtype(arch, ranks.device)
    stored = sum(i.nbytes for i in dense) + local_experts * sum(i.nbytes for i in expert)
    computed = dtype.itemsize * (sum(i.numel for i in dense) + local_experts * sum(i.numel for i in expert))
    everywhere = sum(i.nbytes for i in dense) + layout.num_experts * sum(i.nbytes for i in expert)
    return stored, computed, everywhere, sum(i.numel * dtype.itemsize for i in [*dense, *expert] if i.dtype is not dtype)


def _free_bytes(arch: Architecture, ranks: Ranks, models: int = 1) -> int:
    """Bytes free for each of `models` beside layers, embedding, final norm and output head. A CPU holds the layer that runs and
    the next one, a GPU only the first of these."""
    sizes, outside = [_layer_bytes(arch, layout, ranks) for layout in arch.layers], outside_bytes(arch, ranks.device)
    usable = int(_USED * free_memory(ranks))
    if ranks.device.type == "cuda":
        return usable // models - max(stored + converted for stored, _, _, converted in sizes) - outside
    return (usable - 2 * max(stored + computed for stored, computed, _, _ in sizes) - outside) // models


def _batch(requested: int, free: float, row: int, rows: int, name: str) -> int:
    if requested:
        return requested
    if free < row:
        raise StunError(f"out of memory: one row of {name} takes {size(row)}, {size(max(free, 0))} are free")
    return min(_largest_power(free / row), _MOST, _largest_power(2 * -(-rows // _PARTS) - 1))


def scoring_batch(arch: Architecture, models: int, lengths: list[int], requested: int, ranks: Ranks) -> int:
    """Sequences to score at once, with `models` streamed side by side. Raises StunError if one sequence does not fit."""
    width = arch.token_width * compute_dtype(arch, ranks.device).itemsize
    states = 2 * models * width * max(lengths) * -(-len(lengths) // ranks.world)
    free = _free_bytes(arch, ranks, models) - states / models
    if free < 0:
        raise StunError(f"out of memory: the hidden states of {len(lengths)} sequences take {size(states)}; use fewer")
    peak = max(trace_layers(arch, 1, max(lengths), ranks.device, ranks.world, use_cache=True).layers)
    # The other half of a GPU is what is read ahead.
    return _batch(requested, free / 2, peak + 2 * width * max(lengths), len(lengths), f"{max(lengths)} tokens")


@dataclass(frozen=True)
class Capacity:
    """Sizes of a generation: `batch` rows in a micro-batch, `turns` micro-batches on a rank at once, the first `held_layers`
    layers held in memory, and `step_bytes` of the remaining ones read at every step. Caches and logits of more than `most` rows
    do not fit."""

    batch: int
    turns: int
    held_layers: int
    step_bytes: int
    most: int = 2**63


def generation_capacity(arch: Architecture, prompts: list[int], new: int, requested: int, ranks: Ranks) -> Capacity:
    """Sizes for `new` tokens after prompts of these lengths (tokens). Raises StunError if not even one row fits."""
    free, sizes = _free_bytes(arch, ranks), [_layer_bytes(arch, layout, ranks) for layout in arch.layers]
    dtype = compute_dtype(arch, ranks.device)
    longest = max(prompts)
    traced = trace_layers(arch, 1, longest + new, ranks.device, ranks.world, use_cache=True)
    row = max(traced.layers) + traced.caches + 2 * (longest * arch.token_width * dtype.itemsize) + 8 * arch.config.vocab_size
    held_bytes, held_layers = 0, 0
    while held_layers < len(sizes) and held_bytes + sizes[held_layers][1] <= min(free / 2, free - 2 * row):
        held_bytes += sizes[held_layers][1]
        held_layers += 1
    left = free - held_bytes
    if held_layers < len(sizes) and ranks.device.type == "cuda":  # which reads as much of the next layer ahead as fits a share
        left -= read_ahead(max(stored for stored, *_ in sizes), left)
    batch = _batch(requested, left / 2, row, len(prompts), f"{longest + new} tokens")
    turns = 1 if held_layers == len(sizes) else max(1, int(left / 2 / max(1, batch * traced.caches)))
    step_bytes = sum(everywhere for _, _, everywhere, _ in sizes[held_layers:])
    return Capacity(batch, turns, held_layers, step_bytes, max(0, int(left / (traced.caches + 8 * arch.config.vocab_size))))
