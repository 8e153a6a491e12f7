"""The compressed form of a checkpoint: of sparse matrices only a bitmask and the kept values are stored.

A compressed folder is a checkpoint in the hub's layout but for this:

config.json                 has `stun_format: {"compression": "bitmask", "version": 1}`
model.bitmask.index.json    the index, under another name: transformers finds no weights here and says so. Under the usual name it
                            would load the folder with random weights in place of the matrices it misses, and only warn
*.safetensors               in place of a tensor NAME of shape [..., O, D], where that takes fewer bytes:
                            NAME.bitmask  uint8 [..., O, ceil(D / 8)]: bit j % 8 (the lowest is bit 0) of byte j // 8 is 1 where
                                          column j is kept; the bits from D on are 0
                            NAME.values   [kept], in NAME's dtype: the kept entries, in row-major order
                            All other tensors are stored as they are. The file's metadata has one entry, `bitmask_columns`: a JSON
                            object, NAME -> D, of the tensors stored so; a file without any has the usual `format: pt`

An entry is kept unless all its bytes are 0. So -0.0 is, and what is expanded has the same bytes as what was compressed.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from stun.checkpoint.config_check import check_config
from stun.checkpoint.headers import TensorInfo, read_header
from stun.checkpoint.reader import COMPRESSED_INDEX, Checkpoint, read_index
from stun.checkpoint.writer import copy_extras, write_index, write_tensors
from stun.config import StunError
from stun.files import check_folder, load_json, parse_json, write_json
from stun.model.empty import without_weights

FORMAT = {"compression": "bitmask", "version": 1}
_KEY = "stun_format"
_COLUMNS = "bitmask_columns"
_BITMASK, _VALUES = ".bitmask", ".values"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size: what entries' bytes are read as
_CHUNK = 1 << 18  # entries at once: what is computed of them stays in the cache
_GATHER = 0x0102040810204080  # times eight bytes of 0 or 1, the first the lowest: their bits in the same order in the top byte
_BYTES = torch.arange(256, dtype=torch.uint8)
_BITS_OF = (_BYTES[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1  # [256, 8]
_SPREAD = _BITS_OF.view(torch.int64).flatten()  # [256], eight bytes of 0 or 1: the inverse of _GATHER
_COUNTS = _BITS_OF.sum(1)


def _pack(mask: torch.Tensor) -> torch.Tensor:
    """Bits [..., ceil(D / 8)] uint8 of a bool mask [..., D]."""
    padded = F.pad(mask, (0, -mask.shape[-1] % 8))
    return (padded.view(torch.int64) * _GATHER).view(torch.uint8)[..., 7::8].contiguous()


def _unpack(bitmask: torch.Tensor, columns: int) -> torch.Tensor:
    """The bool mask [..., columns] of a bitmask; the inverse of `_pack`."""
    bits = _SPREAD.index_select(0, bitmask.flatten().int()).view(torch.bool)
    return bits.view(*bitmask.shape[:-1], -1)[..., :columns]


def _kept(bitmask: torch.Tensor) -> int:
    """How many bits are 1."""
    return int((torch.bincount(bitmask.flatten(), minlength=256) * _COUNTS).sum())


def compress_tensor(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(bitmask, values) of a tensor on the CPU, as in the module's description; None where they would not be smaller."""
    if tensor.dim() not in (2, 3) or not tensor.numel() or tensor.itemsize not in _INTEGERS:
        return None
    entries = tensor.contiguous().view(_INTEGERS[tensor.itemsize])
    mask = entries != 0
    bitmask = _pack(mask)
    kept = _kept(bitmask)
    if bitmask.nbytes + kept * tensor.itemsize >= tensor.nbytes:
        return None
    values, start = torch.empty(kept, dtype=entries.dtype), 0
    for part, own in zip(entries.flatten().split(_CHUNK), mask.flatten().split(_CHUNK), strict=True):
        places = torch.from_numpy(np.flatnonzero(own.numpy()))  # torch's nonzero takes four times as long as numpy's
        torch.index_select(part, 0, places, out=values[start : start + len(places)])
        start += len(places)
    return bitmask, values.view(tensor.dtype)


def _check(bitmask: torch.Tensor, values: torch.Tensor, columns: int, name: str) -> None:
    """Raise StunError where the three do not describe one tensor."""
    if bitmask.dtype is not torch.uint8 or bitmask.dim() not in (2, 3):
        raise StunError(f"{name}{_BITMASK}: must be uint8 with 2 or 3 dimensions, is {bitmask.dtype} {tuple(bitmask.shape)}")
    if not bitmask.numel() or bitmask.shape[-1] != -(-columns // 8):
        raise StunError(f"{name}{_BITMASK}: shape {tuple(bitmask.shape)} cannot hold rows of {columns} columns")
    if columns % 8 and bool((bitmask[..., -1] >> columns % 8).any()):
        raise StunError(f"{name}{_BITMASK}: has bits beyond its {columns} columns")
    if values.dim() != 1 or values.itemsize not in _INTEGERS:
        raise StunError(f"{name}{_VALUES}: must have 1 dimension, is {values.dtype} {tuple(values.shape)}")
    if len(values) != _kept(bitmask):
        raise StunError(f"{name}{_VALUES}: holds {len(values)} values, {_kept(bitmask)} bits are set in {name}{_BITMASK}")


def expand_tensor(bitmask: torch.Tensor, values: torch.Tensor, columns: int, name: str = "tensor") -> torch.Tensor:
    """The tensor [..., O, columns] that `compress_tensor` was given. Raises StunError, naming `name`, where they do not fit."""
    _check(bitmask, values, columns, name)
    mask = _unpack(bitmask, columns)
    entries = values.view(_INTEGERS[values.itemsize])
    expanded, start = torch.empty(mask.numel(), dtype=entries.dtype), 0
    for own, part in zip(mask.flatten().split(_CHUNK), expanded.split(_CHUNK), strict=True):
        places = own.cumsum(0, dtype=torch.int32)
        count = int(places[-1])
        zero_and_kept = torch.cat([entries.new_zeros(1), entries[start : start + count]])
        torch.index_select(zero_and_kept, 0, places.mul_(own), out=part)
        start += count
    return expanded.view(values.dtype).view(mask.shape)


def compress(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What a file is to hold in place of `tensors`, all on the CPU, and its metadata. Raises StunError on a reserved name."""
    stored: dict[str, torch.Tensor] = {}
    columns: dict[str, int] = {}
    for name, tensor in tensors.items():
        if name.endswith((_BITMASK, _VALUES)):
            raise StunError(f"{name}: the compressed form cannot store a tensor whose name ends in {_BITMASK} or {_VALUES}")
        packed = compress_tensor(tensor)
        if packed is None:
            stored[name] = tensor
        else:
            stored[name + _BITMASK], stored[name + _VALUES] = packed
            columns[name] = tensor.shape[-1]
    return stored, {_COLUMNS: json.dumps(columns)} if columns else {"format": "pt"}


def mark(config: dict) -> dict:
    """The content of a config.json, with the mark of a compressed folder."""
    return {**config, _KEY: FORMAT}


def is_compressed(folder: str | Path) -> bool:
    """Whether a checkpoint has the mark. Raises StunError where it has one of another form or version."""
    return _is_marked(load_json(Path(folder) / "config.json"), Path(folder) / "config.json")


def _is_marked(config: dict, file: Path) -> bool:
    found = config.get(_KEY)
    if found not in (None, FORMAT):
        raise StunError(f"{file}: {_KEY}={found}: only {FORMAT} can be read; a newer version of stun may be needed")
    return found is not None


class _Shard:
    """One file of a compressed checkpoint, open: `names` are those of the tensors it describes. Raises StunError."""

    def __init__(self, file: Path):
        self.file = file
        read_header(file)
        try:
            self._handle = safe_open(file, framework="pt")
            stored, metadata = set(self._handle.keys()), self._handle.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise StunError(f"{file}: cannot be read: {error}") from error
        self._columns = self._parse_columns(metadata.get(_COLUMNS, "{}"))
        packed = {name + suffix for name in self._columns for suffix in (_BITMASK, _VALUES)}
        missing, dense = sorted(packed - stored), stored - packed
        if missing:
            raise StunError(f"{file}: {missing[0]}: missing, but {_COLUMNS} names its tensor")
        stray = sorted(name for name in dense if name.endswith((_BITMASK, _VALUES)) or name in self._columns)
        if stray:
            raise StunError(f"{file}: {stray[0]}: is not what {_COLUMNS} in the metadata says of it")
        self.stored, self.names = stored, sorted(dense | self._columns.keys())
        self._before: dict[str, list[int]] = {}

    def _parse_columns(self, text: str) -> dict[str, int]:
        columns = parse_json(text, f"{self.file}: metadata {_COLUMNS}")
        if not isinstance(columns, dict) or not all(type(count) is int and count > 0 for count in columns.values()):
            raise StunError(f"{self.file}: metadata {_COLUMNS} must map names to numbers of columns, is {text[:80]!r}")
        return columns

    def _read(self, name: str) -> torch.Tensor:
        """A stored tensor, its bytes still in the file: they are read as they are used."""
        try:
            return self._handle.get_tensor(name)
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise StunError(f"{self.file}: {name}: cannot be read: {error}") from error

    def check(self) -> None:
        """Raise StunError where a tensor cannot be expanded."""
        for name, columns in self._columns.items():
            _check(self._read(name + _BITMASK), self._read(name + _VALUES), columns, f"{self.file}: {name}")

    def dtype(self, name: str) -> torch.dtype:
        return self._read(name + _VALUES if name in self._columns else name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        columns = self._columns.get(name)
        if columns is None:
            return tuple(self._handle.get_slice(name).get_shape())
        return (*self._handle.get_slice(name + _BITMASK).get_shape()[:-1], columns)

    def tensor(self, name: str, row: int | None = None) -> torch.Tensor:
        """One tensor, expanded where it is stored so; `row` is one entry of its first dimension."""
        columns = self._columns.get(name)
        if columns is None:
            stored = self._read(name)
            return stored if row is None else stored[row]
        bitmask, values = self._read(name + _BITMASK), self._read(name + _VALUES)
        if row is None:
            return expand_tensor(bitmask, values, columns, f"{self.file}: {name}")
        ends = self._ends(name, bitmask)
        own = values[ends[row] : ends[row + 1]]
        return expand_tensor(bitmask[row : row + 1], own, columns, f"{self.file}: {name}")[0]

    def _ends(self, name: str, bitmask: torch.Tensor) -> list[int]:
        """How many values lie before each entry of the first dimension, and before what follows the last."""
        if name not in self._before:
            self._before[name] = [0, *itertools.accumulate(map(_kept, bitmask))]
        return self._before[name]


def _checked_files(folder: Path) -> list[Path]:
    """The files of a compressed checkpoint, all found to be whole. Raises StunError."""
    if not is_compressed(folder):
        raise StunError(f"{folder}: is not compressed: its config.json has no {_KEY}")
    check_folder(folder)
    weight_map, seen = read_index(folder / COMPRESSED_INDEX), set()
    files = sorted(set(weight_map.values()))
    for file in files:
        shard = _Shard(folder / file)
        unlike = sorted(shard.stored ^ {name for name, own in weight_map.items() if own == file})
        if unlike:
            raise StunError(f"{folder / file}: {unlike[0]}: stands in one of the file and {COMPRESSED_INDEX}, not in both")
        twice = sorted(seen.intersection(shard.names))
        if twice:
            raise StunError(f"{folder / file}: {twice[0]}: stands in another file too")
        seen.update(shard.names)
        shard.check()
    return [folder / file for file in files]


def expand(folder: str | Path, output: str | Path) -> None:
    """Write the compressed checkpoint `folder` to `output`, a new or empty folder, as an ordinary one; one file at a time.

    Raises StunError before anything is written where the checkpoint is not whole.
    """
    source, target = Path(folder), Path(output)
    files = _checked_files(source)
    try:
        target.mkdir(parents=True, exist_ok=True)
        is_empty = not any(target.iterdir())
    except OSError as error:
        raise StunError(f"output={output}: cannot be written: {error}") from error
    if not is_empty:
        raise StunError(f"output={output}: holds something else; choose an empty or new folder")
    sizes: dict[str, dict[str, int]] = {}
    for file in files:
        shard = _Shard(file)
        tensors = {name: shard.tensor(name) for name in shard.names}
        write_tensors(target / file.name, tensors)
        sizes[file.name] = {name: tensor.nbytes for name, tensor in tensors.items()}
        del shard, tensors
    copy_extras(source, target)
    config = load_json(source / "config.json")
    write_json(target / "config.json", {key: value for key, value in config.items() if key != _KEY})
    write_index(target, sizes)


class _Compressed(Checkpoint):
    """A compressed checkpoint, read as if it were not."""

    def __init__(self, folder: Path):
        self._shards = {name: shard for file in _checked_files(folder) for shard in [_Shard(file)] for name in shard.names}
        config = {key: value for key, value in load_json(folder / "config.json").items() if key != _KEY}
        tensors = {name: _info(shard, name) for name, shard in self._shards.items()}
        check_config(folder / "config.json", config, tensors)
        super().__init__(folder, config, tensors)

    def read(self, *names: str, row: int | None = None) -> torch.Tensor:
        parts = [self._shards[name].tensor(name, row) for name in names]
        self.bytes_read += sum(part.nbytes for part in parts)
        return torch.cat(parts) if len(parts) > 1 else parts[0].clone()


def _info(shard: _Shard, name: str) -> TensorInfo:
    shape, dtype = shard.shape(name), shard.dtype(name)
    return TensorInfo(shard.file, 0, math.prod(shape) * dtype.itemsize, dtype, shape)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in a folder, compressed or not. Raises StunError where it is not whole."""
    folder = Path(path)
    is_marked = (folder / "config.json").is_file() and is_compressed(folder)
    return _Compressed(folder) if is_marked else Checkpoint.open(path)


class _Unread:
    """A tensor of a shard as transformers takes the tensors of a file: `self[...]` reads and expands it."""

    def __init__(self, shard: _Shard, name: str):
        self._shard, self._name = shard, name
        self.dtype = shard.dtype(name)

    def __getitem__(self, index) -> torch.Tensor:
        return self._shard.tensor(self._name)[index]

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


def load_model(folder: str | Path, **keywords) -> PreTrainedModel:
    """The model of a compressed checkpoint, as AutoModelForCausalLM makes it; `keywords` as for its from_pretrained (dtype, ...).

    Nothing is written, and tensors are expanded only as the model takes them. Raises StunError where the checkpoint is not whole.
    """
    source = Path(folder)
    shards = [_Shard(file) for file in _checked_files(source)]
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    config.__dict__.pop(_KEY, None)  # or the model would save it
    if (source / "generation_config.json").is_file():
        keywords = {"generation_config": GenerationConfig.from_pretrained(source), **keywords}
    with without_weights():
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # AutoModel itself takes no state_dict
    tensors = {name: _Unread(shard, name) for shard in shards for name in shard.names}
    model = type(empty).from_pretrained(None, config=empty.config, state_dict=tensors, **keywords)
    model.config.name_or_path = model.name_or_path = str(source)
    return model
