"""Protected experts, which are always kept: those listed, and those that the statistics single out."""

import re

import numpy as np
import torch

from stun.config import ExpertsMethod, PruneConfig, StunError
from stun.model.architecture import Architecture
from stun.planning.budget import floor_of, groups_of
from stun.statistics.store import Statistics

_FORM = re.compile(r"L([0-9]{1,6})E([0-9]{1,6})")


def listed_experts(cfg: PruneConfig, arch: Architecture) -> list[tuple[int, int]]:
    """(layer, expert) of every entry of `experts.protect.experts`. Raises StunError if an entry names no expert."""
    experts = []
    for entry in cfg.experts.protect.experts:
        match = _FORM.fullmatch(str(entry))
        layer, expert = map(int, match.groups()) if match else (-1, -1)
        if not 0 <= layer < len(arch.layers) or expert >= arch.layers[layer].num_experts:
            raise StunError(f"experts.protect.experts: {entry!r} names no expert; the form is L3E10, layers and experts from 0")
        experts.append((layer, expert))
    return experts


def check_listed(cfg: PruneConfig, arch: Architecture, drops: list[int]) -> None:
    """Raises StunError if the listed experts allow fewer removals than `drops`, per layer or, where layers may differ, in all."""
    listed = listed_experts(cfg, arch)
    rooms = removable(cfg, arch, {layer: {e for own, e in listed if own == layer} for layer, _ in listed})
    needs = [(f"layer {number}: ", *need) for number, need in enumerate(zip(rooms, drops, strict=True))]
    if cfg.experts.may_differ:
        needs = [("", sum(rooms), sum(drops))]
    for where, room, drop in needs:
        if listed and room < drop:
            raise StunError(f"{where}{drop} experts are to be removed, but experts.protect.experts allows {room}; list fewer")


def removable(cfg: PruneConfig, arch: Architecture, protected: dict[int, set[int]]) -> list[int]:
    """Most experts that each layer can lose beside its protected ones."""
    rooms, groups = [], groups_of(cfg, arch)
    alone = 0 if cfg.experts.method is ExpertsMethod.rank else 1  # a cluster keeps one member
    for layout in arch.layers:
        size = max(1, layout.num_experts // groups)
        homes = [expert // size for expert in protected.get(layout.index, ())]
        movable = min(max(0, size - homes.count(group) - alone) for group in range(groups))
        rooms.append(min(groups * movable, max(0, layout.num_experts - floor_of(cfg, arch))))
    return rooms


def protected_experts(cfg: PruneConfig, arch: Architecture, moe: list[int], stats: Statistics) -> dict[int, set[int]]:
    """Experts that must be kept, by layer."""
    rule, protected = cfg.experts.protect, {index: set() for index in moe}
    for layer, expert in listed_experts(cfg, arch):
        protected[layer].add(expert)
    if rule.super_experts or rule.domain_share:
        usage = {index: _usage(stats.load(index, arch.layers[index].num_experts), arch.top_k) for index in moe}
        peaks = np.concatenate([peak_E for peak_E, _ in usage.values()])
        # Super experts, arXiv 2507.23279: above a tenth of the largest peak, and in the top 0.5 % of all.
        extreme = max(peaks.max() / 10, np.quantile(peaks, 0.995))
        for index, (peak_E, share_SE) in usage.items():
            if rule.super_experts:
                protected[index] |= set(np.flatnonzero(peak_E > extreme).tolist())
            if rule.domain_share:
                protected[index] |= set(np.flatnonzero((share_SE >= rule.domain_share).any(0)).tolist())
    return protected


def _usage(layer: dict[str, torch.Tensor], top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Largest output norm of each expert [E], and the share of each source's tokens that each serves [S, E]."""
    served_SE = layer["coactivation"].diagonal(dim1=1, dim2=2).double()
    share_SE = served_SE / (served_SE.sum(1, keepdim=True) / top_k).clamp(min=1)
    return layer["peak"].amax(0).numpy(), share_SE.numpy()
