"""Zeros of a pruned model that stay zeros while it is fine-tuned: docs/healing.md has whole examples."""

import re

import torch
from torch import nn
from transformers import TrainerCallback

from stun.config import StunError
from stun.pruning.padding import NEVER


class KeepZeros(TrainerCallback):
    """Zeros of `model`'s layers as it was loaded, set again after every optimizer step, whatever the optimizer did to them:
    `Trainer(model=model, callbacks=[KeepZeros(model)], ...)`.

    To be made before adapters are added; after they are merged, and in a training loop of one's own, call `restore()`. Zeros of
    vectors, as in biases and novices, are not held; biases that keep a padded layer's zero experts from being chosen are. Raises
    StunError for a model with adapters.
    """

    def __init__(self, model: nn.Module):
        if hasattr(model, "peft_config"):
            raise StunError("KeepZeros: the model has adapters, whose own zeros are to be trained; make it before they are added")
        self._model = model
        # The layers' names begin with `layers.` where `model` is the decoder without its head.
        weights = [parameter for name, parameter in model.named_parameters() if re.search(r"\blayers\.", name)]
        held = [(weight, *_held(weight.detach())) for weight in weights]
        self._held = [(weight, mask, value) for weight, mask, value in held if mask.any()]

    @torch.no_grad()
    def restore(self) -> None:
        """Set what is held to its value. Raises StunError if the model no longer has the weights that it had."""
        present = {id(weight) for weight in self._model.parameters()}
        for weight, mask, value in self._held:
            if id(weight) not in present or weight.shape != mask.shape:
                raise StunError(
                    "KeepZeros: the model's weights were replaced or sharded (FSDP, ZeRO-3); DDP and ZeRO-1 are allowed"
                )
            weight.masked_fill_(mask.to(weight.device), value)

    def on_train_begin(self, args, state, control, **keywords) -> None:
        self.restore()  # refuses before hours of training

    def on_optimizer_step(self, args, state, control, **keywords) -> None:
        self.restore()


def _held(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Places of a weight that are held, and their value: zeros of a matrix, or a vector's `NEVER`, rounded as it is stored."""
    return (weight == 0, 0) if weight.dim() > 1 else (weight < NEVER / 2, weight.min().item())
