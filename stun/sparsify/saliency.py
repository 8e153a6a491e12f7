"""Histograms of weight scores in a layer: all weights in scope, and the removed ones."""

import threading

import numpy as np
import torch

from stun.config import SparsifyConfig
from stun.sparsify.matrix import scores_of

STRIDE = 16  # every 16th row is counted
OCTAVE, LOWEST, HIGHEST = 4, -160, 160  # a bin is a quarter of an octave: bin b begins at 2^(b / OCTAVE)
_BINS = HIGHEST - LOWEST + 1
_MANTISSA = 23  # bits of a float32's fraction, below those of its exponent, which is biased by 127
_FRACTION = (1 << _MANTISSA) - 1
_QUARTERS = [int(np.float32(2 ** (part / OCTAVE)).view(np.int32)) & _FRACTION for part in range(1, OCTAVE)]


class Saliency:
    """Histograms on this rank, by bin of the score: `counts[0]` of the kept weights, `counts[1]` of the removed ones.

    Rows 0, STRIDE, 2 * STRIDE, ... of every matrix are counted. Methods that also change weights are shown by the Wanda score of
    the dense weights.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2, _BINS, dtype=torch.int64)
        self._lock = threading.Lock()

    def add(self, config: SparsifyConfig, dense_OD: torch.Tensor, removed_OD: torch.Tensor, moment: torch.Tensor | None) -> None:
        """Count the weights of one matrix's rows, where `removed_OD` is true for the removed ones; `moment` as in
        stun.sparsify.matrix. Thread-safe."""
        bin_OD = bins(scores_of(config, dense_OD, moment)).sub_(LOWEST).add_(removed_OD, alpha=_BINS)
        counts = torch.bincount(bin_OD.flatten(), minlength=2 * _BINS).view(2, _BINS).cpu()
        with self._lock:
            self.counts += counts

    def to_json(self) -> dict[str, dict[str, int]]:
        """`all` scores and those of the `removed` weights."""
        histograms = {"all": self.counts.sum(0).tolist(), "removed": self.counts[1].tolist()}
        return {name: {str(b + LOWEST): n for b, n in enumerate(counts) if n} for name, counts in histograms.items()}


def bins(scores_OD: torch.Tensor) -> torch.Tensor:
    """Bin [O, D] int32 of every float32 score >= 0."""
    # Read from the bits: exact, and in a tenth of the time of a logarithm.
    bits_OD = scores_OD.view(torch.int32)
    bin_OD = (bits_OD >> _MANTISSA).sub_(127).mul_(OCTAVE)
    fraction_OD = bits_OD & _FRACTION
    for edge in _QUARTERS:
        bin_OD.add_(fraction_OD >= edge)
    return bin_OD.clamp_(LOWEST, HIGHEST)
