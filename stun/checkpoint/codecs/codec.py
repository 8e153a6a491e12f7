"""What all codecs share: the interface, scales, and codes of four bits.

Shapes, as stored: L lines of a weight, W entries of a line, G scales of a line. A weight [O, D] has L = O; one that is stored
transposed has L = D.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from stun.checkpoint.headers import Part, TensorInfo

Tensors = Mapping[str, TensorInfo]
Parts = Mapping[str, torch.Tensor]
_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by bytes of a number
EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)  # dtypes of scales that are powers of two (E8M0: 2 ** (byte - 127), 255 is NaN)
_ROUNDS_UP = 8 / 7 * (1 - 2**-20)  # a largest magnitude above 1.75 times a power of two takes the next one
_E4M3 = tuple(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist())
# Ends of names of what belongs to a layer's inputs: they are not read, and travel with their weight.
PASSENGERS = ("input_scale", "input_global_scale")


@dataclass(frozen=True)
class Codec:
    """A form of stored weights: a code for every entry, worth so many steps, times a scale that several entries share.

    `parts` are a weight's tensors by role (`codes`, `scale`, and what else a form has), or the rows of them that belong to some
    of its lines. `name` is the form in words, `bits` the bits of a code. `is_transposed`: lines are columns of the weight.
    """

    name: str
    bits: int
    is_transposed: bool = False

    @property
    def exponent(self) -> int:
        """Exponent of the largest power of two that a code is worth."""
        raise NotImplementedError

    def dequantise(self, parts: Parts) -> torch.Tensor:
        """Values [L, W] in float32; rounded to the weight's dtype, they are those of the form's own library."""
        raise NotImplementedError

    def remove(self, parts: Parts, gone_LW: torch.Tensor) -> None:
        """Write the code of zero, in place, where `gone_LW` is true."""
        raise NotImplementedError

    def grid(self, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale of every entry [L, W] in float32, and its code of zero, [] where all have one."""
        raise NotImplementedError

    def rounded(self, steps: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Nearest multiples of a scale that have a code, of multiples in float32 of entries with these codes of zero. Here codes
        are whole numbers from 0 on."""
        return steps.round().clamp_(-zero, (1 << self.bits) - 1 - zero)

    def write(self, parts: Parts, steps_LW: torch.Tensor, zero: torch.Tensor, changed_LW: torch.Tensor) -> None:
        """Write the codes of multiples that have one, in place, where `changed_LW` is true."""
        raise NotImplementedError

    def largest(self, parts: Parts, values_LW: torch.Tensor) -> torch.Tensor:
        """Largest magnitudes of the values that share a scale, in the shape of the scales. Here these are neighbours in a
        line."""
        return values_LW.view(*parts["scale"].shape, -1).abs().amax(-1)

    def rescale(self, parts: Parts, values_LW: torch.Tensor) -> None:
        """Change the scales, in place, as the largest magnitude of those that share one does from the weight to `values_LW`.
        Scales of zeros alone stay; powers of two are those of a form that is made anew (MX)."""
        scale, raw = parts["scale"], _RAW[parts["scale"].element_size()]
        before = self.largest(parts, self.dequantise(parts).to(values_LW.dtype).float())
        after = self.largest(parts, values_LW.float())
        if scale.dtype in EXPONENTS:
            _, exponent = torch.frexp(after * _ROUNDS_UP)
            new = (exponent - 1 - self.exponent + 127).clamp(0, 254).to(torch.uint8)
        else:
            most = torch.finfo(scale.dtype).max
            new = (scale.float() * (after / before)).clamp(max=most).to(scale.dtype).view(raw).clamp(min=1)  # the smallest, not 0
        is_scaled = (before > 0) & (after > 0) & (before != after)
        scale.view(raw).copy_(torch.where(is_scaled, new, scale.view(raw)))

    def near(self, values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Multiples of the scale nearest to values; 0 where both are 0."""
        return self.rounded((values.float() / scale).nan_to_num_(0), zero)

    def near_at(self, parts: Parts, lines: tuple[int, ...]) -> Callable[[torch.Tensor, tuple], torch.Tensor]:
        """Function `near(values, places)` that gives the values nearest to some at these places of a matrix [O, D], whose lines
        are [L, W], on the scales that are there."""
        scale, zero = (each.expand(lines).T if self.is_transposed else each.expand(lines) for each in self.grid(parts))
        return lambda values, places: self.near(values, scale[places], zero[places]) * scale[places]

    def fit(self, parts: Parts, values_LW: torch.Tensor, changed_LW: torch.Tensor) -> None:
        """Write the codes that come nearest to `values_LW` on the scales that are there, in place, where `changed_LW` is true."""
        scale_LW, zero = self.grid(parts)
        self.write(parts, self.near(values_LW, scale_LW, zero), zero, changed_LW)


def decoded(scale: torch.Tensor) -> torch.Tensor:
    """Stored scales in float32."""
    return in_float32(scale.view(torch.float8_e8m0fnu) if scale.dtype is torch.uint8 else scale)


def in_float32(codes: torch.Tensor) -> torch.Tensor:
    """Numbers in float32. E4M3 [L, W] is looked up in pairs on CPUs, where torch converts one number after the other."""
    is_slow = codes.dtype is torch.float8_e4m3fn and codes.device.type == "cpu"
    return worth(codes, _E4M3) if is_slow and codes.dim() == 2 and codes.shape[1] % 2 == 0 else codes.float()


def multiplied(steps_LW: torch.Tensor, scale_LG: torch.Tensor) -> torch.Tensor:
    """Steps, in place, times the scales of their groups of neighbours in a line."""
    steps_LW.view(*scale_LG.shape, -1).mul_(scale_LG[..., None])
    return steps_LW


@cache
def _pairs(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """The bytes, as one int64, of the two float32 that neighbouring codes are worth, the low one first: [256] for a byte of two
    codes, [65536] for two bytes."""
    one = torch.tensor(values)
    pairs = torch.stack([one.repeat(len(one)), one.repeat_interleave(len(one))], 1)
    return pairs.view(torch.int64).flatten().to(device)


def worth(codes: torch.Tensor, values: tuple[float, ...]) -> torch.Tensor:
    """[L, W] float32: what codes are worth of `values`: 16 for those of four bits, packed along the lines, 256 for bytes, an even
    number of them a line. A look-up of pairs is several times as fast as taking codes one by one."""
    raw_Lb = codes.contiguous().view(torch.uint8).flatten(1)
    index = raw_Lb if len(values) == 16 else raw_Lb.view(torch.uint16)
    return _pairs(values, codes.device).index_select(0, index.flatten().int()).view(torch.float32).view(len(raw_Lb), -1)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[L, W] uint8: codes of four bits, the low half of a byte first; words are little-endian bytes."""
    raw_Lb = packed.contiguous().view(torch.uint8).flatten(1)
    return torch.stack((raw_Lb & 15, raw_Lb >> 4), -1).flatten(1)


def joined(codes_LW: torch.Tensor) -> torch.Tensor:
    """[L, W / 2] uint8: bytes of two codes of four bits each, the first in the low half."""
    pairs = codes_LW.unflatten(1, (-1, 2))
    return (pairs[..., 0] | pairs[..., 1] << 4).contiguous()


def from_nibbles(codes_LW: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Codes of four bits, packed as they are in the tensor `like`."""
    return joined(codes_LW).view(like.dtype).view(like.shape)


def weight(codec: Codec, shape: tuple[int, ...], parts: list[Part]) -> TensorInfo:
    """Description of a weight of this shape [..., O, D] as it is once read: in the dtype of its scales if that is one of weights,
    else bfloat16."""
    scale = next(part.info.dtype for part in parts if part.role == "scale")
    dtype = scale if scale in (torch.bfloat16, torch.float16) else torch.bfloat16
    return TensorInfo(parts[0].info.file, 0, dtype.itemsize * math.prod(shape), dtype, shape, codec, tuple(parts))


def passengers(stem: str, tensors: Tensors) -> list[Part]:
    """Parts of a weight that are not read, by the start of its tensors' names."""
    return [Part("", stem + end, tensors[stem + end], 0) for end in PASSENGERS if stem + end in tensors]
