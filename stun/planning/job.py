"""Jobs: requests to prune a model, resolved and checked once for pruning, preflight and planning."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from stun.checkpoint import hub
from stun.checkpoint.codecs.grids import GRIDS, Grid
from stun.checkpoint.reader import Checkpoint, Headers
from stun.config import Budget, Dropped, ModelConfig, OutputFormat, PruneConfig, SparsifyMethod, StunError, Uneven
from stun.data.samples import Samples, calibration_samples
from stun.data.tokenizer import load_tokenizer
from stun.files import load_json
from stun.model.architecture import Architecture
from stun.model.families import NOVICES, PADDED
from stun.model.layer_layout import LayerLayout
from stun.model.precision import check_alike, compute_dtype
from stun.planning.allocation import Losses
from stun.planning.budget import LayerSize, check_pattern, measure_layers, reachable
from stun.planning.counts import plan_of_counts, settle
from stun.planning.layer_ratios import check_ratios
from stun.planning.plan import LayerPlan, Plan
from stun.planning.plan_file import read_plan
from stun.planning.protection import check_listed
from stun.planning.validation import validate
from stun.planning.written_form import settle_format
from stun.run import layer_records
from stun.run.folder import MANIFEST, STATISTICS
from stun.run.identity import observed
from stun.runtime.ranks import Ranks
from stun.sparsify.joint_refit import held_bytes, replicated_bytes
from stun.statistics.store import Statistics
from stun.stream.self_check import check_unknown
from stun.tracking.tracker import check_tracking

SHARE = 8  # trials prune on one sample in so many, and hold out as many
TRIED = ("budget", "search")  # streams of trials, on that share of the samples; nothing is saved in them


@dataclass(frozen=True)
class Job:
    """A request that can be met.

    `plan` is the plan given, or a stand-in with the right numbers of experts, which are not chosen yet. `fractions` are the
    splits to search for experts.fraction=auto; `plan` then has the split that keeps most experts. `losses` are those of the
    layers, once they are measured for experts.budget=measured. `samples` are the calibration tokens, None if nothing reads any.
    `form_note` says in which form weights are written, where that is not the plain source's.
    """

    cfg: PruneConfig
    arch: Architecture
    sizes: list[LayerSize]
    plan: Plan
    is_given: bool = False
    fractions: tuple[float, ...] = ()
    losses: Losses = field(default_factory=list)
    samples: Samples | None = None
    form_note: str = ""

    @property
    def drops(self) -> list[int]:
        """Experts removed per layer; where the budget lets layers differ only the sum counts."""
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
    def measures(self) -> bool:
        """Whether the layers' losses decide how many experts each of them keeps."""
        removes = any(self.drops) or bool(self.fractions)
        return self.cfg.experts.budget is Budget.measured and removes and not self.is_given

    @property
    def refits(self) -> bool:
        """Whether the experts kept are fitted to the dense layers' outputs, which run beside the pruned ones."""
        return bool(self.cfg.experts.refit and (any(self.drops) or self.plan.zeros))

    def tokens_of(self, world: int) -> int:
        """Calibration tokens of the rank with most of them; micro-batches are dealt in turn."""
        calibration = self.cfg.calibration
        turns = -(-calibration.samples // (calibration.micro_batch * world))
        return min(calibration.samples, turns * calibration.micro_batch) * calibration.length

    def refit_bytes(self, layout: LayerLayout, plan: LayerPlan, world: int, itemsize: int, share: int = 1) -> int:
        """Bytes that the joint refit of a layer, on one sample in `share`, holds on a rank; 0 for a layer without experts."""
        if not layout.experts:
            return 0
        tokens, kept = -(-self.tokens_of(world) // share), -(-len(plan.clusters) // world)
        height, width = self.arch.down_shape(layout)
        replicated = [self.arch.info(name).shape[:2] for name in layout.shared_outputs]
        replicated += [(height, plan.experts - len(plan.clusters))] if self.has_novices else []
        held = held_bytes((height, width), kept, tokens, tokens * self.arch.top_k, itemsize)
        if layout.output_matrix:  # what is missing in the outputs is behind it, and before it once more; the matrix and a factor
            hidden = self.arch.config.hidden_size
            held += 8 * tokens * hidden + 4 * height * (hidden + height)
        if self.arch.adds_by_token or layout.shared_outputs:  # a louder run beside the plain one, and what is louder in it
            held += 2 * tokens * self.arch.token_width * itemsize
        if self.arch.norms_behind:  # weights before a run with new ones
            held += kept * height * width * itemsize
        return held + sum(replicated_bytes(shape, tokens, itemsize, world) for shape in replicated)

    @property
    def refit_runs(self) -> int:
        """Runs of a layer in its joint refit: as it is, with each matrix of shared experts louder, with all experts louder where
        tokens have factors, and where norms follow, with the weights before and after."""
        if not self.refits:
            return 0
        shared = max(len(layout.shared_outputs) for layout in self.arch.layers if layout.experts)
        return 1 + shared + self.arch.adds_by_token + 2 * bool(self.arch.norms_behind)

    @property
    def has_novices(self) -> bool:
        """Whether experts that are removed become novices."""
        return self.cfg.experts.dropped is Dropped.novice and any(self.drops)

    @property
    def is_padded(self) -> bool:
        """Whether experts of zeros fill every layer up to the largest number kept."""
        return self.cfg.experts.uneven is Uneven.padded

    @property
    def keeps_form(self) -> bool:
        """Whether a quantised source's weights are written as they are stored."""
        return self.cfg.output.format is OutputFormat.source and bool(self.arch.source.formats)

    @property
    def grid(self) -> Grid | None:
        """New form that weights are rounded to, if any."""
        return GRIDS.get(self.cfg.output.format.name)

    def solves(self, plan: Plan) -> bool:
        """Whether matrices of a run with this plan get other values before the joint refit: by a solver, or as means."""
        has_solver = self.cfg.sparsify.method in (SparsifyMethod.sparsegpt, SparsifyMethod.alps) or self.cfg.sparsify.reconstruct
        return bool(plan.zeros and has_solver) or any(layer.mean for layer in plan.layers)

    @property
    def runs_dense(self) -> bool:
        """Whether the dense layers run beside the pruned ones."""
        return self.refits or self.has_novices

    @property
    def streams(self) -> dict[str, bool]:
        """Streams over the layers still to run, and whether each of them runs the model's forward."""
        is_taken = self.cfg.statistics or self.statistics.complete
        first = {"observe": True} if self.reads_statistics and not is_taken else {}
        budget = {"budget": True} if self.measures else {}
        search = {"search": True} if self.fractions else {}
        return first | budget | search | {"prune": self.runs_dense or bool(self.plan.zeros and self.cfg.sparsify.reads_inputs)}

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
    if job.refits and job.arch.cannot_refit:
        raise StunError(f"experts.refit=true: {job.arch.cannot_refit}; use experts.refit=false")
    ranks.on_first(lambda: check_tracking(cfg.tracking))
    check_unknown(job.arch, ranks, job.refits)
    if runs_here:
        check_alike(job.arch, ranks)
    samples = _samples(job, ranks) if job.cfg.target else None
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
        measured = Path(job.cfg.statistics) / layer_records.FILE  # read once the checkpoint is written
        ranks.on_first(lambda: load_json(measured) if measured.is_file() else None)


def resolve_statistics(cfg: PruneConfig, ranks: Ranks) -> Job:
    """The job of the first stream alone, which removes nothing and so ignores the settings of experts and weights.

    All ranks call this together. Raises StunError as `resolve` does.
    """
    experts = replace(cfg.experts, fraction=0.0, keep=None, drop=None)
    own = replace(cfg, plan="", statistics="", fit="")  # collected here, whatever others there are
    job = resolve(replace(own, experts=experts, sparsify=replace(cfg.sparsify, pattern=""), target=0.0), ranks)
    return replace(job, cfg=replace(own, model=job.cfg.model), samples=_samples(job, ranks))


def _architecture(cfg: PruneConfig, remote: Headers | None = None) -> Architecture:
    return Architecture(Checkpoint.open(hub.folder(cfg.model.path), remote), cfg.precision)


def resolve_model(cfg: PruneConfig, sources: list[str] | None = None, remote: Headers | None = None) -> Job:
    """The configuration's job without its calibration tokens, from the model's headers alone.

    `sources` names the calibration sources of saved statistics, for a configuration that has none; `remote` are headers of
    weights that are not here. Raises StunError if the request cannot be met.
    """
    validate(cfg, sources)
    arch = _architecture(cfg, remote)
    _check_novices(cfg, arch)
    _check_padding(cfg, arch)
    sizes = measure_layers(arch, cfg.sparsify.scope, cfg.experts.dropped)
    check_ratios(cfg.sparsify, arch)
    check_pattern(cfg.sparsify, arch)
    cfg, note = settle_format(cfg, arch)
    cfg = settle(cfg, arch, sizes)
    if cfg.plan:
        plan = read_plan(cfg.plan, arch, sizes, cfg, cfg.target)
        return Job(replace(cfg, target=plan.target), arch, sizes, plan, is_given=True, form_note=note)
    _check_loadable(cfg, arch)
    is_auto = cfg.experts.fraction == "auto"
    fractions = reachable(cfg, arch, sizes) if is_auto else []
    first = replace(cfg, experts=replace(cfg.experts, fraction=min(fractions))) if is_auto else cfg
    plan = plan_of_counts(first, arch, sizes)
    job = Job(cfg, arch, sizes, plan, fractions=tuple(fractions), form_note=note)
    check_listed(cfg, arch, [0] * len(arch.layers) if is_auto else job.drops)
    return job


def statistics_identity(job: Job, ranks: Ranks) -> dict:
    """Everything that the statistics of this launch depend on."""
    return observed(job.cfg, job.arch.source, job.samples, compute_dtype(job.arch, ranks.device))


def _check_loadable(cfg: PruneConfig, arch: Architecture) -> None:
    """Raises StunError if layers may differ in experts and the checkpoint's form cannot hold that."""
    if cfg.experts.may_differ and (cfg.experts.fraction or cfg.experts.is_counted or cfg.sparsify.pattern) and arch.cannot_differ:
        reason = f"{arch.cannot_differ}; layers cannot keep different numbers of experts"
        raise StunError(f"experts.budget={cfg.experts.budget.name}: {reason}. Use experts.budget=uniform")


def _check_novices(cfg: PruneConfig, arch: Architecture) -> None:
    """Raises StunError if the checkpoint has novices, or its form can hold none that are asked for."""
    if any(layout.novices for layout in arch.layers):
        raise StunError(f"{arch.source.folder}: has experts that are constants already ({NOVICES}); prune what it was made from")
    if cfg.experts.dropped is Dropped.reroute:
        return
    reason = f"{arch.source.config['model_type']} wraps its text model in another" if arch.is_nested else ""
    if any(layout.fused for layout in arch.layers):
        reason = "this checkpoint has all experts of a layer in one tensor"
    if len({layout.num_experts for layout in arch.layers if layout.experts}) > 1:
        reason = "this checkpoint's layers have different numbers of experts already"
    if reason:
        raise StunError(f"experts.dropped=novice: {reason}, a form that holds no constants. Use experts.dropped=reroute")
    if cfg.experts.fraction == "auto":
        raise StunError("experts.fraction=auto: the search tries experts.dropped=reroute alone; give a number")


def _check_padding(cfg: PruneConfig, arch: Architecture) -> None:
    """Raises StunError if the checkpoint was padded, or its routers cannot keep padding from being chosen."""
    if PADDED in arch.source.config:
        zeros = f"has experts of zeros that fill its layers up ({PADDED})"
        raise StunError(f"{arch.source.folder}: {zeros}; prune what it was made from")
    if cfg.experts.uneven is Uneven.code:
        return
    if cfg.experts.dropped is Dropped.novice:
        raise StunError("experts.uneven=padded: with experts.dropped=novice every layer keeps its number; one of them is enough")
    if not all(layout.biases for layout in arch.layers if layout.experts):
        ways = "experts.uneven=code, or experts.dropped=novice, which vLLM reads"
        reason = f"the routers of {arch.model_type} have no bias that could keep experts of zeros from being chosen"
        raise StunError(f"experts.uneven=padded: {reason}. Use {ways}")


def _samples(job: Job, ranks: Ranks) -> Samples:
    """Calibration tokens, with a line in the log for rows that were skipped. Raises StunError if the text is missing, too short,
    or too short to hold samples out."""
    samples = ranks.on_first(lambda: _read_samples(job))
    for note in samples.notes:
        ranks.log(note)
    return samples


def _read_samples(job: Job) -> Samples:
    arch = job.arch
    samples = calibration_samples(job.cfg.calibration, load_tokenizer(arch.source.folder), arch.config.vocab_size)
    for name, count in samples.sources.items() if job.fractions or job.measures else ():
        if count < SHARE:
            setting = "experts.fraction=auto" if job.fractions else "experts.budget=measured"
            raise StunError(f"{setting}: source {name!r} has {count} samples; {SHARE} are needed to hold some out")
    return samples
