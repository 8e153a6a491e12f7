"""Power sums of weights in float64 and their kurtosis, the same on any number of ranks and threads.

A matrix is summed by rows, and matrices are added exactly: a short list of floats represents an exact sum, which is rounded once,
at the end. As JSON: `{"count": n, "sums": [of w, of w^2, of w^3, of w^4]}`.
"""

import math
from collections.abc import Callable, Iterable

import torch

_BLOCK, _LARGE_BLOCK = 1 << 17, 1 << 22  # weights converted to float64 per block, on a CPU (as many as a cache holds) and a GPU


def power_sums(matrices: Iterable[torch.Tensor], without_zeros: bool = False, apply: Callable = map) -> dict:
    """Count and power sums of the entries of matrices [O, D]; `apply` works like map, possibly in threads. `without_zeros` counts
    only non-zero entries. The sums are empty if one is not finite."""

    def sums_of(weight_OD: torch.Tensor) -> dict:
        *sums, nonzero = _sums(weight_OD, without_zeros)
        return {
            "count": int(nonzero) if without_zeros else weight_OD.numel(),
            "sums": [[value] for value in sums] if all(map(math.isfinite, sums)) else [],
        }

    return together(list(apply(sums_of, matrices)))


def _sums(weight_OD: torch.Tensor, counts_nonzero: bool) -> list[float]:
    """Sums of the first four powers, over the entries of each row, then over the rows; and the number of non-zero entries, 0 if
    they are not counted."""
    sums_X = torch.zeros(4 * len(weight_OD) + 1, dtype=torch.float64, device=weight_OD.device)
    sums_4O = sums_X[:-1].view(4, -1)
    if counts_nonzero:
        sums_X[-1] = weight_OD.count_nonzero()
    size = max(1, (_BLOCK if weight_OD.device.type == "cpu" else _LARGE_BLOCK) // weight_OD.shape[1])
    # Row sums go into one tensor: small tensors that outlive a block would fragment the memory it frees.
    for block_oD, sums_4o in zip(weight_OD.split(size), sums_4O.split(size, 1), strict=True):
        # The order of a sum depends on the strides, so every block is made contiguous.
        w_oD = block_oD.to(torch.float64, memory_format=torch.contiguous_format)
        square_oD = w_oD * w_oD
        for place, power_oD in enumerate((w_oD, square_oD, w_oD * square_oD, square_oD * square_oD)):
            torch.sum(power_oD, 1, out=sums_4o[place])
    sums_X = sums_X.cpu()  # with the count: a GPU is waited for once
    return [*sums_X[:-1].view(4, -1).sum(1).tolist(), float(sums_X[-1])]


def _exact(values: list[float]) -> list[float]:
    """A few floats with the same exact sum as `values`: its rounding, then that of each remainder."""
    parts: list[float] = []
    while rest := math.fsum([*values, *(-part for part in parts)]):
        parts.append(rest)
    return parts


def together(parts: list[dict]) -> dict:
    """Power sums of the union of disjoint parts."""
    filled = [part for part in parts if part["count"]]
    is_finite = filled and all(part["sums"] for part in filled)
    sums = [_exact([value for part in filled for value in part["sums"][power]]) for power in range(4)] if is_finite else []
    return {"count": sum(part["count"] for part in filled), "sums": sums}


def kurtosis(parts: list[dict]) -> float | None:
    """Kurtosis E[((w - mean) / deviation)^4] of the weights in `parts`; 3 for a normal distribution, None if undefined."""
    whole = together(parts)
    if not whole["sums"]:
        return None
    first, second, third, fourth = (math.fsum(values) / whole["count"] for values in whole["sums"])
    variance = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return central / variance**2 if variance > 0 else None
