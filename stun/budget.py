"""How much leaves: parameters of the decoder layers, and the split of a total target into whole experts and single weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stun.arch import Architecture
from stun.config import Budget, PruneConfig, Scope, StunError
from stun.plan import Plan
from stun.sparsify.select import quotas


@dataclass(frozen=True)
class LayerSize:
    """Parameters of one layer. `expert` counts one expert with its rows of the router; `dense` maps scoped matrices to sizes."""

    total: int
    experts: int
    expert: int
    expert_parts: dict[str, int]
    dense: dict[str, int]


def measure_layers(arch: Architecture, scope: list[Scope]) -> list[LayerSize]:
    """Sizes of every decoder layer, from the checkpoint's headers. An expert's vectors (biases) leave only with it."""
    sizes = []
    for layout in arch.layers:
        parts: dict[str, int] = {}
        matrices: dict[str, int] = {}
        for part in layout.experts[0] if layout.experts else ():
            infos = arch.piece(layout, 0, part)
            parts[part] = sum(info.numel for info in infos)
            if len(infos[0].shape) > 1 and Scope.experts in scope:
                matrices[part] = parts[part]
        rows = sum(arch.info(name).numel for name in layout.routed) // max(1, layout.num_experts)
        dense = {name: arch.info(name).numel for name, kind in layout.linears.items() if kind in scope}
        size = LayerSize(arch.parameters_of(layout), layout.num_experts, sum(parts.values()) + rows, matrices, dense)
        sizes.append(size)
    return sizes


def floor_of(cfg: PruneConfig, arch: Architecture) -> int:
    """Fewest experts a layer may keep: routing needs the model's top-k, and where it is limited to groups, enough in every
    group."""
    return arch.groups * max(arch.group_floor, -(-cfg.experts.keep_at_least // arch.groups))


def experts_to_drop(cfg: PruneConfig, sizes: list[LayerSize], arch: Architecture) -> list[int]:
    """Experts to drop per layer for `target` and `experts.fraction`, in whole experts, rounded to the nearest; the same number in
    every group of experts that routing is limited to.

    With the uniform budget this is what each layer drops; with the global one only the sum counts.
    Raises StunError where a layer would keep fewer than the floor allows.
    """
    moe = [size for size in sizes if size.experts]
    if not moe:
        raise StunError("model.path: no decoder layer of this checkpoint has experts")
    remove = cfg.target * sum(size.total for size in sizes)
    wanted, floor, groups = cfg.experts.fraction * remove, floor_of(cfg, arch), arch.groups
    is_global = cfg.experts.budget is Budget["global"]
    if is_global:
        unit = sum(size.expert for size in moe) / len(moe)
        room = sum(max(0, size.experts - floor) for size in moe)
    else:
        unit = sum(size.expert for size in moe)
        room = min(max(0, size.experts - floor) for size in moe)
    count = groups * min(round(wanted / unit / groups), int(remove / unit / groups))
    if count > room:
        per_layer = "" if is_global else " of every layer"
        most = math.floor(room / count * cfg.experts.fraction * 1000) / 1000
        in_groups = f", in {groups} groups of at least {arch.group_floor}" if groups > 1 else ""
        raise StunError(
            f"target={cfg.target} with experts.fraction={cfg.experts.fraction} drops {count} experts{per_layer}, but only {room} "
            f"may go: a layer must keep {floor} (top-k {arch.top_k}{in_groups}, experts.keep_at_least "
            f"{cfg.experts.keep_at_least}). Lower experts.fraction to {most} or less"
        )
    if is_global:
        return _spread(count, [max(0, size.experts - floor) for size in sizes], groups)
    return [count if size.experts else 0 for size in sizes]


def _spread(count: int, room: list[int], step: int) -> list[int]:
    """`count` in shares that differ by `step` at most, none above its room: only the sum matters to a global budget."""
    given = [0] * len(room)
    while count:
        for layer, limit in enumerate(room):
            if count and given[layer] < limit:
                given[layer] += step
                count -= step
    return given


def make_budget(cfg: PruneConfig, sizes: list[LayerSize], kept: list[int]) -> Plan:
    """A plan without clusters: how many single weights must go beside the dropped experts to meet the target exactly.

    Raises StunError, naming the largest reachable target, where the scope is too small.
    """
    total = sum(size.total for size in sizes)
    dropped = sum((size.experts - count) * size.expert for size, count in zip(sizes, kept, strict=True))
    scope_size = sum(matrix_sizes(sizes, kept))
    zeros = max(0, round(cfg.target * total) - dropped)
    if zeros > scope_size:
        scope = ", ".join(kind.name for kind in cfg.sparsify.scope)
        reachable = math.floor((dropped + scope_size) / total * 10000) / 10000
        raise StunError(f"target={cfg.target}: not reachable; with sparsify.scope=[{scope}] at most {reachable}")
    return Plan(cfg.target, total, dropped, zeros, scope_size, [])


def matrix_sizes(sizes: list[LayerSize], kept: list[int]) -> list[int]:
    """Sizes of all matrices whose weights may go, in the order in which removals are shared out: layer by layer, dense matrices
    by name, then the surviving experts' parts."""
    matrices = []
    for size, count in zip(sizes, kept, strict=True):
        matrices += [size.dense[name] for name in sorted(size.dense)]
        matrices += [size.expert_parts[part] for _ in range(count) for part in size.expert_parts]
    return matrices


@dataclass(frozen=True)
class LayerQuota:
    """Single weights to remove from each matrix of a layer: `dense` by name, `experts[i]` by part for the i-th survivor."""

    dense: dict[str, int]
    experts: list[dict[str, int]]


def layer_quotas(sizes: list[LayerSize], kept: list[int], zeros: int) -> list[LayerQuota]:
    """Share `zeros` removals over all matrices in proportion to their sizes; the sum is exact."""
    shares = iter(quotas(matrix_sizes(sizes, kept), zeros))
    return [
        LayerQuota(
            {name: next(shares) for name in sorted(size.dense)},
            [{part: next(shares) for part in size.expert_parts} for _ in range(count)],
        )
        for size, count in zip(sizes, kept, strict=True)
    ]
