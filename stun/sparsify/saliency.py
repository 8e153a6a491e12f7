"""Of a layer's weights that could be removed, how many had which score, and how many of these went."""

from __future__ import annotations

import threading

import numpy as np
import torch

from stun.config import SparsifyConfig
from stun.sparsify.matrix import scores_of

STRIDE = 16  # of the rows that are looked at
OCTAVE, LOWEST, HIGHEST = 4, -160, 160  # a bin is a quarter of an octave: bin b begins at 2^(b / OCTAVE)
_BINS = HIGHEST - LOWEST + 1
_MANTISSA = 23  # bits of a float32's fraction, below those of its exponent, which is biased by 127
_FRACTION = (1 << _MANTISSA) - 1
_QUARTERS = [int(np.float32(2 ** (part / OCTAVE)).view(np.int32)) & _FRACTION for part in range(1, OCTAVE)]


class Saliency:
    """Counts by bin of the scores looked at on this rank: `counts[0]` of the weights that stay, `counts[1]` of the removed ones.

    Looked at are rows 0, STRIDE, 2 * STRIDE, ... of every matrix. Methods that also change weights are shown by the score of the
    dense weights that their mask competes with, Wanda's.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2, _BINS, dtype=torch.int64)
        self._lock = threading.Lock()

    def add(self, how: SparsifyConfig, dense_OD: torch.Tensor, gone_OD: torch.Tensor, moment: torch.Tensor | None) -> None:
        """Count the weights of one matrix's rows, of which `gone_OD` were removed; `moment` as stun.sparsify.matrix takes it.
        Several threads may call this at once."""
        place_OD = bins(scores_of(how, dense_OD, moment)).sub_(LOWEST).add_(gone_OD, alpha=_BINS)
        counts = torch.bincount(place_OD.flatten(), minlength=2 * _BINS).view(2, _BINS).cpu()
        with self._lock:
            self.counts += counts

    def to_json(self) -> dict[str, dict[str, int]]:
        """`all` scores and those of the `removed` weights."""
        return {name: _by_bin(counts) for name, counts in (("all", self.counts.sum(0)), ("removed", self.counts[1]))}


def bins(scores_OD: torch.Tensor) -> torch.Tensor:
    """The bin of every float32 >= 0, int32. By its bits, a tenth of the time of a logarithm, and exact."""
    bits_OD = scores_OD.view(torch.int32)
    bin_OD = (bits_OD >> _MANTISSA).sub_(127).mul_(OCTAVE)
    fraction_OD = bits_OD & _FRACTION
    for edge in _QUARTERS:
        bin_OD.add_(fraction_OD >= edge)
    return bin_OD.clamp_(LOWEST, HIGHEST)


def _by_bin(counts: torch.Tensor) -> dict[str, int]:
    return {str(place + LOWEST): count for place, count in enumerate(counts.tolist()) if count}
