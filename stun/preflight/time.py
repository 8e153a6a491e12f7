"""Least time of a run: bytes over the rate of the disk, operations over the peak of the device.

Operations are those of the layers' forwards, and of what is done with Gram matrices: their sums, SparseGPT, ALPS and refits.
"""

from stun.config import SparsifyConfig, SparsifyMethod
from stun.model.architecture import Architecture, expert_infos
from stun.planning.job import SHARE, TRIED
from stun.planning.make import TRIALS
from stun.preflight.memory import Footprint
from stun.sparsify.alps import CHECK_EVERY, REFIT_STEPS
from stun.sparsify.joint_refit import FEW_STEPS
from stun.sparsify.joint_refit import STEPS as JOINT_STEPS
from stun.sparsify.refit import STEPS

ROUNDS = 30  # of ALPS' ADMM, by matrix: docs/performance.md
FACTOR, INVERSE = 1 / 3, 2  # D^3 operations of a Cholesky factor [D, D], and of an inverse from it
IN_TF32 = 3  # products on a GPU for one of float32 (stun.runtime.matmul)


def durations(footprint: Footprint, read: dict[str, list[int]], written: int, snapshots: int) -> dict[str, dict[str, float]]:
    """Least seconds to `read`, `compute` and `write`, by stream, which does all three at the same time. `read` is bytes by stream
    and rank, `written` bytes of the model, written by the last stream, and `snapshots` bytes of hidden states, spread over the
    streams that run the model."""
    job, launch, by_stream = footprint.job, footprint.launch, {}
    saving = [name for name, runs in job.streams.items() if runs and name not in TRIED]
    few = {"budget": (len(TRIALS), SHARE, FEW_STEPS), "search": (len(job.fractions), SHARE, FEW_STEPS)}
    solving = {"prune": (1, 1, JOINT_STEPS)} | few
    for name, ranks in read.items():
        node_bytes = max(sum(ranks[start : start + launch.per_node]) for start in range(0, len(ranks), launch.per_node))
        out_bytes = (written if name == "prune" else 0) + (snapshots / len(saving) if name in saving else 0)
        times, share, steps = solving.get(name, (0, 1, 0))
        float32, tf32 = (times * flop / launch.world for flop in solvers_flop(footprint, share, steps, name != "budget"))
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
    if stream == "budget":
        return (len(TRIALS) * whole * (job.refit_runs + 2) + 2 * whole) / SHARE
    measured = footprint.passes * inputs if job.plan.zeros and cfg.sparsify.reads_inputs else 0
    if stream == "search":
        return (len(job.fractions) * (measured + whole * (job.refit_runs + 2)) + 2 * whole) / SHARE
    if not job.streams["prune"]:
        return 0
    return (
        measured + whole * (job.runs_dense + job.refit_runs) + whole * (layers - 1) / layers
    )  # the pruned last layer is not run


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


def solvers_flop(footprint: Footprint, share: int, steps: int, has_masks: bool) -> tuple[float, float]:
    """FLOP of all layers in float32, and in TF32 where the device has it: on all ranks together, on one sample in `share`, with
    so many `steps` of the joint refit, and with or without masks of single weights."""
    job, totals, times = footprint.job, [], IN_TF32 if footprint.is_gpu else 1
    calibration, config = job.cfg.calibration, job.cfg.sparsify
    tokens = calibration.samples * calibration.length / share
    for layout, plan in zip(job.arch.layers, job.plan.layers, strict=True):
        experts = len(plan.clusters)
        if job.refits and experts:
            totals.append((joint_flop(*footprint.arch.down_shape(layout), tokens * job.arch.top_k, experts, steps), 0))
        if not (has_masks and config.reads_grams and job.plan.zeros):
            continue
        matrices = [(1, shape, tokens, layout.closes(name)) for name, shape in footprint.matrices(layout).items()]
        for part, shape in footprint.parts(layout).items():
            matrices.append((experts, shape, tokens * job.arch.top_k / experts, part == "down_proj"))
        for count, shape, inputs, closes in matrices:
            float32, products, grams = matrix_flop(config, *shape, inputs, closes)
            totals.append((count * float32, count * (times * products + grams)))
    return tuple(map(sum, zip(*totals, strict=True))) or (0, 0)


def joint_flop(rows: int, columns: int, tokens: float, experts: int, steps: int) -> float:
    """FLOP of the joint refit of a layer's down projections [rows, columns], `tokens` in all: Gram matrices, their factors, then
    steps of an output, a gradient and two solves with a factor."""
    step = 4 * tokens * rows * columns + 2 * experts * rows * columns**2
    return 2 * tokens * columns**2 + experts * FACTOR * columns**3 + steps * step


def matrix_flop(config: SparsifyConfig, rows: int, columns: int, tokens: float, closes: bool) -> tuple[float, float, float]:
    """FLOP of one matrix [rows, columns] with `tokens` inputs: in float32; of products with its Gram matrix; of that matrix. One
    that `closes` its block is refitted twice."""
    gram, products, factors, pairs = 2 * tokens * columns**2, 0.0, 0.0, 0.0
    if config.method in (SparsifyMethod.sparsegpt, SparsifyMethod.alps):
        products += 2  # the errors of its result and of Wanda's mask
    if config.method is SparsifyMethod.sparsegpt:
        factors += 2 * FACTOR + INVERSE + rows / columns  # and half a product of errors
    if config.method is SparsifyMethod.alps:
        products += 1 + ROUNDS + 1 + REFIT_STEPS
        factors += ROUNDS / CHECK_EVERY * (FACTOR + INVERSE)
    if config.reconstruct:
        products += (1 + closes) * (1 + STEPS + 3)
        pairs = 2 * gram * closes
    return factors * columns**3 + pairs, products * 2 * rows * columns**2, gram
