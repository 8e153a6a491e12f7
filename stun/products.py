"""An expert's products, of as many rows as it has tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_PIECE, _STEP = 512, 32  # rows


def linear(rows_nD: torch.Tensor, weight_OD: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Rows times a matrix, plus a bias: [n, O].

    In bfloat16 on a CPU in pieces of a few sizes, the last one filled up with zeros: for every new number of rows the library
    below torch (oneDNN) makes a program, which takes 1.5 ms and 0.7 MB.
    """
    if rows_nD.device.type != "cpu" or rows_nD.dtype is not torch.bfloat16:
        return F.linear(rows_nD, weight_OD, bias_O)
    output_nO = rows_nD.new_empty(len(rows_nD), len(weight_OD))
    for start in range(0, len(rows_nD), _PIECE):
        piece_nD, out_nO = rows_nD[start : start + _PIECE], output_nO[start : start + _PIECE]
        whole = len(piece_nD) // _STEP * _STEP
        if whole:
            torch.mm(piece_nD[:whole], weight_OD.T, out=out_nO[:whole])
        if whole < len(piece_nD):
            filled_nD = F.pad(piece_nD[whole:], (0, 0, 0, _STEP + whole - len(piece_nD)))
            out_nO[whole:] = (filled_nD @ weight_OD.T)[: len(piece_nD) - whole]
    return output_nO if bias_O is None else output_nO.add_(bias_O)
