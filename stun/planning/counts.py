"""Plans of which only the numbers of experts are known, and the numbers that a request asks for."""

import math
import re
from bisect import bisect_right
from dataclasses import replace

from stun.config import ExpertsMethod, PruneConfig, Representative, StunError, Uneven
from stun.model.architecture import Architecture
from stun.planning.budget import LayerSize, count_of_heads, experts_to_drop, floor_of, groups_of, make_budget, model_bytes
from stun.planning.plan import LayerPlan, Plan
from stun.runtime.units import size

SERVED = 1.1  # bytes to serve a model over the bytes of its weights: a tenth more for cache, activations and the runtime
_BYTES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def settle(cfg: PruneConfig, arch: Architecture, sizes: list[LayerSize]) -> PruneConfig:
    """Configuration with a number as `target` and, if experts are counted, as `experts.keep`, however it was asked for.

    Raises StunError if the model cannot be pruned to those counts.
    """
    if cfg.fit:
        cfg = _fitting(cfg, arch, sizes)
    if cfg.experts.drop is not None:
        cfg = _keeping(cfg, arch, _kept_of(cfg, arch, sizes))
    if cfg.experts.keep is None:
        return cfg
    drops = experts_to_drop(cfg, sizes, arch)
    plan = make_budget(replace(cfg, target=0.0), sizes, [layer.experts - drop for layer, drop in zip(sizes, drops, strict=True)])
    alone = (plan.dropped + plan.zeros) / plan.parameters
    if cfg.target is None and not alone:
        raise StunError(f"experts.keep={cfg.experts.keep}: those are all; nothing would be removed. Give fewer, or a target")
    if cfg.target is None:
        return replace(cfg, target=alone)
    if cfg.target < alone or cfg.sparsify.pattern:
        reason = f"keeping {cfg.experts.keep} experts a layer removes {math.ceil(alone * 10000) / 10000}"
        more = "the pattern sets the target: leave it out" if cfg.sparsify.pattern else "give more, or none"
        raise StunError(f"target={cfg.target}: {reason}; {more}")
    return cfg


def _keeping(cfg: PruneConfig, arch: Architecture, keep: int) -> PruneConfig:
    return replace(cfg, experts=replace(cfg.experts, keep=keep, drop=None), fit="")


def _kept_of(cfg: PruneConfig, arch: Architecture, sizes: list[LayerSize]) -> int:
    """Experts a layer keeps of which `experts.drop` are removed, the same in every routing group."""
    setting, groups = f"experts.drop={cfg.experts.drop}", groups_of(cfg, arch)
    experts, floor = _experts(setting, sizes), floor_of(cfg, arch)
    keep = experts - groups * round(cfg.experts.drop * experts / groups)
    if not floor <= keep < experts:
        some = f"{groups / experts:.3g} to {(experts - floor) / experts:.3g}"
        raise StunError(
            f"{setting}: keeps {keep} of {experts} experts a layer; it must keep {floor} (top-k {arch.top_k}); give {some}"
        )
    return keep


def _experts(setting: str, sizes: list[LayerSize]) -> int:
    """Experts of every layer. Raises StunError if layers differ."""
    counts = sorted({layer.experts for layer in sizes if layer.experts})
    if len(counts) != 1:
        numbers = ", ".join(map(str, counts)) or "no"
        raise StunError(f"{setting}: the model's layers have {numbers} experts; it needs layers alike. Give target instead")
    return counts[0]


def _fitting(cfg: PruneConfig, arch: Architecture, sizes: list[LayerSize]) -> PruneConfig:
    """Configuration that keeps as many experts as serve in `fit`. Raises StunError if none do, or all."""
    number = re.fullmatch(r"([\d.]+) ?([KMGT]i?B)", cfg.fit)
    if not number or not number[1].replace(".", "", 1).isdecimal():
        raise StunError(f"fit={cfg.fit}: must be a number of bytes, such as 24GiB or 80GB")
    if cfg.experts.may_differ and cfg.experts.uneven is Uneven.padded:
        unknown = "experts.uneven=padded fills all layers up to the most that one keeps, which is not known yet"
        raise StunError(f"fit={cfg.fit}: {unknown}; give experts.budget=uniform, or experts.uneven=code")
    memory, experts = float(number[1]) * _BYTES[number[2]], _experts(f"fit={cfg.fit}", sizes)
    counts = range(floor_of(cfg, arch), experts + 1, groups_of(cfg, arch))

    def served(keep: int) -> float:
        kept = replace(_keeping(cfg, arch, keep), target=0.0)
        return SERVED * model_bytes(arch, plan_of_counts(kept, arch, sizes), cfg)

    fitting = bisect_right(counts, memory, key=served)
    if not fitting:
        least = f"{size(served(counts[0]))} with the fewest experts a layer may keep, {counts[0]} of {experts}"
        raise StunError(f"fit={cfg.fit}: the model needs {least}")
    if counts[fitting - 1] == experts:
        raise StunError(f"fit={cfg.fit}: the model needs {size(served(experts))} as it is; nothing has to be removed")
    return _keeping(cfg, arch, counts[fitting - 1])


def plan_of_counts(cfg: PruneConfig, arch: Architecture, sizes: list[LayerSize]) -> Plan:
    """A stand-in for the plan to be made: it removes as many experts, but not yet the right ones.

    If representatives are chosen by their weights, all experts count as read. Raises StunError if the target cannot be met.
    """
    drops = experts_to_drop(cfg, sizes, arch)
    reads_all = cfg.experts.method is not ExpertsMethod.rank and cfg.experts.representative is Representative.nearest
    layers = [_layer(layout.num_experts, drop, reads_all) for layout, drop in zip(arch.layers, drops, strict=True)]
    plan = make_budget(cfg, sizes, [len(layer.clusters) for layer in layers])
    counts = {len(layer.clusters) for layer in layers if layer.experts}
    may_differ = cfg.experts.may_differ and any(drops) and cfg.experts.uneven is Uneven.code
    common = None if may_differ else count_of_heads(cfg, counts)
    heads = [(head.num_experts, 0 if common is None else head.num_experts - common) for head in arch.mtp]
    plan.layers, plan.mtp = layers, [_layer(experts, drop, True) for experts, drop in heads]
    return plan


def _layer(experts: int, drop: int, reads_all: bool) -> LayerPlan:
    count = experts - drop
    clusters = [[expert] for expert in range(count)]
    for expert in range(count, experts) if reads_all else ():
        clusters[(expert - count) * count // drop % count].append(expert)
    return LayerPlan(experts, clusters, [] if reads_all and drop else list(range(count)), nearest=bool(reads_all and drop))
