"""Allocation of the experts to remove: so many from each layer that the layers' outputs lose least in all.

What a layer loses is known for some numbers of its experts removed (stun.pruning.sensitivity). In between its logarithm is
interpolated, and from none removed, where nothing is lost, up to the first of these the loss itself.
"""

import numpy as np

Losses = list[dict[int, float]]  # loss by number of experts removed, of every decoder layer; empty for layers without experts


def allocate(losses: Losses, total: int, step: int) -> list[int]:
    """Experts to remove from each layer, `total` in all, of the least summed loss: the exact solution, by dynamic programming
    over the layers. Numbers are multiples of `step`, at most the largest that was measured. Of equals, the first layers lose
    more."""
    curves = [_curve(layer, step) for layer in losses]
    least_N, choices = np.full(total // step + 1, np.inf), []
    least_N[0] = 0.0
    for curve_R in curves:
        summed_N, choice_N = least_N + curve_R[0], np.zeros(len(least_N), np.int64)
        for removed in range(1, min(len(curve_R), len(least_N))):
            own_N = least_N[:-removed] + curve_R[removed]
            is_less_N = own_N < summed_N[removed:]
            summed_N[removed:][is_less_N] = own_N[is_less_N]
            choice_N[removed:][is_less_N] = removed
        least_N, choices = summed_N, [*choices, choice_N]
    assert np.isfinite(least_N[-1]), "the measured numbers allow the total (stun.planning.make.trial_drops)"
    rest, drops = total // step, []
    for choice_N in reversed(choices):
        drops.append(int(choice_N[rest]) * step)
        rest -= int(choice_N[rest])
    return drops[::-1]


def _curve(losses: dict[int, float], step: int) -> np.ndarray:
    """Loss [R] of 0, `step`, 2 `step`, ... experts removed, up to the most that was measured. It never falls."""
    if not losses:
        return np.zeros(1)
    removed_M = np.array(sorted(losses))
    log_M = np.log(np.maximum.accumulate([losses[number] for number in removed_M]) + np.finfo(float).tiny)
    wanted_R = np.arange(0, removed_M[-1] + 1, step)
    curve_R = np.exp(np.interp(wanted_R, removed_M, log_M))
    return np.where(wanted_R < removed_M[0], np.exp(log_M[0]) * wanted_R / removed_M[0], curve_R)
