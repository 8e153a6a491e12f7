"""Safetensors checkpoints in the hub's layout, read one tensor at a time.

Quantised weights (stun.checkpoint.codecs) are listed under the names and dtypes of plain ones, and dequantised as they are read.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch

from stun.checkpoint.codecs.codec import decoded
from stun.checkpoint.config_check import check_config
from stun.checkpoint.headers import Part, TensorInfo, read_header
from stun.checkpoint.other_forms import other_form
from stun.checkpoint.quantised import with_weights
from stun.config import StunError
from stun.files import check_folder, is_file_name, load_json, sample
from stun.runtime.device_copies import PIECE, THREADS, HostMemory, Memory, copiers
from stun.runtime.threads import one_thread

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_BAND = 2**22  # weights of a quantised matrix that one thread reads at once
_BLOCK = 2**17  # ... and dequantises at once on a CPU, whose cache holds them
DEQUANTISED = 10 * THREADS * _BAND  # most bytes of that beside the result: those of GPTQ, a band at once

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
        run = f"; did you mean {folder / 'model'}?" if (folder / "model" / "config.json").is_file() else ""
        raise StunError(f"{folder}: has no config.json{run}")
    check_folder(folder)
    if not has_weights:
        raise StunError(f"{folder}: holds neither {INDEX} nor {SINGLE}")


def _check_single(folder: Path) -> None:
    """Raise StunError if a folder with an index holds one file of all weights too, as after a save over an earlier one."""
    if (folder / SINGLE).is_file() and SINGLE not in shards(folder):
        reason = f"{SINGLE} is what transformers loads, and the files of {INDEX} are what vLLM does; remove one of them"
        raise StunError(f"{folder}: holds two sets of weights: {reason}")


class Checkpoint:
    """Source checkpoint. `tensors` describes every tensor; `read` returns one and adds its bytes to `bytes_read`. `is_here`: all
    its files are in `folder`."""

    def __init__(self, folder: Path, config: dict, tensors: dict[str, TensorInfo]):
        self.folder, self.config, self.tensors = folder, config, tensors
        self.bytes_read = 0
        self._lock = threading.Lock()
        files = {part.info.file for info in tensors.values() for part in info.parts}
        files |= {info.file for info in tensors.values()}
        self._stamps = {file: _stamp(file.stat()) for file in files if file.is_file()}
        self.is_here = len(self._stamps) == len(files)

    @cached_property
    def formats(self) -> dict[str, tuple[int, int]]:
        """Forms of the quantised weights: their number of weights, and the bytes that they are stored in."""
        found: dict[str, tuple[int, int]] = {}
        for info in self.tensors.values():
            if info.codec:
                weights, stored = found.get(info.codec.name, (0, 0))
                found[info.codec.name] = weights + info.numel, stored + info.stored_bytes
        return found

    @property
    def bits(self) -> float:
        """Bits that a quantised weight takes in the files, its scales included, on average."""
        weights, stored = map(sum, zip(*self.formats.values(), strict=True))
        return 8 * stored / weights

    @property
    def file_bytes(self) -> int:
        """Total size of the files that hold tensors."""
        return sum(size for size, _ in self._stamps.values())

    def sampled(self) -> list[tuple[str, int, str]]:
        """(name, size, digest of 16 evenly spaced pages) of every file: they differ between models of the same shapes."""
        return [(file.name, size, sample(file)) for file, (size, _) in sorted(self._stamps.items())]

    @classmethod
    def open(cls, path: str | Path, remote: Headers | None = None) -> Checkpoint:
        """Open and check the folder at `path`. `remote`: headers of files that are still to come, whose tensors are described but
        cannot be read. Raises StunError if it is not a complete safetensors checkpoint."""
        folder, remote = Path(path), remote or {}
        _check_form(folder, remote)
        if (folder / INDEX).is_file():
            _check_single(folder)
            tensors = _indexed_tensors(folder, remote)
        else:
            tensors = read_header(folder / SINGLE) if (folder / SINGLE).is_file() else remote[SINGLE]
        config = load_json(folder / "config.json")
        check_config(folder / "config.json", config, tensors)
        return cls(folder, config, with_weights(folder, config, tensors))

    def read(self, *names: str, row: int | None = None) -> torch.Tensor:
        """Tensor on the CPU. See `reading`."""
        with self.reading(HostMemory()) as read:
            return read(*names, row=row)

    def stored(self, name: str, row: int | None = None, pruned: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Tensors on the CPU, by source name, that a quantised weight, or one entry of its first dimension, is stored in. Where
        `pruned` has other values than the weight, they get other codes: that of zero for 0.

        Raises StunError if a value of `pruned` has no code.
        """
        info, parts = self._parts(name, row)
        if pruned is not None:
            with one_thread():
                pruned = pruned.cpu()
                values = fit(info, _by_role(info, parts, pruned.device), pruned)
                if not torch.equal(values, pruned):
                    reason = "kept weights have changed to values without a code"
                    raise StunError(f"{name}: {reason}, which output.format=source cannot hold; use output.format=bfloat16")
        return parts

    def nearest(self, name: str, weight: torch.Tensor, row: int | None = None) -> torch.Tensor:
        """The values nearest to those of `weight` that a quantised weight, or one entry of its first dimension, can have on the
        scales that it is stored with."""
        info, stored = self._parts(name, row)
        return fit(info, _by_role(info, stored, weight.device), weight)

    def rescaled(self, name: str, weight: torch.Tensor, row: int | None, rounded: Callable) -> dict[str, torch.Tensor]:
        """Tensors, by source name, in which a quantised weight, or one entry of its first dimension, is stored if it becomes
        `weight`: on scales that have the size which its largest values need, what `rounded(weight, near)` makes of it, with
        `near` of `Codec.near_at`. One that has not changed, but for removed weights, keeps its scales and codes."""
        info, stored = self._parts(name, row)
        parts = _by_role(info, stored, weight.device)
        if not torch.equal(fit(info, parts, weight), weight):
            parts = _by_role(*self._parts(name, row), weight.device)
            info.codec.rescale(parts, weight.T if info.codec.is_transposed else weight)
            fit(info, parts, rounded(weight, info.codec.near_at(parts, info.lines)).to(info.dtype))
        return stored | {part.name: parts[part.role] for part in info.parts if part.role}

    def worth(self, name: str, row: int | None, stored: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        """The values of a quantised weight, or one entry of it, if it is stored in these tensors."""
        info = self.tensors[name] if row is None else self.tensors[name].row(row)
        values_LW = info.codec.dequantise(_by_role(info, stored, device)).to(info.dtype)
        return values_LW.T if info.codec.is_transposed else values_LW

    def _parts(self, name: str, row: int | None) -> tuple[TensorInfo, dict[str, torch.Tensor]]:
        """Description and parts, by name, of a quantised weight or one entry of its first dimension."""
        info, memory = self.tensors[name] if row is None else self.tensors[name].row(row), HostMemory()
        raw = {part.name: memory.empty(part.info.nbytes) for part in info.parts}
        for part in info.parts:
            self._fill(memory, raw[part.name], part.name, part.info)
        return info, {part.name: raw[part.name].view(part.info.dtype).view(part.info.shape) for part in info.parts}

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
                    for matrix, target_OD in _matrices(info, part):
                        target_LW = target_OD.T if matrix.codec.is_transposed else target_OD
                        bands = _bands(matrix, range(matrix.lines[0]), _BAND)
                        pieces.extend(pool.submit(self._dequantise, memory, target_LW, matrix, lines) for lines in bands)
                    if info.codec:
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
        self._count(len(target_N))

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.bytes_read += nbytes

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

    def _dequantise(self, memory: Memory, target_LW: torch.Tensor, info: TensorInfo, lines: range) -> None:
        """Read some lines of a quantised matrix, and put their values into the rows of `target_LW`."""
        with memory.computing():
            stored = [(part, self._stored(memory, part, info, lines)) for part in info.parts if part.role]
            target_lW, own = target_LW[lines.start : lines.stop], range(len(lines))
            for block in _bands(info, own, _BLOCK) if memory.device.type == "cpu" else [own]:
                parts = {part.role: content[_rows(part, block)] if part.lines else content for part, content in stored}
                target_lW[block.start : block.stop].copy_(info.codec.dequantise(parts))

    def _stored(self, memory: Memory, part: Part, info: TensorInfo, lines: range) -> torch.Tensor:
        """Rows of one part of a quantised matrix that belong to some of its lines. Raises StunError as `_check_content`."""
        own = part.info
        shape, start, nbytes = own.shape, 0, own.nbytes
        if part.lines:
            rows = _rows(part, lines)
            count = rows.stop - rows.start
            shape, start, nbytes = (count, *shape[1:]), rows.start * nbytes // shape[0], count * nbytes // shape[0]
        raw = memory.empty(nbytes)

        def read(view: memoryview, place: int) -> None:
            self._read_into(view, part.name, own.file, own.start + start + place)
            _check_content(part, info, torch.frombuffer(view, dtype=own.dtype))

        memory.fill(raw, read)
        self._count(nbytes)
        return raw.view(own.dtype).view(shape)


def _check_content(part: Part, info: TensorInfo, content: torch.Tensor) -> None:
    """Raise StunError if a part of a quantised matrix holds numbers that none can have. Looked for on the host, as they are read:
    a GPU would be waited for."""
    if part.role in ("scale", "global"):
        if not _are_finite(content):
            raise StunError(f"{part.info.file}: {part.name} holds a scale that is no number (NaN, infinity, or E8M0 of 255)")
        if part.role == "global" and not bool(decoded(content).all()):
            raise StunError(f"{part.info.file}: {part.name} is 0; the scale of a whole matrix cannot be")
    if part.role == "order":
        groups = next(other.info.shape[0] for other in info.parts if other.role == "scale")
        if not bool(((content >= 0) & (content < groups)).all()):
            raise StunError(f"{part.info.file}: {part.name} names groups that are not there; there are {groups}")
    if part.role == "shape" and tuple(content.tolist()) != info.shape:
        raise StunError(f"{part.info.file}: {part.name} says {tuple(content.tolist())}, the codes hold {info.shape}")


def _are_finite(scale_N: torch.Tensor) -> bool:
    """Whether stored scales are numbers. Of E4M3 the bytes are compared, which is faster than converting them."""
    if scale_N.dtype is torch.float8_e4m3fn:
        return not bool(((scale_N.view(torch.uint8) & 127) == 127).any())
    return bool(decoded(scale_N).isfinite().all())


def _by_role(info: TensorInfo, stored: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Parts of a quantised weight that are read, of those by name, on a device; on the CPU the same tensors."""
    return {part.role: stored[part.name].to(device) for part in info.parts if part.role}


def fit(info: TensorInfo, parts: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """Change the codes in the parts, by role, of a quantised matrix to those nearest to `weight` where it has other values;
    returns what they are then worth."""
    codec = info.codec
    weight_LW = weight.T if codec.is_transposed else weight
    values_LW = codec.dequantise(parts).to(info.dtype)
    changed_LW = values_LW != weight_LW
    gone_LW = (weight_LW == 0) & changed_LW
    codec.remove(parts, gone_LW)
    changed_LW &= ~gone_LW
    if bool(changed_LW.any()):
        codec.fit(parts, weight_LW, changed_LW)
    values_LW = codec.dequantise(parts).to(info.dtype) if bool((changed_LW | gone_LW).any()) else values_LW
    return values_LW.T if codec.is_transposed else values_LW


def _matrices(info: TensorInfo, content_N: torch.Tensor) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
    """Matrices of a quantised weight, which may be a tensor of all experts, each with its own part of `content_N`."""
    if info.codec:
        whole = content_N.view(info.dtype).view(info.shape)
        yield from [(info, whole)] if len(info.shape) == 2 else ((info.row(n), matrix) for n, matrix in enumerate(whole))


def _bands(info: TensorInfo, lines: range, weights: int) -> list[range]:
    """Lines of a quantised matrix by band: whole rows of its parts, with so many weights, but a row at least."""
    height = max(1, min(math.lcm(*(part.lines for part in info.parts if part.lines)), info.lines[0]))
    step = height * max(1, weights // max(1, height * info.lines[1]))
    return [range(start, min(start + step, lines.stop)) for start in lines[::step]]


def _rows(part: Part, lines: range) -> slice:
    """Rows of a part that belong to some of the lines."""
    return slice(lines.start // part.lines, -(-lines.stop // part.lines))


def _stamp(status: os.stat_result) -> tuple[int, int]:
    """Size and time of change, to notice that a file was written to."""
    return status.st_size, status.st_mtime_ns
