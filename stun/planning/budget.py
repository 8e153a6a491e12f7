"""Budgets: parameters of the decoder layers, and the split of a target into experts and single weights to remove."""

import math
from dataclasses import dataclass, replace

from stun.config import Dropped, PruneConfig, Scope, SparsifyConfig, StunError, Uneven
from stun.model.architecture import Architecture
from stun.model.layer_layout import LayerLayout
from stun.planning.plan import Plan
from stun.planning.written_form import bytes_by_name
from stun.sparsify.select import Pattern, quotas


@dataclass(frozen=True)
class LayerSize:
    """Parameters of one layer. `expert` counts one expert with its router rows; `dense` has the sizes of matrices in scope."""

    total: int
    experts: int
    expert: int
    expert_parts: dict[str, int]
    dense: dict[str, int]


def measure_layers(arch: Architecture, scope: list[Scope], dropped: Dropped = Dropped.reroute) -> list[LayerSize]:
    """Sizes of every decoder layer, from the checkpoint's headers. Only an expert's matrices are in scope, not its biases. A
    novice keeps its router rows and a constant, which so are no part of `expert`."""
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
        rows = -layout.width if dropped is Dropped.novice else rows
        size = LayerSize(arch.parameters_of(layout), layout.num_experts, sum(parts.values()) + rows, matrices, dense)
        sizes.append(size)
    return sizes


def floor_of(cfg: PruneConfig, arch: Architecture) -> int:
    """Fewest experts a layer may keep: top-k, `keep_at_least`, and enough in every group where routing is limited to groups.
    Beside novices, which are routed to, one will do."""
    if cfg.experts.dropped is Dropped.novice:
        return max(1, cfg.experts.keep_at_least)
    return arch.groups * max(arch.group_floor, -(-cfg.experts.keep_at_least // arch.groups))


def groups_of(cfg: PruneConfig, arch: Architecture) -> int:
    """Routing groups that must keep equal numbers of experts (1: none)."""
    return 1 if cfg.experts.dropped is Dropped.novice else arch.groups


def count_of_heads(cfg: PruneConfig, counts: set[int]) -> int | None:
    """Experts that a multi-token-prediction head keeps where the layers keep these: as many as the layers are written with, since
    runtimes build both from one number. None is all: where layers differ, or novices leave the number as it is."""
    is_one = len(counts) == 1 or cfg.experts.uneven is Uneven.padded
    return max(counts) if is_one and cfg.experts.dropped is not Dropped.novice else None


def experts_to_drop(cfg: PruneConfig, sizes: list[LayerSize], arch: Architecture) -> list[int]:
    """Experts to remove per layer: all but `experts.keep`, or else for `target` and `experts.fraction`, rounded to whole experts,
    the same in every routing group.

    Where layers may differ only the sum counts. Raises StunError if a layer would keep fewer than `floor_of` allows.
    """
    moe = [size for size in sizes if size.experts]
    if not moe:
        raise StunError("model.path: no decoder layer of this checkpoint has experts")
    floor, groups, may_differ = floor_of(cfg, arch), groups_of(cfg, arch), cfg.experts.may_differ
    if cfg.experts.keep is not None:
        _check_kept(cfg, arch, moe)
        drops = [max(0, size.experts - cfg.experts.keep) for size in sizes]
        return _spread(sum(drops), [max(0, size.experts - floor) for size in sizes], groups) if may_differ else drops
    room = (sum if may_differ else min)(max(0, size.experts - floor) for size in moe)
    count = groups * _groups_to_drop(cfg, sizes, groups * unit_of(cfg, sizes))
    if count > room:
        per_layer = "" if may_differ else " of every layer"
        in_groups = f", in {groups} groups of at least {arch.group_floor}" if groups > 1 else ""
        setting, advice = f"sparsify.pattern={cfg.sparsify.pattern}", "Lower target"
        if not cfg.sparsify.pattern:
            most = math.floor(room / count * cfg.experts.fraction * 1000) / 1000
            setting = f"experts.fraction={cfg.experts.fraction}"
            advice = f"Lower experts.fraction to {most} or less" if most else "Give experts.fraction=0"
        raise StunError(
            f"target={cfg.target} with {setting} removes {count} experts{per_layer}, but at most {room} can be: a layer must "
            f"keep {floor} (top-k {arch.top_k}{in_groups}, experts.keep_at_least {cfg.experts.keep_at_least}). {advice}"
        )
    if may_differ:
        return _spread(count, [max(0, size.experts - floor) for size in sizes], groups)
    return [count if size.experts else 0 for size in sizes]


def _check_kept(cfg: PruneConfig, arch: Architecture, moe: list[LayerSize]) -> None:
    """Raises StunError if layers cannot keep `experts.keep` experts."""
    keep, least, most = cfg.experts.keep, floor_of(cfg, arch), min(size.experts for size in moe)
    groups = groups_of(cfg, arch)
    if not least <= keep <= most or keep % groups:
        step = f", a multiple of {groups}, the routing groups" if groups > 1 else ""
        raise StunError(f"experts.keep={keep}: must be {least} to {most}{step} (top-k is {arch.top_k})")


def unit_of(cfg: PruneConfig, sizes: list[LayerSize]) -> float:
    """Parameters removed by one more expert where layers may differ, or else one more of every layer, except those that the
    pattern, if any, removes anyway."""
    pattern = Pattern.parse(cfg.sparsify.pattern)
    units = [
        size.expert - (sum(map(pattern.zeros, size.expert_parts.values())) if pattern else 0) for size in sizes if size.experts
    ]
    return sum(units) / len(units) if cfg.experts.may_differ else sum(units)


def _groups_to_drop(cfg: PruneConfig, sizes: list[LayerSize], unit: float) -> int:
    """Number of units, of `unit` parameters each, to remove as experts: `experts.fraction` of the target, or with a pattern the
    part of the target that it does not remove. Raises StunError if the pattern alone removes more than the target.
    """
    total = sum(size.total for size in sizes)
    remove, pattern = cfg.target * total, Pattern.parse(cfg.sparsify.pattern)
    if not pattern:
        return min(round(cfg.experts.fraction * remove / unit), int(remove / unit))
    alone = sum(map(pattern.zeros, matrix_sizes(sizes, [size.experts for size in sizes])))
    if alone - remove > unit / 2:
        share = math.ceil(alone / total * 10000) / 10000
        raise StunError(f"target={cfg.target}: sparsify.pattern={cfg.sparsify.pattern} alone removes {share}; raise the target")
    return max(0, round((remove - alone) / unit))


def _spread(count: int, room: list[int], step: int) -> list[int]:
    """Split `count` into shares that differ by at most `step`, none above its room; of which only the sum is read."""
    shares = [0] * len(room)
    while count:
        for layer, limit in enumerate(room):
            if count and shares[layer] < limit:
                shares[layer] += step
                count -= step
    return shares


def make_budget(cfg: PruneConfig, sizes: list[LayerSize], kept: list[int]) -> Plan:
    """A plan without clusters: the single weights to remove beside experts, so that the target is met exactly, or those that the
    pattern removes. Raises StunError, with the largest reachable target, if the scope is too small.
    """
    total = sum(size.total for size in sizes)
    dropped = sum((size.experts - count) * size.expert for size, count in zip(sizes, kept, strict=True))
    matrices, pattern = matrix_sizes(sizes, kept), Pattern.parse(cfg.sparsify.pattern)
    scope_size = sum(matrices)
    if pattern:
        return Plan(cfg.target, total, dropped, sum(map(pattern.zeros, matrices)), scope_size, [])
    zeros = max(0, round(cfg.target * total) - dropped)
    if zeros > scope_size:
        scope = ", ".join(kind.name for kind in cfg.sparsify.scope)
        reachable = math.floor((dropped + scope_size) / total * 10000) / 10000
        raise StunError(f"target={cfg.target}: not reachable; with sparsify.scope=[{scope}] at most {reachable}")
    return Plan(cfg.target, total, dropped, zeros, scope_size, [])


def matrix_sizes(sizes: list[LayerSize], kept: list[int]) -> list[int]:
    """Sizes of all matrices in scope, in the order of their quotas: layer by layer, dense matrices by name, then the parts of the
    experts kept."""
    matrices = []
    for size, count in zip(sizes, kept, strict=True):
        matrices += [size.dense[name] for name in sorted(size.dense)]
        matrices += [size.expert_parts[part] for _ in range(count) for part in size.expert_parts]
    return matrices


@dataclass(frozen=True)
class LayerQuota:
    """Single weights to remove from each matrix of a layer: `dense` by name, `experts[i]` by part for the i-th expert kept."""

    dense: dict[str, int]
    experts: list[dict[str, int]]


def layer_quotas(sizes: list[LayerSize], plan: Plan) -> list[LayerQuota]:
    """Share the plan's removals over all matrices, in proportion to their sizes or as its ratios say; the sum is exact."""
    kept = [len(layer.clusters) for layer in plan.layers]
    shares = iter(quotas(matrix_sizes(sizes, kept), plan.zeros, _matrix_ratios(sizes, plan)))
    return [
        LayerQuota(
            {name: next(shares) for name in sorted(size.dense)},
            [{part: next(shares) for part in size.expert_parts} for _ in range(count)],
        )
        for size, count in zip(sizes, kept, strict=True)
    ]


def check_pattern(config: SparsifyConfig, arch: Architecture) -> None:
    """Raises StunError if the number of inputs of a matrix is not a multiple of the pattern's groups."""
    pattern = Pattern.parse(config.pattern)
    for layout in arch.layers if pattern else []:
        widths = {name: arch.info(name).shape[-1] for name, kind in layout.linears.items() if kind in config.scope}
        if layout.experts and Scope.experts in config.scope:
            shapes = {part: arch.piece(layout, 0, part)[0].shape for part in layout.experts[0]}
            inputs = 0 if layout.is_transposed else 1
            widths |= {f"layer {layout.index}: {p} of the experts": s[inputs] for p, s in shapes.items() if len(s) > 1}
        for name, width in widths.items():
            if width % pattern.of:
                raise StunError(f"sparsify.pattern={config.pattern}: {name} has {width} inputs, not a multiple of {pattern.of}")


def _matrix_ratios(sizes: list[LayerSize], plan: Plan) -> list[float] | None:
    """Ratio of every matrix, in the order of `matrix_sizes`; None if all are the same."""
    if all(layer.ratio is None for layer in plan.layers):
        return None
    ratios = []
    for size, layer in zip(sizes, plan.layers, strict=True):
        ratio = plan.ratio if layer.ratio is None else layer.ratio
        ratios += [ratio] * (len(size.dense) + len(layer.clusters) * len(size.expert_parts))
    return ratios


NEARLY = 1.15  # errors of splits that differ by less say nothing of which is better (docs/quality.md)


def best_fraction(errors: dict[float, float]) -> float:
    """The largest fraction whose held-out error is nearly the least, since fewer experts make a smaller model."""
    return max(fraction for fraction, error in errors.items() if error <= NEARLY * min(errors.values()))


def reachable(cfg: PruneConfig, arch: Architecture, sizes: list[LayerSize]) -> list[float]:
    """Fractions out of `FRACTIONS` that the model and the target allow, of those that remove the same experts the first. Raises
    StunError if there is none."""
    fractions: dict[tuple[int, ...], float] = {}
    for fraction in FRACTIONS:
        candidate = replace(cfg, experts=replace(cfg.experts, fraction=fraction))
        try:
            drops = experts_to_drop(candidate, sizes, arch)
            make_budget(candidate, sizes, [size.experts - drop for size, drop in zip(sizes, drops, strict=True)])
            fractions.setdefault(tuple(drops), fraction)
        except StunError:
            continue  # other splits may be possible
    if not fractions:
        raise StunError(f"experts.fraction=auto: no split of target={cfg.target} into experts and weights can be met")
    return list(fractions.values())


FRACTIONS = (0.0, 0.15, 0.3, 0.45, 0.6, 1.0)


def model_bytes(arch: Architecture, plan: Plan, cfg: PruneConfig) -> int:
    """Bytes of all tensors of the pruned checkpoint, zeros included, in the form that is written."""
    sizes, experts = bytes_by_name(arch, cfg.output.format), cfg.experts
    total = sum(sizes.values())
    most = plan.most if experts.uneven is Uneven.padded else 0
    for layout, layer in zip([*arch.layers, *arch.mtp], [*plan.layers, *plan.mtp], strict=True):
        if layout.experts:
            entries = sum(arch.info(name).nbytes for name in layout.routed) // layout.num_experts
            if experts.dropped is Dropped.novice:  # the router stays whole, and a constant is added
                entries = -layout.width * arch.novice_dtype(layout).itemsize
            removed = layer.experts - max(most, len(layer.clusters))
            total -= removed * (_expert_bytes(layout, sizes) + entries)
    return total


def _expert_bytes(layout: LayerLayout, sizes: dict[str, int]) -> int:
    """Bytes of one of a layer's experts, by those of whole tensors."""
    parts = layout.experts[layout.whole[0]]
    shares = {part: layout.num_experts if part in layout.fused else 1 for part in parts}
    return sum(sizes[name] // shares[part] for part, names in parts.items() for name in names)
