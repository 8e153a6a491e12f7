"""Makes plans: from saved statistics, from a file, or for a run that drops no experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from stun.arch import Architecture
from stun.budget import LayerSize, experts_to_drop, floor_of, make_budget, measure_layers
from stun.checkpoint import Checkpoint, write_json
from stun.config import Budget, ExpertsMethod, PruneConfig, Representative, StunError, validate_experts
from stun.experts.distances import expert_distance, router_distance
from stun.experts.scores import score_experts
from stun.experts.select import Evidence, select_experts
from stun.plan import LayerPlan, Plan, read_layers
from stun.run import Statistics, model_digest


def make_plan(cfg: PruneConfig, arch: Architecture, sizes: list[LayerSize], drops: list[int], stats: Statistics | None) -> Plan:
    """The plan for `drops` experts to leave each layer (with the global budget only their sum counts).

    `stats` may be None where nobody leaves. Raises StunError where protected experts do not allow it.
    """
    layers = [LayerPlan.of(layout.num_experts, [[e] for e in range(layout.num_experts)]) for layout in arch.layers]
    moe = [layout.index for layout in arch.layers if layout.experts]
    if any(drops):
        one_threshold, how = cfg.experts.budget is Budget["global"], cfg.experts
        most = [max(0, sizes[index].experts - floor_of(cfg, arch)) for index in moe]
        evidence = gather_evidence(cfg, arch, moe, stats)
        selected = select_experts(
            how.method, evidence, [drops[i] for i in moe], most, one_threshold, arch.groups, how.representative, how.kappa
        )
        for index, plan in zip(moe, selected, strict=True):
            layers[index] = plan
    plan = make_budget(cfg, sizes, [len(layer.clusters) for layer in layers])
    plan.layers, plan.mtp = layers, _plan_heads(cfg, arch, [len(layers[index].clusters) for index in moe])
    return plan


@dataclass(frozen=True)
class Described:
    """A plan, the bytes of all tensors of the checkpoint it makes, and by calibration source the experts that serve most of its
    tokens: how many there are, and how many of them stay (where that is decided already)."""

    plan: Plan
    nbytes: int
    needs: dict[str, tuple[int, int]]


def plan_from_run(cfg: PruneConfig, output: Path, compare: str = "") -> dict[str, Described]:
    """Make a plan from the statistics of `cfg.run_dir` and write it to `output`; the plan file `compare` beside it, where given.

    Raises StunError where the statistics are missing or belong to another model.
    """
    source = Checkpoint.open(cfg.model.path)
    arch = Architecture(source)
    stats = Statistics(Path(cfg.run_dir) / "stats")
    if not stats.complete:
        raise StunError(f"run_dir={cfg.run_dir}: holds no complete statistics; a run that drops experts takes them")
    if stats.about["model"] != model_digest(source):
        raise StunError(f"run_dir={cfg.run_dir}: its statistics belong to another model than {cfg.model.path}")
    validate_experts(cfg, list(stats.sources))
    if cfg.experts.fraction == "auto":
        raise StunError("experts.fraction=auto: a search runs the model; jobs.prune does that")
    sizes = measure_layers(arch, cfg.sparsify.scope)
    plan = make_plan(cfg, arch, sizes, experts_to_drop(cfg, sizes, arch), stats)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, plan.to_json())
    describe = lambda made: Described(made, _bytes_written(arch, made), _needs(arch, made, stats))  # noqa: E731
    plans = {str(output): describe(plan)}
    if compare:
        other = plan_from_file(replace(cfg, plan=compare), arch, sizes)
        plans[compare] = describe(other)
    return plans


def _bytes_written(arch: Architecture, plan: Plan) -> int:
    """Bytes of all tensors of the pruned checkpoint, zeros included."""
    total = sum(info.nbytes for info in arch.source.tensors.values())
    for layout, layer in zip([*arch.layers, *arch.mtp], [*plan.layers, *plan.mtp], strict=True):
        if layout.experts:
            pieces = sum(info.nbytes for part in layout.experts[0] for info in arch.piece(layout, 0, part))
            entries = sum(arch.info(name).nbytes for name in layout.routed) // layout.num_experts
            total -= (layer.experts - len(layer.clusters)) * (pieces + entries)
    return total


def _needs(arch: Architecture, plan: Plan, stats: Statistics, share: float = 0.9) -> dict[str, tuple[int, int]]:
    """For each source the fewest experts of all layers that serve `share` of its routed tokens, and how many of them stay."""
    needs = {name: (0, 0) for name in stats.sources}
    for layout in (layout for layout in arch.layers if layout.experts):
        served_SE = stats.load(layout.index)["coactivation"].diagonal(dim1=1, dim2=2).double()
        kept = set(plan.layers[layout.index].kept)
        for name, served_E in zip(needs, served_SE, strict=True):
            order = served_E.argsort(descending=True, stable=True)
            enough = int((served_E[order].cumsum(0) < share * served_E.sum()).sum()) + 1
            needed, stay = needs[name]
            needs[name] = (needed + enough, stay + len(kept.intersection(order[:enough].tolist())))
    return needs


def gather_evidence(cfg: PruneConfig, arch: Architecture, moe: list[int], stats: Statistics) -> list[Evidence]:
    """What the statistics say of the experts of every layer in `moe`, calibration sources weighed as configured."""
    how = cfg.experts
    weights_S = torch.tensor([how.source_weights.get(name, 1.0) for name in stats.sources], dtype=torch.float64)
    pooled, protected = [], _protected(cfg, arch, moe, stats)
    for index in moe:
        layer = stats.load(index)
        coactivation_EE, agreement_EE = (
            (layer[name].double() * weights_S[:, None, None]).sum(0) for name in ("coactivation", "agreement")
        )
        powers_E33 = (layer["powers"] * weights_S[:, None, None, None]).sum(0)
        distance_EE = expert_distance(
            layer["router_distance"], coactivation_EE, agreement_EE / stats.cosine_unit, how.lambda1, how.lambda2, how.lambda3
        )
        score_E = score_experts(how.score, powers_E33, layer["weights"], index, how.seed, (how.a, how.b, how.beta))
        pooled.append(Evidence(distance_EE, score_E, frozenset(protected[index])))
    return pooled


@dataclass(frozen=True)
class _Usage:
    """How a layer's experts were used: largest output norm [E], share of each source's tokens that each served [S, E]."""

    peak_E: np.ndarray
    share_SE: np.ndarray


def listed_experts(cfg: PruneConfig, arch: Architecture) -> list[tuple[int, int]]:
    """(layer, expert) of every entry of `experts.protect.experts`. Raises StunError for one that names no expert."""
    found = []
    for entry in cfg.experts.protect.experts:
        layer, _, expert = entry.partition(".")
        known = layer.isdigit() and expert.isdigit() and int(layer) < len(arch.layers)
        if not known or int(expert) >= arch.layers[int(layer)].num_experts:
            raise StunError(f"experts.protect.experts: {entry!r} names no expert; the form is layer.expert, counted from 0")
        found.append((int(layer), int(expert)))
    return found


def _protected(cfg: PruneConfig, arch: Architecture, moe: list[int], stats: Statistics) -> dict[int, set[int]]:
    """Experts that must stay, by layer."""
    rule, protected = cfg.experts.protect, {index: set() for index in moe}
    for layer, expert in listed_experts(cfg, arch):
        protected[layer].add(expert)
    if rule.super_experts or rule.domain_share:
        usage = {index: _usage(stats.load(index), arch.top_k) for index in moe}
        peaks = np.concatenate([usage[index].peak_E for index in moe])
        extreme = max(peaks.max() / 10, np.quantile(peaks, 0.995))
        for index, used in usage.items():
            if rule.super_experts:
                protected[index] |= set(np.flatnonzero(used.peak_E > extreme).tolist())
            if rule.domain_share:
                protected[index] |= set(np.flatnonzero((used.share_SE >= rule.domain_share).any(0)).tolist())
    return protected


def _usage(layer: dict[str, torch.Tensor], top_k: int) -> _Usage:
    served_SE = layer["coactivation"].diagonal(dim1=1, dim2=2).double()
    share_SE = served_SE / (served_SE.sum(1, keepdim=True) / top_k).clamp(min=1)
    return _Usage(layer["peak"].amax(0).numpy(), share_SE.numpy())


def _plan_heads(cfg: PruneConfig, arch: Architecture, counts: list[int]) -> list[LayerPlan]:
    """Plans of the experts of multi-token-prediction heads, by their router rows: no forward runs a head.

    Runtimes build a head from the same count of experts as the decoder layers, so it keeps as many. Where these keep different
    numbers there is no such count, and a head keeps all.
    """
    common = min(counts) if len(set(counts)) == 1 else None
    method = ExpertsMethod.stun if cfg.experts.method is ExpertsMethod.rank else cfg.experts.method
    plans = []
    for layout in arch.mtp:
        distance_EE = expert_distance(router_distance(arch.source.read(layout.router).float()))
        evidence = Evidence(distance_EE, torch.zeros(layout.num_experts, dtype=torch.float64))
        drop = 0 if common is None else layout.num_experts - common
        plans += select_experts(method, [evidence], [drop], [drop], False, arch.groups, Representative.nearest)
    return plans


def plan_from_file(cfg: PruneConfig, arch: Architecture, sizes: list[LayerSize]) -> Plan:
    """The plan in the file `cfg.plan`, its weights counted anew for `cfg.target`. Raises StunError where it does not fit the
    model."""
    layers, heads = read_layers(Path(cfg.plan))
    where, floor = f"plan={cfg.plan}", floor_of(cfg, arch)
    if len(layers) != len(arch.layers) or len(heads) != len(arch.mtp):
        here = f"{len(arch.layers)} layers and {len(arch.mtp)} prediction heads"
        raise StunError(f"{where}: {len(layers)} layers and {len(heads)} prediction heads; the model has {here}")
    for layout, layer in zip([*arch.layers, *arch.mtp], [*layers, *heads], strict=True):
        if layer.experts != layout.num_experts:
            raise StunError(f"{where}: layer {layout.index}: {layer.experts} experts; the model has {layout.num_experts}")
        if layer.experts and len(layer.clusters) < floor and len(layer.clusters) < layer.experts:
            raise StunError(f"{where}: layer {layout.index} keeps {len(layer.clusters)} experts; at least {floor} are needed")
        _check_groups(layer, arch.groups, f"{where}: layer {layout.index}")
    counts = {len(layer.clusters) for layer in layers if layer.experts}
    if len(counts) > 1 and arch.cannot_differ:
        raise StunError(f"{where}: layers keep different numbers of experts; {arch.cannot_differ}, so they cannot")
    if any({len(layer.clusters)} != counts for layer in heads) and len(counts) == 1:
        raise StunError(f"{where}: a prediction head must keep as many experts as every layer, {counts.pop()}")
    plan = make_budget(cfg, sizes, [len(layer.clusters) for layer in layers])
    if plan.dropped > round(cfg.target * plan.parameters):
        share = plan.dropped / plan.parameters
        raise StunError(f"{where}: the experts that leave are {share:.4f} of the parameters, more than target={cfg.target}")
    plan.layers, plan.mtp = layers, heads
    return plan


def _check_groups(layer: LayerPlan, groups: int, where: str) -> None:
    size = max(1, layer.experts // groups)
    homes = [{expert // size for expert in cluster} for cluster in layer.clusters]
    if layer.experts and (any(len(home) > 1 for home in homes) or len({homes.count({g}) for g in range(groups)}) > 1):
        raise StunError(
            f"{where}: routing is limited to {groups} groups of experts: each must keep as many, no cluster may span two"
        )
