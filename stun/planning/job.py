"""What is asked of a model, in numbers: everything that a run needs follows from it and the headers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from stun.checkpoint.reader import Checkpoint
from stun.config import ExpertsMethod, PruneConfig, Representative
from stun.run.folder import ABOUT, STATISTICS
from stun.model.architecture import Architecture
from stun.planning.budget import LayerSize, experts_to_drop, make_budget, measure_layers, reachable
from stun.planning.make import reads_statistics
from stun.planning.plan import LayerPlan, Plan
from stun.planning.plan_file import read_plan
from stun.planning.validation import validate


@dataclass(frozen=True)
class Job:
    """What is asked of a model: `plan` has at least the right numbers of experts, `candidates` are splits to be searched."""

    cfg: PruneConfig
    arch: Architecture
    sizes: list[LayerSize]
    plan: Plan
    is_given: bool = False
    candidates: int = 0

    @property
    def streams(self) -> dict[str, bool]:
        """The streams over the layers, and whether each runs the model."""
        drops, how = any(len(layer.clusters) < layer.experts for layer in self.plan.layers), self.cfg.sparsify
        chooses = drops and not self.is_given and reads_statistics(self.cfg.experts)
        observes = chooses or (self.plan.zeros and how.counts_outliers) or self.candidates
        is_there = self.cfg.statistics or (Path(self.cfg.run_dir) / STATISTICS / ABOUT).is_file()
        first = {"observe": True} if observes and not is_there else {}
        search = {"search": True} if self.candidates else {}
        return first | search | {"prune": bool(self.plan.zeros and how.reads_inputs)}


def open_job(cfg: PruneConfig) -> Job:
    """The job that a configuration asks for. Raises StunError where it cannot be."""
    validate(cfg)
    arch = Architecture(Checkpoint.open(cfg.model.path), cfg.precision)
    sizes = measure_layers(arch, cfg.sparsify.scope)
    given = read_plan(cfg.plan, arch, sizes, cfg, cfg.target) if cfg.plan else None
    return make_job(cfg, arch, sizes, given)


def make_job(cfg: PruneConfig, arch: Architecture, sizes: list[LayerSize], given: Plan | None) -> Job:
    """The job with the plan `given`, or one that has the numbers of the plan to be made. Of splits to be searched it is the one
    that leaves most experts."""
    if given:
        return Job(cfg, arch, sizes, given, is_given=True)
    fractions = reachable(cfg, arch, sizes) if cfg.experts.fraction == "auto" else []
    own = replace(cfg, experts=replace(cfg.experts, fraction=min(fractions))) if fractions else cfg
    plan = stand_in(own, arch, sizes, experts_to_drop(own, sizes, arch))
    return Job(cfg, arch, sizes, plan, candidates=len(fractions))


def stand_in(cfg: PruneConfig, arch: Architecture, sizes: list[LayerSize], drops: list[int]) -> Plan:
    """A plan that drops as many experts as the one to be made will; who they are it does not know.

    Where representatives may have to be found by their weights, all experts are taken to be read for it.
    """
    how = cfg.experts
    reads_all = how.method is not ExpertsMethod.rank and how.representative is Representative.nearest
    layers = [_layer(layout.num_experts, drop, reads_all) for layout, drop in zip(arch.layers, drops, strict=True)]
    plan = make_budget(cfg, sizes, [len(layer.clusters) for layer in layers])
    counts = {len(layer.clusters) for layer in layers if layer.experts}
    heads = [(head.num_experts, head.num_experts - counts.copy().pop() if len(counts) == 1 else 0) for head in arch.mtp]
    plan.layers, plan.mtp = layers, [_layer(experts, drop, True) for experts, drop in heads]
    return plan


def _layer(experts: int, drop: int, reads_all: bool) -> LayerPlan:
    stay = experts - drop
    clusters = [[expert] for expert in range(stay)]
    for expert in range(stay, experts) if reads_all else ():
        clusters[(expert - stay) * stay // drop % stay].append(expert)
    return LayerPlan(experts, clusters, [] if reads_all and drop else list(range(stay)), nearest=bool(reads_all and drop))
