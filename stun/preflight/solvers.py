"""Floating-point operations of what is done with Gram matrices: their sums, SparseGPT, ALPS and refits."""

from stun.config import SparsifyConfig, SparsifyMethod
from stun.preflight.memory import Footprint
from stun.sparsify.alps import CHECK_EVERY, REFIT_STEPS
from stun.sparsify.joint_refit import STEPS as JOINT_STEPS
from stun.sparsify.refit import STEPS

ROUNDS = 30  # of ALPS' ADMM, by matrix: docs/performance.md
FACTOR, INVERSE = 1 / 3, 2  # D^3 operations of a Cholesky factor [D, D], and of an inverse from it
IN_TF32 = 3  # products on a GPU for one of float32 (stun.runtime.matmul)
Flop = tuple[float, float]  # in float32, and in TF32 where the device has it


def solvers_flop(footprint: Footprint, share: int = 1, steps: int = JOINT_STEPS) -> Flop:
    """FLOP of all layers, on all ranks together, on one sample in `share` and with so many `steps` of the joint refit."""
    job, totals, times = footprint.job, [], IN_TF32 if footprint.is_gpu else 1
    calibration, config = job.cfg.calibration, job.cfg.sparsify
    tokens = calibration.samples * calibration.length / share
    for layout, plan in zip(job.arch.layers, job.plan.layers, strict=True):
        experts = len(plan.clusters)
        if job.refits and experts:
            totals.append((joint_flop(*footprint.arch.down_shape(layout), tokens * job.arch.top_k, experts, steps), 0))
        if not (config.reads_grams and job.plan.zeros):
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
