"""A checkpoint's model without its weights: transformers' modules on the meta device, for every family.

Router rules, masks and rotary embeddings come from transformers, whose internals only this package uses. Whatever else differs
between families is data in `stun.model.families`.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable
from functools import cached_property

import torch
import transformers
from torch import nn
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from stun.checkpoint.headers import TensorInfo
from stun.checkpoint.reader import Checkpoint
from stun.config import Precision, StunError
from stun.model import families, heterogeneous, remote_code, routing
from stun.model.as_configured import as_configured
from stun.model.form_settings import renumbered
from stun.model.forward import Forward, embedding_of
from stun.model.layer_layout import LayerLayout
from stun.model.novices import stock
from stun.model.tensor_names import NameMap
from stun.model.text_part import build, text_part

EXPERTS_IMPLEMENTATION = "stun"
# Flags that change what layers and models return, whatever config.json says.
_RETURNS = {"output_attentions": False, "output_hidden_states": False, "output_router_logits": False, "return_dict": True}


class Architecture(Forward):
    """Modules of a checkpoint's model on the meta device, and the places of its tensors in them.

    `layers` and `mtp` are the layouts of decoder layers and of multi-token-prediction heads with experts. `outer` maps every
    other source name to its parameter ('' where the model has none). `precision` decides the compute dtype. Raises StunError.
    """

    def __init__(self, source: Checkpoint, precision: Precision = Precision.auto):
        self.source, self.precision = source, precision
        families.check_family(source.folder, source.config)
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
        super().__init__(text, source.folder)
        self.config = self.decoder.config
        self.config.__dict__.pop("quantization_config", None)
        self.is_nested = self.config is not whole.config
        name = source.config["model_type"].removeprefix(families.HETEROGENEOUS)
        self.model_type = families.ALIASES.get(name, name)
        # As config.json names it: runtimes look their own class up by it.
        self.class_name = next(iter(source.config.get("architectures") or []), "").removeprefix(families.HETEROGENEOUS_CLASS)
        self.count = routing.field_of_count(self.decoder, self.folder)
        if not self.count and self.model_type not in families.TESTED:
            reason = "no layer of it has experts that run through transformers' interface of experts"
            raise StunError(f"{source.folder}: model_type {self.model_type!r} is not supported: {reason}")
        with as_configured(source.folder, "the model"):
            names = NameMap(source, text, self.build_layer)
        self.layers, self.mtp, self.outer = names.layers, names.mtp, names.outer
        self.top_k = routing.most_of_a_token(self.decoder, self.folder)
        self.groups, self.group_floor = routing.groups(self)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Dtype of most of the checkpoint's bytes."""
        nbytes: Counter[torch.dtype] = Counter()
        for info in self.source.tensors.values():
            nbytes[info.dtype] += info.nbytes
        return nbytes.most_common(1)[0][0]

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

    @property
    def is_grouped(self) -> bool:
        """Whether the routers know groups of experts, be it one."""
        return routing.router_of_groups(self.decoder) is not None

    def parameters_of(self, layout: LayerLayout) -> int:
        """Number of parameters of a decoder layer in the checkpoint."""
        experts = {name for expert in layout.experts for names in expert.values() for name in names}
        return sum(self.info(name).numel for name in [*layout.copied, *experts])

    def build_layer(self, index: int, num_experts: int) -> nn.Module:
        """Decoder layer `index` with `num_experts` experts, on the meta device."""
        return routing.built_layer(self.decoder, index, self.count if num_experts else "", num_experts).eval()

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
        own = embedding_of(self.decoder).weight
        target = next(name for name, parameter in self.whole.named_parameters() if parameter is own)
        return next(name for name, other in self.outer.items() if other == target)

    def install_outer(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Put tensors outside the layers, by source name, into the model as `install` does; a tied head shares the embedding.
        Those that become one tensor of the model come together."""
        self.install(self.whole, joined(self.outer, tensors), dtype)
        head = self.model.get_output_embeddings()
        if head.weight.is_meta and self.model.config.tie_word_embeddings:
            head.weight = embedding_of(self.decoder).weight

    @property
    def outer_weights(self) -> list[str]:
        """Source names of the tensors outside the layers that the model uses, in a fixed order."""
        return sorted(name for name, target in self.outer.items() if target)

    @cached_property
    def outer_groups(self) -> dict[str, list[str]]:
        """The same by the tensor of the model that they become."""
        groups: dict[str, list[str]] = {}
        for name in self.outer_weights:
            groups.setdefault(self.outer[name], []).append(name)
        return groups

    @property
    def cannot_differ(self) -> str:
        """Reason why layers must keep equal numbers of experts; empty if they need not."""
        if not families.count_field(self.config):
            return f"{self.model_type} has a field of its own for the number of experts"
        if self.model_type != "arctic" and not remote_code.is_describable(self.model_type):
            return f"transformers {transformers.__version__} builds no base model of {self.model_type}"
        return ""

    @property
    def norms_behind(self) -> tuple[str, ...]:
        """Paths, inside a layer, of norms between its experts and its output, in order."""
        return families.NORMS_BEHIND.get(self.model_type, ())

    @property
    def adds_by_token(self) -> bool:
        """Whether a layer multiplies its experts' output by a factor of each token: with residual streams, or in norms."""
        return bool(self.norms_behind) or len(self.probe.token_shape) > 1

    @property
    def cannot_refit(self) -> str:
        """Reason why a layer does more with the output of its experts than the joint refit knows; empty if it does not, or if
        that is not known before it runs."""
        if self.norms_behind and getattr(self.config, "hidden_size_per_layer_input", 0):
            return f"layers of {self.model_type} with hidden_size_per_layer_input do more than to normalise and add their output"
        narrow = {own.width for own in self.layers if own.experts and not own.output_matrix} - {self.config.hidden_size}
        return f"its experts' outputs have {max(narrow)} numbers a token" if narrow else ""

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
            text[families.NOVICES] = {str(layer): experts for layer, experts in sorted(novices.items()) if experts}
            return written
        if counts == [layout.num_experts for layout in self.layers]:
            return written
        present = [name for name in families.COUNT_FIELDS if name in text]
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


def expert_infos(arch: Architecture, layout: LayerLayout) -> list[TensorInfo]:
    """Tensors that make up one expert of a layer."""
    if not layout.experts:
        return []
    some = layout.whole[0]
    return [info for part in layout.experts[some] for info in arch.piece(layout, some, part)]
