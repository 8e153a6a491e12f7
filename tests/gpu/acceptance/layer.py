"""One layer of Arctic's shape with a quarter of its experts: `jobs.benchmark case=layer`, its memory beside preflight's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gpu.acceptance.rows import Row
from stun.benchmark.config import BenchmarkConfig
from stun.benchmark.layer import benchmark_layer
from stun.checkpoint.reader import Checkpoint
from stun.config import Device
from stun.model.architecture import Architecture
from stun.planning.budget import measure_layers
from stun.planning.job import Job, plan_of_counts
from stun.preflight import hardware
from stun.preflight.hardware import GIB, gpu_base, resident, this_launch
from stun.preflight.job import SURE
from stun.preflight.memory import Footprint
from stun.runtime.ranks import Ranks
from stun.settings.compose import composed

_SMALL = ["gpu_shape.hidden=128", "gpu_shape.expert_width=64", "gpu_shape.experts=8"]
_SMALL += ["calibration.samples=4", "calibration.length=16", "calibration.micro_batch=2"]


def check(folder: Path, pretend: bool) -> Iterator[Row]:
    ranks = Ranks(Device.cuda)
    if pretend:
        hardware._LARGE["cuda"] = (64, 64)  # a product of the size for GPUs would take a processor minutes
    cfg = composed("benchmark", ["case=layer", f"run_dir={folder}", *(_SMALL if pretend else ["gpu_shape.experts=32"])])
    result = benchmark_layer(cfg, folder, ranks)
    for phase, found in result["phases"].items():
        yield Row(phase, found["seconds"], "s", found.get("limit"), f"limit by {found.get('rate')}")
    for rate, unit, size in (("read", "GiB/s", GIB), ("write", "GiB/s", GIB), ("copy", "GiB/s", GIB), ("flops", "TFLOP/s", 1e12)):
        yield Row(f"limit: {rate}", result["rates"][rate] / size, unit)
    for name in ("seconds_with_storage", "seconds_without_storage"):
        yield Row(f"{name.replace('_', ' ')}, {result['depth']} such layers", result[name], "s")
    peak, estimate = result["peak_bytes"], _estimate(cfg, folder / "timed" / "source", ranks)
    yield Row("peak memory of tensors", peak / GIB, "GiB", estimate / GIB, "preflight", pretend or SURE * peak <= estimate)


def _estimate(cfg: BenchmarkConfig, source: Path, ranks: Ranks) -> int:
    """Preflight's bytes of tensors on the GPU for the layer."""
    arch = Architecture(Checkpoint.open(source), cfg.precision)
    sizes = measure_layers(arch, cfg.sparsify.scope)
    job = Job(cfg, arch, sizes, plan_of_counts(cfg, arch, sizes))
    return Footprint(job, this_launch(ranks, arch, cfg, resident())).peak().gpu - gpu_base(ranks.world)
