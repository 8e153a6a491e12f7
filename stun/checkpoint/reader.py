"""Safetensors checkpoints in the hub's layout, read one tensor at a time.

Block-scaled fp8 weights (DeepSeek-V3's format: `X` in float8_e4m3, `X_scale_inv` in float32, one scale a block) are listed as
bfloat16 and dequantised as they are read. Other quantised formats are refused.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from stun.checkpoint.config_check import check_config
from stun.checkpoint.headers import TensorInfo, read_header
from stun.checkpoint.other_forms import other_form, quantised, quantised_by
from stun.config import StunError
from stun.files import check_folder, is_file_name, load_json
from stun.runtime.device_copies import PIECE, THREADS, HostMemory, Memory, copiers

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SCALE = "_scale_inv"
_BAND = 2**22  # weights of an fp8 matrix that one thread dequantises at once
DEQUANTISED = 9 * THREADS * _BAND  # most bytes of that beside the result: weights, their scales and products in float32

Headers = dict[str, dict[str, TensorInfo]]  # by file name


def shards(folder: Path) -> list[str]:
    """Names of the files that hold a checkpoint's tensors, by its index; without one there is a single file. Raises StunError."""
    return sorted(set(_read_index(folder / INDEX).values())) if (folder / INDEX).is_file() else [SINGLE]


def _read_index(file: Path) -> dict[str, str]:
    """Tensor name -> file name, from an index. Raises StunError if a file is not in the index's own folder."""
    weight_map = load_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise StunError(f"{file}: has no weight_map")
    for name, shard in weight_map.items():
        if not is_file_name(shard):
            raise StunError(f"{file}: {name}: names the file {shard!r}; only *.safetensors beside the index are read")
    return weight_map


def _indexed_tensors(folder: Path, remote: Headers) -> dict[str, TensorInfo]:
    weight_map, headers = _read_index(folder / INDEX), dict(remote)
    shard_of: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        if (folder / shard).is_file():
            headers[shard] = read_header(folder / shard)
        elif shard not in remote:
            raise StunError(f"{folder / shard}: missing, but named in {INDEX}")
        for name in headers[shard]:
            if shard_of.setdefault(name, shard) != shard:
                raise StunError(f"{folder / shard}: {name}: is also in {shard_of[name]}")
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise StunError(f"{folder / INDEX}: says that {shard} holds {name}; it does not")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _quantisation(folder: Path, config: dict, names: Iterable[str]) -> tuple[int, int] | None:
    """Block size [rows, columns] of an fp8 checkpoint, None if weights are not quantised; `names` are those of all tensors.
    Raises StunError if they are quantised in another way."""
    settings = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not settings:
        if method := quantised_by(names):
            raise StunError(f"{folder}: {quantised(method)}")
        return None
    if not isinstance(settings, dict):
        raise StunError(f"{folder / 'config.json'}: quantization_config must be an object, is {settings!r}")
    method, block = settings.get("quant_method"), settings.get("weight_block_size")
    if method == "fp8" and isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block):
        return block[0], block[1]
    raise StunError(f"{folder / 'config.json'}: {quantised(str(method or quantised_by(names) or 'by an unnamed method'))}")


def _with_scales(tensors: dict[str, TensorInfo], block: tuple[int, int]) -> dict[str, TensorInfo]:
    """`tensors` without the scales; every fp8 matrix is described as bfloat16, which is what a read returns."""
    plain = {}
    for name, info in tensors.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in tensors:
            continue
        if info.dtype is torch.float8_e4m3fn:
            scale = tensors.get(name + SCALE)
            if scale is None:
                raise StunError(f"{info.file}: {name} is fp8 but has no {name}{SCALE}")
            wanted = tuple(-(-size // step) for size, step in zip(info.shape, block, strict=False))
            if len(info.shape) != 2 or scale.shape != wanted:
                raise StunError(
                    f"{scale.file}: {name}{SCALE} has shape {scale.shape}; {info.shape} in blocks of {block} needs {wanted}"
                )
            if not scale.dtype.is_floating_point:
                raise StunError(f"{scale.file}: {name}{SCALE} holds {scale.dtype}; floating-point scales are needed")
            info = replace(info, dtype=torch.bfloat16, nbytes=2 * info.nbytes, scale=scale, block=block)
        plain[name] = info
    return plain


def _check_form(folder: Path, remote: Headers) -> None:
    """Raise StunError unless `folder`, with files that are still to come, has those of a safetensors checkpoint, all its own."""
    has_weights = (folder / INDEX).is_file() or (folder / SINGLE).is_file() or SINGLE in remote
    if not has_weights and (form := other_form(folder)):
        raise StunError(f"model.path={folder}: {form}")
    if not folder.is_dir():
        reason = (
            "a file; give the folder that it is in"
            if folder.is_file()
            else "not a folder, nor the name of a model on the hub, such as Qwen/Qwen3-30B-A3B"
        )
        raise StunError(f"model.path={folder}: {reason}")
    if not (folder / "config.json").is_file():
        raise StunError(f"{folder}: has no config.json")
    check_folder(folder)
    if not has_weights:
        raise StunError(f"{folder}: holds neither {INDEX} nor {SINGLE}")


class Checkpoint:
    """Source checkpoint. `tensors` describes every tensor; `read` returns one and adds its bytes to `bytes_read`. `is_here`: all
    its files are in `folder`."""

    def __init__(self, folder: Path, config: dict, tensors: dict[str, TensorInfo], is_fp8: bool = False):
        self.folder, self.config, self.tensors, self.is_fp8 = folder, config, tensors, is_fp8
        self.bytes_read = 0
        self._lock = threading.Lock()
        files = {info.file for info in tensors.values()}
        self._stamps = {file: _stamp(file.stat()) for file in files if file.is_file()}
        self.is_here = len(self._stamps) == len(files)

    @property
    def file_bytes(self) -> int:
        """Total size of the files that hold tensors."""
        return sum(size for size, _ in self._stamps.values())

    def sampled(self) -> list[tuple[str, int, str]]:
        """(name, size, digest of 16 evenly spaced pages) of every file: they differ between models of the same shapes."""
        samples = []
        for file, (size, _) in sorted(self._stamps.items()):
            digest = hashlib.sha256()
            with file.open("rb") as handle:
                for part in range(16):
                    handle.seek(size * part // 16)
                    digest.update(handle.read(4096))
            samples.append((file.name, size, digest.hexdigest()))
        return samples

    @classmethod
    def open(cls, path: str | Path, remote: Headers | None = None) -> Checkpoint:
        """Open and check the folder at `path`. `remote`: headers of files that are still to come, whose tensors are described but
        cannot be read. Raises StunError if it is not a complete safetensors checkpoint."""
        folder, remote = Path(path), remote or {}
        _check_form(folder, remote)
        if (folder / INDEX).is_file():
            tensors = _indexed_tensors(folder, remote)
        else:
            tensors = read_header(folder / SINGLE) if (folder / SINGLE).is_file() else remote[SINGLE]
        config = load_json(folder / "config.json")
        check_config(folder / "config.json", config, tensors)
        block = _quantisation(folder, config, tensors)
        return cls(folder, config, _with_scales(tensors, block) if block else tensors, bool(block))

    def read(self, *names: str, row: int | None = None) -> torch.Tensor:
        """Tensor on the CPU. See `reading`."""
        with self.reading(HostMemory()) as read:
            return read(*names, row=row)

    @contextmanager
    def reading(self, memory: Memory, threads: int = THREADS) -> Iterator[Callable[..., torch.Tensor]]:
        """Context with a function `read(*names, row=None)`, which returns a tensor in `memory` at once; all have their content
        when the context ends. Several names are concatenated along their rows, `row` selects one entry of the first dimension.

        Raises StunError, at the end, if a file has changed since the checkpoint was opened, or cannot be read.
        """
        pieces: list[Future] = []

        with copiers(memory.device, threads) as pool:

            def read(*names: str, row: int | None = None) -> torch.Tensor:
                infos = [self.tensors[name] if row is None else self.tensors[name].row(row) for name in names]
                raw = memory.empty(sum(info.nbytes for info in infos))
                parts = raw.split([info.nbytes for info in infos])
                for name, info, part in zip(names, infos, parts, strict=True):
                    if info.scale is not None:
                        target_OD = part.view(info.dtype).view(info.shape)
                        pieces.extend(pool.submit(self._dequantise, memory, target_OD, name, info, rows) for rows in _bands(info))
                        continue
                    for start in range(0, info.nbytes, PIECE):
                        pieces.append(pool.submit(self._fill, memory, part[start : start + PIECE], name, info, start))
                rows = sum(info.shape[0] for info in infos) if len(infos) > 1 else None
                shape = infos[0].shape if rows is None else (rows, *infos[0].shape[1:])
                return raw.view(infos[0].dtype).view(shape)

            yield read
            for piece in pieces:
                piece.result()

    def _fill(self, memory: Memory, target_N: torch.Tensor, name: str, info: TensorInfo, start: int = 0) -> None:
        """Read bytes of one tensor, from `start` on."""
        memory.fill(target_N, lambda view, place: self._read_into(view, name, info.file, info.start + start + place))
        with self._lock:
            self.bytes_read += len(target_N)

    def _read_into(self, view: memoryview, name: str, file: Path, start: int) -> None:
        """Fill `view` with the bytes of a file from `start` on."""
        filled = 0
        try:
            with file.open("rb", buffering=0) as handle:
                if self._stamps.get(file, now := _stamp(os.fstat(handle.fileno()))) != now:
                    raise StunError(f"{file}: has changed since the run began; {name} was not read")
                while filled < len(view):
                    count = os.preadv(handle.fileno(), [view[filled:]], start + filled)
                    if not count:
                        raise StunError(f"{file}: ended while reading {name}; did the file change?")
                    filled += count
        except OSError as error:
            raise StunError(f"{file}: {name} cannot be read: {error}") from error

    def _dequantise(self, memory: Memory, target_OD: torch.Tensor, name: str, info: TensorInfo, rows: range) -> None:
        """Read a band of rows of an fp8 matrix [O, D], and multiply every entry, in float32, with the scale of its block."""
        shape, row_bytes = (len(rows), info.shape[1]), info.scale.nbytes // info.scale.shape[0]
        blocks = range(rows.start // info.block[0], -(-rows.stop // info.block[0]))
        with memory.computing():
            raw, scales = memory.empty(shape[0] * shape[1]), memory.empty(len(blocks) * row_bytes)
            self._fill(memory, raw, name, info, rows.start * shape[1])
            self._fill(memory, scales, name + SCALE, info.scale, blocks.start * row_bytes)
            scale_OD = scales.view(info.scale.dtype).view(len(blocks), info.scale.shape[1]).float()
            for dim, size in enumerate(shape):
                scale_OD = scale_OD.repeat_interleave(min(info.block[dim], size), dim)[(slice(None),) * dim + (slice(size),)]
            product_OD = raw.view(torch.float8_e4m3fn).view(shape).float().mul_(scale_OD)
            target_OD[rows.start : rows.stop].copy_(product_OD)


def _bands(info: TensorInfo) -> list[range]:
    """Rows of an fp8 matrix by band: whole blocks, with as many weights as are dequantised at once, but a block at least."""
    rows, columns = info.shape
    height = max(1, min(info.block[0], rows))
    step = height * max(1, _BAND // max(1, height * columns))
    return [range(start, min(start + step, rows)) for start in range(0, rows, step)]


def _stamp(status: os.stat_result) -> tuple[int, int]:
    """Size and time of change, to notice that a file was written to."""
    return status.st_size, status.st_mtime_ns
