"""Which weights of a matrix to remove. Tensors in, tensors out."""

from __future__ import annotations

import torch

from stun.config import StunError


def quotas(sizes: list[int], total: int) -> list[int]:
    """Share `total` removals over matrices in proportion to their sizes, as integers that add up to `total` exactly."""
    whole, shares, seen, given = sum(sizes), [], 0, 0
    for size in sizes:
        seen += size
        upto = total * seen // whole
        shares.append(upto - given)
        given = upto
    return shares


def wanda_scores(weight_OD: torch.Tensor, squared_sum_D: torch.Tensor) -> torch.Tensor:
    """|W_ij| * ||X_j||_2 in float32 (Sun et al., ICLR 2024, eq. 1): [O, D] from a matrix and its inputs' sums of squares."""
    return weight_OD.float().abs() * squared_sum_D.sqrt().float()


def smallest_per_row(scores_OD: torch.Tensor, total: int) -> torch.Tensor:
    """Mask [O, D], true for the `total` entries to remove: the smallest of each row, ties to the lower column.

    Every row loses total / O entries; where that is not whole, the extra ones are spread evenly over the rows.
    """
    rows, columns = scores_OD.shape
    edges = torch.arange(rows + 1, device=scores_OD.device) * total // rows
    count_O = edges[1:] - edges[:-1]
    order_OD = scores_OD.sort(dim=1, stable=True).indices
    leaves_OD = torch.arange(columns, device=scores_OD.device) < count_O[:, None]
    return torch.zeros_like(leaves_OD).scatter_(1, order_OD, leaves_OD)


def require_finite(tensor: torch.Tensor, what: str) -> None:
    """Raise StunError naming the first entry of `what` that is NaN or infinite."""
    finite = torch.isfinite(tensor)
    if not finite.all():
        first = (~finite).nonzero()[0].tolist()
        raise StunError(f"{what}: not finite at {first}: {tensor[tuple(first)].item()}; nothing was written for this layer")
