"""E2M1 (fp4), two codes a byte: MXFP4 with a power of two for 32 neighbours, NVFP4 with an E4M3 for 16 and a scale of the matrix.

gpt-oss: `X_blocks` [E, O, D / 32, 16] and `X_scales` [E, O, D / 32] of the weight X [E, D, O]. compressed-tensors:
`weight_packed`, `weight_scale` and, of NVFP4, `weight_global_scale`, by which scales are divided. ModelOpt: `weight`,
`weight_scale`, and `weight_scale_2`, by which they are multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stun.checkpoint.codecs.codec import (
    EXPONENTS,
    Codec,
    Parts,
    Tensors,
    decoded,
    from_nibbles,
    multiplied,
    nibbles,
    passengers,
    weight,
    worth,
)
from stun.checkpoint.headers import Part, TensorInfo
from stun.config import StunError

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BLOCKS, SCALES = "_blocks", "_scales"


@dataclass(frozen=True)
class FourBits(Codec):
    """Codes [L, W / 2] of bytes, or [L, G, ...]; scales [L, G]. `divides`: scales are divided by that of the matrix."""

    divides: bool = False

    def dequantise(self, parts: Parts) -> torch.Tensor:
        scale_LG = decoded(parts["scale"])
        if "global" in parts:
            whole = parts["global"].float().reshape(())
            scale_LG = scale_LG / whole if self.divides else scale_LG * whole
        return multiplied(worth(parts["codes"], E2M1), scale_LG)

    def remove(self, parts: Parts, gone_LW: torch.Tensor) -> None:
        parts["codes"].copy_(from_nibbles(nibbles(parts["codes"]).masked_fill_(gone_LW, 0), parts["codes"]))


def gpt_oss(name: str, tensors: Tensors, settings: dict) -> tuple[str, TensorInfo] | None:
    """Name and description of the weight whose codes `name` holds; None if it holds others. Raises StunError."""
    if not name.endswith(BLOCKS):
        return None
    stem, info = name.removesuffix(BLOCKS), tensors[name]
    scale = tensors.get(stem + SCALES)
    if scale is None:
        raise StunError(f"{info.file}: {name} has no {stem}{SCALES}")
    if (
        info.dtype is not torch.uint8
        or scale.dtype is not torch.uint8
        or info.shape != (*scale.shape, 16)
        or len(info.shape) != 4
    ):
        found = f"{info.dtype} {info.shape}, {stem}{SCALES} {scale.dtype} {scale.shape}"
        raise StunError(f"{info.file}: {name} holds {found}; bytes [E, O, D / 32, 16] and [E, O, D / 32] are needed")
    experts, outputs, groups, _ = info.shape
    parts = [Part("codes", name, info, 1), Part("scale", stem + SCALES, scale, 1)]
    return stem, weight(FourBits("mxfp4", 4, is_transposed=True), (experts, 32 * groups, outputs), parts)


def four_bits(name: str, tensors: Tensors, settings: dict) -> tuple[str, TensorInfo] | None:
    """The same of matrices of compressed-tensors and ModelOpt."""
    info, is_packed = tensors[name], name.endswith("weight_packed")
    if info.dtype is not torch.uint8 or not (is_packed or name.endswith("weight")):
        return None
    stem = name.removesuffix("_packed").removesuffix("weight")
    own = {"scale": f"{stem}weight_scale", "global": f"{stem}weight_global_scale" if is_packed else f"{stem}weight_scale_2"}
    if own["scale"] not in tensors:
        raise StunError(f"{info.file}: {name} has no {own['scale']}")
    scale, whole = tensors[own["scale"]], tensors.get(own["global"])
    group = 32 if scale.dtype in EXPONENTS else 16
    wide = (info.shape[0], 2 * info.shape[1]) if len(info.shape) == 2 else ()
    fits = wide and wide[1] % group == 0 and scale.shape == (wide[0], wide[1] // group)
    if not fits or (group == 16 and scale.dtype is not torch.float8_e4m3fn):
        found = f"{info.shape} with scales {scale.dtype} {scale.shape}"
        raise StunError(f"{info.file}: {name}: bytes {found} are neither MXFP4 (a byte for 32 weights) nor NVFP4 (E4M3 for 16)")
    if (whole is not None) != (group == 16) or (whole is not None and whole.numel != 1):
        raise StunError(f"{info.file}: {name} needs {'one number as' if group == 16 else 'no'} {own['global']}")
    parts = [Part("codes", name, info, 1), Part("scale", own["scale"], scale, 1)]
    parts += [] if whole is None else [Part("global", own["global"], whole, 0)]
    codec = FourBits("nvfp4" if group == 16 else "mxfp4", 4, divides=is_packed)
    return f"{stem}weight", weight(codec, wide, [*parts, *passengers(stem, tensors)])
