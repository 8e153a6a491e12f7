"""Balance of the experts in training: the routers' choices counted, and evened out by a loss or by the routers' own biases."""

from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

_BIAS = "e_score_correction_bias"  # [E], of a router: chooses experts and does not scale them; at most one a block


class Loads:
    """Tokens that every expert of a model was given: `last_E` in the last forward, `total_E` since `reset`, by layer."""

    def __init__(self, model: PreTrainedModel):
        blocks = {name: module for name, module in model.named_modules() if hasattr(module, "experts")}
        self.last_E: dict[str, torch.Tensor] = {}
        self.total_E = {name: torch.zeros(block.experts.num_experts) for name, block in blocks.items()}
        self.tokens = dict.fromkeys(blocks, 0)
        buffers = ((name, key, bias_E) for name, block in blocks.items() for key, bias_E in block.named_buffers())
        self.biases_E = {name: bias_E for name, key, bias_E in buffers if key.endswith(_BIAS)}
        for name, block in blocks.items():
            block.experts.register_forward_pre_hook(partial(self._count, name))

    def _count(self, name: str, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Count the choices [N, K], the second argument of transformers' experts."""
        self.last_E[name] = torch.bincount(args[1].flatten(), minlength=len(self.total_E[name])).float()
        self.total_E[name] += self.last_E[name]
        self.tokens[name] += len(args[1])

    def reset(self) -> None:
        """Begin the totals anew."""
        self.total_E = {name: torch.zeros_like(total_E) for name, total_E in self.total_E.items()}
        self.tokens = dict.fromkeys(self.tokens, 0)

    @property
    def smallest(self) -> float:
        """Smallest share of the tokens that any expert of any layer was given; K / E where all are given the same."""
        return min((total_E.min() / self.tokens[name]).item() for name, total_E in self.total_E.items())

    def correct(self, step: float) -> None:
        """Raise the bias of every expert with fewer tokens than the mean by `step`, lower the others' (arXiv 2408.15664)."""
        for name, bias_E in self.biases_E.items():
            bias_E += step * torch.sign(self.last_E[name].mean() - self.last_E[name])


def auxiliary_loss(model: PreTrainedModel, out, loads: Loads, per_layer: bool) -> torch.Tensor | float:
    """Router loss of a forward's output (arXiv 2101.03961): of every layer, averaged, or of the choices of all layers together,
    which leaves experts of single layers unused; 0 where correction biases do its work."""
    if loads.biases_E:
        return 0.0
    if not per_layer:
        return out.aux_loss
    experts = len(next(iter(loads.total_E.values())))
    losses = [load_balancing_loss_func((logits,), experts, model.config.num_experts_per_tok) for logits in out.router_logits]
    return torch.stack(losses).mean()
