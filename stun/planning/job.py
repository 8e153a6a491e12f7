"""Jobs: requests to prune a model, resolved and checked once for pruning, preflight and planning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from stun.checkpoint import hub
from stun.checkpoint.reader import Checkpoint, Headers
from stun.config import Budget, ExpertsMethod, ModelConfig, PruneConfig, Representative, StunError
from stun.data import Samples, calibration_samples, load_tokenizer
from stun.model.architecture import Architecture
from stun.model.precision import check_alike, compute_dtype
from stun.planning.budget import LayerSize, check_pattern, experts_to_drop, make_budget, measure_layers, reachable
from stun.planning.layer_ratios import check_ratios
from stun.planning.plan import LayerPlan, Plan
from stun.planning.plan_file import read_plan
from stun.planning.protection import check_listed
from stun.planning.validation import validate
from stun.run.folder import MANIFEST, STATISTICS
from stun.run.identity import observed
from stun.runtime.ranks import Ranks
from stun.statistics.store import Statistics
from stun.tracking.tracker import check_tracking

HELD_OUT = 8  # the search for the best split holds out one sample in so many


@dataclass(frozen=True)
class Job:
    """A request that can be met.

    `plan` is the plan given, or a stand-in with the right numbers of experts, which are not chosen yet. `fractions` are the
    splits to search for experts.fraction=auto; `plan` then has the split that keeps most experts. `samples` are the calibration
    tokens, None if nothing reads any.
    """

    cfg: PruneConfig
    arch: Architecture
    sizes: list[LayerSize]
    plan: Plan
    is_given: bool = False
    fractions: tuple[float, ...] = ()
    samples: Samples | None = None

    @property
    def drops(self) -> list[int]:
        """Experts removed per layer; with the global budget only the sum counts."""
        return [layer.experts - len(layer.clusters) for layer in self.plan.layers]

    @property
    def statistics(self) -> Statistics:
        """Statistics of the first stream, in the folder `statistics` or else in the run's own."""
        return Statistics(Path(self.cfg.statistics or self.cfg.run_dir) / STATISTICS)

    @property
    def reads_statistics(self) -> bool:
        """Whether the plan or the search reads statistics of the first stream."""
        chooses = any(self.drops) and not self.is_given and self.cfg.experts.reads_statistics
        return bool(chooses or (self.plan.zeros and self.cfg.sparsify.counts_outliers) or self.fractions)

    @property
    def streams(self) -> dict[str, bool]:
        """Streams over the layers still to run, and whether each of them runs the model's forward."""
        is_taken = self.cfg.statistics or self.statistics.complete
        first = {"observe": True} if self.reads_statistics and not is_taken else {}
        search = {"search": True} if self.fractions else {}
        return first | search | {"prune": bool(self.plan.zeros and self.cfg.sparsify.reads_inputs)}

    @property
    def is_finished(self) -> bool:
        """Whether the run folder says that it is complete."""
        return (Path(self.cfg.run_dir) / MANIFEST).is_file()

    def with_fraction(self, fraction: float) -> Job:
        """The job with one split of the target. Raises StunError if that split cannot be met."""
        cfg = replace(self.cfg, experts=replace(self.cfg.experts, fraction=fraction))
        return replace(self, cfg=cfg, plan=plan_of_counts(cfg, self.arch, self.sizes), fractions=())


def resolve(cfg: PruneConfig, ranks: Ranks, runs_here: bool = True) -> Job:
    """The configuration's job with its calibration tokens, which runs on these ranks or only describes a run elsewhere. All ranks
    call this together.

    Of a model on the hub, headers alone are read where its weights are not in the cache. Raises StunError, before anything is
    computed or written, if the request cannot be met.
    """
    validate(cfg)  # nothing is fetched for a request that no model can meet
    cfg = replace(cfg, model=ModelConfig(hub.pinned(cfg.model.path, ranks)))
    job = resolve_model(cfg, remote=hub.headers(cfg.model.path, ranks, runs_here))
    ranks.on_first(lambda: check_tracking(cfg.tracking))
    if runs_here:
        check_alike(job.arch, ranks)
    samples = ranks.on_first(lambda: _samples(job)) if cfg.target else None
    job = replace(job, samples=samples)
    _check_statistics(job, ranks, runs_here)
    return job


def with_weights(job: Job, ranks: Ranks) -> Job:
    """The job of `resolve`, with all weights of its model on this node. All ranks call this together.

    Raises StunError if they cannot be fetched, or do not belong to the statistics that the job shares.
    """
    if all(ranks.gather_objects(job.arch.source.is_here)):
        return job
    hub.download(job.cfg.model.path, ranks)
    job = replace(job, arch=_architecture(job.cfg))
    _check_statistics(job, ranks)
    return job


def _check_statistics(job: Job, ranks: Ranks, runs_here: bool = True) -> None:
    """Raises StunError if shared statistics are not the job's. A finished run needs them no more."""
    if job.cfg.statistics and job.samples and not ranks.on_first(lambda: job.is_finished):
        # Other hardware may compute in another dtype; weights that are not here cannot be compared.
        open_keys = {"computed_in": runs_here, "model": all(ranks.gather_objects(job.arch.source.is_here))}
        identity = statistics_identity(job, ranks)
        wanted = {key: value for key, value in identity.items() if open_keys.get(key, True)}
        ranks.on_first(lambda: job.statistics.check(wanted))


def resolve_statistics(cfg: PruneConfig, ranks: Ranks) -> Job:
    """The job of the first stream alone, which removes nothing and so ignores the settings of experts and weights.

    All ranks call this together. Raises StunError as `resolve` does.
    """
    experts = replace(cfg.experts, fraction=0.0)
    dense = replace(cfg, experts=experts, sparsify=replace(cfg.sparsify, pattern=""), plan="", statistics="", target=0.0)
    job = resolve(dense, ranks)
    own = replace(cfg, model=job.cfg.model, plan="", statistics="")  # collected here, whatever others there are
    return replace(job, cfg=own, samples=ranks.on_first(lambda: _samples(job)))


def _architecture(cfg: PruneConfig, remote: Headers | None = None) -> Architecture:
    return Architecture(Checkpoint.open(hub.folder(cfg.model.path), remote), cfg.precision)


def resolve_model(cfg: PruneConfig, sources: list[str] | None = None, remote: Headers | None = None) -> Job:
    """The configuration's job without its calibration tokens, from the model's headers alone.

    `sources` names the calibration sources of saved statistics, for a configuration that has none; `remote` are headers of
    weights that are not here. Raises StunError if the request cannot be met.
    """
    validate(cfg, sources)
    arch = _architecture(cfg, remote)
    sizes = measure_layers(arch, cfg.sparsify.scope)
    check_ratios(cfg.sparsify, arch)
    check_pattern(cfg.sparsify, arch)
    if cfg.plan:
        return Job(cfg, arch, sizes, read_plan(cfg.plan, arch, sizes, cfg, cfg.target), is_given=True)
    _check_loadable(cfg, arch)
    is_auto = cfg.experts.fraction == "auto"
    fractions = reachable(cfg, arch, sizes) if is_auto else []
    first = replace(cfg, experts=replace(cfg.experts, fraction=min(fractions))) if is_auto else cfg
    job = Job(cfg, arch, sizes, plan_of_counts(first, arch, sizes), fractions=tuple(fractions))
    check_listed(cfg, arch, [0] * len(arch.layers) if is_auto else job.drops)
    return job


def statistics_identity(job: Job, ranks: Ranks) -> dict:
    """Everything that the statistics of this launch depend on."""
    return observed(job.cfg, job.arch.source, job.samples, compute_dtype(job.arch, ranks.device))


def plan_of_counts(cfg: PruneConfig, arch: Architecture, sizes: list[LayerSize]) -> Plan:
    """A stand-in for the plan to be made: it removes as many experts, but not yet the right ones.

    If representatives are chosen by their weights, all experts count as read. Raises StunError if the target cannot be met.
    """
    drops = experts_to_drop(cfg, sizes, arch)
    reads_all = cfg.experts.method is not ExpertsMethod.rank and cfg.experts.representative is Representative.nearest
    layers = [_layer(layout.num_experts, drop, reads_all) for layout, drop in zip(arch.layers, drops, strict=True)]
    plan = make_budget(cfg, sizes, [len(layer.clusters) for layer in layers])
    counts = {len(layer.clusters) for layer in layers if layer.experts}
    heads = [(head.num_experts, head.num_experts - counts.copy().pop() if len(counts) == 1 else 0) for head in arch.mtp]
    plan.layers, plan.mtp = layers, [_layer(experts, drop, True) for experts, drop in heads]
    return plan


def _layer(experts: int, drop: int, reads_all: bool) -> LayerPlan:
    count = experts - drop
    clusters = [[expert] for expert in range(count)]
    for expert in range(count, experts) if reads_all else ():
        clusters[(expert - count) * count // drop % count].append(expert)
    return LayerPlan(experts, clusters, [] if reads_all and drop else list(range(count)), nearest=bool(reads_all and drop))


def _check_loadable(cfg: PruneConfig, arch: Architecture) -> None:
    """Raises StunError if layers may differ in experts and the checkpoint's form cannot hold that."""
    if cfg.experts.budget is Budget["global"] and (cfg.experts.fraction or cfg.sparsify.pattern) and arch.cannot_differ:
        reason = f"{arch.cannot_differ}; layers cannot keep different numbers of experts"
        raise StunError(f"experts.budget=global: {reason}. Use experts.budget=uniform")


def _samples(job: Job) -> Samples:
    """Calibration tokens. Raises StunError if the text is missing, too short, or too short to hold samples out."""
    arch = job.arch
    samples = calibration_samples(job.cfg.calibration, load_tokenizer(arch.source.folder), arch.config.vocab_size)
    for name, count in samples.sources.items() if job.fractions else ():
        if count < HELD_OUT:
            few = f"source {name!r} has {count} samples"
            raise StunError(f"experts.fraction=auto: {few}; {HELD_OUT} are needed to hold some out")
    return samples
