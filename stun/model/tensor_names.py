"""Map from a checkpoint's tensors to decoder layers, their experts, experts of prediction heads, and the rest of the model.

transformers' table of renamings says which parameter a source tensor becomes, and that decides its role. A tensor without a
place, or with another shape or kind of number than config.json demands, is refused here, before any work.
"""

import re
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from stun.checkpoint.reader import Checkpoint
from stun.config import StunError
from stun.model.families import NOVICES
from stun.model.layer_layout import CONSTANT, EXPERT_NUMBER, GATES, LayerLayout, scope_of

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Tensors of one block of experts: part -> number of the expert (None: a tensor that holds all) -> (place in it, source name).
Pieces = dict[str, dict[int | None, list[tuple[int, str]]]]


def novices_of(source: Checkpoint) -> dict[int, list[int]]:
    """Novices of each layer that config.json lists, ascending. Raises StunError if it lists anything else."""
    listed = source.config.get(NOVICES, {})
    try:
        novices = {int(layer): sorted(map(int, experts)) for layer, experts in listed.items()}
        is_valid = all(list(experts) == novices[int(layer)] for layer, experts in listed.items())
    except (AttributeError, TypeError, ValueError):
        is_valid = False
    if not is_valid:
        file = source.folder / "config.json"
        raise StunError(f"{file}: {NOVICES}: must map numbers of layers to ascending lists of experts, is {str(listed)[:80]}")
    return {layer: experts for layer, experts in novices.items() if experts}


def experts_of(layer: nn.Module) -> tuple[str, nn.Module] | None:
    """Path and module of a layer's fused experts; None for a layer without experts."""
    return next(((path, module) for path, module in layer.named_modules() if hasattr(module, "is_transposed")), None)


class NameMap:
    """Layouts of a checkpoint's decoder layers (`layers`) and of multi-token-prediction heads with experts (`mtp`); `outer` maps
    every other source name to its parameter ('' where the model has none). Raises StunError where a tensor does not fit."""

    def __init__(self, source: Checkpoint, model: PreTrainedModel, build: Callable[[int, int], nn.Module]):
        """`build(i, n)` builds decoder layer i with n experts."""
        self.source, self.decoder, self.novices = source, model.base_model, novices_of(source)
        self.prefix = next(name for name, module in model.named_modules() if module is self.decoder) + ".layers."
        self.layers = [LayerLayout(i) for i in range(len(self.decoder.layers))]
        self.mtp: list[LayerLayout] = []
        self.outer: dict[str, str] = {}
        self._unknown: dict[str, str] = {}  # target of a tensor that the model has no parameter for -> its name
        blocks = self._sort(model)
        for layout, layer in zip(self.layers, self.decoder.layers, strict=True):
            path, experts = experts_of(layer) or ("", None)
            if experts is not None:
                block, where = f"{self.prefix}{layout.index}.{path}", f"{source.folder}: layer {layout.index}"
                self._place_novices(layout, self._constants.pop(block, {}), experts.num_experts, where)
                self._place_experts(layout, blocks.pop(block, {}), experts, experts.num_experts, where)
            grown = {} if experts is None else build(layout.index, experts.num_experts + 1).state_dict()
            self._describe(layout, layer, grown)
        for block, pieces in sorted(blocks.items()):
            self._place_head(block, pieces)
        self._check_outside(model)

    def _sort(self, model: PreTrainedModel) -> dict[str, Pieces]:
        """Assign every source name to a layer or to `outer`; returns the pieces of experts, by the path of their module."""
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        order = {pattern: rank for t in converters for rank, pattern in enumerate(t.source_patterns)}
        parameters, within = model.state_dict(), re.compile(rf"{re.escape(self.prefix)}(\d+)\.(.+)")
        blocks: dict[str, Pieces] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        self._constants: dict[str, dict[int, str]] = defaultdict(dict)  # by the path of their experts' module
        for name in self.source.tensors:
            target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
            block, is_expert, part = target.partition(".experts.")
            match, number = within.fullmatch(target), EXPERT_NUMBER.search(name)
            if is_expert and number and self.novices and part == f"{number[2]}.{CONSTANT}":
                self._constants[f"{block}.experts"][int(number[2])] = name
            elif is_expert:
                blocks[f"{block}.experts"][part][int(number[2]) if number and pattern else None].append(
                    (order.get(pattern, 0), name)
                )
            elif match and int(match[1]) < len(self.layers):
                layout = self.layers[int(match[1])]
                if target in parameters:
                    self._only(name, match[2], layout.dense)
                else:
                    layout.unused.append(name)
            elif target in parameters:
                self._only(name, target, self.outer)
            else:
                self.outer[name] = ""
                self._unknown[target] = name
        return blocks

    def _only(self, name: str, target: str, places: dict[str, str]) -> None:
        if target in places.values():
            other = next(known for known, taken in places.items() if taken == target)
            raise StunError(f"{self.source.folder}: {other} and {name} are the same tensor of the model; remove one")
        places[name] = target

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        info = self.source.tensors[name]
        if info.shape != tuple(shape):
            raise StunError(f"{info.file}: {name} has shape {info.shape}, config.json asks for {tuple(shape)}")
        if info.dtype not in _FLOATS:
            raise StunError(f"{info.file}: {name} holds {info.dtype}; plain floating-point weights are needed")

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
        for part in layout.fused:
            name, *others = (name for _, name in pieces[part][None])
            if others:
                raise StunError(f"{where}: {name} and {others[0]} are the same tensor of the model; remove one")
            self._check(name, (count, *wanted[part]))
        layout.experts = [{} for _ in range(count)]
        for part, shape in wanted.items():
            for number, expert in ((n, expert) for n, expert in enumerate(layout.experts) if n not in layout.novices):
                is_fused = part in layout.fused
                expert[part] = (pieces[part][None][0][1],) if is_fused else self._joined(pieces, part, number, shape, where)
        layout.is_transposed = module.is_transposed

    def _place_novices(self, layout: LayerLayout, constants: dict[int, str], count: int, where: str) -> None:
        """Fill in a layout's novices, which must be those of config.json."""
        listed = self.novices.get(layout.index, [])
        if sorted(constants) != listed:
            raise StunError(f"{where}: has constants of experts {sorted(constants)}; config.json lists {listed} as {NOVICES}")
        if len(listed) >= count or max(listed, default=0) >= count:
            raise StunError(
                f"{where}: config.json lists {listed} as {NOVICES}; they must be some of its {count} experts, not all"
            )
        for name in constants.values():
            self._check(name, (self.decoder.config.hidden_size,))
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
        return names

    def _describe(self, layout: LayerLayout, layer: nn.Module, grown: dict[str, torch.Tensor]) -> None:
        """Check the tensors outside a layer's experts, and fill in `routed`, `router` and `linears`.

        `grown` is the layer with one more expert: there, tensors with an entry per expert have another shape.
        """
        experts, sources = (experts_of(layer) or ("no experts",))[0], {inside: name for name, inside in layout.dense.items()}
        for inside, tensor in layer.state_dict().items():
            if inside.startswith(f"{experts}."):
                continue
            if inside not in sources:
                raise StunError(f"{self.source.folder}: layer {layout.index}: no tensor for {inside}")
            self._check(sources[inside], tensor.shape)
            dims = [dim for dim, size in enumerate(tensor.shape) if grown and grown[inside].shape[dim] != size]
            if dims:
                layout.routed[sources[inside]] = dims[0]
        layout.router = next((name for name in layout.routed if layout.dense[name].endswith(".weight")), "")
        linears = {f"{path}.weight": path for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
        for name, inside in sorted(layout.dense.items()):
            if inside in linears and name not in layout.routed and linears[inside].rpartition(".")[2] not in GATES:
                layout.linears[name] = scope_of(linears[inside])

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

    def _check_outside(self, model: PreTrainedModel) -> None:
        """Check that every parameter outside the layers has a tensor; a tied output head needs none."""
        sources, head = {target: name for name, target in self.outer.items()}, model.get_output_embeddings()
        tied = {id(parameter) for parameter in head.parameters()} if model.config.tie_word_embeddings else set()
        for target, parameter in model.named_parameters():
            if target.startswith(self.prefix):
                continue
            if target in sources:
                self._check(sources[target], parameter.shape)
            elif id(parameter) not in tied:
                raise StunError(f"{self.source.folder}: no tensor for {target}")
