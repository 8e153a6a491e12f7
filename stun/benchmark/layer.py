"""One MoE decoder layer of an Arctic: seconds of its phases, the hardware's limits, and totals over many layers.

The phases are those of the two streams in their order, each timed until the device has finished:

read       from the disk, not its cache, to the device
plain      the forward alone
observe    the forward with the first stream's statistics
select     the plan from these statistics, and the representatives of its clusters
records    both streams' records of the weights: kurtosis before and after, non-zero counts
measure    the forward with the inputs' moments
mask       selection and removal of single weights
propagate  the forward of the pruned layer
write      from the device to the disk, synced
"""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch

from stun.benchmark.checkpoints import arctic, forget, write_checkpoint
from stun.benchmark.config import BenchmarkConfig, CheckpointShape
from stun.checkpoint.reader import Checkpoint
from stun.model.architecture import Architecture
from stun.planning.budget import LayerQuota, layer_quotas, measure_layers
from stun.planning.job import Job, plan_of_counts
from stun.planning.make import make_plan
from stun.planning.plan import LayerPlan
from stun.preflight.hardware import measure_rates, wait_for
from stun.preflight.time import forward_flop
from stun.pruning.mask import Masking
from stun.pruning.representatives import keep_representatives
from stun.pruning.shards import own_tensors, write_shard
from stun.run.layer_metrics import WeightPowers, expert_powers, nonzero_by_kind
from stun.runtime.ranks import Ranks
from stun.runtime.timers import Meter
from stun.statistics.observe import Watcher
from stun.statistics.store import Statistics
from stun.stream.expert_parallel import Layer
from stun.stream.layer_stream import LayerStream, States, embed, even_owners

_WARM = 8  # experts of the warm-up layer
_PRUNE = ("select", "records", "measure", "mask", "refit", "propagate")  # phases of the second stream that compute
_STREAM = "layer"
_FORWARDS = ("plain", "observe", "measure", "propagate")


def layer_shape(cfg: BenchmarkConfig, device: torch.device) -> CheckpointShape:
    """Shape of the layer that is measured on `device`."""
    return replace((device.type == "cuda" and cfg.gpu_shape) or cfg.shape, layers=1)


def benchmark_layer(cfg: BenchmarkConfig, folder: Path, ranks: Ranks) -> dict:
    """Seconds of every phase beside its limit, and totals over `cfg.depth` layers. A layer with fewer experts of the same size
    runs before on one micro-batch, since first calls load kernels."""
    shape, calibration = layer_shape(cfg, ranks.device), cfg.calibration
    small_shape = replace(shape, experts=min(shape.experts, max(_WARM, shape.top_k)))
    one_batch = replace(calibration, samples=min(calibration.samples, calibration.micro_batch))
    LayerPhases(replace(cfg, target=cfg.target / 2, calibration=one_batch), small_shape, folder / "warm", ranks).run()
    shutil.rmtree(folder / "warm")
    phases = LayerPhases(cfg, shape, folder / "timed", ranks)
    phases.run()
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
    observe, prune = seconds["observe"], sum(seconds.get(name, 0.0) for name in _PRUNE)
    stored = max(seconds["read"], observe) + max(seconds["read"], prune, seconds["write"])
    return {
        "observe_to_plain": seconds["observe"] / seconds["plain"],
        "mask_share": seconds.get("mask", 0.0) / (2 * seconds["read"] + observe + prune + seconds["write"]),
        "depth": depth,
        "seconds_with_storage": depth * stored,
        "seconds_without_storage": depth * (observe + prune),
    }


class _DeviceMeter(Meter):
    """Meter that waits for the device at the end of every phase."""

    def __init__(self, device: torch.device):
        self.device = device
        super().__init__()

    def enter(self, phase: str) -> None:
        wait_for(self.device)
        super().enter(phase)


class LayerPhases:
    """One layer of `shape`, from disk to disk: `seconds` by phase, `work` by phase as (limiting rate, bytes or FLOP), and `peak`
    memory in bytes."""

    def __init__(self, cfg: BenchmarkConfig, shape: CheckpointShape, folder: Path, ranks: Ranks):
        write_checkpoint(folder / "source", arctic(shape), ranks.device)
        self.arch = arch = Architecture(Checkpoint.open(folder / "source"), cfg.precision)
        self.cfg, self.folder, self.ranks, self.states = cfg, folder, ranks, _random_states(cfg, arch, shape.vocabulary, ranks)
        self.layout, sizes = arch.layers[0], measure_layers(arch, cfg.sparsify.scope)
        self.job = Job(cfg, arch, sizes, plan_of_counts(cfg, arch, sizes))
        self.stream = LayerStream(arch, ranks, arch.layers, [even_owners(self.layout, ranks.world)])
        self.tokens = cfg.calibration.samples * cfg.calibration.length
        self.work: dict[str, tuple[str, int]] = {}
        self.peak = 0

    @property
    def seconds(self) -> dict[str, float]:
        return dict(self.meter.seconds[_STREAM])

    def run(self) -> None:
        """Run all phases in the order of the two streams."""
        self.meter = self.ranks.meter = _DeviceMeter(self.ranks.device)
        self.ranks.reset_peak_memory()
        forget(self.arch.source.folder)
        before = self.arch.source.bytes_read
        self.meter.begin(_STREAM)
        layer = next(iter(self.stream))
        self.meter.enter("plain")
        self._forward(layer)
        self.meter.enter("observe")
        statistics = self._observe(layer)
        self._count_forwards()
        self.work["read"] = ("read", self.arch.source.bytes_read - before)
        self._prune(layer, statistics)
        self.meter.end()
        self.peak = self.ranks.peak_memory()
        layer.release()

    def _forward(self, layer: Layer, *observers) -> None:
        self.stream.build(layer)
        self.stream.run(layer, self.states, *observers)

    def _observe(self, layer: Layer) -> Statistics:
        """Statistics of the layer, saved outside the timed phases."""
        watcher = Watcher(self.layout.num_experts, [0] * self.states.total, self.ranks)
        self._forward(layer, watcher)
        totals = watcher.totals(layer)
        self.meter.enter("")
        statistics = Statistics(self.folder / "stats")
        statistics.save(0, {name: tensor.cpu().contiguous() for name, tensor in totals.items()})
        calibration = self.cfg.calibration
        about = {"model": "", "sources": {"all": calibration.samples}, "calibration_tokens": ""}
        statistics.finish({**about, "micro_batch": calibration.micro_batch})
        return statistics

    def _prune(self, layer: Layer, statistics: Statistics) -> None:
        """The second stream's phases of a layer."""
        enter, stream, cfg = self.meter.enter, self.stream, self.cfg
        enter("select")
        plan = make_plan(self.job, statistics)
        layer_plan = plan.layers[0]
        enter("records")
        expert_powers(layer, self.ranks.workers)  # the first stream's
        before, powers = _expert_bytes(layer), WeightPowers(stream, layer)
        enter("select")
        statistics_bytes = sum(file.stat().st_size for file in statistics.folder.iterdir())
        self.work["select"] = ("copy", _bytes_to_choose(layer, layer_plan) + statistics_bytes)
        kept = keep_representatives(stream, layer, layer_plan)
        enter("records")
        powers.experts_removed(is_changed=layer_plan.mean or len(kept) < layer_plan.experts)
        enter("measure")
        quota = layer_quotas(self.job.sizes, plan)[0]
        stream.build(layer)
        Masking(stream, layer, self.states, quota, cfg.sparsify).run()
        enter("propagate")
        self._forward(layer)
        enter("records")
        powers.weights_removed()
        tensors = own_tensors(stream, layer)
        nonzero_by_kind(stream, layer)
        enter("write")
        entry = write_shard(self.folder, None, False, "layer.safetensors", tensors, {})
        enter("")
        self.work["mask"] = ("copy", 2 * _bytes_to_mask(layer, quota))  # every matrix is read and written
        dense, after = sum(layer.dense[name].nbytes for name in self.layout.linears), _expert_bytes(layer)
        examined = 2 * dense + 2 * before + after * (2 if len(kept) < layer_plan.experts else 1)
        self.work["records"] = ("copy", examined + sum(tensor.nbytes for tensor in tensors.values()))
        self.work["write"] = ("write", sum(entry["tensors"].values()))

    def _count_forwards(self) -> None:
        """Set the FLOP of the forwards, without the observers and without the extra forwards for blocks of Gram matrices."""
        for name in _FORWARDS:
            if name != "measure" or self.cfg.sparsify.reads_inputs:
                flop = forward_flop(self.arch, self.tokens, self.cfg.calibration.length, gives_outputs=name != "measure")
                self.work[name] = ("flops", flop)


def _expert_bytes(layer: Layer) -> int:
    return sum(weight.nbytes for expert in layer.experts.values() for weight in expert.values())


def _bytes_to_choose(layer: Layer, plan: LayerPlan) -> int:
    """Bytes of the experts that are compared with the mean of their cluster."""
    compared = [] if plan.kept else [expert for cluster in plan.clusters if len(cluster) > 2 for expert in cluster]
    return sum(weight.nbytes for expert in compared for weight in layer.experts[expert].values())


def _bytes_to_mask(layer: Layer, quota: LayerQuota) -> int:
    """Bytes of the matrices from which weights are removed."""
    dense = sum(layer.dense[name].nbytes for name, count in quota.dense.items() if count)
    experts = zip(layer.kept, quota.experts, strict=True)
    return dense + sum(layer.experts[expert][part].nbytes for expert, counts in experts for part, n in counts.items() if n)
