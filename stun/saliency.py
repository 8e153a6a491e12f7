"""Of a layer's weights that could be removed, how many had which score, and how many of these went."""

from __future__ import annotations

import threading
from collections import Counter

import torch

from stun.config import SparsifyConfig
from stun.sparsify.matrix import scores_of
from stun.sparsify.scores import one_thread

STRIDE = 16  # of the rows that are looked at
OCTAVE, LOWEST, HIGHEST = 4, -160, 160  # a bin is a quarter of an octave: bin b begins at 2^(b / OCTAVE)


class Saliency:
    """Counts by bin of `all` scores looked at and of those of the `removed` weights, on this rank.

    Looked at are rows 0, STRIDE, 2 * STRIDE, ... of every matrix. Methods that also change weights are shown by the score of the
    dense weights that their mask competes with, Wanda's.
    """

    def __init__(self) -> None:
        self.all: Counter[int] = Counter()
        self.removed: Counter[int] = Counter()
        self._lock = threading.Lock()

    def add(self, how: SparsifyConfig, dense_OD: torch.Tensor, gone_OD: torch.Tensor, moment: torch.Tensor | None) -> None:
        """Count the weights of one matrix's rows, of which `gone_OD` were removed; `moment` as stun.sparsify.matrix takes it.
        Several threads may call this at once."""
        with one_thread():  # of the logarithm's last bits (stun.steady)
            octave_OD = scores_of(how, dense_OD, moment).log2() * OCTAVE
        bin_OD = octave_OD.floor().clamp(LOWEST, HIGHEST).long() - LOWEST
        for counter, chosen in ((self.all, bin_OD.flatten()), (self.removed, bin_OD[gone_OD])):
            counts = torch.bincount(chosen, minlength=HIGHEST - LOWEST + 1).tolist()
            with self._lock:
                counter.update({place + LOWEST: count for place, count in enumerate(counts) if count})

    def to_json(self) -> dict[str, dict[str, int]]:
        return {name: {str(place): count for place, count in sorted(getattr(self, name).items())} for name in ("all", "removed")}
