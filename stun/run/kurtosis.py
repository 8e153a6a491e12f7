"""Sums of powers of weights, the same whatever ranks, threads and blocks they were taken on, and the kurtosis they give.

Weights in bfloat16, of which there are 2^16 different ones, are counted, and the sums are exact. In other dtypes a row is summed
in float64, and rows are added exactly. A short list of floats stands for an exact sum. Lists of several ranks are joined, and
rounding happens once, at the end. As JSON: `{"count": n, "sums": [of w, of w^2, of w^3, of w^4]}`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable

import torch

_BLOCK = {"cpu": 1 << 17}  # weights taken to float64 at once: on a CPU as many as stay in a core's cache
_LARGE_BLOCK = 1 << 24
_COUNTED = 1 << 22  # weights in bfloat16 counted at once


def power_sums(matrices: Iterable[torch.Tensor], without_zeros: bool = False, each: Callable = map) -> dict:
    """Number and sums of powers of the entries of some matrices [O, D], which `each` goes through as map does, in threads if it
    likes. The sums are empty where one is not finite."""
    total = _Total()
    list(each(total.add, matrices))
    sums = total.sums()
    is_finite = all(math.isfinite(value) for own in sums for value in own)
    count = total.count - (total.zeros if without_zeros else 0)
    return {"count": count, "sums": [_exact(own) for own in sums] if is_finite else []}


class _Total:
    """Of some matrices: how many entries there are and how many are zero, how often every bfloat16 occurs, and sums of rows."""

    def __init__(self) -> None:
        self.count = self.zeros = 0
        self.rows: list[list[float]] = [[], [], [], []]
        self.counts_V = torch.zeros(1 << 16, dtype=torch.int64)
        self._lock = threading.Lock()

    def add(self, weight_OD: torch.Tensor) -> None:
        if weight_OD.dtype is torch.bfloat16:
            counts_V = _occurrences(weight_OD)
            with self._lock:
                self.counts_V += counts_V
                self.zeros += int(counts_V[0] + counts_V[1 << 15])
        else:
            zeros, sums = weight_OD.numel() - int(weight_OD.count_nonzero()), _row_sums(weight_OD).tolist()
            with self._lock:
                self.zeros += zeros
                for own, more in zip(self.rows, sums, strict=True):
                    own += more
        with self._lock:
            self.count += weight_OD.numel()

    def sums(self) -> list[list[float]]:
        """Terms whose sums are those of w, w^2, w^3 and w^4. Products of a power, of 32 bits at most, and 20 bits of a count are
        exact."""
        places = self.counts_V.nonzero().flatten()
        value_v = (places - (1 << 15)).to(torch.int16).view(torch.bfloat16).double()
        counts_v = self.counts_V[places]
        terms = []
        square_v = value_v * value_v
        for power_v, own in zip((value_v, square_v, square_v * value_v, square_v * square_v), self.rows, strict=True):
            parts = [power_v * (counts_v % (1 << 20)), power_v * (counts_v >> 20 << 20)]
            terms.append(own + [value for part in parts for value in part.tolist() if value])
        return terms


def _occurrences(weight_OD: torch.Tensor) -> torch.Tensor:
    """[2^16] how often every bfloat16 occurs, by its bits as a signed integer, counted from the lowest; on the CPU."""
    counts_V = torch.zeros(1 << 16, dtype=torch.int64, device=weight_OD.device)
    for bits in weight_OD.contiguous().view(torch.int16).flatten().split(_COUNTED):
        counts_V += torch.bincount(bits.int().add_(1 << 15), minlength=1 << 16)
    return counts_V.cpu()


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
