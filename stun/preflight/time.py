"""Least time of a run: bytes over the rate of the disk, operations over the peak of the device."""

from __future__ import annotations

from dataclasses import dataclass

from stun.model.architecture import Architecture, expert_infos
from stun.preflight.memory import Footprint


@dataclass(frozen=True)
class Duration:
    """Least seconds of a stream's reading, computing and writing, which go on side by side."""

    read: float
    compute: float
    write: float

    @property
    def seconds(self) -> float:
        return max(self.read, self.compute, self.write)

    @property
    def bound(self) -> str:
        """Which of the three is the longest."""
        return max(("read", "compute", "write"), key=lambda name: getattr(self, name))


def durations(footprint: Footprint, read: dict[str, list[int]], written: int, snapshots: int) -> dict[str, Duration]:
    """Durations by stream. `read` are bytes by stream and rank, `written` those of the model, which the last stream writes, and
    `snapshots` those of hidden states, which the streams that run the model share."""
    job, launch, found = footprint.job, footprint.launch, {}
    saving = [name for name, runs in job.streams.items() if runs and name != "search"]
    for name, ranks in read.items():
        a_node = max(sum(ranks[start : start + launch.per_node]) for start in range(0, len(ranks), launch.per_node))
        out = (written if name == "prune" else 0) + (snapshots / len(saving) if name in saving else 0)
        compute = stream_flop(footprint, name) / launch.world / launch.flops
        found[name] = Duration(a_node / launch.read, compute, out / launch.nodes / launch.write)
    return found


def stream_flop(footprint: Footprint, stream: str) -> float:
    """FLOP of the forwards that a stream makes, on all ranks together."""
    job, layers, cfg = footprint.job, len(footprint.arch.layers), footprint.job.cfg
    tokens, length = cfg.calibration.samples * cfg.calibration.length, cfg.calibration.length
    whole, inputs = (forward_flop(footprint.arch, tokens, length, gives_outputs) for gives_outputs in (True, False))
    if stream == "observe":
        return whole
    measured = 0
    if job.streams["prune"]:
        blocks = max((footprint.blocks(index) for index in range(layers)), default=1)
        measured = blocks * (2 if cfg.sparsify.reconstruct else 1) * inputs
    if stream == "search":
        return len(job.fractions) * (measured + whole)
    return measured + (whole * (layers - 1) / layers if job.streams["prune"] else 0)  # nothing follows the last layer


def forward_flop(arch: Architecture, tokens: int, length: int, gives_outputs: bool = True) -> int:
    """FLOP of all decoder layers on so many tokens in samples of `length`: two for every parameter that a token meets, and for
    every product of its scores with the tokens before it (half of the sample on average) and of these with their values. Without
    outputs, experts end before their last matrix."""
    scores = length * arch.config.hidden_size * len(arch.layers)
    return 2 * (active_parameters(arch, gives_outputs) + scores) * tokens


def active_parameters(arch: Architecture, gives_outputs: bool = True) -> int:
    """Parameters of the decoder layers' matrices that a token meets."""
    total = 0
    for layout in arch.layers:
        total += sum(arch.info(name).numel for name in layout.dense if len(arch.info(name).shape) == 2)
        last = arch.piece(layout, 0, "down_proj") if layout.experts and not gives_outputs else ()
        total += arch.top_k * (sum(info.numel for info in expert_infos(arch, layout)) - sum(info.numel for info in last))
    return total
