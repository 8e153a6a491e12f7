"""Micro-batches of sequences of different length. Shapes: B sequences, T tokens of the longest."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class MicroBatch:
    """Row numbers of a data set, and the lengths of these rows in the same order."""

    rows: list[int]
    lengths: list[int]

    def real_BT(self, device: torch.device) -> torch.Tensor:
        """Mask [B, T] of the tokens that are not padding, if sequences are padded on the right."""
        return torch.arange(max(self.lengths), device=device) < torch.tensor(self.lengths, device=device)[:, None]


def micro_batches(lengths: list[int], size: int) -> list[MicroBatch]:
    """All rows in micro-batches of `size`, sorted by length. The same for any number of ranks."""
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    return [MicroBatch(part, [lengths[row] for row in part]) for part in parts]


def padded(sequences: list[list[int]], pad: int, on_left: bool = False) -> torch.Tensor:
    """Token ids [B, T], filled up with `pad` on the right or left."""
    rows = [torch.tensor(ids) for ids in sequences]
    return pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left" if on_left else "right")
