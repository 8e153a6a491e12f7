"""Sums of powers of weights, the same whatever ranks, threads and blocks they were taken on, and the kurtosis they give.

A row is summed in float64, and rows are added exactly: a short list of floats stands for their exact sum. Lists of several ranks
are joined, and rounding happens once, at the end. As JSON: `{"count": n, "sums": [of w, of w^2, of w^3, of w^4]}`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

_BLOCK = {"cpu": 1 << 17}  # weights taken to float64 at once: on a CPU as many as stay in a core's cache
_LARGE_BLOCK = 1 << 24


def power_sums(matrices: Iterable[torch.Tensor], without_zeros: bool = False) -> dict:
    """Number and sums of powers of the entries of some matrices [O, D]. The sums are empty where one is not finite."""
    count, rows = 0, [[], [], [], []]
    for weight_OD in matrices:
        count += int(weight_OD.count_nonzero()) if without_zeros else weight_OD.numel()
        for own, sums in zip(rows, _row_sums(weight_OD).tolist(), strict=True):
            own += sums
    is_finite = all(math.isfinite(value) for own in rows for value in own)
    return {"count": count, "sums": [_exact(own) for own in rows] if is_finite else []}


def _row_sums(weight_OD: torch.Tensor) -> torch.Tensor:
    """[4, O] sums of the first four powers of every row."""
    sums_4O = torch.empty(4, len(weight_OD), dtype=torch.float64, device=weight_OD.device)
    size = max(1, _BLOCK.get(weight_OD.device.type, _LARGE_BLOCK) // weight_OD.shape[1])
    # What is summed is kept nowhere else: small tensors that outlive a block would split the memory it leaves.
    for block_oD, sums_4o in zip(weight_OD.split(size), sums_4O.split(size, 1), strict=True):
        w_oD = block_oD.double()
        square_oD = w_oD * w_oD
        for place, power_oD in enumerate((w_oD, square_oD, w_oD * square_oD, square_oD * square_oD)):
            torch.sum(power_oD, 1, out=sums_4o[place])
    return sums_4O


def _exact(values: list[float]) -> list[float]:
    """A few floats whose exact sum is that of `values`."""
    parts: list[float] = []
    while rest := math.fsum([*values, *(-part for part in parts)]):
        parts.append(rest)
    return parts


def together(parts: list[dict]) -> dict:
    """The sums of several disjoint parts as one."""
    count = sum(part["count"] for part in parts)
    if not all(part["sums"] for part in parts if part["count"]):
        return {"count": count, "sums": []}
    whole = [part["sums"] for part in parts if part["count"]]
    return {"count": count, "sums": [[value for sums in whole for value in sums[power]] for power in range(4)] if whole else []}


def kurtosis(parts: list[dict]) -> float | None:
    """E[((w - mean) / deviation)^4] of the weights in `parts`; 3 for a normal distribution, None where it is not defined."""
    whole = together(parts)
    if not whole["count"] or not whole["sums"]:
        return None
    first, second, third, fourth = (math.fsum(values) / whole["count"] for values in whole["sums"])
    variance = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return central / variance**2 if variance > 0 else None
