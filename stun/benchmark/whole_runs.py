"""Whole runs: scaling with model size and tokens, with ranks, and with layers; cost of each method of removing single weights."""

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from stun.benchmark.checkpoints import bytes_of, qwen3_moe, random_checkpoint
from stun.benchmark.config import BenchmarkConfig, CheckpointShape
from stun.benchmark.processes import computed_flop, digests, figures, run_prune
from stun.checkpoint.reader import Checkpoint
from stun.config import PruneConfig, with_overrides
from stun.files import load_json
from stun.model.architecture import Architecture
from stun.model.precision import compute_dtype
from stun.preflight.hardware import measure_rates, read_speed, write_speed
from stun.pruning.job import prune
from stun.run.layer_records import FILE, PHASES
from stun.runtime.ranks import Ranks
from stun.runtime.units import count


def sizes(cfg: BenchmarkConfig) -> dict[str, tuple[CheckpointShape, int]]:
    """(Shape, calibration samples) of every run of `growth`, by name."""
    shape, samples = cfg.shape, cfg.calibration.samples
    by_name = {"base": (shape, samples)}
    for factor in cfg.factors:
        by_name |= {
            f"{factor} x layers": (replace(shape, layers=factor * shape.layers), samples),
            f"{factor} x experts": (replace(shape, experts=factor * shape.experts), samples),
            f"{factor} x tokens": (shape, factor * samples),
        }
    return by_name


def benchmark_growth(cfg: BenchmarkConfig, folder: Path, ranks: Ranks) -> dict:
    """Rows of all runs, each beside the longest of reading its bytes, computing its forwards and writing its model, and beside
    the first run. A run starts without its source in the system's cache, but its second stream may be served from there."""
    model, rows, rates = folder / "source", {}, {}
    for name, (shape, samples) in sizes(cfg).items():
        ranks.log(f"growth: {name}")
        random_checkpoint(model, shape, Path(cfg.model.path))
        arch = Architecture(Checkpoint.open(model), cfg.precision)
        rates = rates or measure_rates(arch.source, folder, ranks, compute_dtype(arch, ranks.device))
        summary = run_prune(replace(cfg, calibration=replace(cfg.calibration, samples=samples)), model, folder / "run")
        tokens = samples * cfg.calibration.length
        read, written = sum(summary["bytes_read"]), summary["bytes_written"]
        flop = computed_flop(summary, arch, tokens, cfg.calibration.length)
        limits = {"read": read / rates["read"], "compute": flop / rates["flops"], "write": written / rates["write"]}
        limit = max(limits.values())
        rows[name] = {
            "shape": asdict(shape),
            "tokens": tokens,
            **figures(summary),
            **{"bytes_read": read, "bytes_written": written, "flop": flop, "limits": limits, "limit": limit},
            "ratio": summary["seconds"] / limit,
            "cost": summary["seconds"] / (rows["base"] if rows else summary)["seconds"],
        }
        _clear(folder)
    return {"rates": rates, "runs": rows}


def benchmark_ranks(cfg: BenchmarkConfig, folder: Path, ranks: Ranks) -> dict:
    """Rows of the same run on each number of ranks in `cfg.worlds`, beside the first, and whether all tensors are identical."""
    model, rows = folder / "source", {}
    random_checkpoint(model, cfg.shape, Path(cfg.model.path))
    for world in cfg.worlds:
        ranks.log(f"ranks: {world}")
        summary = run_prune(cfg, model, folder / "run", world)
        tensors = digests(folder / "run" / "model")
        rows[str(world)] = {
            **figures(summary),
            "speed_up": next(iter(rows.values()), summary)["seconds"] / summary["seconds"],
            "tensors": len(tensors),
            "sha256": hashlib.sha256(json.dumps(sorted(tensors.items())).encode()).hexdigest(),
        }
        shutil.rmtree(folder / "run")
    return {"shape": asdict(cfg.shape), "runs": rows, "identical": len({row["sha256"] for row in rows.values()}) == 1}


def benchmark_depth(cfg: BenchmarkConfig, folder: Path, ranks: Ranks) -> dict:
    """Rows of runs with each number of layers in `cfg.depths`: memory, and the overlap of reading, computing and writing."""
    model, rows = folder / "source", {}
    for layers in cfg.depths:
        ranks.log(f"depth: {count(layers, 'layer')}")
        random_checkpoint(model, replace(cfg.shape, layers=layers), Path(cfg.model.path))
        summary = run_prune(cfg, model, folder / "run")
        measured = load_json(folder / "run" / FILE)
        streams = {name: _overlap(measured[name], phases) for name, phases in summary["phases"].items() if name in measured}
        rows[str(layers)] = {**figures(summary), "streams": streams}
        _clear(folder)
    return {"shape": asdict(cfg.shape), "runs": rows}


def _overlap(layers: list[dict], phases: dict[str, float]) -> dict:
    """Seconds in which a stream's layers were read, computed and written, its `total` seconds, and the `ratio` of the total to
    the longest of the three: 1 for perfect overlap."""
    sums = {phase: sum(layer["seconds"][phase] for layer in layers) for phase in PHASES}
    total = sum(phases.values())
    return {**sums, "total": total, "ratio": total / max(sums.values())}


def _clear(folder: Path) -> None:
    for name in ("source", "run"):
        shutil.rmtree(folder / name)


def method_configs(cfg: BenchmarkConfig, model: Path) -> dict[str, PruneConfig]:
    """Configuration of every method for the checkpoint `model`. Raises StunError for invalid overrides."""
    return {m: with_overrides(replace(cfg, model=replace(cfg.model, path=str(model))), o) for m, o in cfg.methods.items()}


def benchmark_weights(cfg: BenchmarkConfig, folder: Path, ranks: Ranks) -> dict:
    """Seconds and peak memory of every method of `cfg.methods` on one checkpoint, and seconds to read and write its bytes.

    No expert is removed, so that one stream does all the work. All ranks call this together.
    """
    model = folder / "source"
    ranks.on_first(lambda: random_checkpoint(model, cfg.shape, Path(cfg.model.path)))
    nbytes, rows = bytes_of(qwen3_moe(cfg.shape)), {}
    disk = ranks.on_first(lambda: nbytes / read_speed(Checkpoint.open(model)) + nbytes / write_speed(folder))
    for method, config in method_configs(cfg, model).items():
        summary = prune(replace(config, run_dir=str(folder / "run")), ranks)
        rows[method] = {"seconds": summary["seconds"], "peak_bytes": summary["peak_bytes"], "sparsity": summary["sparsity"]}
        ranks.on_first(lambda: shutil.rmtree(folder / "run"))
    return {"bytes": nbytes, "disk_seconds": disk, "methods": rows}
