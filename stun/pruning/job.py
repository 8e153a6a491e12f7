"""The whole job as one readable list: check, observe, plan, prune, write."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from stun.checkpoint.compressed import mark
from stun.checkpoint.reader import COMPRESSED_INDEX, INDEX, TEMPLATES, Checkpoint
from stun.checkpoint.writer import copy_extras, extras, write_index
from stun.config import Budget, PruneConfig, StunError
from stun.data import Samples, calibration_samples, load_tokenizer
from stun.files import load_json, load_yaml, write_json
from stun.model import runtimes as serving
from stun.model.architecture import Architecture
from stun.model.precision import check_alike, compute_dtype
from stun.planning.budget import LayerSize, check_pattern, experts_to_drop, layer_quotas, make_budget, measure_layers, reachable
from stun.planning.job import make_job
from stun.planning.layer_ratios import check_ratios, set_ratios
from stun.planning.make import check_loadable, make_plan, reads_statistics
from stun.planning.plan import Plan
from stun.planning.plan_file import read_plan
from stun.planning.protection import check_listed
from stun.planning.validation import validate
from stun.preflight.job import preflight
from stun.pruning.layers import PruneResult, prune_layers
from stun.pruning.search import check_samples, search_fraction
from stun.pruning.shards import hub_names, keep_only, write_shard
from stun.pruning.summary import save_layers, save_observed, summarise
from stun.report.model_card import CARD, SOURCE_CARD, keep_source_card, write_card
from stun.run.folder import Run
from stun.run.identity import fingerprint, observed, plain
from stun.run.ledger import Ledger
from stun.run.ownership import MARK, own_folder, run_id
from stun.run.recorder import Recorder
from stun.runtime.ranks import Ranks
from stun.runtime.timers import Meter
from stun.statistics.observe import observe
from stun.statistics.store import Statistics
from stun.stream.layer_stream import embed
from stun.tracking.tracker import check_tracking, tracked


def prune(cfg: PruneConfig, ranks: Ranks) -> dict:
    """Prune the checkpoint at `cfg.model.path` into `cfg.run_dir`/model; returns the run's summary.

    All ranks call this together. Raises StunError before any work starts where the request cannot be met.
    """
    validate(cfg)
    ranks.on_first(lambda: check_tracking(cfg.tracking))
    started, ranks.meter = time.perf_counter(), Meter()
    ranks.reset_peak_memory()
    source = Checkpoint.open(cfg.model.path)
    arch = Architecture(source, cfg.precision)
    check_alike(arch, ranks)
    sizes = measure_layers(arch, cfg.sparsify.scope)
    given = read_plan(cfg.plan, arch, sizes, cfg, cfg.target) if cfg.plan else None
    is_auto = cfg.experts.fraction == "auto" and not given
    fractions = reachable(cfg, arch, sizes) if is_auto else []
    drops, budget = ([], None) if is_auto else _request(cfg, arch, sizes, given)
    check_ratios(cfg.sparsify, arch)
    check_pattern(cfg.sparsify, arch)
    if not given:
        check_loadable(cfg, arch)
        check_listed(cfg, arch, drops or [0] * len(arch.layers))
    if not (Path(cfg.run_dir) / "manifest.json").is_file():  # a finished run has nothing left to do
        preflight(make_job(cfg, arch, sizes, given), ranks)
    samples = ranks.on_first(lambda: _samples(cfg, arch)) if cfg.target else None
    if is_auto:
        check_samples(samples)
    run = ranks.on_first(lambda: Run.open(cfg.run_dir, fingerprint(cfg, source, samples)))
    finished = ranks.on_first(lambda: run.summary)
    if finished:
        ranks.on_first(run.clear)  # the launch that finished it may have been killed before it did
        ranks.log(f"{cfg.run_dir} is complete already")
        return finished

    stats = Statistics(run.stats)
    if cfg.statistics and samples:
        stats = ranks.on_first(
            lambda: _share(cfg.statistics, observed(cfg, arch.source, samples, compute_dtype(arch, ranks.device)))
        )
    with tracked(cfg.tracking, run.folder, plain(cfg), ranks) as tracking:
        if is_auto:
            _observe(cfg, arch, samples, ranks, run)
            cfg = _search(cfg, arch, sizes, samples, fractions, ranks, run)
            drops, budget = _request(cfg, arch, sizes, None)
        ranks.log(f"prune {cfg.model.path} | {_describe(arch, budget, drops)} | {ranks.world} ranks on {ranks.device.type}")
        _say_what_loads(arch, drops, given is None and cfg.experts.budget is Budget["global"], ranks)
        chooses = any(drops) and not given and reads_statistics(cfg.experts)
        if chooses or (budget.zeros and cfg.sparsify.counts_outliers):
            _observe(cfg, arch, samples, ranks, run)
        plan = ranks.on_first(lambda: _save_plan(_plan(cfg, arch, sizes, drops, given, run), run))
        result = _prune_and_write(cfg, arch, sizes, plan, samples, ranks, run)
        summary = summarise(cfg, arch, plan, result, run, ranks, time.perf_counter() - started)
        ranks.on_first(lambda: _finish(cfg, arch, plan, result, run, summary))
        tracking.summary = summary
    ranks.log(f"wrote {run.model} | sparsity {summary['sparsity']:.5f} | {summary['seconds']:.1f}s")
    return summary


def _request(cfg: PruneConfig, arch: Architecture, sizes: list[LayerSize], given: Plan | None) -> tuple[list[int], Plan]:
    """Experts to drop by layer, and what must leave beside them. Raises StunError where that cannot be."""
    drops = [layer.experts - len(layer.clusters) for layer in given.layers] if given else experts_to_drop(cfg, sizes, arch)
    return drops, make_budget(cfg, sizes, [size.experts - drop for size, drop in zip(sizes, drops, strict=True)])


def _search(
    cfg: PruneConfig, arch: Architecture, sizes: list[LayerSize], samples: Samples, fractions: list[float], ranks: Ranks, run: Run
) -> PruneConfig:
    """The configuration with the fraction of least held-out error; the curve goes into search.json and search.png."""
    from stun.report.figure import curve_figure  # with matplotlib, which no other run needs

    file = run.folder / "search.json"
    curve = ranks.on_first(lambda: _read_curve(file, fractions) if file.is_file() else None)
    if curve is None:
        found = search_fraction(cfg, arch, sizes, samples, fractions, ranks, run.stats)
        curve = {str(fraction): error for fraction, error in found.items()}
        ranks.on_first(lambda: curve_figure(curve, run.folder / "search.png"))
        ranks.on_first(lambda: write_json(file, {"error": curve}))
    best = float(min(curve, key=curve.get))
    for fraction, error in curve.items():
        ranks.log(f"experts.fraction={fraction}: held-out error {error:.5f}{' <- chosen' if float(fraction) == best else ''}")
    return replace(cfg, experts=replace(cfg.experts, fraction=best))


def _read_curve(file: Path, fractions: list[float]) -> dict[str, float]:
    """What an earlier launch found. Raises StunError where it cannot have."""
    curve = load_json(file).get("error")
    is_known = isinstance(curve, dict) and curve and curve.keys() <= {str(fraction) for fraction in fractions}
    if not is_known or not all(type(error) in (int, float) for error in curve.values()):
        raise StunError(f"{file}: error: must give numbers for some of {fractions}; remove the file to search again")
    return curve


def _say_what_loads(arch: Architecture, drops: list[int], is_global: bool, ranks: Ranks) -> None:
    """Before the work, what its result will be unusual in."""
    if arch.source.is_fp8:
        ranks.log("the source is fp8: weights are multiplied out and written in bfloat16")
    if arch.mtp and any(drops):
        keep = "as many experts as every layer, all where layers differ" if is_global else "as many experts as every layer"
        ranks.log(f"{len(arch.mtp)} multi-token-prediction heads keep {keep}; no single weights leave them")
    experts = {layout.num_experts - drop for layout, drop in zip(arch.layers, drops, strict=True) if layout.experts}
    if not is_global and len(experts) == 1:
        notice = serving.warning(max(layout.num_experts for layout in arch.layers), experts.pop())
        if notice:
            ranks.log(f"warning: {notice}")
    elif any(drops):
        ranks.log("warning: layers may keep different numbers of experts; only this package loads that")


def _samples(cfg: PruneConfig, arch: Architecture) -> Samples:
    return calibration_samples(cfg.calibration, load_tokenizer(arch.source.folder), arch.config.vocab_size)


def _describe(arch: Architecture, budget: Plan, drops: list[int]) -> str:
    experts = sum(layout.num_experts for layout in arch.layers)
    planned = (budget.dropped + budget.zeros) / budget.parameters
    reached = "" if abs(planned - budget.target) < 5e-5 else f" ({planned:.4f} with the pattern)"
    return (
        f"{arch.config.model_type}, {len(arch.layers)} layers, {budget.parameters / 1e6:.1f}M parameters in them | target "
        f"{budget.target:g}{reached}: {sum(drops)} of {experts} experts leave, then {budget.ratio:.3f} of the weights in scope"
    )


def _observe(cfg: PruneConfig, arch: Architecture, samples: Samples, ranks: Ranks, run: Run) -> None:
    """The first stream, unless its statistics are all on disk."""
    if not ranks.on_first(lambda: run.stats.complete):
        size = cfg.calibration.micro_batch
        states = embed(arch, ranks, samples.batches(size), arch.source.read)
        recorder, outliers = Recorder(run.folder, "observe", ranks, len(arch.layers)), cfg.sparsify.counts_outliers
        observe(arch, states, ranks, run.stats.save, samples.source_of_batch(size), outliers, recorder)
        ranks.on_first(lambda: run.stats.finish(observed(cfg, arch.source, samples, compute_dtype(arch, ranks.device))))


def _share(folder: str, wanted: dict) -> Statistics:
    """The statistics in another run's folder. Raises StunError where they are not those that this run would take."""
    shared = Statistics(Path(folder) / "stats")
    shared.check(wanted)
    return shared


def take_statistics(cfg: PruneConfig, ranks: Ranks) -> None:
    """The first stream alone: `cfg.run_dir`/stats, from which plans of any kind can be made and runs pruned.

    Raises StunError before any work starts where the request cannot be met.
    """
    validate(cfg)
    ranks.on_first(lambda: check_tracking(cfg.tracking))
    arch = Architecture(Checkpoint.open(cfg.model.path), cfg.precision)
    check_alike(arch, ranks)
    samples = ranks.on_first(lambda: _samples(cfg, arch))
    dtype, outliers = compute_dtype(arch, ranks.device), cfg.sparsify.counts_outliers
    identity = ranks.on_first(lambda: observed(cfg, arch.source, samples, dtype) | {"outliers": outliers})
    run = ranks.on_first(lambda: Run.open(cfg.run_dir, {"statistics": identity}))
    ranks.log(f"observe {cfg.model.path} | {sum(samples.sources.values())} samples of {cfg.calibration.length} tokens")
    with tracked(cfg.tracking, run.folder, plain(cfg), ranks):
        _observe(cfg, arch, samples, ranks, run)
    ranks.on_first(lambda: save_observed(run))
    ranks.on_first(run.clear)
    ranks.log(f"wrote {run.stats}")


def _plan(cfg: PruneConfig, arch: Architecture, sizes: list[LayerSize], drops: list[int], given: Plan | None, run: Run) -> Plan:
    """The plan given, with its ratios, or one made from the statistics."""
    if given:
        set_ratios(given, cfg.sparsify, arch, sizes, run.stats)
    return given or make_plan(cfg, arch, sizes, drops, run.stats if run.stats.complete else None)


def _save_plan(plan: Plan, run: Run) -> Plan:
    write_json(run.folder / "plan.json", plan.to_json())
    return plan


def _prune_and_write(
    cfg: PruneConfig, arch: Architecture, sizes: list[LayerSize], plan: Plan, samples, ranks: Ranks, run: Run
) -> PruneResult:
    """The second stream and the files around it; the index comes last."""
    quotas, plans = layer_quotas(sizes, plan), [*plan.layers, *plan.mtp]
    recorder = Recorder(run.folder, "prune", ranks, len(arch.layers))
    write = partial(write_shard, run.model, is_compressed=cfg.compress)
    outer: dict[str, torch.Tensor] = {}
    outside = ranks.on_first(lambda: _write_outside(arch, run, write, recorder.ledger.finished(), len(plans), outer))
    states = None
    if plan.zeros and cfg.sparsify.reads_inputs:
        batches = samples.batches(cfg.calibration.micro_batch)
        states = embed(arch, ranks, batches, lambda name: outer[name] if outer else arch.source.read(name))
    outer.clear()
    result = prune_layers(arch, states, plans, quotas, cfg.sparsify, ranks, recorder, write)
    result.files.insert(0, outside)
    ranks.on_first(lambda: _write_around(cfg, arch, result, run))
    return result


def _write_outside(
    arch: Architecture, run: Run, write, finished: list[list[dict]], layers: int, outer: dict[str, torch.Tensor]
) -> dict:
    """The entry of the file with everything outside the layers, which is written where an interrupted launch did not, after
    its other remains are removed. `outer` then holds these tensors."""
    own_folder(run.model, run_id(run.folder))
    ledger = Ledger(run.folder / "progress", "outside")
    known = [entry for entries in ledger.finished() for entry in entries]
    files = known + [entry for entries in finished for entry in entries]
    if len(finished) == layers:  # it may have been interrupted while it gave its files their final names
        for file, name in hub_names(files).items():
            if (run.model / name).is_file():
                (run.model / name).rename(run.model / file)
    beside = {MARK, "config.json", INDEX, COMPRESSED_INDEX, CARD, SOURCE_CARD, TEMPLATES, *extras(arch.source.folder)}
    keep_only(run.model, files, beside)
    if not known:
        outer |= {name: arch.source.read(name) for name in arch.outer}
        known = [write("outside.safetensors", outer)]
        ledger.record(0, 0, 1, known[0])
    return known[0]


def _write_around(cfg: PruneConfig, arch: Architecture, result: PruneResult, run: Run) -> None:
    """Final names for all files, and what belongs to them; the index comes last."""
    names = hub_names(result.files)
    for file, name in names.items():
        (run.model / file).rename(run.model / name)
    copy_extras(arch.source.folder, run.model, skip=(CARD,))
    keep_source_card(arch.source.folder, run.model)
    config = arch.pruned_config([len(k) for k in result.kept[: len(arch.layers)]])
    write_json(run.model / "config.json", mark(config) if cfg.compress else config)
    shards = {names[entry["file"]]: entry["tensors"] for entry in result.files if entry["file"]}
    write_index(run.model, dict(sorted(shards.items())), COMPRESSED_INDEX if cfg.compress else INDEX)


def _finish(cfg: PruneConfig, arch: Architecture, plan: Plan, result: PruneResult, run: Run, summary: dict) -> None:
    for layer, kept in zip([*plan.layers, *plan.mtp], result.kept, strict=True):
        layer.kept = kept
    write_json(run.folder / "plan.json", plan.to_json())
    layers = save_layers(cfg, arch, result, run)
    config = load_yaml(run.folder / "config.yaml")["config"]
    write_card(run.folder, summary, config, layers, {})
    run.finish(summary)
