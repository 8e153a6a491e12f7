"""Sparsity ratios of layers and experts: OWL (Yin et al., ICML 2024, arXiv 2310.05175) from histograms of scores.

A layer's mean score, and so the threshold of an outlier, depends on which experts are kept. A histogram, taken once, gives the
share of outliers for any threshold.
"""

import math

import torch

from stun.runtime.threads import one_thread

BINS, OCTAVE, LOWEST = 512, 8, -40  # bins of an eighth of an octave, from 2^-40 to 2^24; the outermost take the rest


def score_histogram(scores_OD: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Counts [BINS] int64 of the scores on a logarithmic scale, and the exact sum of the scores."""
    with one_thread():  # the last bits of a logarithm depend on the threads (stun.runtime.determinism)
        bin_OD = ((scores_OD.log2() - LOWEST) * OCTAVE).clamp(0, BINS - 1).long()
    return torch.bincount(bin_OD.flatten(), minlength=BINS), math.fsum(scores_OD.double().sum(1).tolist())


def share_above(counts_B: torch.Tensor, threshold: float) -> float:
    """Share of the scores above a threshold, with the scores of a bin spread evenly on the logarithmic scale."""
    position = min(max((math.log2(threshold) - LOWEST) * OCTAVE, 0.0), float(BINS)) if threshold > 0 else 0.0
    whole, part = int(position), position - int(position)
    above = float(counts_B[whole + 1 :].sum()) + (float(counts_B[whole]) * (1 - part) if whole < BINS else 0.0)
    return above / max(1, int(counts_B.sum()))


def owl(outliers: list[float], sizes: list[int], ratio: float, spread: float) -> list[float]:
    """Sparsity of each part: `ratio` on average (weighted by size), lower for more outliers; the largest and the smallest are
    2 * `spread` apart, since outlier shares are stretched to [0, 2 * spread]. If all are equal, every part has `ratio`."""
    counted = [share for share, size in zip(outliers, sizes, strict=True) if size]
    low, high, whole = min(counted, default=0.0), max(counted, default=0.0), sum(sizes)
    if high == low:
        return [ratio] * len(outliers)
    stretched = [(min(max(share, low), high) - low) / (high - low) * 2 * spread for share in outliers]
    mean = math.fsum(s * size for s, size in zip(stretched, sizes, strict=True)) / whole
    return meet([ratio - (s - mean) for s in stretched], sizes, ratio * whole)


def meet(ratios: list[float], sizes: list[int], total: float) -> list[float]:
    """Ratios shifted by one common amount and clipped to [0, 1], such that they remove `total` (at most all) of the sizes."""

    def shifted(shift: float) -> list[float]:
        return [min(max(ratio + shift, 0.0), 1.0) for ratio in ratios]

    low, high = -1.0 - max(ratios), 1.0 - min(ratios)
    for _ in range(100):
        middle = (low + high) / 2
        removed = math.fsum(ratio * size for ratio, size in zip(shifted(middle), sizes, strict=True))
        low, high = (middle, high) if removed < total else (low, middle)
    return shifted(high)
