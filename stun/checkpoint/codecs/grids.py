"""Forms that plain weights are rounded to, to nearest: the bytes are those of llm-compressor's `model_free_ptq`.

All arithmetic is in the weights' dtype, as there. Shapes: O outputs, D inputs, G groups of inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch

from stun.checkpoint.codecs.codec import Codec, Parts, decoded, joined
from stun.checkpoint.codecs.eight_bits import INVERSE, LARGEST, SCALE, EightBits
from stun.checkpoint.codecs.four_bits import FourBits, nearest_e2m1
from stun.checkpoint.codecs.packed import PACKED, Packed

_NO_SCALE = 0.125  # in place of an E4M3 scale that rounds to 0


@dataclass(frozen=True, eq=False)
class Grid:
    """A form to round matrices [O, D] to.

    `block` are the outputs and inputs that share a scale (0: all); a matrix must hold whole ones. `ends` are the ends of the
    names of its tensors, in place of `weight`, by role; `settings(plain)` is quantization_config where the modules `plain` keep
    their weights. `parts(weight_OD, largest)` are the tensors, by role. Forms that have one scale for the whole matrix share it
    among matrices that runtimes merge, of which `largest` is the largest magnitude.
    """

    codec: Codec
    block: tuple[int, int]
    ends: dict[str, str]
    settings: Callable[[list[str]], dict]
    parts: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]

    @property
    def is_shared(self) -> bool:
        """Whether matrices that runtimes merge have a scale in common."""
        return "global" in self.ends

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Whether matrices of this shape can be rounded."""
        return all(size % step == 0 for size, step in zip(shape, self.block, strict=True) if step)

    def values(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        """Values [O, D] of rounded weights."""
        return self.codec.dequantise(parts).to(dtype)

    def compensated(
        self, weight_OD: torch.Tensor, largest: torch.Tensor, rounded: Callable[[torch.Tensor, Callable], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Tensors by role with the scales of nearest rounding and the values that `rounded(weight, near)` chooses, with `near` of
        `Codec.near_at`."""
        parts = self.parts(weight_OD, largest)
        values_OD = rounded(weight_OD, self.codec.near_at(parts, weight_OD.shape))
        self.codec.fit(parts, values_OD, torch.ones_like(values_OD, dtype=torch.bool))
        return parts

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a matrix of this shape."""
        return _nbytes(self, shape)

    @property
    def bits(self) -> float:
        """Bits a weight, scales included."""
        return 8 * self.nbytes((4096, 4096)) / 4096**2


@cache
def _nbytes(grid: Grid, shape: tuple[int, int]) -> int:
    weight_OD = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    return sum(part.nbytes for part in grid.parts(weight_OD, weight_OD.abs().amax()).values())


def _scales(amax: torch.Tensor, most: float) -> torch.Tensor:
    scale = amax / most
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def _fp8(weight_OD: torch.Tensor, largest: torch.Tensor, block: tuple[int, int] | None = None) -> dict[str, torch.Tensor]:
    """Codes, and a scale a block in float32, or a row in the weights' dtype."""
    rows, columns = block or (1, weight_OD.shape[1])
    blocks = weight_OD.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scale = _scales(blocks.abs().amax((1, 3)), LARGEST)
    codes = (blocks / scale[:, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return {"codes": codes.view(weight_OD.shape), "scale": scale.float() if block else scale}


def _int4(weight_OD: torch.Tensor, largest: torch.Tensor) -> dict[str, torch.Tensor]:
    groups = weight_OD.unflatten(1, (-1, 32))
    scale_OG = _scales(groups.abs().amax(-1), 7.5)
    steps = (groups / scale_OG[..., None]).clamp(-8, 7).round().to(torch.int8)
    shape = torch.tensor(weight_OD.shape, device=weight_OD.device)
    return {"codes": joined((steps + 8).view(torch.uint8).flatten(1)).view(torch.int32), "scale": scale_OG, "shape": shape}


def _nvfp4(weight_OD: torch.Tensor, largest: torch.Tensor) -> dict[str, torch.Tensor]:
    groups = weight_OD.unflatten(1, (-1, 16))
    whole = (6 * LARGEST / largest.clamp(min=torch.finfo(largest.dtype).tiny)).nan_to_num(1, 1, 1).float().reshape(1)
    scale_OG = (whole * (groups.abs().amax(-1) / 6)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()
    scale_OG = torch.where(scale_OG == 0, _NO_SCALE, scale_OG)
    codes = nearest_e2m1(groups / (scale_OG / whole)[..., None]).flatten(1)
    return {"codes": joined(codes), "scale": scale_OG.to(torch.float8_e4m3fn), "global": whole}


def _mxfp4(weight_OD: torch.Tensor, largest: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scales are powers of two, rounded up from 1.75."""
    groups = weight_OD.unflatten(1, (-1, 32))
    exponent = (groups.abs().amax(-1).float().view(torch.int32) + (1 << 21)) >> 23
    scale_OG = (exponent - 2).clamp(min=0).to(torch.uint8)
    codes = nearest_e2m1(groups / decoded(scale_OG)[..., None]).flatten(1)
    return {"codes": joined(codes), "scale": scale_OG}


def _blocks(plain: list[str]) -> dict:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": plain,
    }


def _compressed(form: str, inputs: dict | None = None, **weights) -> Callable[[list[str]], dict]:
    """Settings of compressed-tensors; `inputs` says how a runtime rounds a matrix's inputs, if it does."""
    common = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": {**common, **weights}, "input_activations": inputs, "output_activations": None}

    def settings(plain: list[str]) -> dict:
        groups = {"group_0": {**group, "format": form}}
        kind = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
        return {**kind, "config_groups": groups, "ignore": plain}

    return settings


_OF_TOKENS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
_PACKED = {"codes": PACKED, "scale": f"weight{SCALE}"}
GRIDS = {
    "fp8_block": Grid(
        EightBits("fp8", 8, block=(128, 128)),
        (128, 128),
        {"codes": "weight", "scale": f"weight{INVERSE}"},
        _blocks,
        partial(_fp8, block=(128, 128)),
    ),
    "fp8_channel": Grid(
        EightBits("fp8", 8),
        (1, 0),
        {"codes": "weight", "scale": f"weight{SCALE}"},
        _compressed("float-quantized", _OF_TOKENS, num_bits=8, strategy="channel"),
        _fp8,
    ),
    "int4": Grid(
        Packed("int4", 4),
        (1, 32),
        {**_PACKED, "shape": "weight_shape"},
        _compressed("pack-quantized", type="int", strategy="group", group_size=32),
        _int4,
    ),
    "nvfp4": Grid(
        FourBits("nvfp4", 4, divides=True),
        (1, 16),
        {**_PACKED, "global": "weight_global_scale"},
        _compressed("nvfp4-pack-quantized", strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"),
        _nvfp4,
    ),
    "mxfp4": Grid(
        FourBits("mxfp4", 4),
        (1, 32),
        _PACKED,
        _compressed("mxfp4-pack-quantized", strategy="group", group_size=32, scale_dtype="torch.uint8"),
        _mxfp4,
    ),
}
