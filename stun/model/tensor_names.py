"""Map from a checkpoint's tensors to decoder layers, their experts, experts of prediction heads, and the rest of the model.

transformers' table of renamings says which parameter a source tensor becomes, and that decides its role. A tensor without a
place, or with another shape or kind of number than config.json demands, is refused here, before any work.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from stun.checkpoint.reader import Checkpoint
from stun.config import Scope, StunError
from stun.model.families import NOVICES
from stun.model.layer_layout import CONSTANT, EXPERT_NUMBER, GATES, LayerLayout, scope_of
from stun.schema import ASCENDING, INTEGER, misfit

if TYPE_CHECKING:
    from stun.model.text_part import TextPart

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Tensors of one block of experts: part -> number of the expert (None: a tensor that holds all) -> (place in it, source name).
Pieces = dict[str, dict[int | None, list[tuple[int, str]]]]


def novices_of(source: Checkpoint) -> dict[int, list[int]]:
    """Novices of each layer that config.json lists, ascending. Raises StunError if it lists anything else."""
    listed = source.config.get(NOVICES, {})
    if reason := misfit(listed, {INTEGER: ASCENDING}, NOVICES):
        raise StunError(f"{source.folder / 'config.json'}: {reason} (experts by layer)")
    return {int(layer): experts for layer, experts in listed.items() if experts}


def all_experts(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and modules of a layer's fused experts, those that run through transformers' interface of experts."""
    return [(path, module) for path, module in layer.named_modules() if hasattr(module, "is_transposed")]


def experts_of(layer: nn.Module) -> tuple[str, nn.Module] | None:
    """The first of them; None for a layer without experts."""
    return next(iter(all_experts(layer)), None)


def _joins_rows(converter: WeightConverter) -> bool:
    """Whether a conversion puts tensors under one another, and does nothing else."""
    return all(isinstance(step, Concatenate) and step.dim == 0 for step in converter.operations)


def _joins_experts(converter: WeightConverter) -> bool:
    """Whether a conversion puts the matrices of experts beside each other, and the rows of those of one under one another."""
    steps = [(type(step), step.dim) for step in converter.operations if isinstance(step, (Concatenate, MergeModulelist))]
    return len(steps) == len(converter.operations) and set(steps) <= {(MergeModulelist, 0), (Concatenate, 1)}


def _turns_experts(converter: WeightConverter) -> bool:
    """Whether a conversion transposes the matrix of every expert, if that fits, and does nothing else."""
    return all(isinstance(step, Transpose) and {step.dim0, step.dim1} == {1, 2} for step in converter.operations)


def _multiplies(module: nn.Module) -> bool:
    """Whether a module multiplies all of its input by its weight; DeepSeek-V4's grouped one gives each group of rows inputs of
    their own."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def width_of(experts: nn.Module) -> int:
    """Numbers that an expert gives for a token: not the model's hidden size where experts work in a latent space."""
    return experts.down_proj.shape[2 if experts.is_transposed else 1]


class NameMap:
    """Layouts of a checkpoint's decoder layers (`layers`) and of multi-token-prediction heads with experts (`mtp`); `outer` maps
    every other source name to its parameter ('' where the text model has none; tensors of other towers are copied). Raises
    StunError where a tensor does not fit."""

    def __init__(self, source: Checkpoint, text: TextPart, build: Callable[[int, int], nn.Module]):
        """`build(i, n)` builds decoder layer i with n experts."""
        self.source, self.text, self.decoder, self.novices = source, text, text.decoder, novices_of(source)
        self.prefix = f"{text.path}layers."
        self.layers = [LayerLayout(i) for i in range(len(self.decoder.layers))]
        self.mtp: list[LayerLayout] = []
        self.outer: dict[str, str] = {}
        self._unknown: dict[str, str] = {}  # target of a tensor that the model has no parameter for -> its name
        self._taken: dict[int, dict[str, str]] = {}  # by place of the map: target -> its tensor
        blocks = self._sort(text.whole)
        for layout, layer in zip(self.layers, self.decoder.layers, strict=True):
            path, experts = self._experts(layout, layer)
            if experts is not None:
                block, where = f"{self.prefix}{layout.index}.{path}", f"{source.folder}: layer {layout.index}"
                self._place_novices(layout, self._constants.pop(block, {}), experts, where)
                self._place_experts(layout, blocks.pop(block, {}), experts, experts.num_experts, where)
            grown = {} if experts is None else build(layout.index, experts.num_experts + 1).state_dict()
            self._describe(layout, layer, grown)
        for block, pieces in sorted(blocks.items()):
            self._place_head(block, pieces)
        self._check_outside()

    def _experts(self, layout: LayerLayout, layer: nn.Module) -> tuple[str, nn.Module | None]:
        """Path and module of a layer's experts. Raises StunError if they are several blocks, or run in a way of their own."""
        found = all_experts(layer)
        where = f"{self.source.folder}: layer {layout.index}"
        if len(found) > 1:
            raise StunError(f"{where}: has {len(found)} blocks of experts; layers with one are read")
        if found and getattr(found[0][1], "has_post_expert_norm", False):
            raise StunError(f"{where}: has a norm behind every expert; experts that end in a matrix are read")
        return found[0] if found else ("", None)

    def _sort(self, model: PreTrainedModel) -> dict[str, Pieces]:
        """Put every source name into a layer or `outer`; returns the tensors of experts, by the path of their module."""
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        order = {pattern: rank for t in converters for rank, pattern in enumerate(t.source_patterns)}
        self._home = {pattern: t for t in reversed(converters) for pattern in t.source_patterns}
        parameters, within = model.state_dict(), re.compile(rf"{re.escape(self.prefix)}(\d+)\.(.+)")
        heads = self._head_names(parameters)
        # transformers puts the model's prefix before names of parameters that it has.
        parameters |= dict.fromkeys(self._places_of_constants(), torch.empty(0, device="meta"))
        blocks: dict[str, Pieces] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        self._constants: dict[str, dict[int, str]] = defaultdict(dict)  # by the path of their experts' module
        self._turned: set[str] = set()  # tensors of all experts that are transposed if they do not fit
        self._converted: dict[str, tuple[tuple[int, int], WeightConverter]] = {}  # dense tensor -> its place, what converts it
        for name in self.source.tensors:
            target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
            if target not in parameters and name in parameters:  # saved by transformers under the model's own name
                target, pattern = name, None
            is_inside = target.startswith(self.text.path) or target in heads
            number = EXPERT_NUMBER.search(name)
            if number and pattern is None and not is_inside and target not in parameters:
                # A head beside a wrapped text model: conversions may be of names within it.
                within_text = f"{self.text.path}{name}"
                target, pattern = rename_source_key(within_text, renamings, converters, model.base_model_prefix, parameters)
                target = target.removeprefix(self.text.path)
            block, is_expert, part = target.partition(".experts.")
            match = within.fullmatch(target)
            is_of_expert = bool(is_expert) and (is_inside or target not in parameters)
            if is_of_expert and number and self.novices and part == f"{number[2]}.{CONSTANT}":
                self._constants[f"{block}.experts"][int(number[2])] = name
            elif is_of_expert:
                self._check_conversion(name, pattern, f"{block}.experts")
                blocks[f"{block}.experts"][part][int(number[2]) if number and pattern else None].append(
                    (order.get(pattern, 0), name)
                )
            elif is_inside and match and int(match[1]) < len(self.layers):
                layout = self.layers[int(match[1])]
                if target in parameters:
                    self._only(name, match[2], layout.dense, pattern)
                else:
                    layout.unused.append(name)
            elif is_inside and target in parameters:
                self._only(name, target, self.outer, pattern)
            else:
                self.outer[name] = ""  # of another tower, or none that transformers knows
                self._unknown[target] = name
        for places in (self.outer, *(layout.dense for layout in self.layers)):
            for name in sorted(self._converted.keys() & places.keys(), key=lambda name: (places[name], self._converted[name][0])):
                places[name] = places.pop(name)
        return blocks

    def _places_of_constants(self) -> list[str]:
        """Parameters of the constants that config.json lists, in a model that has them."""
        paths = {index: found[0] for index, layer in enumerate(self.decoder.layers) if (found := experts_of(layer))}
        listed = [(index, expert) for index, experts in self.novices.items() if index in paths for expert in experts]
        return [f"{self.prefix}{index}.{paths[index]}.{expert}.{CONSTANT}" for index, expert in listed]

    def _head_names(self, parameters: dict[str, torch.Tensor]) -> set[str]:
        """Names of the output head's parameters."""
        head = self.text.model.get_output_embeddings()
        path = next(path for path, module in self.text.whole.named_modules() if module is head)
        return {f"{path}.{name}" for name in head.state_dict()} & parameters.keys()

    def _check_conversion(self, name: str, pattern: str | None, block: str) -> None:
        """Raise StunError for a tensor of experts that transformers converts in a way that is not known here."""
        converter = self._home.get(pattern)
        if converter is not None and not (_joins_experts(converter) or _turns_experts(converter)):
            steps = ", ".join(type(step).__name__ for step in converter.operations)
            raise StunError(f"{self.source.folder}: {name}: {block} is made of it by {steps}, which cannot be written back")
        if converter is not None and not _joins_experts(converter):
            self._turned.add(name)

    def _only(self, name: str, target: str, places: dict[str, str], pattern: str | None) -> None:
        """Give a tensor its place in the model, which it shares with those that it is joined with only."""
        converter = self._home.get(pattern)
        if converter is not None and not _joins_rows(converter):
            steps = ", ".join(type(step).__name__ for step in converter.operations)
            raise StunError(f"{self.source.folder}: {name}: {target} is made of it by {steps}, which is not known")
        if converter is not None and (len(converter.source_patterns) > 1 or "*" in pattern):
            number = re.search(r"_(\d+)\.", name)
            self._converted[name] = (converter.source_patterns.index(pattern), int(number[1]) if number else 0), converter
        elif target in self._taken.setdefault(id(places), {}):
            other = self._taken[id(places)][target]
            raise StunError(f"{self.source.folder}: {other} and {name} are the same tensor of the model; remove one")
        self._taken.setdefault(id(places), {})[target] = name
        places[name] = target

    def _check(self, name: str, shape: tuple[int, ...], is_float: bool = True) -> None:
        info = self.source.tensors[name]
        if info.shape != tuple(shape):
            raise StunError(f"{info.file}: {name} has shape {info.shape}, config.json asks for {tuple(shape)}")
        if is_float != (info.dtype in _FLOATS):
            kind = "plain floating-point weights" if is_float else "whole numbers"
            raise StunError(f"{info.file}: {name} holds {info.dtype}; {kind} are needed")

    def _place_experts(self, layout: LayerLayout, pieces: Pieces, module: nn.Module, count: int, where: str) -> None:
        """Fill in a layout's `count` experts, with the shapes of `module`'s."""
        wanted = {name: tuple(parameter.shape[1:]) for name, parameter in sorted(module.named_parameters())}
        for part in pieces.keys() - wanted.keys():
            stray = next(iter(pieces[part].values()))[0][1]
            raise StunError(f"{where}: {stray} belongs to an expert, but the model has no such parameter")
        numbers = {number for numbered in pieces.values() for number in numbered if number is not None}
        layout.fused = frozenset(part for part in wanted if None in pieces.get(part, {}))
        if (numbers or not layout.fused) and len(numbers) != count - len(layout.novices):
            numbered = f", numbered {min(numbers)} to {max(numbers)}" if numbers else ""
            raise StunError(f"{where} holds {len(numbers)} experts{numbered}; config.json says {count}")
        is_turned = self._is_turned(pieces, layout.fused, wanted, where)
        for part in layout.fused:
            name, *others = (name for _, name in pieces[part][None])
            if others:
                raise StunError(f"{where}: {name} and {others[0]} are the same tensor of the model; remove one")
            self._check(name, (count, *(wanted[part][::-1] if is_turned else wanted[part])))
        layout.experts = [{} for _ in range(count)]
        for part, shape in wanted.items():
            for number, expert in ((n, expert) for n, expert in enumerate(layout.experts) if n not in layout.novices):
                is_fused = part in layout.fused
                expert[part] = (pieces[part][None][0][1],) if is_fused else self._joined(pieces, part, number, shape, where)
        layout.is_transposed = module.is_transposed != is_turned
        layout.width = width_of(module)

    def _is_turned(self, pieces: Pieces, fused: frozenset[str], wanted: dict[str, tuple[int, ...]], where: str) -> bool:
        """Whether the checkpoint stores the matrices of experts the other way than the model has them. Raises StunError if it is
        not so of all of them."""
        turned = set()
        for part in fused:
            name = pieces[part][None][0][1]
            shape, may_turn = self.source.tensors[name].shape[1:], name in self._turned
            is_square = len(shape) == 2 and shape[0] == shape[1]
            turned.add(None if may_turn and is_square else may_turn and shape != wanted[part] and shape == wanted[part][::-1])
        if None in turned or len(turned) > 1:
            raise StunError(f"{where}: the shapes of its experts do not say whether they are stored as the model has them")
        return turned == {True}

    def _place_novices(self, layout: LayerLayout, constants: dict[int, str], module: nn.Module, where: str) -> None:
        """Fill in a layout's novices, which must be those of config.json."""
        listed, count = self.novices.get(layout.index, []), module.num_experts
        if sorted(constants) != listed:
            raise StunError(f"{where}: has constants of experts {sorted(constants)}; config.json lists {listed} as {NOVICES}")
        if len(listed) >= count or max(listed, default=0) >= count:
            raise StunError(
                f"{where}: config.json lists {listed} as {NOVICES}; they must be some of its {count} experts, not all"
            )
        for name in constants.values():
            self._check(name, (width_of(module),))
        layout.novices = dict(sorted(constants.items()))

    def _joined(self, pieces: Pieces, part: str, number: int, shape: tuple[int, ...], where: str) -> tuple[str, ...]:
        """Tensors whose rows, in order, make up one part of an expert."""
        names = tuple(name for _, name in sorted(pieces.get(part, {}).get(number, [])))
        shapes = [self.source.tensors[name].shape for name in names]
        fits = all(len(piece) == len(shape) and piece[1:] == shape[1:] for piece in shapes)
        if not fits or sum(piece[0] for piece in shapes) != shape[0]:
            raise StunError(f"{where}, expert {number}: {part} must be {shape} by config.json, found {shapes or 'nothing'}")
        for name, piece in zip(names, shapes, strict=True):
            self._check(name, piece)
        dtypes = {name: self.source.tensors[name].dtype for name in names}  # their bytes become one tensor
        if len(set(dtypes.values())) > 1:
            found = ", ".join(f"{name} holds {dtype}" for name, dtype in dtypes.items())
            raise StunError(f"{where}, expert {number}: {part} must be of one dtype, and {found}")
        return names

    def _describe(self, layout: LayerLayout, layer: nn.Module, grown: dict[str, torch.Tensor]) -> None:
        """Check the tensors outside a layer's experts, and fill in `routed`, `router` and `linears`.

        `grown` is the layer with one more expert: there, tensors with an entry per expert have another shape.
        """
        path = (experts_of(layer) or ("no experts",))[0]
        sources: dict[str, list[str]] = defaultdict(list)
        for name, inside in layout.dense.items():
            sources[inside].append(name)
        state = layer.state_dict()
        for inside, tensor in state.items():
            if not inside.startswith(f"{path}."):
                self._check_dense(layout, inside, sources[inside], tensor)
                self._find_entries(layout, sources[inside], tensor, grown.get(inside, tensor))
        layout.router = next((name for name in layout.routed if layout.dense[name].endswith(".weight")), "")
        block = path.rpartition(".")[0]
        linears = {f"{path}.weight": path for path, module in layer.named_modules() if _multiplies(module)}
        for name, inside in sorted(layout.dense.items()):
            if inside in linears and name not in layout.routed and linears[inside].rpartition(".")[2] not in GATES:
                is_beside = bool(block) and linears[inside].rpartition(".")[0] == block
                layout.linears[name] = Scope.mlp if is_beside else scope_of(linears[inside])
                layout.behind += [name] if is_beside else []

    def _check_dense(self, layout: LayerLayout, inside: str, names: list[str], tensor: torch.Tensor) -> None:
        """Check the tensors that become one of a layer's, outside its experts."""
        where, is_float = f"{self.source.folder}: layer {layout.index}", tensor.is_floating_point()
        if not names:
            raise StunError(f"{where}: no tensor for {inside}")
        rows = [self.source.tensors[name].shape[0] if len(names) > 1 else tensor.shape[0] for name in names if tensor.dim()]
        if tensor.dim() and sum(rows) != tensor.shape[0]:
            raise StunError(f"{where}: {', '.join(names)} have {sum(rows)} rows, {inside} must have {tensor.shape[0]}")
        for name, count in zip(names, rows or [0] * len(names), strict=True):
            self._check(name, (count, *tensor.shape[1:]) if tensor.dim() else (), is_float)
        if not is_float and layout.experts:
            if tuple(tensor.shape) != (self.decoder.config.vocab_size, self._top_k(layout)):
                raise StunError(f"{where}: {inside} holds whole numbers, of which it is not known whether they are experts")
            layout.tables += names

    def _top_k(self, layout: LayerLayout) -> int:
        return max((getattr(module, "top_k", 0) for module in self.decoder.layers[layout.index].modules()), default=0)

    def _find_entries(self, layout: LayerLayout, names: list[str], tensor: torch.Tensor, grown: torch.Tensor) -> None:
        """Note tensors with an entry per expert: those that have another shape in the layer with one expert more."""
        dims = [dim for dim, size in enumerate(tensor.shape) if grown.shape[dim] != size]
        if not dims:
            return
        if len(dims) > 1 or len(names) > 1 or tensor.shape[dims[0]] != layout.num_experts:
            raise StunError(
                f"{self.source.folder}: layer {layout.index}: {names[0]} has {tuple(tensor.shape)} entries for "
                f"{layout.num_experts} experts; one for each is known"
            )
        layout.routed[names[0]] = dims[0]

    def _place_head(self, block: str, pieces: Pieces) -> None:
        """Add the layout of experts outside the decoder layers, which must be those of a multi-token-prediction head.

        transformers has no modules for such heads. Their experts and their routers' names are like those of the decoder layers;
        other tensors of a head remain in `outer`.
        """
        parent, where = block.removesuffix(".experts"), f"{self.source.folder}: {block}"
        if not self._is_head(block):
            raise StunError(
                f"{where}: neither in one of the {len(self.layers)} layers of config.json nor in a prediction head it names"
            )
        model = next(layout for layout in reversed(self.layers) if layout.experts)
        path, module = experts_of(self.decoder.layers[model.index])
        fused = [self.source.tensors[numbered[None][0][1]].shape for numbered in pieces.values() if None in numbered]
        count = (fused[0] or (0,))[0] if fused else len({number for numbered in pieces.values() for number in numbered})
        counts = {layout.num_experts for layout in self.layers if layout.experts}
        if len(counts) == 1 and count not in counts:
            raise StunError(f"{where}: {count} experts, where the decoder layers have {model.num_experts}")
        layout = LayerLayout(len(self.layers) + len(self.mtp), is_mtp=True)
        self._place_experts(layout, pieces, module, count, where)
        for known, dim in model.routed.items():
            name = self._unknown.get(parent + model.dense[known].removeprefix(path.removesuffix(".experts")))
            if name is None:
                raise StunError(f"{where}: no tensor like {known} for this head")
            shape = list(self.source.tensors[known].shape)
            self._check(name, (*shape[:dim], count, *shape[dim + 1 :]))
            layout.dense[name], layout.routed[name] = model.dense[known], dim
            layout.router = name if known == model.router else layout.router
            del self.outer[name]
        self.mtp.append(layout)

    def _is_head(self, block: str) -> bool:
        """Whether config.json or the name says that this is a multi-token-prediction head."""
        text = self.source.config.get("text_config") or self.source.config
        heads, after = text.get("num_nextn_predict_layers"), re.match(rf"{re.escape(self.prefix)}(\d+)\.", block)
        return "mtp" in block or bool(after and isinstance(heads, int) and int(after[1]) < len(self.layers) + heads)

    def _check_outside(self) -> None:
        """Check that every parameter of the text model outside the layers has a tensor; a tied output head needs none."""
        whole, head = self.text.whole, self.text.model.get_output_embeddings()
        sources: dict[str, list[str]] = defaultdict(list)
        for name, target in self.outer.items():
            sources[target].append(name)
        heads = {id(parameter) for parameter in head.parameters()}
        is_tied = self.text.model.config.tie_word_embeddings
        for target, parameter in whole.named_parameters():
            is_text = target.startswith(self.text.path) or id(parameter) in heads
            if target.startswith(self.prefix) or not is_text:
                continue
            names = sources.get(target, [])
            if len(names) == 1:
                self._check(names[0], parameter.shape)
            elif names and sum(self.source.tensors[name].shape[0] for name in names) != parameter.shape[0]:
                raise StunError(f"{self.source.folder}: {', '.join(names)} are not the {parameter.shape[0]} rows of {target}")
            elif not names and not (is_tied and id(parameter) in heads):
                raise StunError(f"{self.source.folder}: no tensor for {target}")
