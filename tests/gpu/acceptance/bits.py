"""Whether the bits of a row of a product depend on where in memory it is, and on the rows beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from gpu.acceptance.rows import Row

_OFFSETS = 16
_SHAPES = ((7168, 9728), (768, 2048), (1000, 520))  # inputs and outputs: Arctic's, Qwen3's, rows at odd places of 256 bytes
_COUNTS = [*range(1, 18), *(edge + more for edge in (32, 64, 128, 256, 384) for more in (-1, 0, 1)), 511, 512]
Product = Callable[[torch.Tensor], torch.Tensor]  # rows [n, D] to rows


def check(folder: Path, pretend: bool) -> Iterator[Row]:
    shapes, counts = (((40, 24),), [1, 5, 32]) if pretend else (_SHAPES, _COUNTS)
    torch.manual_seed(0)
    for inputs, outputs in shapes:
        rows_ND, weight_OD, bias_O = _normal(counts[-1], inputs), _normal(outputs, inputs), _normal(outputs)
        products: dict[str, Product] = {
            "linear": lambda x_nD, w=weight_OD: F.linear(x_nD, w),
            "linear with bias": lambda x_nD, w=weight_OD, b=bias_O: F.linear(x_nD, w, b),
            "bmm": lambda x_nD: torch.bmm(x_nD.view(-1, 2, x_nD.shape[1] // 2), x_nD.view(-1, 2, x_nD.shape[1] // 2).mT),
        }
        shape = f"{inputs} to {outputs}"
        for name, product in products.items():
            yield _by_place(f"{name}, {shape}, by place", product, rows_ND, counts)
            yield _by_count(f"{name}, {shape}, by number of rows", product, rows_ND, counts)
    for inputs, outputs in shapes:
        yield from _grouped(f"{inputs} to {outputs}", _normal(counts[-1], inputs), _normal(3, outputs, inputs), counts)


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16().to("cuda")


def _different(pairs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Number of pairs that differ; the GPU is waited for once."""
    return int(torch.stack([(one != two).any() for one, two in pairs]).sum())


def _by_place(name: str, product: Product, rows_ND: torch.Tensor, counts: list[int]) -> Row:
    """The same rows at 16 places of a buffer. The library relies on it: what must hold."""

    def pairs():
        for count in counts:
            wanted = product(rows_ND[:count].clone())
            for offset in range(_OFFSETS):
                yield product(F.pad(rows_ND[:count], (0, 0, offset, 0))[offset:]), wanted

    found = _different(pairs())
    return Row(name, f"{found} of {len(counts) * _OFFSETS} differ", is_right=not found)


def _by_count(name: str, product: Product, rows_ND: torch.Tensor, counts: list[int]) -> Row:
    """The first rows alone and among all. The library does not rely on it."""
    whole = product(rows_ND)
    return Row(name, f"{_different((product(rows_ND[:n]), whole[:n]) for n in counts)} of {len(counts)} differ")


def _grouped(shape: str, rows_ND: torch.Tensor, weights_EOD: torch.Tensor, counts: list[int]) -> Iterator[Row]:
    """Rows of one group behind 0 to 15 rows of another, and the same by `linear`. The library does not use it yet, and can only
    if the first number is 0."""

    def grouped(count: int, offset: int) -> torch.Tensor:
        ends = torch.tensor([offset, offset + count, count + _OFFSETS], dtype=torch.int32, device="cuda")
        filled_nD = F.pad(rows_ND[:count], (0, 0, offset, _OFFSETS - offset), value=0.5)
        return F.grouped_mm(filled_nD, weights_EOD.mT, offs=ends)[offset : offset + count]

    places = ((grouped(n, offset), grouped(n, 0)) for n in counts for offset in range(1, _OFFSETS))
    yield Row(f"grouped_mm, {shape}, by place", f"{_different(places)} of {len(counts) * (_OFFSETS - 1)} differ")
    alone = ((grouped(n, 0), F.linear(rows_ND[:n], weights_EOD[1])) for n in counts)
    yield Row(f"grouped_mm, {shape}, beside linear", f"{_different(alone)} of {len(counts)} differ")
