"""Plans from saved statistics: which experts are kept, and the ratio of weights removed in every layer."""

import numpy as np
import torch

from stun.config import Budget, Dropped, ExpertsConfig, ExpertsMethod, PruneConfig, Representative, Score, StunError
from stun.model.architecture import Architecture
from stun.model.layer_layout import LayerLayout
from stun.planning.allocation import allocate
from stun.planning.budget import count_of_heads, floor_of, groups_of, make_budget
from stun.planning.experts.distances import expert_distance
from stun.planning.experts.scores import score_experts
from stun.planning.experts.select import Evidence, select_experts
from stun.planning.job import Job
from stun.planning.layer_ratios import set_ratios
from stun.planning.plan import LayerPlan, Plan
from stun.planning.protection import protected_experts, removable
from stun.statistics.router import router_distance
from stun.statistics.store import Statistics
from stun.stream.tables import successors

TRIALS = (0.5, 1.0, 1.5)  # times the share of experts that is removed on average


def make_plan(job: Job, stats: Statistics | None, drops: list[int] | None = None) -> Plan:
    """Plan of a job without a plan file, which removes `drops` experts from the layers if they are given.

    `stats` may be None if no outliers are counted and either no expert is removed or the routers' rows suffice. Raises StunError
    if the protected experts do not allow a plan.
    """
    cfg, arch, sizes = job.cfg, job.arch, job.sizes
    drops = drops or (allocate(job.losses, sum(job.drops), groups_of(cfg, arch)) if job.losses else job.drops)
    layers = [LayerPlan.of(layout.num_experts, [[e] for e in range(layout.num_experts)]) for layout in arch.layers]
    moe = [layout.index for layout in arch.layers if layout.experts]
    if any(drops):
        experts, removed = cfg.experts, [drops[index] for index in moe]
        most = [max(0, sizes[index].experts - floor_of(cfg, arch)) for index in moe]
        one_threshold = experts.budget is Budget["global"]
        evidence = gather_evidence(cfg, arch, moe, stats)
        kappa = 0 if experts.dropped is Dropped.novice else experts.kappa  # a mean would need rows of the router to go
        selected = select_experts(
            experts.method, evidence, removed, most, one_threshold, groups_of(cfg, arch), experts.representative, kappa
        )
        for index, plan in zip(moe, selected, strict=True):
            layers[index] = plan
    plan = make_budget(cfg, sizes, [len(layer.clusters) for layer in layers])
    plan.layers, plan.mtp = layers, _plan_heads(cfg, arch, [len(layers[index].clusters) for index in moe])
    set_ratios(plan, cfg.sparsify, arch, sizes, stats)
    name_successors(plan, arch, cfg.experts.dropped)
    return plan


def trial_drops(job: Job, stats: Statistics | None, total: int) -> list[list[int]]:
    """Experts to remove from every layer in each of the trials that tell what its output loses (stun.pruning.sensitivity): around
    the share that is removed on average, and so many that `total` can be met. Raises StunError if none can."""
    cfg, step = job.cfg, groups_of(job.cfg, job.arch)
    moe = [layout.index for layout in job.arch.layers if layout.experts]
    rooms = removable(cfg, job.arch, protected_experts(cfg, job.arch, moe, stats))
    if sum(rooms) < total:
        raise StunError(
            f"experts.budget=measured: {total} experts are to be removed; protected ones and top-k allow {sum(rooms)}"
        )
    experts = [size.experts for size in job.sizes]

    def removed(times: float) -> list[int]:
        shares = (step * round(times * total / sum(experts) * number / step) for number in experts)
        return [min(room, max(step, share)) for room, share in zip(rooms, shares, strict=True)]

    trials = [removed(times) for times in TRIALS]
    return trials if sum(trials[-1]) >= total else [*trials[:-1], rooms]


def complete_plan(job: Job) -> Plan:
    """Plan of the job with its ratios: the plan file's, or one made from the job's statistics."""
    stats = job.statistics if job.statistics.complete else None
    if not job.is_given:
        return make_plan(job, stats)
    set_ratios(job.plan, job.cfg.sparsify, job.arch, job.sizes, stats)
    name_successors(job.plan, job.arch, job.cfg.experts.dropped)
    return job.plan


def name_successors(plan: Plan, arch: Architecture, dropped: Dropped) -> None:
    """Say in the plan who takes the tokens of removed experts, in layers with a table whose survivors are known."""
    for layout, layer in zip(arch.layers, plan.layers, strict=True):
        if layout.tables and layer.kept and not layer.mean and len(layer.kept) < layer.experts and dropped is Dropped.reroute:
            plan.successors[layout.index] = successors(layer.kept, arch.source.read(layout.router).float())


def gather_evidence(cfg: PruneConfig, arch: Architecture, moe: list[int], stats: Statistics | None) -> list[Evidence]:
    """Distances, scores and protected experts of the layers `moe`, from statistics or, without them, from the routers' rows.
    Calibration sources are weighed as configured. Raises StunError for a distance or score that is not finite."""
    pooled, protected = [], protected_experts(cfg, arch, moe, stats)
    for index in moe:
        layout = arch.layers[index]
        if stats:
            distance_EE, score_E, scale = weigh(cfg.experts, stats.load(index, layout.num_experts), stats, index)
        else:
            distance_EE, score_E, scale = *_by_router(arch, layout, cfg.experts.lambda1), 0.0
        if not (np.isfinite(distance_EE).all() and torch.isfinite(score_E).all()):
            raise StunError(f"layer {index}: an expert's score or distance is not finite; a lambda is too large")
        pooled.append(Evidence(distance_EE, score_E, frozenset(protected[index]), scale))
    return pooled


def weigh(
    cfg: ExpertsConfig, layer: dict[str, torch.Tensor], stats: Statistics, index: int
) -> tuple[np.ndarray, torch.Tensor, float]:
    """Distances [E, E] and scores [E] of one layer's experts, and the scale of the scores, from its statistics `layer`."""
    weights_S = torch.tensor([cfg.source_weights.get(name, 1.0) for name in stats.sources], dtype=torch.float64)
    coactivation_EE = (layer["coactivation"].double() * weights_S[:, None, None]).sum(0)
    powers_E33 = (layer["powers"] * weights_S[:, None, None, None]).sum(0)
    distance_EE = expert_distance(layer["router_distance"], coactivation_EE, cfg.lambda1, cfg.lambda2)
    if cfg.sums_outputs and "outputs" not in layer:
        lacking = "its statistics have no sums of outputs; a run with experts.score=residual collects them"
        raise StunError(f"{stats.folder}: {lacking}")
    outputs_ED = (layer["outputs"].double() * weights_S[:, None, None]).sum(0) if cfg.sums_outputs else None
    score_E = score_experts(cfg.score, powers_E33, layer["weights"], index, cfg.seed, outputs_ED)
    # What is lost of a layer's output counts beside all of it, also where most of it is constant.
    scale = float(powers_E33[:, 2, 2].mean()) if cfg.score is Score.residual else 0.0
    return distance_EE, score_E, scale


def _by_router(arch: Architecture, layout: LayerLayout, lambda1: float = 1.0) -> tuple[np.ndarray, torch.Tensor]:
    """Distances [E, E] of the router's rows, and scores [E] that are all 0."""
    distance_EE = expert_distance(router_distance(arch.source.read(layout.router).float()), lambda1=lambda1)
    return distance_EE, torch.zeros(layout.num_experts, dtype=torch.float64)


def _plan_heads(cfg: PruneConfig, arch: Architecture, counts: list[int]) -> list[LayerPlan]:
    """Plans of the multi-token-prediction heads, from their routers' rows, since no forward runs a head."""
    common = count_of_heads(cfg, set(counts))
    method = ExpertsMethod.stun if cfg.experts.method is ExpertsMethod.rank else cfg.experts.method
    plans = []
    for layout in arch.mtp:
        evidence = Evidence(*_by_router(arch, layout))
        drop = 0 if common is None else layout.num_experts - common
        plans += select_experts(method, [evidence], [drop], [drop], False, arch.groups, Representative.nearest)
    return plans
