"""Four-bit integers of GPTQ and AWQ, stored transposed: a line is an input, scales and zero points belong to groups of inputs.

GPTQ: `qweight` I32 [D / 8, O], `qzeros` I32 [G, O / 8], `scales` [G, O], and `g_idx` [D], the group of every input; zero points
are stored one too small, but for checkpoint_format gptq_v2. AWQ: `qweight` I32 [D, O / 8], `qzeros`, `scales`, with the codes of
a word in an order of its own.
"""

from dataclasses import dataclass

import torch

from stun.checkpoint.codecs.codec import Codec, Parts, Tensors, from_nibbles, nibbles, weight
from stun.checkpoint.headers import Part, TensorInfo
from stun.config import StunError

CODES = "qweight"
# Place of column n in an AWQ word, and column of place n.
_PLACES, _COLUMNS = [0, 4, 1, 5, 2, 6, 3, 7], [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True)
class Transposed(Codec):
    """Codes of inputs and outputs; `offset` is added to stored zero points. `is_ordered`: words are AWQ's, along the outputs.

    Scales [G, W] are those of the lines' groups; with `order`, all of them, and it gives the group of each line.
    """

    offset: int = 0
    is_ordered: bool = False

    def largest(self, parts: Parts, values_LW: torch.Tensor) -> torch.Tensor:
        largest_GW = torch.zeros_like(parts["scale"], dtype=torch.float32)
        group_LW = self._groups(parts, len(values_LW))[:, None].expand(values_LW.shape)
        return largest_GW.scatter_reduce_(0, group_LW, values_LW.abs(), "amax")

    def dequantise(self, parts: Parts) -> torch.Tensor:
        codes_LW = self._codes(parts["codes"])
        group_L = self._groups(parts, len(codes_LW))
        steps_LW = codes_LW.float().sub_(self._zeros(parts).float()[group_L])
        return steps_LW.mul_(parts["scale"].float()[group_L])

    def remove(self, parts: Parts, gone_LW: torch.Tensor) -> None:
        codes_LW = self._codes(parts["codes"])
        self._store(parts, torch.where(gone_LW, self._zeros(parts)[self._groups(parts, len(codes_LW))], codes_LW))

    def grid(self, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
        group_L = self._groups(parts, len(self._codes(parts["codes"])))
        return parts["scale"].float()[group_L], self._zeros(parts).float()[group_L]

    def write(self, parts: Parts, steps_LW: torch.Tensor, zero: torch.Tensor, changed_LW: torch.Tensor) -> None:
        self._store(parts, torch.where(changed_LW, (steps_LW + zero).to(torch.uint8), self._codes(parts["codes"])))

    def _store(self, parts: Parts, codes_LW: torch.Tensor) -> None:
        words = parts["codes"]
        if self.is_ordered:
            words.copy_(from_nibbles(codes_LW.unflatten(1, (-1, 8))[..., _COLUMNS].flatten(1), words))
        else:
            columns = words.T.clone(memory_format=torch.contiguous_format)
            words.copy_(from_nibbles(codes_LW.T, columns).T)

    def _codes(self, words: torch.Tensor) -> torch.Tensor:
        """Codes [L, W], a byte each."""
        return self._fields(words) if self.is_ordered else nibbles(words.T.clone(memory_format=torch.contiguous_format)).T

    def _fields(self, words: torch.Tensor) -> torch.Tensor:
        """Codes of words along the outputs."""
        codes = nibbles(words)
        return codes.unflatten(1, (-1, 8))[..., _PLACES].flatten(1) if self.is_ordered else codes

    def _zeros(self, parts: Parts) -> torch.Tensor:
        """Codes of zero [G, W]."""
        return (self._fields(parts["zero"]) + self.offset) & 15

    def _groups(self, parts: Parts, lines: int) -> torch.Tensor:
        """Group of each line."""
        if "order" in parts:
            return parts["order"].long()
        groups = parts["scale"].shape[0]
        return torch.arange(lines, device=parts["scale"].device) // -(-lines // groups)


def transposed(name: str, tensors: Tensors, settings: dict) -> tuple[str, TensorInfo] | None:
    """Name and description of the weight whose codes `name` holds; None if it holds others. Raises StunError."""
    if not name.endswith(CODES):
        return None
    info, stem, is_awq = tensors[name], name.removesuffix(CODES), settings["quant_method"] == "awq"
    for end in ("scales", "qzeros"):
        if stem + end not in tensors:
            raise StunError(f"{info.file}: {name} has no {stem}{end}")
    scale, zero, order = tensors[f"{stem}scales"], tensors[f"{stem}qzeros"], tensors.get(f"{stem}g_idx")
    inputs, outputs = _shape(info, is_awq)
    groups = scale.shape[0] if len(scale.shape) == 2 else 0
    if not groups or inputs % groups or scale.shape != (groups, outputs) or not scale.dtype.is_floating_point:
        raise StunError(
            f"{scale.file}: {stem}scales is {scale.dtype} {scale.shape}; numbers [groups of {inputs}, {outputs}] are needed"
        )
    if zero.dtype is not torch.int32 or zero.shape != (groups, outputs // 8):
        raise StunError(f"{zero.file}: {stem}qzeros is {zero.dtype} {zero.shape}; words [{groups}, {outputs // 8}] are needed")
    if order is not None and (order.dtype is not torch.int32 or order.shape != (inputs,)):
        raise StunError(f"{order.file}: {stem}g_idx is {order.dtype} {order.shape}; a group of each of {inputs} inputs is needed")
    lines = 0 if order else inputs // groups
    parts = [Part("codes", name, info, 1 if is_awq else 8)]
    parts += [Part("scale", f"{stem}scales", scale, lines), Part("zero", f"{stem}qzeros", zero, lines)]
    parts += [Part("order", f"{stem}g_idx", order, 1)] if order else []
    offset = 0 if is_awq or settings.get("checkpoint_format") == "gptq_v2" else 1
    codec = Transposed("awq" if is_awq else "gptq", 4, is_transposed=True, offset=offset, is_ordered=is_awq)
    return f"{stem}weight", weight(codec, (outputs, inputs), parts)


def _shape(info: TensorInfo, is_awq: bool) -> tuple[int, int]:
    """Inputs and outputs of a matrix by its codes."""
    if info.dtype is not torch.int32 or len(info.shape) != 2:
        raise StunError(f"{info.file}: codes of GPTQ and AWQ must be words [.., ..], are {info.dtype} {info.shape}")
    rows, columns = info.shape
    return (rows, 8 * columns) if is_awq else (8 * rows, columns)
