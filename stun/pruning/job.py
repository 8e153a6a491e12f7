"""Pruning job: resolve, check, observe, plan, prune, write."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from stun.config import PruneConfig, StunError
from stun.files import load_yaml, write_json
from stun.model.precision import compute_dtype
from stun.planning.budget import best_fraction
from stun.planning.job import Job, resolve, resolve_statistics, statistics_identity, with_weights
from stun.planning.make import complete_plan, name_successors
from stun.planning.plan import Plan
from stun.preflight.job import preflight
from stun.pruning.describe import describe, notices, usage_warning
from stun.pruning.output import Written, prune_and_write
from stun.pruning.search import search_fraction
from stun.pruning.sensitivity import losses
from stun.pruning.summary import save_layers, save_observed, summarise
from stun.report.model_card import write_card
from stun.run.folder import Run
from stun.run.identity import fingerprint, hardware, plain
from stun.run.recorder import Recorder
from stun.runtime.ranks import Ranks
from stun.runtime.timers import Meter
from stun.runtime.units import count, duration
from stun.schema import NUMBER, load_record, one_of
from stun.statistics.observe import observe
from stun.stream.layer_stream import embed
from stun.tracking.tracker import tracked


def prune(cfg: PruneConfig, ranks: Ranks) -> dict:
    """Prune the checkpoint at `cfg.model.path` into `cfg.run_dir`/model; returns the run's summary.

    All ranks call this together. Raises StunError before any work starts if the request cannot be met.
    """
    ranks.meter = Meter()
    ranks.reset_peak_memory()
    job = resolve(cfg, ranks)
    if not ranks.on_first(lambda: job.is_finished):
        job = preflight(job, ranks)
    job = with_weights(job, ranks)
    with open_run(job, ranks) as run:
        if not run.summary:
            job = observe_and_split(job, run, ranks)
            plan = ranks.on_first(lambda: complete_plan(job))
            ranks.on_first(lambda: write_json(run.folder / "plan.json", plan.to_json()))
            written = prune_and_write(job, plan, run, ranks)
            run.summary = finish(job, plan, written, run, ranks)
        return run.summary


def take_statistics(cfg: PruneConfig, ranks: Ranks) -> None:
    """Run the first stream alone and write `cfg.run_dir`/stats, which any plan or pruning run can use.

    All ranks call this together. Raises StunError before any work starts if the request cannot be met.
    """
    job = with_weights(resolve_statistics(cfg, ranks), ranks)
    requested = {"outliers": cfg.sparsify.counts_outliers, "outputs": cfg.experts.sums_outputs}
    identity = ranks.on_first(lambda: {"statistics": statistics_identity(job, ranks) | requested})
    machine = hardware(ranks, compute_dtype(job.arch, ranks.device))
    run = ranks.on_first(lambda: Run.open(cfg.run_dir, identity, machine, cfg.allow_other_hardware))
    samples, tokens = count(len(job.samples.tokens_ST), "sample"), count(cfg.calibration.length, "token")
    ranks.log(f"observe {job.cfg.model.path} | {samples} of {tokens}")
    with tracked(cfg.tracking, run.folder, plain(cfg), ranks):
        _observe(job, run, ranks)
    ranks.on_first(lambda: save_observed(run))
    ranks.on_first(run.clear)
    ranks.doing = ""
    ranks.log(f"wrote {run.stats}")


@contextmanager
def open_run(job: Job, ranks: Ranks) -> Iterator[Run]:
    """Run folder of a job, locked against other launches, with tracking on while it is open.

    A run that an earlier launch finished has its summary. Raises StunError if the folder holds something else.
    """
    cfg, machine = job.cfg, hardware(ranks, compute_dtype(job.arch, ranks.device))

    def opened() -> Run:
        return Run.open(cfg.run_dir, fingerprint(cfg, job.arch.source, job.samples), machine, cfg.allow_other_hardware)

    run = ranks.on_first(opened)
    run.summary = ranks.on_first(run.read_summary)
    if run.summary:
        ranks.on_first(run.clear)  # the launch that finished it may have been killed before it cleared
        lost = "" if (run.model / "config.json").is_file() else f", but its checkpoint is no longer in {run.model}"
        ranks.log(f"{cfg.run_dir} is complete already{lost}")
        yield run
        return
    with tracked(cfg.tracking, run.folder, plain(cfg), ranks) as tracking:
        yield run
        tracking.summary = run.summary
    ranks.doing = ""
    ranks.log(f"wrote {run.model} | sparsity {run.summary['sparsity']:.5f} | {duration(run.summary['seconds'])}")


def observe_and_split(job: Job, run: Run, ranks: Ranks) -> Job:
    """Take the statistics that the job reads, if any; returns the job with its target split into experts and weights."""
    if job.measures:
        if job.reads_statistics:
            _observe(job, run, ranks)
        job = replace(job, losses=losses(job, run.folder / "budget.json", ranks))
    if job.fractions:
        _observe(job, run, ranks)
        job = job.with_fraction(_best_fraction(job, run, ranks))
    ranks.log(f"prune {job.cfg.model.path} | {describe(job)} | {count(ranks.world, 'rank')} on {ranks.device.type}")
    for notice in notices(job, ranks.device):
        ranks.log(notice)
    if job.reads_statistics:
        _observe(job, run, ranks)
        rarely = ranks.on_first(lambda: usage_warning(job.arch, job.statistics)) if any(job.drops) else ""
        if rarely:
            ranks.log(rarely)
    return job


def _observe(job: Job, run: Run, ranks: Ranks) -> None:
    """Run the first stream, unless its statistics are complete on disk."""
    stats, cfg, arch = job.statistics, job.cfg, job.arch
    if not ranks.on_first(lambda: stats.complete):
        if cfg.statistics:
            ranks.on_first(lambda: stats.check({}))  # nothing is written into the folder of other runs
        size = cfg.calibration.micro_batch
        states = embed(arch, ranks, job.samples.batches(size), arch.source.read)
        recorder, sources = Recorder(run.folder, "observe", ranks, len(arch.layers)), job.samples.source_of_batch(size)
        observe(arch, states, recorder, stats.save, sources, cfg.sparsify.counts_outliers, cfg.experts.sums_outputs)
        ranks.on_first(lambda: stats.finish(statistics_identity(job, ranks)))


def _best_fraction(job: Job, run: Run, ranks: Ranks) -> float:
    """The fraction that the held-out errors say; the curve is written to search.json and search.png."""
    file = run.folder / "search.json"
    curve = ranks.on_first(lambda: _read_curve(file, job.fractions) if file.is_file() else None)
    if curve is None:
        errors = search_fraction(job, ranks)
        curve = {str(fraction): error for fraction, error in errors.items()}
        ranks.on_first(lambda: _draw(errors, run.folder / "search.png"))
        ranks.on_first(lambda: write_json(file, {"error": curve}))
    best = best_fraction({float(fraction): error for fraction, error in curve.items()})
    for fraction, error in curve.items():
        ranks.log(f"experts.fraction={fraction}: held-out error {error:.5f}{' <- chosen' if float(fraction) == best else ''}")
    return best


def _draw(errors: dict[float, float], file: Path) -> None:
    """The report's chart of a search, on a white background."""
    from stun.report import charts, png, theme  # with matplotlib, which no other run needs

    figure = charts.budget(theme.LIGHT, {"fraction": list(errors), "error": list(errors.values())})
    figure.patch.set_alpha(1)
    png.saved(figure, file)


def _read_curve(file: Path, fractions: tuple[float, ...]) -> dict[str, float]:
    """Errors by fraction from an earlier launch's search.json. Raises StunError if the file does not fit the job."""
    again = "remove the file to search again"
    curve = load_record(file, {"error": {one_of(*map(str, fractions)): NUMBER}}, again)["error"]
    if not curve:
        raise StunError(f"{file}: error: must give numbers for some of {list(fractions)}; {again}")
    return curve


def finish(job: Job, plan: Plan, written: Written, run: Run, ranks: Ranks) -> dict:
    """Write the run's last files, the manifest at the end; returns the summary."""
    summary = summarise(job, plan, written, run, ranks) | {"seconds": time.perf_counter() - ranks.meter.began}

    def write() -> None:
        for layer, kept in zip([*plan.layers, *plan.mtp], written.kept, strict=True):
            layer.kept = kept
        name_successors(plan, job.arch, job.cfg.experts.dropped)
        write_json(run.folder / "plan.json", plan.to_json())
        layers = save_layers(job, written, run)
        config = load_yaml(run.folder / "config.yaml")["config"]
        write_card(run.folder, summary, config, layers, {})
        run.finish(summary)

    ranks.on_first(write)
    return summary
