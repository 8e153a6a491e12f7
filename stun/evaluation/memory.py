"""How much of an evaluation fits into the memory that is free: rows at once, and layers that need not be read again."""

from __future__ import annotations

from dataclasses import dataclass

from stun.config import StunError
from stun.model.architecture import Architecture, expert_infos
from stun.model.layer_layout import LayerLayout
from stun.model.precision import compute_dtype
from stun.preflight.activations import trace_row
from stun.preflight.hardware import free_memory
from stun.runtime.ranks import Ranks
from stun.runtime.units import size
from stun.stream.embeddings import outside_bytes

_USED = 0.8  # of the free memory: allocators round up and libraries take their part
_MOST = 256  # rows at once: more make no product faster
_PARTS = 8  # of the rows at least, so that ranks have equal work


def _largest_power(most: float) -> int:
    """The largest power of two that is no larger, at least 1: what is free varies, and results should not vary with it."""
    return 1 << max(0, int(most).bit_length() - 1)


def _layer_bytes(arch: Architecture, layout: LayerLayout, ranks: Ranks) -> tuple[int, int, int]:
    """Of one layer on a rank: as stored, in what is computed in; and of the whole layer as stored."""
    dense = [arch.info(name) for name in layout.dense]
    expert, own = expert_infos(arch, layout), -(-layout.num_experts // ranks.world)
    itemsize = compute_dtype(arch, ranks.device).itemsize
    stored = sum(i.nbytes for i in dense) + own * sum(i.nbytes for i in expert)
    computed = itemsize * (sum(i.numel for i in dense) + own * sum(i.numel for i in expert))
    return stored, computed, sum(i.nbytes for i in dense) + layout.num_experts * sum(i.nbytes for i in expert)


def _rest(arch: Architecture, ranks: Ranks) -> int:
    """What is free beside two layers, the one that runs and the one that is read, and what lies outside the layers."""
    largest = max((_layer_bytes(arch, layout, ranks) for layout in arch.layers), key=lambda sizes: sum(sizes[:2]))
    return int(_USED * free_memory(ranks)) - 2 * sum(largest[:2]) - outside_bytes(arch, ranks.device)


def _batch(asked: int, rest: float, row: int, rows: int, what: str) -> int:
    if asked:
        return asked
    if rest < row:
        raise StunError(f"out of memory: one row of {what} takes {size(row)}, {size(max(rest, 0))} are there")
    return min(_largest_power(rest / row), _MOST, _largest_power(2 * -(-rows // _PARTS) - 1))


def scoring_batch(arch: Architecture, models: int, lengths: list[int], asked: int, ranks: Ranks) -> int:
    """How many sequences to score at once; `models` are streamed side by side. Raises StunError where they do not fit."""
    width = arch.config.hidden_size * compute_dtype(arch, ranks.device).itemsize
    states = 2 * models * width * max(lengths) * -(-len(lengths) // ranks.world)
    rest = _rest(arch, ranks) / models - states / models
    if rest < 0:
        raise StunError(f"out of memory: the hidden states of {len(lengths)} sequences take {size(states)}; ask for fewer")
    peak, _ = trace_row(arch, max(lengths), ranks.device, ranks.world)
    return _batch(asked, rest / 2, peak + 2 * width * max(lengths), len(lengths), f"{max(lengths)} tokens")


@dataclass(frozen=True)
class Room:
    """Of a generation: `batch` rows make a micro-batch, a rank has `turns` of them at once, the first `stays` layers stay in
    memory, and every step reads `step_bytes` of the others."""

    batch: int
    turns: int
    stays: int
    step_bytes: int


def generation_room(arch: Architecture, prompts: list[int], new: int, asked: int, ranks: Ranks) -> Room:
    """What is free for `new` tokens after prompts of these lengths. Raises StunError where nothing fits."""
    rest, sizes = _rest(arch, ranks), [_layer_bytes(arch, layout, ranks) for layout in arch.layers]
    dtype = compute_dtype(arch, ranks.device)
    longest = max(prompts)
    peak, cached = trace_row(arch, longest + new, ranks.device, ranks.world)
    row = peak + cached + 2 * (longest * arch.config.hidden_size * dtype.itemsize) + 8 * arch.config.vocab_size
    held, stays = 0, 0
    while stays < len(sizes) and held + sizes[stays][1] <= min(rest / 2, rest - 2 * row):
        held += sizes[stays][1]
        stays += 1
    batch = _batch(asked, (rest - held) / 2, row, len(prompts), f"{longest + new} tokens")
    turns = 1 if stays == len(sizes) else max(1, int((rest - held) / 2 / max(1, batch * cached)))
    return Room(batch, turns, stays, sum(whole for _, _, whole in sizes[stays:]))
