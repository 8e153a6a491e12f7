"""Integers of compressed-tensors' pack-quantized form: unsigned codes of four or eight bits along the inputs, in 32-bit words.

`weight_packed` I32 [O, D / 8], `weight_scale` [O, G], `weight_shape`; the middle code is zero, or that of a group's own
`weight_zero_point`, packed along the outputs.
"""

from dataclasses import dataclass

import torch

from stun.checkpoint.codecs.codec import Codec, Parts, Tensors, from_nibbles, multiplied, nibbles, passengers, weight, worth
from stun.checkpoint.headers import Part, TensorInfo
from stun.config import StunError

PACKED = "weight_packed"


@dataclass(frozen=True)
class Packed(Codec):
    """Codes in words, scales [L, G], and zero points in words, those of a group of neighbours, where a form has its own."""

    def dequantise(self, parts: Parts) -> torch.Tensor:
        codes, middle = parts["codes"], 0 if "zero" in parts else 1 << self.bits - 1
        if self.bits == 4:
            steps_LW = worth(codes, tuple(float(code - middle) for code in range(16)))
        else:
            steps_LW = self._fields(codes).float().sub_(middle)
        if "zero" in parts:
            zero_LG = self._zeros(parts, len(steps_LW)).float()
            steps_LW.view(*zero_LG.shape, -1).sub_(zero_LG[..., None])
        return multiplied(steps_LW, parts["scale"].float())

    def remove(self, parts: Parts, gone_LW: torch.Tensor) -> None:
        codes_LW = self._fields(parts["codes"])
        self._store(parts, torch.where(gone_LW, self._zero(parts, codes_LW), codes_LW))

    def grid(self, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
        codes_LW, scale_LG = self._fields(parts["codes"]), parts["scale"].float()
        zero_LW = self._zero(parts, codes_LW).float()
        return scale_LG.repeat_interleave(codes_LW.shape[1] // scale_LG.shape[1], 1), zero_LW

    def write(self, parts: Parts, steps_LW: torch.Tensor, zero: torch.Tensor, changed_LW: torch.Tensor) -> None:
        self._store(parts, torch.where(changed_LW, (steps_LW + zero).to(torch.uint8), self._fields(parts["codes"])))

    def _store(self, parts: Parts, codes_LW: torch.Tensor) -> None:
        words = parts["codes"]
        words.copy_(from_nibbles(codes_LW, words) if self.bits == 4 else codes_LW.contiguous().view(torch.int32))

    def _zero(self, parts: Parts, codes_LW: torch.Tensor) -> torch.Tensor:
        """Codes of zero [L, W]."""
        if "zero" not in parts:
            return torch.full_like(codes_LW, 1 << self.bits - 1)
        zero_LG = self._zeros(parts, len(codes_LW))
        return zero_LG.repeat_interleave(codes_LW.shape[1] // zero_LG.shape[1], 1)

    def _fields(self, words: torch.Tensor) -> torch.Tensor:
        """Codes of words along their lines, a byte each."""
        return nibbles(words) if self.bits == 4 else words.contiguous().view(torch.uint8)

    def _zeros(self, parts: Parts, lines: int) -> torch.Tensor:
        """Codes of zero of a form that has its own [L, G]."""
        # A copy, since one column counts as contiguous either way.
        return self._fields(parts["zero"].T.clone(memory_format=torch.contiguous_format)).T[:lines]


def packed(name: str, tensors: Tensors, settings: dict) -> tuple[str, TensorInfo] | None:
    """Name and description of the weight whose codes `name` holds; None if it holds others. Raises StunError."""
    info, stem = tensors[name], name.removesuffix(PACKED)
    if not name.endswith(PACKED) or info.dtype is not torch.int32 or len(info.shape) != 2:
        return None
    own = {role: f"{stem}weight_{end}" for role, end in (("scale", "scale"), ("zero", "zero_point"), ("shape", "shape"))}
    if f"{stem}weight_g_idx" in tensors:
        raise StunError(f"{info.file}: {stem}weight_g_idx: weights in another order than their inputs (actorder) are not read")
    for role in ("scale", "shape"):
        if own[role] not in tensors:
            raise StunError(f"{info.file}: {name} has no {own[role]}")
    bits, scale, zero = _bits(name, info, settings), tensors[own["scale"]], tensors.get(own["zero"])
    rows, columns = info.shape[0], info.shape[1] * 32 // bits
    groups = scale.shape[1] if len(scale.shape) == 2 else 0
    if not groups or columns % groups or scale.shape[0] != rows or not scale.dtype.is_floating_point:
        raise StunError(
            f"{scale.file}: {own['scale']} is {scale.dtype} {scale.shape}; {(rows, columns)} needs a number for groups"
        )
    if zero is not None and (zero.dtype is not torch.int32 or zero.shape != (-(-rows * bits // 32), groups)):
        raise StunError(
            f"{zero.file}: {own['zero']} is {zero.dtype} {zero.shape}; words [{-(-rows * bits // 32)}, {groups}] are needed"
        )
    parts = [
        Part("codes", name, info, 1),
        Part("scale", own["scale"], scale, 1),
        Part("shape", own["shape"], tensors[own["shape"]], 0),
    ]
    parts += [] if zero is None else [Part("zero", own["zero"], zero, 32 // bits)]
    return f"{stem}weight", weight(Packed(f"int{bits}", bits), (rows, columns), [*parts, *passengers(stem, tensors)])


def _bits(name: str, info: TensorInfo, settings: dict) -> int:
    """Bits of a code, which must be the same for all groups of the configuration that hold integers."""
    groups = [group.get("weights") or {} for group in (settings.get("config_groups") or {}).values()]
    found = {group.get("num_bits") for group in groups if group.get("type", "int") == "int"}
    if len(found) != 1 or not found <= {4, 8}:
        raise StunError(
            f"{info.file}: {name}: config.json says integers of {sorted(map(str, found))} bits; all of 4 or all of 8 are read"
        )
    return found.pop()
