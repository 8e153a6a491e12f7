"""A byte an entry: E4M3 (fp8) or signed integers, with a scale a block, a row, a group of neighbours, or the matrix.

DeepSeek-V3 and others: `X` and `X_scale_inv`. compressed-tensors and ModelOpt: `X` and `X_scale`, where X ends in `weight`.
"""

from dataclasses import dataclass

import torch

from stun.checkpoint.codecs.codec import EXPONENTS, Codec, Parts, Tensors, decoded, in_float32, passengers, weight
from stun.checkpoint.headers import Part, TensorInfo
from stun.config import StunError

INVERSE, SCALE = "_scale_inv", "_scale"
LARGEST = 448.0  # of E4M3


@dataclass(frozen=True)
class EightBits(Codec):
    """Codes [L, W] and scales, one for `block` [rows, columns]; the last blocks may be cut off."""

    block: tuple[int, int] = (1, 1)

    @property
    def exponent(self) -> int:
        return 8

    def largest(self, parts: Parts, values_LW: torch.Tensor) -> torch.Tensor:
        largest, scale = values_LW.abs(), parts["scale"]
        shape = scale.shape if scale.dim() == 2 else (scale.numel(), 1)
        for dim, blocks in enumerate(shape):
            size = largest.shape[dim]
            step = size if blocks == 1 else self.block[dim]
            missing = [0, 0, 0, blocks * step - size] if dim == 0 else [0, blocks * step - size]
            largest = torch.nn.functional.pad(largest, missing).unflatten(dim, (blocks, step)).amax(dim + 1)
        return largest.view(scale.shape)

    def dequantise(self, parts: Parts) -> torch.Tensor:
        return _scaled(in_float32(parts["codes"]), decoded(parts["scale"]), self.block)

    def remove(self, parts: Parts, gone_LW: torch.Tensor) -> None:
        parts["codes"].view(torch.uint8).masked_fill_(gone_LW, 0)

    def grid(self, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
        scale, shape = decoded(parts["scale"]), parts["codes"].shape
        return _spread(scale, shape, self.block).expand(shape), scale.new_zeros(())

    def rounded(self, steps: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        if self.name == "int8":
            return steps.round().clamp_(-128, 127)
        return steps.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()

    def write(self, parts: Parts, steps_LW: torch.Tensor, zero: torch.Tensor, changed_LW: torch.Tensor) -> None:
        raw_LW = parts["codes"].view(torch.uint8)
        raw_LW.copy_(torch.where(changed_LW, steps_LW.to(parts["codes"].dtype).view(torch.uint8), raw_LW))


def _scaled(steps_LW: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Steps, in place, times the scales of their blocks."""
    lines, width = steps_LW.shape
    scale = scale if scale.dim() == 2 else scale.reshape(-1, 1)
    if scale.shape[1] > 1:
        scale = scale[..., None].expand(-1, -1, min(block[1], width)).flatten(1)[:, :width]
    rows = min(block[0], lines)
    whole = lines // rows
    steps_LW[: whole * rows].unflatten(0, (whole, rows)).mul_(scale[:whole, None])
    steps_LW[whole * rows :].mul_(scale[-1])  # the last block may be cut
    return steps_LW


def _spread(scale: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> torch.Tensor:
    """Scales by entry, or one where all entries along a dimension share it."""
    scale = scale if scale.dim() == 2 else scale.reshape(-1, 1)
    for dim, size in enumerate(shape):
        if scale.shape[dim] > 1:
            scale = scale.repeat_interleave(min(block[dim], size), dim)[(slice(None),) * dim + (slice(size),)]
    return scale


def eight_bits(name: str, tensors: Tensors, settings: dict) -> tuple[str, TensorInfo] | None:
    """Name and description of the weight whose codes `name` holds; None if it holds others. Raises StunError."""
    info, stem, is_fp8 = tensors[name], name.removesuffix("weight"), settings.get("quant_method") == "fp8"
    if info.dtype not in (torch.float8_e4m3fn, torch.int8) or not (is_fp8 or name.endswith("weight")):
        return None
    blocks, wanted = _blocks(settings), INVERSE if is_fp8 else SCALE
    kind = "fp8" if info.dtype is torch.float8_e4m3fn else "int8"
    scale = tensors.get(name + wanted)
    if scale is None:
        raise StunError(f"{info.file}: {name} is {kind} but has no {name}{wanted}")
    block = _block(info.shape, scale.shape, blocks)
    if block is None:
        fits = " or ".join(f"in blocks of {block} needs {_cut(info.shape, block)}" for block in blocks) or "needs another"
        raise StunError(f"{scale.file}: {name}{wanted} has shape {scale.shape}; {info.shape} {fits}")
    if not scale.dtype.is_floating_point and scale.dtype not in EXPONENTS:
        raise StunError(f"{scale.file}: {name}{wanted} holds {scale.dtype}; floating-point scales are needed")
    codec = EightBits("mxfp8" if scale.dtype is torch.uint8 else kind, 8, block=block)
    lines = block[0] if len(scale.shape) > 1 or scale.shape == info.shape[:1] else 0
    parts = [Part("codes", name, info, 1), Part("scale", name + wanted, scale, lines)]
    return name, weight(codec, info.shape, [*parts, *passengers(stem, tensors)])


def _blocks(settings: dict) -> list[tuple[int, int]]:
    """Sizes of blocks [rows, columns] that the configuration names."""
    groups = settings.get("config_groups") or {}
    said = [(group.get("weights") or {}).get("block_structure") for group in groups.values()]
    return [(block[0], block[1]) for block in (settings.get("weight_block_size"), *said) if is_block(block)]


def is_block(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(b) is int and b > 0 for b in value)


def _cut(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Blocks along each dimension."""
    return tuple(-(-size // step) for size, step in zip(shape, block, strict=False))


def _block(shape: tuple[int, ...], scale: tuple[int, ...], blocks: list[tuple[int, int]]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; where the configuration names none, a row, a group of a row, or the matrix."""
    if len(shape) != 2:
        return None
    for block in blocks:
        if scale == _cut(shape, block):
            return block
    if blocks:
        return None
    if scale in ((), (1,), (1, 1)):
        return shape[0], shape[1]
    columns = scale[1] if len(scale) == 2 else 1
    return (1, shape[1] // columns) if scale[0] == shape[0] and columns and shape[1] % columns == 0 else None
