"""Forward of a model around its layers: from tokens to the first layer, and from the last one to logits and the next token.

The model's own forward runs, with stand-ins in place of all layers, so that no family needs code for it.
"""

import copy
import math
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel

from stun.config import StunError
from stun.model.carried import HIDDEN, Key, Unpacked, is_expression, needs, stand_ins
from stun.model.text_part import TextPart

# Name of the cache among the arguments of a layer and of the model: transformers 5.24 renamed it.
_PREPARES = signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = next(name for name in ("cache", "past_key_values") if name in _PREPARES)
_OUTPUTS = 4  # most outputs of a layer


class _Entered(Exception):
    """Ends the model's forward once it has called all layers."""


@dataclass(frozen=True)
class Probe:
    """What the arguments of layers are.

    `needed[l]` are the carried values that layers after l read, beside the hidden states of layer l. `by_token[l]` are the names
    of layer l's arguments that depend on the tokens, and `filled` those of dictionaries that layers fill. `token_shape` is the
    shape of a token's hidden state. `reads_outside`: the way to the first layer needs parameters of the decoder beside the
    embedding.
    """

    needed: list[set[Key]]
    by_token: list[set[str]]
    filled: set[str]
    token_shape: tuple[int, ...]
    reads_outside: bool

    @classmethod
    def of(cls, first: tuple[torch.Tensor, list[dict]], second: tuple[torch.Tensor, list[dict]], reads_outside: bool) -> "Probe":
        """Of two recordings, with different tokens."""
        hidden, arguments = first
        uses = [set().union(*(needs(value) for value in own.values())) for own in arguments]
        needed = [
            {key for later in uses[index + 1 :] for key in later if key.source < index or (key.source == index and key.place)}
            | {key for later in uses[index + 2 :] for key in later if key == (index, 0, -1)}
            for index in range(len(uses))
        ]
        by_token = [
            {name for name, value in own.items() if _differs(value, other.get(name))}
            for own, other in zip(arguments, second[1], strict=True)
        ]
        empty = {name for own in arguments for name, v in own.items() if isinstance(v, MutableMapping) and not len(v)}
        return cls(needed, by_token, empty, tuple(hidden.shape[2:]), reads_outside)


class Forward:
    """Forward of the checkpoint in `folder` without the layers of its text part."""

    def __init__(self, text: TextPart, folder: Path):
        self.whole, self.model, self.decoder, self.path, self.folder = text.whole, text.model, text.decoder, text.path, folder
        self._outputs = 1  # of a layer

    @torch.no_grad()
    def enter(
        self, tokens_BT: torch.Tensor, embedding_VD: torch.Tensor | None = None, **inputs
    ) -> tuple[torch.Tensor, list[dict]]:
        """Hidden states [B, T, D] before the first layer (with residual streams [B, T, S, D]), and all layers' keyword arguments
        (masks, rotary embeddings, ...), in which outputs of other layers are stand-ins (stun.model.carried).

        `inputs` are further inputs of the model: mask, positions, cache. The model's own forward runs with a recorder in place
        of every layer, so no family needs code for this. Without `embedding_VD` the installed embedding is used.
        """
        _move_buffers(self.decoder, tokens_BT.device)
        embedding = embedding_of(self.decoder)
        placeholder = embedding.weight
        if embedding_VD is not None:
            embedding.weight = nn.Parameter(embedding_VD, requires_grad=False)
        try:
            return self._recorded(tokens_BT, inputs)
        finally:
            embedding.weight = placeholder

    def _recorded(self, tokens_BT: torch.Tensor, inputs: dict) -> tuple[torch.Tensor, list[dict]]:
        """The recording; finds out, at first, how many outputs of a layer the model takes."""
        for outputs in range(self._outputs, _OUTPUTS + 1):
            try:
                recorded = self._record(tokens_BT, outputs, inputs)
            except (Unpacked, ValueError) as error:
                if isinstance(error, ValueError) and "unpack" not in str(error):
                    raise
                continue
            self._outputs = outputs
            return recorded
        raise StunError(f"{self.folder}: layers that give more than {_OUTPUTS} outputs are not known")

    def _record(self, tokens_BT: torch.Tensor, outputs: int, inputs: dict) -> tuple[torch.Tensor, list[dict]]:
        names = [list(signature(type(layer).forward).parameters)[1:] for layer in self.decoder.layers]
        recorded: list[tuple[torch.Tensor, dict]] = []

        def record(index: int, *positional, **keywords) -> object:
            if index != len(recorded):
                where = f"{self.folder}: layer {index} runs in place of {len(recorded)}"
                raise StunError(f"{where}; layers must run in order, once")
            arguments = dict(zip(names[index], positional, strict=False)) | keywords
            hidden = arguments.pop(names[index][0])
            recorded.append((hidden, arguments))
            if len(recorded) == len(self.decoder.layers):
                raise _Entered
            return stand_ins(index, hidden, outputs)

        try:
            with self._stand_ins(record):
                self.decoder(input_ids=tokens_BT, **{"use_cache": False, **inputs})
        except _Entered:
            pass
        for index, (hidden, arguments) in enumerate(recorded[1:]):
            if not is_expression(hidden) or hidden.made != Key(index, 0):
                arguments[HIDDEN] = hidden
        return recorded[0][0], [arguments for _, arguments in recorded]

    @cached_property
    def probe(self) -> Probe:
        """What runs over two tokens of a model of zeros tell about the arguments of layers."""
        weight_VD = torch.zeros((), dtype=torch.float32).expand(embedding_of(self.decoder).weight.shape)
        try:
            entered = [self.enter(torch.full((1, 2), token), weight_VD) for token in (0, 1)]
            reads_outside = any(leaf.is_meta for leaf in tree_leaves(entered) if _is_value(leaf))
        except RuntimeError:  # of hidden states beside parameters on the meta device
            reads_outside = True
        if reads_outside:
            with self.zeros_outside():
                entered = [self.enter(torch.full((1, 2), token), weight_VD) for token in (0, 1)]
        return Probe.of(*entered, reads_outside)

    @property
    def token_width(self) -> int:
        """Numbers in a token's hidden state, all residual streams together."""
        return math.prod(self.probe.token_shape)

    @contextmanager
    def zeros_outside(self) -> Iterator[None]:
        """Context in which the text model's parameters outside its layers are zeros, which take no memory."""
        with self.outside_restored() as placeholders:
            for module, parameters in placeholders:
                for name, parameter in parameters.items():
                    if parameter is not None and parameter.is_meta:
                        zeros = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
                        module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
            yield

    @contextmanager
    def outside_restored(self) -> Iterator[list[tuple[nn.Module, dict]]]:
        """Context after which the modules of the text model outside its layers have the parameters that they had; gives both."""
        inside = {module for layer in self.decoder.layers for module in layer.modules()}
        modules = {*self.model.modules(), *self.decoder.modules()} - inside
        placeholders = [(module, dict(module._parameters)) for module in modules]
        try:
            yield placeholders
        finally:
            for module, parameters in placeholders:
                module._parameters.update(parameters)

    @torch.no_grad()
    def leave(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of hidden states after the last layer: final norm and output head, which must be installed.

        The model's own forward runs, with layers that return these states whatever their input.
        """
        hidden_N1D = hidden_ND[:, None]  # every token as a sample of length 1
        tokens_N1 = torch.zeros(len(hidden_ND), 1, dtype=torch.int64, device=hidden_ND.device)  # whatever they are
        outputs = (hidden_N1D, *[None] * (self._outputs - 1)) if self._outputs > 1 else hidden_N1D
        with self._stand_ins(lambda *_, **__: outputs):
            return self.model(input_ids=tokens_N1, use_cache=False, output_router_logits=False).logits[:, 0]

    def next_inputs(self, tokens_BT: torch.Tensor, mask_BT: torch.Tensor, cache: object | None) -> dict:
        """Inputs that transformers' generate gives a model for its next step: the tokens of `tokens_BT` (prompt and output so
        far) that are not in the cache, mask, positions and cache."""
        positions_BT = (mask_BT.cumsum(-1) - 1).masked_fill(mask_BT == 0, 0)
        arguments = {"position_ids": positions_BT, "use_cache": True, CACHE: cache}
        arguments["attention_mask"] = None if bool(mask_BT.all()) else mask_BT
        new = None if cache is None else 1
        inputs = self.model.prepare_inputs_for_generation(
            tokens_BT, next_sequence_length=new, is_first_iteration=new is None, **arguments
        )
        return {name: value for name, value in inputs.items() if name not in ("logits_to_keep", "is_first_iteration")}

    def logits_processors(self, generation: GenerationConfig, mask_BT: torch.Tensor) -> LogitsProcessorList:
        """Changes that transformers' greedy generate makes to logits, such as repetition penalties; `mask_BT` is the prompts'."""
        arguments = {"attention_mask": mask_BT}
        return self.model._get_logits_processor(
            generation, input_ids_seq_length=mask_BT.shape[1], device=str(mask_BT.device), model_kwargs=arguments
        )

    def generation_config(self, max_new_tokens: int) -> GenerationConfig:
        """The checkpoint's generation settings, for greedy decoding. Raises StunError if they cannot be read."""
        file = self.folder / "generation_config.json"
        try:
            config = GenerationConfig.from_pretrained(self.folder) if file.is_file() else self.model.generation_config
        except Exception as error:  # transformers raises many kinds, all of them about this file
            raise StunError(f"{file}: transformers cannot read it: {error}") from error
        config = copy.deepcopy(config)
        config.update(do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
        return config

    @contextmanager
    def _stand_ins(self, forward: Callable) -> Iterator[None]:
        """Context in which `forward` replaces that of every layer, with the layer's number as its first argument."""
        for index, layer in enumerate(self.decoder.layers):
            layer.forward = partial(forward, index)
        try:
            yield
        finally:
            for layer in self.decoder.layers:
                del layer.forward


def embedding_of(decoder: PreTrainedModel) -> nn.Module:
    """The module with the weight of the input embedding: some families have a norm in the same module."""
    module = decoder.get_input_embeddings()
    return next(own for own in module.modules() if "weight" in own._parameters and own.weight.dim() == 2)


def _is_value(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and not is_expression(leaf)


def _differs(first: object, second: object) -> bool:
    """Whether two recordings of an argument hold different tensors."""
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return any(_is_value(a) and not (a.shape == b.shape and torch.equal(a, b)) for a, b in pairs)


def _move_buffers(root: nn.Module, device: torch.device) -> None:
    for module in root.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)
