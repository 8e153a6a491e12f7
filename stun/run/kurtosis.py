"""Sums of powers of weights in float64, and the kurtosis they give, the same on any number of ranks and threads.

A matrix is summed by rows, and matrices are added exactly: a short list of floats stands for an exact sum, and rounding happens
once, at the end. As JSON: `{"count": n, "sums": [of w, of w^2, of w^3, of w^4]}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

_BLOCK = {"cpu": 1 << 17}  # weights taken to float64 at once: on a CPU as many as stay in a core's cache
_LARGE_BLOCK = 1 << 20


def power_sums(matrices: Iterable[torch.Tensor], without_zeros: bool = False, each: Callable = map) -> dict:
    """Number and sums of powers of the entries of some matrices [O, D], which `each` goes through as map does, in threads if it
    likes. The sums are empty where one is not finite."""

    def own(weight_OD: torch.Tensor) -> dict:
        sums = _sums(weight_OD)
        count = int(weight_OD.count_nonzero()) if without_zeros else weight_OD.numel()
        return {"count": count, "sums": [[value] for value in sums] if all(map(math.isfinite, sums)) else []}

    return together(list(each(own, matrices)))


def _sums(weight_OD: torch.Tensor) -> list[float]:
    """Sums of the first four powers, of every row and then of the rows."""
    sums_4O = torch.empty(4, len(weight_OD), dtype=torch.float64, device=weight_OD.device)
    size = max(1, _BLOCK.get(weight_OD.device.type, _LARGE_BLOCK) // weight_OD.shape[1])
    # What is summed is kept nowhere else: small tensors that outlive a block would split the memory it leaves.
    for block_oD, sums_4o in zip(weight_OD.split(size), sums_4O.split(size, 1), strict=True):
        w_oD = block_oD.to(torch.float64, memory_format=torch.contiguous_format)  # strides would change the order
        square_oD = w_oD * w_oD
        for place, power_oD in enumerate((w_oD, square_oD, w_oD * square_oD, square_oD * square_oD)):
            torch.sum(power_oD, 1, out=sums_4o[place])
    return sums_4O.cpu().sum(1).tolist()


def _exact(values: list[float]) -> list[float]:
    """A few floats whose exact sum is that of `values`."""
    parts: list[float] = []
    while rest := math.fsum([*values, *(-part for part in parts)]):
        parts.append(rest)
    return parts


def together(parts: list[dict]) -> dict:
    """The sums of several disjoint parts as one."""
    some = [part for part in parts if part["count"]]
    is_finite = some and all(part["sums"] for part in some)
    sums = [_exact([value for part in some for value in part["sums"][power]]) for power in range(4)] if is_finite else []
    return {"count": sum(part["count"] for part in some), "sums": sums}


def kurtosis(parts: list[dict]) -> float | None:
    """E[((w - mean) / deviation)^4] of the weights in `parts`; 3 for a normal distribution, None where it is not defined."""
    whole = together(parts)
    if not whole["sums"]:
        return None
    first, second, third, fourth = (math.fsum(values) / whole["count"] for values in whole["sums"])
    variance = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return central / variance**2 if variance > 0 else None
