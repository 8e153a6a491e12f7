"""What differs between model families, and how a checkpoint's tensors map onto transformers' modules.

The only family-specific code: `FAMILIES` (one entry of data each) and `stun.models`. Names, router rules, masks and rotary
embeddings all come from transformers, whose internals this module is the only one to touch.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import stun.models.arctic  # noqa: F401  (its registration happens in the package)
from stun.checkpoint import Checkpoint, TensorInfo
from stun.config import Scope, StunError

EXPERTS_IMPLEMENTATION = "stun"
_EXPERT_NUMBER = re.compile(r"(\.experts\.)(\d+)(\.)")


@dataclass(frozen=True)
class Family:
    """Data of one model family.

    `count_fields`: keys under which config.json may hold the number of experts, the canonical one first. `routed`: parameters
    of the MoE block whose rows belong to experts. `per_layer_counts`: the count may be a list with one entry a layer.
    """

    count_fields: tuple[str, ...]
    top_k_field: str = "num_experts_per_tok"
    routed: tuple[str, ...] = ("gate.weight",)
    per_layer_counts: bool = False


FAMILIES: dict[str, Family] = {
    "arctic": Family(("num_local_experts",), per_layer_counts=True),
    "mixtral": Family(("num_local_experts", "num_experts")),
    "qwen3_moe": Family(("num_experts", "num_local_experts")),
}


@dataclass
class LayerLayout:
    """The tensors of one decoder layer, by source name.

    `dense` maps a name to the parameter inside the layer. `experts[e]` maps a fused parameter of the experts module
    (`gate_up_proj`, `down_proj`) to the tensors whose rows make up expert e's part of it, in order. `routed` are the dense
    names with one row per expert. `unused` are tensors the model has no parameter for; they are copied.
    """

    index: int
    block: str = ""
    dense: dict[str, str] = field(default_factory=dict)
    experts: list[dict[str, tuple[str, ...]]] = field(default_factory=list)
    routed: frozenset[str] = frozenset()
    unused: list[str] = field(default_factory=list)
    linears: dict[str, Scope] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        return len(self.experts)


def renumber(name: str, expert: int) -> str:
    """The source name of an expert's tensor, for the expert that is number `expert` after pruning."""
    return _EXPERT_NUMBER.sub(rf"\g<1>{expert}\g<3>", name, count=1)


def _experts_module(layer: nn.Module) -> tuple[str, nn.Module] | None:
    """Path and module of a layer's fused experts, None for a layer without experts."""
    for path, module in layer.named_modules():
        if hasattr(module, "down_proj") and isinstance(module.down_proj, nn.Parameter):
            return path, module
    return None


def _kind(path: str) -> Scope:
    """Which part of a layer a linear module belongs to, from its path."""
    first = path.split(".")[0]
    if "attn" in first or "attention" in first:
        return Scope.attention
    return Scope.shared if "shared" in path else Scope.mlp


class Architecture:
    """A checkpoint's model without its weights: the modules on the meta device, and the map of names."""

    def __init__(self, source: Checkpoint):
        model_type = source.config.get("model_type")
        if model_type not in FAMILIES:
            raise StunError(f"{source.folder}: model_type {model_type!r} is not supported; known: {', '.join(FAMILIES)}")
        if source.config.get("quantization_config"):
            raise StunError(f"{source.folder}: quantised checkpoints are not supported; use the bf16 or fp32 release")
        self.source, self.family = source, FAMILIES[model_type]
        try:
            self.config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
            with init_empty_weights(include_buffers=False):
                self.model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StunError(f"{source.folder / 'config.json'}: transformers cannot build this model: {error}") from error
        self.model.eval()
        if EXPERTS_IMPLEMENTATION in ALL_EXPERTS_FUNCTIONS:
            self.model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        self.decoder = self.model.base_model
        self.top_k: int = getattr(self.config, self.family.top_k_field)
        self.layers, self.outer = self._map_names()
        self._check_complete()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype most bytes of the checkpoint are stored in."""
        nbytes: dict[torch.dtype, int] = {}
        for info in self.source.tensors.values():
            nbytes[info.dtype] = nbytes.get(info.dtype, 0) + info.nbytes
        return max(nbytes, key=nbytes.get)

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and place of a source tensor."""
        return self.source.tensors[name]

    def parameters_of(self, layout: LayerLayout) -> int:
        """Parameters of one decoder layer, counted in the checkpoint."""
        names = [*layout.dense, *layout.unused]
        names += [name for expert in layout.experts for part in expert.values() for name in part]
        return sum(self.info(name).numel for name in names)

    def _map_names(self) -> tuple[list[LayerLayout], dict[str, str]]:
        """Sort all source names: into layers, and into `outer` (source name -> parameter, '' where the model has none)."""
        transforms = get_model_conversion_mapping(self.model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        order = {pattern: rank for t in converters for rank, pattern in enumerate(t.source_patterns)}
        parameters = self.model.state_dict()
        prefix = next(name for name, module in self.model.named_modules() if module is self.decoder) + ".layers."
        layers = [self._empty_layout(i) for i in range(len(self.decoder.layers))]
        parts: dict[tuple[int, int, str], list[tuple[int, str]]] = {}
        outer: dict[str, str] = {}
        for name in self.source.tensors:
            target, pattern = rename_source_key(name, renamings, converters, self.model.base_model_prefix, parameters)
            index, _, inside = target.removeprefix(prefix).partition(".")
            if not target.startswith(prefix) or int(index) >= len(layers):
                outer[name] = target if target in parameters else ""
                continue
            layout = layers[int(index)]
            number = _EXPERT_NUMBER.search(name)
            if pattern is not None and number and target in parameters:
                part = inside.rpartition(".")[2]
                parts.setdefault((int(index), int(number[2]), part), []).append((order[pattern], name))
            elif target in parameters:
                layout.dense[name] = inside
            else:
                layout.unused.append(name)
        for (index, expert, part), names in sorted(parts.items()):
            experts = layers[index].experts
            experts.extend({} for _ in range(expert + 1 - len(experts)))
            experts[expert][part] = tuple(name for _, name in sorted(names))
        for layout in layers:
            ends = {f"{layout.block}.{suffix}" for suffix in self.family.routed}
            layout.routed = frozenset(name for name, inside in layout.dense.items() if inside in ends)
            kinds = {f"{path}.weight": _kind(path) for path in self._linear_paths(layout.index)}
            layout.linears = {
                name: kinds[inside]
                for name, inside in sorted(layout.dense.items())
                if inside in kinds and name not in layout.routed
            }
        return layers, outer

    def _empty_layout(self, index: int) -> LayerLayout:
        found = _experts_module(self.decoder.layers[index])
        return LayerLayout(index, block=found[0].rpartition(".")[0] if found else "")

    def _linear_paths(self, index: int) -> list[str]:
        return [path for path, m in self.decoder.layers[index].named_modules() if isinstance(m, nn.Linear)]

    def _check_complete(self) -> None:
        """Every parameter of the decoder has its tensors, with the shape the config asks for. Raises StunError."""
        folder = self.source.folder
        for layout, layer in zip(self.layers, self.decoder.layers, strict=True):
            found = _experts_module(layer)
            wanted = dict(layer.named_parameters())
            if found:
                path, module = found
                parts = {name: wanted.pop(f"{path}.{name}") for name, _ in module.named_parameters()}
                self._check_experts(layout, module.num_experts, parts)
            sources = {inside: name for name, inside in layout.dense.items()}
            for inside, parameter in wanted.items():
                name = sources.get(inside)
                if name is None:
                    raise StunError(f"{folder}: layer {layout.index}: no tensor for {inside}")
                self._check_shape(name, tuple(parameter.shape))
        for parameter in ("embed_tokens.weight", "norm.weight"):
            if f"{self.model.base_model_prefix}.{parameter}" not in self.outer.values():
                raise StunError(f"{folder}: no tensor for {parameter}")

    def _check_experts(self, layout: LayerLayout, count: int, parts: dict[str, nn.Parameter]) -> None:
        if layout.num_experts != count:
            raise StunError(
                f"{self.source.folder}: layer {layout.index} holds {layout.num_experts} experts, config.json says {count}"
            )
        for number, expert in enumerate(layout.experts):
            for part, parameter in parts.items():
                names = expert.get(part, ())
                rows = sum(self.info(name).shape[0] for name in names)
                columns = {self.info(name).shape[1:] for name in names}
                if rows != parameter.shape[1] or columns != {tuple(parameter.shape[2:])}:
                    raise StunError(
                        f"{self.source.folder}: layer {layout.index}, expert {number}: {part} must be "
                        f"{tuple(parameter.shape[1:])}, found {[self.info(n).shape for n in names] or 'nothing'}"
                    )

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if self.info(name).shape != shape:
            raise StunError(f"{self.info(name).file}: {name} has shape {self.info(name).shape}, config.json asks for {shape}")

    def build_layer(self, index: int, num_experts: int) -> nn.Module:
        """Decoder layer `index` with `num_experts` experts, its parameters still on the meta device."""
        config = copy.deepcopy(self.config)
        if num_experts:
            setattr(config, self.family.count_fields[0], num_experts)
        with init_empty_weights(include_buffers=False):
            layer = type(self.decoder.layers[index])(config, index)
        return layer.eval()

    def experts_of(self, layer: nn.Module) -> nn.Module | None:
        """The fused experts module of a layer, None if it has none."""
        found = _experts_module(layer)
        return found[1] if found else None

    def layer_arguments(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> list[dict]:
        """Keyword arguments (masks, rotary embeddings, ...) that the model passes each layer for unpadded input [batch, length].

        The model's own forward runs once with every layer replaced by a recorder, so no family needs code for this.
        """
        _move_buffers(self.decoder, device)
        recorded: list[dict] = []

        def recorder(hidden_states, **kwargs):
            recorded.append(kwargs)
            return hidden_states

        patched = [*self.decoder.layers, self.decoder.norm]
        for layer in self.decoder.layers:
            layer.forward = recorder
        self.decoder.norm.forward = lambda hidden_states: hidden_states
        try:
            embeddings = torch.zeros(batch, length, self.config.hidden_size, device=device, dtype=dtype)
            with torch.no_grad():
                self.decoder(inputs_embeds=embeddings, use_cache=False)
        finally:
            for module in patched:
                del module.forward
        return recorded

    def embedding(self, read, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The input embedding, its weight fetched with `read(source name)`."""
        target = f"{self.model.base_model_prefix}.embed_tokens.weight"
        weight = read(next(name for name, parameter in self.outer.items() if parameter == target))
        module = copy.deepcopy(self.decoder.embed_tokens)
        module.weight = nn.Parameter(weight.to(device=device, dtype=dtype), requires_grad=False)
        return module

    def pruned_config(self, counts: list[int]) -> dict:
        """config.json for `counts` experts per layer (0: none): the source's own, with one key changed and no alias beside it."""
        written = dict(self.source.config)
        if counts == [layout.num_experts for layout in self.layers]:
            return written
        present = [name for name in self.family.count_fields if name in written] or [self.family.count_fields[0]]
        distinct = {count for count in counts if count}
        if len(distinct) > 1 and not self.family.per_layer_counts:
            raise StunError(f"{written['model_type']} cannot hold a different number of experts in each layer")
        written[present[0]] = distinct.pop() if len(distinct) == 1 else counts
        for alias in present[1:]:
            del written[alias]
        return written


def _move_buffers(root: nn.Module, device: torch.device) -> None:
    for module in root.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)
