"""Headers of safetensors files: the place of every tensor, checked before anything is read or allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stun.config import StunError
from stun.files import is_count, opened, parse_json

if TYPE_CHECKING:
    from stun.checkpoint.codecs.codec import Codec

# In the order in which safetensors writes them to a file, the most aligned first.
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Place of one tensor in a file (first byte), and its size, dtype and shape once read.

    A quantised weight has a `codec` and, in place of `start`, the `parts` that it is stored in; its dtype, shape and size are
    those of the dequantised values.
    """

    file: Path
    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    codec: Codec | None = None
    parts: tuple[Part, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes in the files."""
        return sum(part.info.nbytes for part in self.parts) if self.codec else self.nbytes

    @property
    def lines(self) -> tuple[int, int]:
        """Lines of a quantised matrix, as stored, and entries of a line."""
        rows, columns = self.shape
        return (columns, rows) if self.codec and self.codec.is_transposed else (rows, columns)

    def row(self, number: int) -> TensorInfo:
        """Entry `number` along the first dimension; a quantised one is a matrix."""
        nbytes = self.nbytes // self.shape[0]
        parts = tuple(replace(part, info=part.info.row(number)) for part in self.parts)
        return replace(self, start=self.start + number * nbytes, nbytes=nbytes, shape=self.shape[1:], parts=parts)


@dataclass(frozen=True)
class Part:
    """One of the tensors that a quantised weight is stored in: its role (stun.checkpoint.codecs; none: it is not read), name and
    place. `lines` are the weight's lines that one of its rows belongs to; 0: all of it belongs to all."""

    role: str
    name: str
    info: TensorInfo
    lines: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file. Raises StunError as `described`."""
    with opened(file) as handle:
        size, length = file.stat().st_size, int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise StunError(f"{file}: truncated: {size} bytes, header of {length}")
        content = parse_json(handle.read(length), f"{file}: header")
    if not isinstance(content, dict):
        raise StunError(f"{file}: header: must be a JSON object")
    return described(file, content, 8 + length, size)


def described(file: Path, content: dict, start: int, size: int) -> dict[str, TensorInfo]:
    """Tensors by the header's JSON object, the byte at which they begin, and the file's size. Raises StunError, also where
    tensors overlap or bytes between them are unused."""
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StunError(f"{file}: __metadata__ must map names to texts")
    infos = {name: _tensor(file, name, entry, start, size) for name, entry in content.items()}
    end, last = start, "the header"
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start != end:
            raise StunError(f"{file}: tensor {name} begins at byte {info.start}, but {last} ends at {end}")
        end, last = info.start + info.nbytes, f"tensor {name}"
    if end != size:
        raise StunError(f"{file}: {last} ends at byte {end}, but the file at {size}")
    return infos


def _tensor(file: Path, name: str, entry: object, base: int, size: int) -> TensorInfo:
    where = f"{file}: tensor {name}"
    if not name or not name.isprintable() or "/" in name or "\\" in name:
        raise StunError(f"{file}: tensor {name!r}: a name has one printable character or more, none of them a slash")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise StunError(f"{where}: must have dtype, shape and data_offsets, and nothing else; is {str(entry)[:80]}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise StunError(f"{where}: dtype {str(code)[:80]!r} is not known; known: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(map(is_count, shape)):
        raise StunError(f"{where}: shape must be a list of whole numbers, is {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise StunError(f"{where}: data_offsets must be two whole numbers, are {str(offsets)[:80]}")
    (first, last), dtype = offsets, DTYPES[code]
    if base + last > size:
        raise StunError(f"{file}: truncated: tensor {name}: data_offsets end at byte {base + last}, the file at {size}")
    nbytes = last - first
    if nbytes != _nbytes(shape, dtype.itemsize, size):
        raise StunError(f"{where}: data_offsets {first}..{last} do not hold shape {str(tuple(shape))[:80]} of {dtype}")
    return TensorInfo(file, base + first, nbytes, dtype, tuple(shape))


def _nbytes(shape: list[int], itemsize: int, most: int) -> int:
    """Bytes of a tensor; above `most` the count stops early, since a hostile shape has no end of factors."""
    if 0 in shape:
        return 0
    nbytes = itemsize
    for count in shape:
        nbytes *= count
        if nbytes > most:
            break
    return nbytes
