"""Least time of a run: bytes over the rate of the disk, operations over the peak of the device."""

from stun.model.architecture import Architecture, expert_infos
from stun.planning.job import SHARE
from stun.preflight.memory import Footprint
from stun.preflight.solvers import solvers_flop
from stun.sparsify.joint_refit import FEW_STEPS, STEPS


def durations(footprint: Footprint, read: dict[str, list[int]], written: int, snapshots: int) -> dict[str, dict[str, float]]:
    """Least seconds to `read`, `compute` and `write`, by stream, which does all three at the same time. `read` is bytes by stream
    and rank, `written` bytes of the model, written by the last stream, and `snapshots` bytes of hidden states, spread over the
    streams that run the model."""
    job, launch, by_stream = footprint.job, footprint.launch, {}
    saving = [name for name, runs in job.streams.items() if runs and name not in TRIED]
    for name, ranks in read.items():
        node_bytes = max(sum(ranks[start : start + launch.per_node]) for start in range(0, len(ranks), launch.per_node))
        out_bytes = (written if name == "prune" else 0) + (snapshots / len(saving) if name in saving else 0)
        times, way = {"prune": (1, (1, STEPS)), "search": (len(job.fractions), (SHARE, FEW_STEPS))}.get(name, (0, (1, STEPS)))
        float32, tf32 = (times * flop / launch.world for flop in solvers_flop(footprint, *way))
        compute = stream_flop(footprint, name) / launch.world / launch.flops + float32 / launch.float32 + tf32 / launch.tf32
        write = out_bytes / launch.nodes / launch.write
        by_stream[name] = {"read": node_bytes / launch.read, "compute": compute, "write": write}
    return by_stream


def stream_flop(footprint: Footprint, stream: str) -> float:
    """FLOP of a stream's forwards, on all ranks together."""
    job, layers, cfg = footprint.job, len(footprint.arch.layers), footprint.job.cfg
    tokens, length = cfg.calibration.samples * cfg.calibration.length, cfg.calibration.length
    whole, inputs = (forward_flop(footprint.arch, tokens, length, gives_outputs) for gives_outputs in (True, False))
    if stream == "observe":
        return whole
    measured = footprint.passes * inputs if job.plan.zeros and cfg.sparsify.reads_inputs else 0
    if stream == "search":
        return (len(job.fractions) * (measured + whole * (job.refits + 2)) + 2 * whole) / SHARE
    if not job.streams["prune"]:
        return 0
    return measured + whole * (job.runs_dense + job.refits) + whole * (layers - 1) / layers  # the pruned last layer is not run


def forward_flop(arch: Architecture, tokens: int, length: int, gives_outputs: bool = True) -> int:
    """FLOP of all decoder layers on `tokens` in samples of `length`: two per active parameter of a token, and two per product of
    its attention scores and of their sum over the values, with half of the sample before it on average. Without outputs, experts
    end before their last matrix."""
    active = 0
    for layout in arch.layers:
        active += sum(arch.info(name).numel for name in layout.dense if len(arch.info(name).shape) == 2)
        last = arch.piece(layout, 0, "down_proj") if layout.experts and not gives_outputs else ()
        active += arch.top_k * (sum(info.numel for info in expert_infos(arch, layout)) - sum(info.numel for info in last))
    scores = length * arch.config.hidden_size * len(arch.layers)
    return 2 * (active + scores) * tokens
