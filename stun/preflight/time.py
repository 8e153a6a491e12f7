"""How long a run takes, from what it reads, computes and writes and what the machine does a second.

What a rank computes of a stream is the sum of: products and attention (FLOP), what the operations between these write and the
observers look at (bytes), weights that are counted for the records and weights that are chosen (on GPUs bytes, on CPUs timed here
on a few). What ranks send one another is not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from stun.config import SparsifyConfig
from stun.model.architecture import Architecture, expert_infos
from stun.model.layer_layout import LayerLayout
from stun.preflight.memory import Footprint
from stun.preflight.speeds import usual
from stun.run.kurtosis import power_sums
from stun.runtime.threads import Workers
from stun.sparsify.matrix import SOLVERS, sparsify

_SMALL, _LARGE = 256, 1024  # rows and columns of the matrices on which choosing weights is timed, by solvers and otherwise
_FLOAT = 4  # bytes: observers look at float32
_COUNTED, _CHOSEN = 18, 44  # bytes that the operations read and write for each weight that is counted, and that is chosen
_OBSERVED, _WRITTEN = 2, 3  # how often the experts' weights are counted in the first stream, and what is written in the last


@dataclass(frozen=True)
class Duration:
    """Seconds of a stream over so many layers, each of what goes on side by side."""

    read: float
    compute: float
    write: float
    layers: int

    @property
    def minutes(self) -> float:
        """The longest of the three, with the first layer's reading and the last one's writing, for which all wait."""
        return (max(self.read, self.compute, self.write) + (self.read + self.write) / self.layers) / 60

    @property
    def bound(self) -> str:
        """Which of the three is the longest."""
        return max(("read", "compute", "write"), key=lambda name: getattr(self, name))


def durations(footprint: Footprint, read: dict[str, list[int]], written: int, snapshots: int) -> dict[str, Duration]:
    """Of every stream, with bytes that each rank reads in it, that all write of the model in the last, and of hidden states in
    those that run it."""
    job, launch, found = footprint.job, footprint.launch, {}
    saving = [name for name, runs in job.streams.items() if runs and name != "search"]
    for name, ranks in read.items():
        a_node = max(sum(ranks[start : start + launch.per_node]) for start in range(0, len(ranks), launch.per_node))
        out = (written if name == "prune" else 0) + (snapshots / len(saving) if name in saving else 0)
        computing = _Computing(footprint).seconds(name) + max(ranks) / launch.link
        found[name] = Duration(a_node / launch.read, computing, out / launch.nodes / launch.write, len(job.arch.layers))
    return found


def forward_flop(arch: Architecture, tokens: int, length: int, gives_outputs: bool = True) -> int:
    """FLOP of all decoder layers on so many tokens in samples of `length`: two for every parameter that a token meets, and for
    every product of its scores with the tokens before it (half of the sample on average) and of these with their values. Without
    outputs, experts end before their last matrix."""
    return 2 * (active_parameters(arch, gives_outputs) + _scores(arch, length)) * tokens


def _scores(arch: Architecture, length: int) -> int:
    return length * arch.config.hidden_size * len(arch.layers)


def active_parameters(arch: Architecture, gives_outputs: bool = True) -> int:
    """Parameters of the decoder layers' matrices that a token meets."""
    total = 0
    for layout in arch.layers:
        total += sum(arch.info(name).numel for name in layout.dense if len(arch.info(name).shape) == 2)
        expert = sum(info.numel for info in expert_infos(arch, layout))
        total += arch.top_k * (expert if gives_outputs else expert - _last_matrix(arch, layout))
    return total


def _last_matrix(arch: Architecture, layout: LayerLayout) -> int:
    """Parameters of the matrix that gives an expert's output."""
    return sum(info.numel for info in arch.piece(layout, 0, "down_proj")) if layout.experts else 0


class _Computing:
    """What a rank computes, in seconds."""

    def __init__(self, footprint: Footprint):
        self.footprint, self.job, self.arch, self.speeds = footprint, footprint.job, footprint.arch, footprint.launch.speeds
        calibration = self.job.cfg.calibration
        self.tokens, self.length = calibration.samples * calibration.length, calibration.length
        self.batches = -(-calibration.samples // calibration.micro_batch)

    def seconds(self, stream: str) -> float:
        """Of a whole stream."""
        job, how, layers = self.job, self.job.cfg.sparsify, len(self.arch.layers)
        experts = sum(layout.num_experts * self._expert(layout) for layout in self.arch.layers)
        if stream == "observe":
            return self._run() + self._watch() + self._count(_OBSERVED * experts)
        once = self._choose()
        if job.streams["prune"]:
            blocks = max((self.footprint.blocks(index) for index in range(layers)), default=1)
            once += blocks * (2 if how.reconstruct else 1) * self._measure()
        if stream == "search":
            return len(job.fractions) * (once + self._run())
        propagate = self._run() * (layers - 1) / layers if job.streams["prune"] else 0.0  # nothing follows the last one
        return once + propagate + self._count(_WRITTEN * (job.plan.parameters - job.plan.dropped))

    def _shared(self, flop: float, scores: float, nbytes: float) -> float:
        """Seconds for a rank's share of FLOP of products and of attention and of bytes."""
        speeds = self.speeds
        return (flop / speeds.products + scores / speeds.attention + nbytes / speeds.between) / self.footprint.launch.world

    def _run(self, gives_outputs: bool = True) -> float:
        """All layers once; without outputs, experts end before their last matrix."""
        arch, itemsize = self.arch, self.footprint.dtype.itemsize
        flop, scores = 2 * active_parameters(arch, gives_outputs) * self.tokens, 2 * _scores(arch, self.length) * self.tokens
        written = sum(self.footprint.activations.made) * self.batches
        combined = 2 * _FLOAT * self._routed(lambda layout: arch.config.hidden_size) if gives_outputs else 0
        infos = [(layout, info) for layout in arch.layers for info in expert_infos(arch, layout)]
        others = sum(layout.num_experts * info.numel for layout, info in infos if info.dtype is not self.footprint.dtype)
        return self._shared(flop, scores, written + combined + others * itemsize * self.batches)

    def _measure(self) -> float:
        """All layers once for the inputs of their matrices."""
        arch, hidden = self.arch, self.arch.config.hidden_size
        seen = self._routed(lambda layout: hidden + _last_matrix(arch, layout) // hidden)
        return self._run(gives_outputs=False) + self._shared(0, 0, 2 * _FLOAT * seen)

    def _watch(self) -> float:
        """The experts' outputs, for their inner products."""
        return self._shared(0, 0, _FLOAT * self._routed(lambda layout: self.arch.config.hidden_size))

    def _routed(self, width: Callable[[LayerLayout], int]) -> int:
        """Entries of all rows that experts serve, of a layer's `width`."""
        return self.arch.top_k * self.tokens * sum(width(layout) for layout in self.arch.layers if layout.experts)

    def _expert(self, layout: LayerLayout) -> int:
        """Parameters of one expert."""
        return sum(info.numel for info in expert_infos(self.arch, layout))

    def _count(self, weights: int) -> float:
        """So many weights, for the records."""
        return self._for_each(_COUNTED, time_to_count, weights)

    def _choose(self) -> float:
        """The single weights that leave. Where values are refitted, the cost of a weight grows with the width."""
        how, width = self.job.cfg.sparsify, self.arch.config.hidden_size
        if not self.job.plan.zeros:
            return 0.0
        if _is_solved(how):
            return self._timed_here(time_to_choose(how) * max(1.0, width / _SMALL), self.job.plan.scope_size)
        return self._for_each(_CHOSEN, lambda: time_to_choose(how), self.job.plan.scope_size)

    def _for_each(self, nbytes: int, timed: Callable[[], float], weights: int) -> float:
        """So many weights, for each of which a GPU reads and writes `nbytes`, and a CPU takes what is `timed` here."""
        return self._shared(0, 0, nbytes * weights) if self.footprint.launch.gpu_memory else self._timed_here(timed(), weights)

    def _timed_here(self, seconds: float, weights: int) -> float:
        """A rank's share of so many weights, each of which takes `seconds` here: as much less as its memory is faster."""
        launch = self.footprint.launch
        return seconds * weights / launch.world * (launch.here / launch.speeds.between)


def _is_solved(how: SparsifyConfig) -> bool:
    return how.reconstruct or how.method in SOLVERS


def time_to_choose(how: SparsifyConfig) -> float:
    """Seconds for each weight of a matrix, on this machine's CPU."""
    size = _SMALL if _is_solved(how) else _LARGE
    generator = torch.Generator().manual_seed(0)
    weight_OD, rows_TD = torch.randn(size, size, generator=generator), torch.randn(2 * size, size, generator=generator)
    moment = rows_TD.T @ rows_TD if how.reads_grams else rows_TD.square().sum(0).double()
    own, half = moment if how.reads_inputs else None, weight_OD.numel() // 2
    return _time_of_each(lambda weight_OD: sparsify(how, weight_OD, own, half, "a sample"), weight_OD)


@cache
def time_to_count() -> float:
    """Seconds for each weight in bfloat16 whose powers are summed, on this machine's CPU."""
    return _time_of_each(lambda weight_OD: power_sums([weight_OD]), torch.randn(_LARGE, _LARGE, dtype=torch.bfloat16))


@cache
def _workers() -> Workers:
    """Those of this machine's CPU, whatever the ranks compute on."""
    return Workers(torch.device("cpu"))


def _time_of_each(work: Callable[[torch.Tensor], object], weight_OD: torch.Tensor) -> float:
    """Seconds of `work` for each weight, a matrix on every worker."""
    workers = _workers()
    seconds = usual(lambda: workers.map(work, [weight_OD] * workers.count))
    return seconds / weight_OD.numel() / workers.count
