"""Matrix products of experts, with as many rows as an expert has tokens.

In bfloat16 on a CPU, oneDNN compiles a kernel for every new number of rows, which takes 1.5 ms and 0.7 MB. So row counts are
rounded up to a step, and products of many rows are computed in pieces of one size.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

_PIECE, _STEP = 512, 32  # rows


def _is_compiled(rows_nD: torch.Tensor) -> bool:
    return rows_nD.device.type == "cpu" and rows_nD.dtype is torch.bfloat16


def stretched(rows_ND: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """`count` rows from `start` on, and more rows or zeros after them, up to a multiple of the step."""
    step = _STEP if _is_compiled(rows_ND) else 1
    size = -(-count // step) * step
    rows_nD = rows_ND[start : start + size]
    return rows_nD if len(rows_nD) == size else F.pad(rows_nD, (0, 0, 0, size - len(rows_nD)))


def linear(rows_nD: torch.Tensor, weight_OD: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Rows times the transposed matrix, plus a bias: [n, O]."""
    if not _is_compiled(rows_nD):
        return F.linear(rows_nD, weight_OD, bias_O)
    missing = -len(rows_nD) % _STEP
    filled_mD = F.pad(rows_nD, (0, 0, 0, missing)) if missing else rows_nD
    output_mO = rows_nD.new_empty(len(filled_mD), len(weight_OD))
    for start in range(0, len(filled_mD), _PIECE):
        piece = slice(start, start + _PIECE)
        torch.mm(filled_mD[piece], weight_OD.T, out=output_mO[piece])
    output_nO = output_mO[: len(rows_nD)]
    return output_nO if bias_O is None else output_nO.add_(bias_O)


@contextmanager
def tf32() -> Iterator[None]:
    """Context in which GPUs that can multiply float32 on tensor cores: with 10 bits of fraction, and sums in float32. The setting
    is the process'; a GPU's work is started by one thread."""
    setting = torch.backends.cuda.matmul
    before, setting.fp32_precision = setting.fp32_precision, "tf32"
    try:
        yield
    finally:
        setting.fp32_precision = before


def product(left_NK: torch.Tensor, right_KM: torch.Tensor) -> torch.Tensor:
    """Product of matrices [N, M] in their dtype; on a GPU, if that is float32, by tensor cores."""
    by_tensor_cores = left_NK.is_cuda and left_NK.dtype is torch.float32
    return _in_three(left_NK, right_KM) if by_tensor_cores else left_NK @ right_KM


def _in_three(left_NK: torch.Tensor, right_KM: torch.Tensor) -> torch.Tensor:
    """Sum of three products in TF32, together as exact as one in float32 and faster: of the upper 10 bits of the fractions, and
    of each one's upper with the other's lower bits."""
    left_upper, right_upper = _upper(left_NK), _upper(right_KM)
    with tf32():
        sum_NM = left_upper @ (right_KM - right_upper)
        return sum_NM.addmm_(left_NK - left_upper, right_upper).addmm_(left_upper, right_upper)


def _upper(matrix: torch.Tensor) -> torch.Tensor:
    """Float32 numbers without the bits that TF32 does not hold."""
    return (matrix.view(torch.int32) & ~0x1FFF).view(torch.float32)
