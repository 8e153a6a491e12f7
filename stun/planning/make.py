"""Makes plans from saved statistics."""

import numpy as np
import torch

from stun.config import Budget, ExpertsConfig, ExpertsMethod, PruneConfig, Representative, StunError
from stun.model.architecture import Architecture
from stun.model.layer_layout import LayerLayout
from stun.planning.budget import floor_of, make_budget
from stun.planning.experts.distances import expert_distance
from stun.planning.experts.scores import score_experts
from stun.planning.experts.select import Evidence, select_experts
from stun.planning.job import Job
from stun.planning.layer_ratios import set_ratios
from stun.planning.plan import LayerPlan, Plan
from stun.planning.protection import protected_experts
from stun.statistics.router import router_distance
from stun.statistics.store import Statistics


def make_plan(job: Job, stats: Statistics | None) -> Plan:
    """The plan of a job, which has none yet.

    `stats` may be None where no expert is removed, or the routers' rows decide, and no outliers are counted. Raises StunError
    where protected experts do not allow it.
    """
    cfg, arch, sizes, drops = job.cfg, job.arch, job.sizes, job.drops
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
    set_ratios(plan, cfg.sparsify, arch, sizes, stats)
    return plan


def complete_plan(job: Job) -> Plan:
    """The plan given, its ratios filled in, or one made from the statistics of the job, which are complete where it reads any."""
    stats = job.statistics if job.statistics.complete else None
    if not job.is_given:
        return make_plan(job, stats)
    set_ratios(job.plan, job.cfg.sparsify, job.arch, job.sizes, stats)
    return job.plan


def gather_evidence(cfg: PruneConfig, arch: Architecture, moe: list[int], stats: Statistics | None) -> list[Evidence]:
    """What the statistics, or without them the routers, say of the experts of every layer in `moe`; calibration sources are
    weighed as configured."""
    how = cfg.experts
    pooled, protected = [], protected_experts(cfg, arch, moe, stats)
    for index in moe:
        layout = arch.layers[index]
        if stats:
            distance_EE, score_E = weigh(how, stats.load(index, layout.num_experts), stats, index)
        else:
            distance_EE, score_E = _by_router(arch, layout, how.lambda1)
        if not (np.isfinite(distance_EE).all() and torch.isfinite(score_E).all()):
            raise StunError(f"layer {index}: an expert's score or distance is not finite; a lambda is too large")
        pooled.append(Evidence(distance_EE, score_E, frozenset(protected[index])))
    return pooled


def weigh(how: ExpertsConfig, layer: dict[str, torch.Tensor], stats: Statistics, index: int) -> tuple[np.ndarray, torch.Tensor]:
    """Distances [E, E] and scores [E] of one layer's experts, from its statistics `layer`."""
    weights_S = torch.tensor([how.source_weights.get(name, 1.0) for name in stats.sources], dtype=torch.float64)
    coactivation_EE = (layer["coactivation"].double() * weights_S[:, None, None]).sum(0)
    powers_E33 = (layer["powers"] * weights_S[:, None, None, None]).sum(0)
    distance_EE = expert_distance(layer["router_distance"], coactivation_EE, how.lambda1, how.lambda2)
    return distance_EE, score_experts(how.score, powers_E33, layer["weights"], index, how.seed)


def _by_router(arch: Architecture, layout: LayerLayout, lambda1: float = 1.0) -> tuple[np.ndarray, torch.Tensor]:
    """Distances [E, E] by the router's rows alone, and scores [E] that tell no expert from another."""
    distance_EE = expert_distance(router_distance(arch.source.read(layout.router).float()), lambda1=lambda1)
    return distance_EE, torch.zeros(layout.num_experts, dtype=torch.float64)


def _plan_heads(cfg: PruneConfig, arch: Architecture, counts: list[int]) -> list[LayerPlan]:
    """Plans of the experts of multi-token-prediction heads, by their router rows: no forward runs a head.

    Runtimes build a head from the same count of experts as the decoder layers, so it keeps as many. Where these keep different
    numbers there is no such count, and a head keeps all.
    """
    common = min(counts) if len(set(counts)) == 1 else None
    method = ExpertsMethod.stun if cfg.experts.method is ExpertsMethod.rank else cfg.experts.method
    plans = []
    for layout in arch.mtp:
        evidence = Evidence(*_by_router(arch, layout))
        drop = 0 if common is None else layout.num_experts - common
        plans += select_experts(method, [evidence], [drop], [drop], False, arch.groups, Representative.nearest)
    return plans
