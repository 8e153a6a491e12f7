"""Scores that are hard to select from, and selection row by row in Python."""

from __future__ import annotations

import torch

from stun.sparsify import select_kernel


def naive_mask(scores: torch.Tensor, counts: list[int]) -> torch.Tensor:
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row, values in enumerate(scores.tolist()):
        mask[row, sorted(range(len(values)), key=lambda column: (values[column], column))[: counts[row]]] = True
    return mask


def cases(rows: int, columns: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(columns)
    uniform = torch.rand(rows, columns, generator=generator)
    normal = torch.randn(rows, columns, generator=generator).abs()
    return {
        "random": uniform,
        "wide": normal * (10 * torch.randn(columns, generator=generator)).exp(),
        "rising": uniform * torch.logspace(-30, 30, columns),
        "tied": (uniform * 4).floor(),
        "mostly zero": (uniform - 0.7).clamp(min=0),
        "negative zero": torch.where(normal < 1, -0.0, (uniform * 3).floor()),
        "infinite": torch.where(normal < 1, float("inf"), uniform),
        "constant": torch.full((rows, columns), 0.37),
        "zero": torch.zeros(rows, columns),
    }


def check_interpreted(dtype: str, columns: int, held: int) -> None:
    """Two rows of every case, with another count each, in one call."""
    select_kernel.HELD = held
    scores = torch.cat(list(cases(2, columns).values())).to(getattr(torch, dtype))
    counts = [0, 1, columns // 3, columns // 2 + 1, columns - 1, columns, columns // 5] * 3
    mask = select_kernel._by_kernel(scores, torch.tensor(counts[: len(scores)]))
    wrong = (mask != naive_mask(scores, counts)).any(dim=1).nonzero().flatten().tolist()
    assert not wrong, f"{dtype}, {columns} columns, {held} held: rows {wrong} of {list(cases(2, columns))}, two each"
