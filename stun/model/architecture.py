"""A checkpoint's model without its weights: transformers' modules on the meta device, for every family.

Router rules, masks and rotary embeddings come from transformers, whose internals only this package uses. Whatever else differs
between families is data in `stun.model.families`.
"""

import copy
import math
import re
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from stun.checkpoint.headers import TensorInfo
from stun.checkpoint.reader import Checkpoint
from stun.config import Precision, StunError
from stun.model import heterogeneous
from stun.model.as_configured import as_configured
from stun.model.carried import HIDDEN, Key, Unpacked, is_expression, needs, stand_ins
from stun.model.empty import without_weights
from stun.model.families import (
    ALIASES,
    COUNT_FIELDS,
    FLOORS,
    HETEROGENEOUS,
    HETEROGENEOUS_CLASS,
    NOVICES,
    TESTED,
    check_family,
    count_field,
)
from stun.model.form_settings import renumbered
from stun.model.layer_layout import LayerLayout
from stun.model.novices import stock
from stun.model.tensor_names import NameMap, experts_of
from stun.model.text_part import build, text_part

EXPERTS_IMPLEMENTATION = "stun"
# Name of the cache among the arguments of a layer and of the model: transformers 5.24 renamed it.
_PREPARES = signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = next(name for name in ("cache", "past_key_values") if name in _PREPARES)


_TOP_K = ("num_experts_per_tok", "top_k_experts")  # names in the configuration, where routers do not keep the number
_OUTPUTS = 4  # most outputs of a layer
# Flags that change what layers and models return, whatever config.json says.
_RETURNS = {"output_attentions": False, "output_hidden_states": False, "output_router_logits": False, "return_dict": True}


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


class Architecture:
    """Modules of a checkpoint's model on the meta device, and the places of its tensors in them.

    `layers` and `mtp` are the layouts of decoder layers and of multi-token-prediction heads with experts. `outer` maps every
    other source name to its parameter ('' where the model has none). `precision` decides the compute dtype. Raises StunError.
    """

    def __init__(self, source: Checkpoint, precision: Precision = Precision.auto):
        self.source, self.precision = source, precision
        check_family(source.folder, source.config)
        try:
            config = stock(AutoConfig.from_pretrained(source.folder, trust_remote_code=False, output_attentions=False))
            for part in {id(own): own for own in (config, config.get_text_config(decoder=True))}.values():
                for flag, value in _RETURNS.items():
                    setattr(part, flag, value)
            config.__dict__.pop("quantization_config", None)  # the reader dequantises
            # A named implementation could be code that transformers fetches from the hub.
            config._attn_implementation = None
            whole = build(config, source.config.get("architectures") or [])
        except Exception as error:  # transformers raises many kinds, all of them about this file
            raise StunError(f"{source.folder / 'config.json'}: transformers cannot build this model: {error}") from error
        whole.eval()
        if EXPERTS_IMPLEMENTATION in ALL_EXPERTS_FUNCTIONS:
            whole.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        text = text_part(source.folder, whole)
        self._outputs = 1
        self.whole, self.model, self.decoder, self.path = whole, text.model, text.decoder, text.path
        self.config = self.decoder.config
        self.config.__dict__.pop("quantization_config", None)
        self.is_nested = self.config is not whole.config
        name = source.config["model_type"].removeprefix(HETEROGENEOUS)
        self.model_type = ALIASES.get(name, name)
        # As config.json names it: runtimes look their own class up by it.
        self.class_name = next(iter(source.config.get("architectures") or []), "").removeprefix(HETEROGENEOUS_CLASS)
        self.count = self._count_field()
        if not self.count and self.model_type not in TESTED:
            reason = "no layer of it has experts that run through transformers' interface of experts"
            raise StunError(f"{source.folder}: model_type {self.model_type!r} is not supported: {reason}")
        with as_configured(source.folder, "the model"):
            names = NameMap(source, text, self.build_layer)
        self.layers, self.mtp, self.outer = names.layers, names.mtp, names.outer
        self.top_k = self._top_k()
        self.groups, self.group_floor = self._groups()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of most of the checkpoint's bytes."""
        nbytes: dict[torch.dtype, int] = {}
        for info in self.source.tensors.values():
            nbytes[info.dtype] = nbytes.get(info.dtype, 0) + info.nbytes
        return max(nbytes, key=nbytes.get)

    def info(self, name: str) -> TensorInfo:
        """Place, shape and dtype of a source tensor."""
        return self.source.tensors[name]

    def piece(self, layout: LayerLayout, expert: int, part: str) -> list[TensorInfo]:
        """Source tensors, or entries of them, that make up one part of an expert."""
        infos = [self.info(name) for name in layout.experts[expert][part]]
        return [info.row(expert) for info in infos] if part in layout.fused else infos

    def down_shape(self, layout: LayerLayout) -> tuple[int, int]:
        """Rows and columns of an expert's down projection."""
        rows, columns = self.piece(layout, layout.whole[0], "down_proj")[0].shape
        return (columns, rows) if layout.is_transposed else (rows, columns)

    def read_expert(
        self, layout: LayerLayout, expert: int, read: Callable[..., torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Parts of one expert, from disk, by the function of a `reading` if given; from a tensor that holds all experts only its
        bytes are read."""
        parts, read = layout.experts[expert], read or self.source.read
        return {part: read(*names, row=expert if part in layout.fused else None) for part, names in parts.items()}

    def novice_dtype(self, layout: LayerLayout) -> torch.dtype:
        """Dtype of a layer's constants: that of its down projections."""
        return self.piece(layout, 0, "down_proj")[0].dtype

    def parameters_of(self, layout: LayerLayout) -> int:
        """Number of parameters of a decoder layer in the checkpoint."""
        experts = {name for expert in layout.experts for names in expert.values() for name in names}
        return sum(self.info(name).numel for name in [*layout.copied, *experts])

    def _count_field(self) -> str:
        """Name of the number of experts in the configuration: the field with which a layer gets one expert more. Empty for a
        model without experts. Raises StunError if there is none."""
        found = next(((i, named[1]) for i, layer in enumerate(self.decoder.layers) if (named := experts_of(layer))), None)
        if found is None:
            return ""
        index, experts = found
        first = count_field(self.config)
        numbers = [name for name, value in vars(self.config).items() if type(value) is int and value == experts.num_experts]
        for name in [first] if first else numbers:
            try:
                grown = experts_of(self._built(index, name, experts.num_experts + 1))
            except Exception:  # whatever a family's code raises for a field that is none, or on which others depend
                continue
            if grown is not None and grown[1].num_experts == experts.num_experts + 1:
                return name
        tried = first or "no field"
        raise StunError(f"{self.source.folder / 'config.json'}: {tried} gives layers another number of experts")

    def _top_k(self) -> int:
        """Experts that a token is routed to: the most of any layer. 0 for a model without experts. Raises StunError unless all
        layers' are whole numbers."""
        modules = [module for layer in self.decoder.layers if experts_of(layer) for module in layer.modules()]
        counts = [module.top_k for module in modules if hasattr(module, "top_k")]
        counts += [getattr(self.config, name, 0) for name in _TOP_K if modules and not counts]
        for number in counts:
            if type(number) is not int:
                raise StunError(f"{self.source.folder / 'config.json'}: a token's number of experts cannot be {str(number)[:80]}")
        return max(counts, default=0)

    def _groups(self) -> tuple[int, int]:
        """Routing groups (1: none), and the fewest experts a group may keep. Raises StunError."""
        folder, counts = self.source.folder, [layout.num_experts for layout in self.layers if layout.experts]
        if not counts:
            return 1, 1
        if not 1 <= self.top_k <= min(counts):
            raise StunError(f"{folder}: config.json asks for {self.top_k} experts a token, a layer has {min(counts)}")
        groups, chosen = self._limits()
        if not isinstance(groups, int) or not isinstance(chosen, int) or not 1 <= chosen <= groups:
            raise StunError(f"{folder}: n_group={groups}, topk_group={chosen}: 1 <= topk_group <= n_group is needed")
        floor = max(self._least(groups), FLOORS.get(self.model_type, 1), -(-self.top_k // chosen))
        for count in counts if groups > 1 else ():
            if count % groups or count // groups < floor:
                needed = f"equal groups of at least {floor} (top-k {self.top_k} from {chosen} of them)"
                raise StunError(f"{folder}: {count} experts in n_group={groups} groups; routing needs {needed}")
        return groups, floor

    @property
    def _grouping(self) -> nn.Module | None:
        """A router that knows groups of experts."""
        modules = (module for layer in self.decoder.layers for module in layer.modules())
        return next((module for module in modules if hasattr(module, "num_group")), None)

    @property
    def is_grouped(self) -> bool:
        """Whether the routers know groups of experts, be it one."""
        return self._grouping is not None

    def _limits(self) -> tuple[object, object]:
        """Groups that the routers make of the experts, and those that a token may use; (1, 1) for routers without groups."""
        router = self._grouping
        is_limited = router is not None and getattr(self.config, "topk_method", None) != "greedy"
        return (router.num_group, router.topk_group) if is_limited else (1, 1)

    def _least(self, groups: int) -> int:
        """Fewest experts of a group with which the family's code builds and runs the block around the experts; where that does
        not run alone, the size that no known family exceeds."""
        first = -(-self.top_k // groups)
        known = max(first, 2 if groups > 1 else 1)
        return next((size for size in range(first, first + 3) if self._runs(groups * size)), known)

    def _runs(self, num_experts: int) -> bool:
        layout = next(layout for layout in reversed(self.layers) if layout.experts)
        try:
            layer = self.build_layer(layout.index, num_experts)
            path, experts = experts_of(layer)
            experts.forward = lambda hidden, *_, **__: hidden
            block = layer.get_submodule(path.rpartition(".")[0]).to("meta")
            block(torch.empty(1, 2, self.config.hidden_size, dtype=self.config.dtype or torch.float32, device="meta"))
        except Exception:  # of many kinds: the family's code does not foresee so few
            return False
        return True

    def build_layer(self, index: int, num_experts: int) -> nn.Module:
        """Decoder layer `index` with `num_experts` experts, on the meta device."""
        return self._built(index, self.count if num_experts else "", num_experts).eval()

    def _built(self, index: int, name: str, value: int) -> nn.Module:
        config = copy.deepcopy(self.config)
        if name:
            setattr(config, name, value)
        with without_weights():
            return type(self.decoder.layers[index])(config, index)

    def install(self, root: nn.Module, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Put tensors into a module by their names in it: parameters in `dtype`, or in float32 where the model demands it;
        buffers in their stored dtype."""
        exceptions = self.model._get_dtype_plan(dtype)
        for inside, tensor in tensors.items():
            path, _, leaf = inside.rpartition(".")
            module = root.get_submodule(path)
            if leaf in module._buffers:
                module._buffers[leaf] = tensor
            elif not tensor.is_floating_point():
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                final = next((other for pattern, other in exceptions.items() if re.search(pattern, inside)), dtype)
                module._parameters[leaf] = nn.Parameter(tensor.to(final), requires_grad=False)

    @property
    def embedding(self) -> str:
        """Source name of the input embedding."""
        own = _embedding(self.decoder).weight
        target = next(name for name, parameter in self.whole.named_parameters() if parameter is own)
        return next(name for name, other in self.outer.items() if other == target)

    def install_dense(self, layer: nn.Module, layout: LayerLayout, dense: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Put the tensors outside the experts, by source name, into a layer as `install` does."""
        self.install(layer, joined(layout.dense, dense), dtype)

    def install_outer(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Put tensors outside the layers, by source name, into the model as `install` does; a tied head shares the embedding.
        Those that become one tensor of the model come together."""
        self.install(self.whole, joined(self.outer, tensors), dtype)
        head = self.model.get_output_embeddings()
        if head.weight.is_meta and self.model.config.tie_word_embeddings:
            head.weight = _embedding(self.decoder).weight

    @property
    def entrance(self) -> list[str]:
        """Source names of the decoder's tensors outside its layers if the way to the first layer needs more of them than the
        embedding."""
        return [name for name in self.outer_weights if self.probe.reads_outside and self.outer[name].startswith(self.path)]

    @property
    def outer_weights(self) -> list[str]:
        """Source names of the tensors outside the layers that the model uses, in a fixed order."""
        return sorted(name for name, target in self.outer.items() if target)

    @cached_property
    def outer_groups(self) -> list[list[str]]:
        """The same, those together that become one tensor of the model."""
        groups: dict[str, list[str]] = {}
        for name in self.outer_weights:
            groups.setdefault(self.outer[name], []).append(name)
        return list(groups.values())

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
        embedding = _embedding(self.decoder)
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
        raise StunError(f"{self.source.folder}: layers that give more than {_OUTPUTS} outputs are not known")

    def _record(self, tokens_BT: torch.Tensor, outputs: int, inputs: dict) -> tuple[torch.Tensor, list[dict]]:
        names = [list(signature(type(layer).forward).parameters)[1:] for layer in self.decoder.layers]
        recorded: list[tuple[torch.Tensor, dict]] = []

        def record(index: int, *positional, **keywords) -> object:
            if index != len(recorded):
                where = f"{self.source.folder}: layer {index} runs in place of {len(recorded)}"
                raise StunError(f"{where}; layers must run in order, once")
            arguments = dict(zip(names[index], positional, strict=False)) | keywords
            hidden = arguments.pop(names[index][0])
            recorded.append((hidden, arguments))
            if len(recorded) == len(self.layers):
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
        weight_VD = torch.zeros((), dtype=torch.float32).expand(self.info(self.embedding).shape)
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
        file = self.source.folder / "generation_config.json"
        try:
            config = GenerationConfig.from_pretrained(self.source.folder) if file.is_file() else self.model.generation_config
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

    @property
    def cannot_differ(self) -> str:
        """Reason why layers must keep equal numbers of experts; empty if they need not."""
        return "" if count_field(self.config) else f"{self.model_type} has a field of its own for the number of experts"

    def pruned_config(
        self, counts: list[int], novices: dict[int, list[int]] | None = None, kept: dict[str, list[int]] | None = None
    ) -> dict:
        """config.json for `counts` experts per layer (0: none): the source's with the new number of experts, under one name
        without aliases. With `novices` by layer the number stays, and they are listed.

        Quantisation settings go, unless weights keep their form: `kept` are then the experts kept (`kept_by_block`).
        """
        written = copy.deepcopy(self.source.config)
        text = self._text_of(written)
        for config in (written,) if text is written else (written, text):
            settings = config.pop("quantization_config", None)
            if settings and kept is not None:
                config["quantization_config"] = renumbered(settings, kept)
        if novices:
            text[NOVICES] = {str(layer): experts for layer, experts in sorted(novices.items()) if experts}
            return written
        if counts == [layout.num_experts for layout in self.layers]:
            return written
        present = [name for name in COUNT_FIELDS if name in text]
        name = self.count if self.count in present or not present else present[0]
        for alias in present:
            del text[alias]
        distinct = sorted({count for count in counts if count})
        if len(distinct) > 1:
            heterogeneous.describe(written, text, name, counts)
        else:
            heterogeneous.forget(written, text, name, distinct[0])
        return written

    @property
    def text_path(self) -> list[str]:
        """Names that lead from the configuration of the whole model to that of its text part."""
        return _path_to(self.config, self.whole.config)

    def _text_of(self, written: dict) -> dict:
        """The part of config.json's content that describes the text model."""
        for name in self.text_path:
            if isinstance(written.get(name), dict):
                written = written[name]
        return written


def _path_to(part: PreTrainedConfig, whole: PreTrainedConfig) -> list[str]:
    """Names that lead from a configuration to one of those in it."""
    for name, inner in vars(whole).items():
        if inner is part:
            return [name]
        if isinstance(inner, PreTrainedConfig) and (path := _path_to(part, inner)):
            return [name, *path]
    return []


def joined(places: dict[str, str], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by their names in the model, from those by source name: several that have the same place are its rows, in order."""
    groups: dict[str, list[torch.Tensor]] = {}
    for name in (name for name in places if name in tensors):
        groups.setdefault(places[name], []).append(tensors[name])
    return {inside: parts[0] if len(parts) == 1 else torch.cat(parts) for inside, parts in groups.items()}


def _embedding(decoder: PreTrainedModel) -> nn.Module:
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


def expert_infos(arch: Architecture, layout: LayerLayout) -> list[TensorInfo]:
    """Tensors that make up one expert of a layer."""
    if not layout.experts:
        return []
    some = layout.whole[0]
    return [info for part in layout.experts[some] for info in arch.piece(layout, some, part)]
