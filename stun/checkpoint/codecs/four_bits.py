"""E2M1 (fp4), two codes a byte: MXFP4 with a power of two for 32 neighbours, NVFP4 with an E4M3 for 16 and a scale of the matrix.

gpt-oss: `X_blocks` [E, O, D / 32, 16] and `X_scales` [E, O, D / 32] of the weight X [E, D, O]. compressed-tensors:
`weight_packed`, `weight_scale` and, of NVFP4, `weight_global_scale`, by which scales are divided. ModelOpt: `weight`,
`weight_scale`, and `weight_scale_2`, by which they are multiplied.
"""

from dataclasses import dataclass
from functools import cache

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
# Between the magnitudes of E2M1. A tie goes to the even code: upwards at every second of them, which is so the float32 below.
_MIDDLES = (0.25, 0.75 - 2**-24, 1.25, 1.75 - 2**-23, 2.5, 3.5 - 2**-22, 5.0)


@cache
def _constants(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device)


@dataclass(frozen=True)
class FourBits(Codec):
    """Codes [L, W / 2] of bytes, or [L, G, ...]; scales [L, G]. `divides`: scales are divided by that of the matrix."""

    divides: bool = False

    @property
    def exponent(self) -> int:
        return 2

    def dequantise(self, parts: Parts) -> torch.Tensor:
        return multiplied(worth(parts["codes"], E2M1), self._scales(parts))

    def rescale(self, parts: Parts, values_LW: torch.Tensor) -> None:
        """As others do; first the scale of the matrix, since E4M3 would end below what its scales could become."""
        if "global" in parts:
            growth = values_LW.float().abs().amax() / self.dequantise(parts).to(values_LW.dtype).float().abs().amax()
            if bool(growth.isfinite() & (growth > 0)):
                parts["global"].mul_(1 / growth if self.divides else growth)
        super().rescale(parts, values_LW)

    def remove(self, parts: Parts, gone_LW: torch.Tensor) -> None:
        parts["codes"].copy_(from_nibbles(nibbles(parts["codes"]).masked_fill_(gone_LW, 0), parts["codes"]))

    def grid(self, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
        scale_LG = self._scales(parts)
        width = 2 * parts["codes"].flatten(1).shape[1]
        return scale_LG.repeat_interleave(width // scale_LG.shape[1], 1), scale_LG.new_zeros(())

    def rounded(self, steps: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return _constants(E2M1, steps.device)[nearest_e2m1(steps).int()]

    def write(self, parts: Parts, steps_LW: torch.Tensor, zero: torch.Tensor, changed_LW: torch.Tensor) -> None:
        codes = parts["codes"]
        codes.copy_(from_nibbles(torch.where(changed_LW, nearest_e2m1(steps_LW), nibbles(codes)), codes))

    def _scales(self, parts: Parts) -> torch.Tensor:
        """Scales [L, G] of the groups, with that of the matrix."""
        scale_LG = decoded(parts["scale"])
        if "global" not in parts:
            return scale_LG
        whole = parts["global"].float().reshape(())
        return scale_LG / whole if self.divides else scale_LG * whole


def nearest_e2m1(steps: torch.Tensor) -> torch.Tensor:
    """Nearest codes of numbers in float32; those above 6 get its code, and no code is -0 but for numbers below 0."""
    middles = _constants(_MIDDLES, steps.device)
    near = torch.bucketize(steps.abs().contiguous(), middles, out_int32=True).to(torch.uint8)
    return near | (steps < 0).to(torch.uint8) << 3


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
