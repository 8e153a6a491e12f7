"""How a checkpoint's tensors map onto transformers' modules, for every family alike.

Names, router rules, masks and rotary embeddings all come from transformers, whose internals only this module and `stun.models`
touch. What a family needs beyond that is its entry in `stun.families`.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from stun.checkpoint import Checkpoint, TensorInfo
from stun.config import StunError
from stun.families import COUNT_FIELDS, family_of
from stun.layout import EXPERT_NUMBER, GATES, LayerLayout, renumber, scope_of
from stun.models import heterogeneous
from stun.models.empty import without_weights

EXPERTS_IMPLEMENTATION = "stun"


def experts_of(layer: nn.Module) -> tuple[str, nn.Module] | None:
    """Path and module of a layer's fused experts, None for a layer without experts."""
    return next(((path, module) for path, module in layer.named_modules() if hasattr(module, "is_transposed")), None)


class _Entered(Exception):
    """The model's own forward has called all layers."""


class Architecture:
    """A checkpoint's model without its weights: the modules on the meta device, and the map of names.

    `layers` are the decoder layers, `mtp` the layouts of multi-token-prediction heads with experts, `outer` maps every other
    source name to its parameter ('' where the model has none).
    """

    def __init__(self, source: Checkpoint):
        self.source = source
        folder, self.is_nested = source.folder, isinstance(source.config.get("text_config"), dict)
        self.model_type, self.family = family_of(folder, source.config)
        try:
            self.config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config(decoder=True)
            self.config.__dict__.pop("quantization_config", None)  # weights are multiplied out as they are read
            with without_weights():
                self.model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StunError(f"{folder / 'config.json'}: transformers cannot build this model: {error}") from error
        self.model.eval()
        if EXPERTS_IMPLEMENTATION in ALL_EXPERTS_FUNCTIONS:
            self.model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        self.decoder = self.model.base_model
        self._prefix = next(name for name, module in self.model.named_modules() if module is self.decoder)
        self.layers = [LayerLayout(i) for i in range(len(self.decoder.layers))]
        self.mtp: list[LayerLayout] = []
        self.outer: dict[str, str] = {}
        self._map_names()
        for layout, layer in zip(self.layers, self.decoder.layers, strict=True):
            self._describe_layer(layout, layer)
        self._check_outside()
        self._find_mtp()
        modules = [module for layer in self.decoder.layers if experts_of(layer) for module in layer.modules()]
        self.top_k: int = max((m.top_k for m in modules if hasattr(m, "top_k")), default=0)
        self.is_transposed = any(getattr(module, "is_transposed", False) for module in modules)
        self.groups, self.group_floor = self._groups()

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

    def piece(self, layout: LayerLayout, expert: int, part: str) -> list[TensorInfo]:
        """Shapes and places of what makes up one part of an expert."""
        infos = [self.info(name) for name in layout.experts[expert][part]]
        return [info.row(expert) for info in infos] if part in layout.fused else infos

    def read_expert(self, layout: LayerLayout, expert: int) -> dict[str, torch.Tensor]:
        """An expert's parts, from disk; of a tensor that holds all experts only this one's bytes are read."""
        parts = layout.experts[expert]
        return {part: self.source.read(*names, row=expert if part in layout.fused else None) for part, names in parts.items()}

    def parameters_of(self, layout: LayerLayout) -> int:
        """Parameters of one decoder layer, counted in the checkpoint."""
        experts = {name for expert in layout.experts for names in expert.values() for name in names}
        return sum(self.info(name).numel for name in [*layout.copied, *experts])

    def _groups(self) -> tuple[int, int]:
        """Groups of experts that routing is limited to (1: none), and the fewest experts a group may keep."""
        limited = self.family.group_floor and getattr(self.config, "topk_method", None) != "greedy"
        groups = (getattr(self.config, "n_group", None) or 1) if limited else 1
        for layout in self.layers:
            if layout.num_experts % groups:
                experts = f"{layout.num_experts} experts do not divide into n_group={groups} groups"
                raise StunError(f"{self.source.folder}: layer {layout.index}: {experts}")
        chosen = self.config.topk_group if groups > 1 else 1
        return groups, max(self.family.group_floor, -(-self.top_k // chosen))

    def _map_names(self) -> None:
        """Sort all source names into layers and `outer`."""
        transforms = get_model_conversion_mapping(self.model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        order = {pattern: rank for t in converters for rank, pattern in enumerate(t.source_patterns)}
        parameters = self.model.state_dict()
        inside_layer = re.compile(rf"{re.escape(self._prefix)}\.layers\.(\d+)\.(.+)")
        experts = {i: f"{found[0]}." for i, layer in enumerate(self.decoder.layers) if (found := experts_of(layer))}
        parts: dict[int, dict[int, dict[str, list]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        for name in self.source.tensors:
            target, pattern = rename_source_key(name, renamings, converters, self.model.base_model_prefix, parameters)
            match, number = inside_layer.fullmatch(target), EXPERT_NUMBER.search(name)
            if not match or int(match[1]) >= len(self.layers):
                self.outer[name] = target if target in parameters else ""
                continue
            layout, inside = self.layers[int(match[1])], match[2]
            if target not in parameters:
                layout.unused.append(name)
            elif not inside.startswith(experts.get(layout.index, "no experts")):
                layout.dense[name] = inside
            elif number and pattern:
                parts[layout.index][int(number[2])][inside.rpartition(".")[2]].append((order[pattern], name))
            else:
                self._add_fused(layout, inside.rpartition(".")[2], name)
        for index, numbered in parts.items():
            self.layers[index].experts = [
                {part: tuple(name for _, name in sorted(names)) for part, names in sorted(numbered[expert].items())}
                for expert in range(max(numbered) + 1)
            ]

    def _add_fused(self, layout: LayerLayout, part: str, name: str) -> None:
        """Note that `name` holds `part` of all experts, one entry each."""
        count = self.info(name).shape[0]
        layout.experts.extend({} for _ in range(count - layout.num_experts))
        for expert in layout.experts:
            expert[part] = (name,)
        layout.fused |= {part}

    def _describe_layer(self, layout: LayerLayout, layer: nn.Module) -> None:
        """Check that every tensor of a layer is there in the shape that config.json asks for; tell apart what it is for.

        What has an entry for each expert is found by building the layer with one expert more. Raises StunError.
        """
        wanted, found = layer.state_dict(), experts_of(layer)
        more: dict[str, torch.Tensor] = {}
        if found:
            path, module = found
            parts = {inside: wanted.pop(inside) for inside in list(wanted) if inside.startswith(f"{path}.")}
            self._check_experts(layout, module.num_experts, {inside.rpartition(".")[2]: t for inside, t in parts.items()})
            more = self.build_layer(layout.index, module.num_experts + 1).state_dict()
        sources = {inside: name for name, inside in layout.dense.items()}
        for inside, tensor in wanted.items():
            if inside not in sources:
                raise StunError(f"{self.source.folder}: layer {layout.index}: no tensor for {inside}")
            info = self.info(sources[inside])
            if info.shape != tuple(tensor.shape):
                asked = tuple(tensor.shape)
                raise StunError(f"{info.file}: {sources[inside]} has shape {info.shape}, config.json asks for {asked}")
            grown = [dim for dim, size in enumerate(tensor.shape) if more and more[inside].shape[dim] != size]
            if grown:
                layout.routed[sources[inside]] = grown[0]
        layout.router = next((name for name in layout.routed if layout.dense[name].endswith(".weight")), "")
        linears = {f"{path}.weight": path for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
        for name, inside in sorted(layout.dense.items()):
            if inside in linears and name not in layout.routed and linears[inside].rpartition(".")[2] not in GATES:
                layout.linears[name] = scope_of(linears[inside])

    def _check_experts(self, layout: LayerLayout, count: int, parts: dict[str, torch.Tensor]) -> None:
        where = f"{self.source.folder}: layer {layout.index}"
        if layout.num_experts != count:
            raise StunError(f"{where} holds {layout.num_experts} experts, config.json says {count}")
        for number, expert in enumerate(layout.experts):
            for part, parameter in parts.items():
                shapes = [info.shape for info in self.piece(layout, number, part)] if part in expert else []
                rows = sum(shape[0] for shape in shapes)
                if rows != parameter.shape[1] or {shape[1:] for shape in shapes} != {tuple(parameter.shape[2:])}:
                    wanted = tuple(parameter.shape[1:])
                    raise StunError(f"{where}, expert {number}: {part} must be {wanted}, found {shapes or 'nothing'}")

    def _check_outside(self) -> None:
        """Everything the model needs outside its layers is there: a tied output head needs nothing. Raises StunError."""
        present, head = set(self.outer.values()), self.model.get_output_embeddings()
        tied = {id(p) for p in head.parameters()} if self.config.tie_word_embeddings else set()
        for name, parameter in self.model.named_parameters():
            if not name.startswith(f"{self._prefix}.layers.") and name not in present and id(parameter) not in tied:
                raise StunError(f"{self.source.folder}: no tensor for {name}")

    def _find_mtp(self) -> None:
        """Layouts of the experts outside the decoder layers: those of multi-token-prediction heads, which transformers leaves
        out.

        Their names end like those of a decoder layer; whatever else a head holds is copied with `outer`.
        """
        model = next((layout for layout in reversed(self.layers) if layout.experts), None)
        one = next(iter(model.experts[0].values()))[0] if model else ""
        block, found, _ = one.partition(".experts.")
        strays = [name for name, target in self.outer.items() if not target and ".experts." in name] if found else []
        for own in sorted({name.partition(".experts.")[0] for name in strays}):
            layout = self._mtp_layout(model, block, own, [name for name in strays if name.startswith(f"{own}.experts.")])
            self.mtp.append(layout)
            for name in {*layout.dense, *(name for expert in layout.experts for names in expert.values() for name in names)}:
                del self.outer[name]

    def _mtp_layout(self, model: LayerLayout, block: str, own: str, strays: list[str]) -> LayerLayout:
        """The layout of the experts at `own`, alike to those of the decoder layer `model` at `block`. Raises StunError."""

        def here(known: str, expert: int = 0) -> str:
            return own + renumber(known, expert).removeprefix(block)

        numbers = [int(match[2]) for name in strays if (match := EXPERT_NUMBER.search(name))]
        count = max(numbers) + 1 if numbers else self.info(strays[0]).shape[0]
        layout = LayerLayout(len(self.layers) + len(self.mtp), fused=model.fused, router=here(model.router), is_mtp=True)
        layout.dense = {here(known): model.dense[known] for known in model.routed}
        layout.routed = {here(known): dim for known, dim in model.routed.items()}
        parts = model.experts[0]
        layout.experts = [{p: tuple(here(known, e) for known in parts[p]) for p in parts} for e in range(count)]
        names = {*layout.dense, *(name for expert in layout.experts for part in expert.values() for name in part)}
        missing = sorted(name for name in names if name not in self.outer)
        if missing or count != model.num_experts:
            why = f"no {missing[0]}" if missing else f"{count} of them, where the decoder layers have {model.num_experts}"
            raise StunError(f"{self.source.folder}: {own} holds experts outside the decoder layers, in a form not known: {why}")
        return layout

    def build_layer(self, index: int, num_experts: int) -> nn.Module:
        """Decoder layer `index` with `num_experts` experts, its parameters still on the meta device."""
        config = copy.deepcopy(self.config)
        if num_experts:
            setattr(config, self.family.count, num_experts)
        with without_weights():
            layer = type(self.decoder.layers[index])(config, index)
        return layer.eval()

    def install(self, layer: nn.Module, layout: LayerLayout, dense: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Put the tensors outside the experts into a layer: parameters in `dtype` but where the model insists on float32, buffers
        as they are stored."""
        exceptions = self.model._get_dtype_plan(dtype)
        for name, inside in layout.dense.items():
            path, _, leaf = inside.rpartition(".")
            module = layer.get_submodule(path)
            if leaf in module._buffers:
                module._buffers[leaf] = dense[name]
            else:
                own = next((kept for pattern, kept in exceptions.items() if re.search(pattern, inside)), dtype)
                module._parameters[leaf] = nn.Parameter(dense[name].to(own), requires_grad=False)

    @property
    def embedding(self) -> str:
        """Source name of the input embedding."""
        module = self.decoder.get_input_embeddings()
        path = next(path for path, other in self.model.named_modules() if other is module)
        return next(name for name, target in self.outer.items() if target == f"{path}.weight")

    @torch.no_grad()
    def enter(self, tokens_BT: torch.Tensor, embedding_VD: torch.Tensor) -> tuple[torch.Tensor, list[dict]]:
        """Hidden states [B, T, D] that reach the first layer, and the keyword arguments (masks, rotary embeddings, ...) of
        every layer.

        The model's own forward runs with a recorder in place of every layer, so no family needs code for this. No padding.
        """
        _move_buffers(self.decoder, tokens_BT.device)
        embedding, recorded = self.decoder.get_input_embeddings(), []

        def recorder(hidden_states, **arguments):
            recorded.append((hidden_states, arguments))
            if len(recorded) == len(self.layers):
                raise _Entered
            return hidden_states

        placeholder = embedding.weight
        embedding.weight = nn.Parameter(embedding_VD, requires_grad=False)
        for layer in self.decoder.layers:
            layer.forward = recorder
        try:
            self.decoder(input_ids=tokens_BT, use_cache=False)
        except _Entered:
            pass
        finally:
            embedding.weight = placeholder
            for layer in self.decoder.layers:
                del layer.forward
        return recorded[0][0], [arguments for _, arguments in recorded]

    @property
    def cannot_differ(self) -> str:
        """Why layers may not keep different numbers of experts; empty where they may."""
        return f"{self.source.config['model_type']} wraps its text model in another" if self.is_nested else ""

    def pruned_config(self, counts: list[int]) -> dict:
        """config.json for `counts` experts per layer (0: none): the source's own but for the number of experts, which stands
        under one name, with no alias beside it, and the mark of fp8."""
        written = copy.deepcopy(self.source.config)
        text = written["text_config"] if self.is_nested else written
        for config in (written, text):
            config.pop("quantization_config", None)
        if counts == [layout.num_experts for layout in self.layers]:
            return written
        present = [name for name in COUNT_FIELDS if name in text]
        name = self.family.count if self.family.count in present or not present else present[0]
        for alias in present:
            del text[alias]
        distinct = sorted({count for count in counts if count})
        heterogeneous.describe(text, name, counts) if len(distinct) > 1 else heterogeneous.forget(text, name, distinct[0])
        return written


def _move_buffers(root: nn.Module, device: torch.device) -> None:
    for module in root.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)
