"""One MoE decoder layer of an Arctic: seconds of its phases, the hardware's limits, and totals over many layers."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch

from stun.benchmark.checkpoints import arctic, write_checkpoint
from stun.benchmark.config import BenchmarkConfig, CheckpointShape
from stun.benchmark.limits import measure_rates
from stun.benchmark.phases import LayerPhases
from stun.checkpoint.reader import Checkpoint
from stun.model.architecture import Architecture
from stun.runtime.ranks import Ranks
from stun.stream.layer_stream import States, embed

_WARM = 8  # experts of the warm-up layer
_OBSERVE, _PRUNE = ("observe",), ("select", "records", "measure", "mask", "refit", "propagate")  # phases that compute


def layer_shape(cfg: BenchmarkConfig, device: torch.device) -> CheckpointShape:
    """Shape of the layer that is measured on `device`."""
    return replace((device.type == "cuda" and cfg.gpu_shape) or cfg.shape, layers=1)


def benchmark_layer(cfg: BenchmarkConfig, folder: Path, ranks: Ranks) -> dict:
    """Seconds of every phase beside its limit, and totals over `cfg.depth` layers. A layer with fewer experts of the same size
    runs before on one micro-batch, since first calls load kernels."""
    shape, calibration = layer_shape(cfg, ranks.device), cfg.calibration
    small_shape = replace(shape, experts=min(shape.experts, max(_WARM, shape.top_k)))
    one_batch = replace(calibration, samples=min(calibration.samples, calibration.micro_batch))
    _run(replace(cfg, target=cfg.target / 2, calibration=one_batch), small_shape, folder / "warm", ranks)
    shutil.rmtree(folder / "warm")
    phases = _run(cfg, shape, folder / "timed", ranks)
    rates = measure_rates(phases.arch.source, folder, ranks, phases.stream.dtype)
    rows = {name: _beside(seconds, phases.work.get(name), rates) for name, seconds in phases.seconds.items()}
    return {
        "shape": asdict(shape),
        "tokens": phases.tokens,
        "dtype": str(phases.stream.dtype).removeprefix("torch."),
        "rates": rates,
        "peak_bytes": phases.peak,
        "phases": rows,
        **_totals(phases.seconds, cfg.depth),
    }


def _run(cfg: BenchmarkConfig, shape: CheckpointShape, folder: Path, ranks: Ranks) -> LayerPhases:
    """Write a checkpoint with one layer of `shape`, run its phases and return them."""
    write_checkpoint(folder / "source", arctic(shape), ranks.device)
    arch = Architecture(Checkpoint.open(folder / "source"), cfg.precision)
    phases = LayerPhases(cfg, arch, _random_states(cfg, arch, shape.vocabulary, ranks), folder, ranks)
    phases.run()
    return phases


def _random_states(cfg: BenchmarkConfig, arch: Architecture, vocabulary: int, ranks: Ranks) -> States:
    """Normally distributed hidden states of the calibration's size, in its micro-batches."""
    calibration = cfg.calibration
    generator = torch.Generator(ranks.device).manual_seed(0)
    tokens_ST = torch.arange(calibration.samples * calibration.length).view(calibration.samples, -1) % vocabulary
    states = embed(arch, ranks, list(tokens_ST.split(calibration.micro_batch)), arch.source.read)
    for hidden_BTD in states.hidden:
        hidden_BTD.normal_(generator=generator)
    return states


def _beside(seconds: float, work: tuple[str, int] | None, rates: dict[str, float]) -> dict:
    """Seconds of a phase beside the least seconds for its `work`: (name of the limiting rate, bytes or FLOP)."""
    if work is None:
        return {"seconds": seconds}
    rate, amount = work
    limit, unit = amount / rates[rate], "flop" if rate == "flops" else "bytes"
    return {"seconds": seconds, unit: amount, "rate": rate, "limit": limit, "ratio": seconds / limit}


def _totals(seconds: dict[str, float], depth: int) -> dict:
    """Ratio of observing to the plain forward; the mask's share in both streams' phases (each reads the layer); seconds of both
    streams over `depth` layers, with reading, computing and writing at the same time, and for computing alone."""
    observe, prune = (sum(seconds.get(name, 0.0) for name in names) for names in (_OBSERVE, _PRUNE))
    stored = max(seconds["read"], observe) + max(seconds["read"], prune, seconds["write"])
    return {
        "observe_to_plain": seconds["observe"] / seconds["plain"],
        "mask_share": seconds.get("mask", 0.0) / (2 * seconds["read"] + observe + prune + seconds["write"]),
        "depth": depth,
        "seconds_with_storage": depth * stored,
        "seconds_without_storage": depth * (observe + prune),
    }
