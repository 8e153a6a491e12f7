"""Files are read and written in pieces by several threads, with the bytes of safetensors' own reader and writer."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stun.checkpoint.headers import DTYPES, read_header
from stun.checkpoint.reader import Checkpoint
from stun.checkpoint.writer import Stacked, write_tensors
from stun.config import StunError
from stun.runtime.device_copies import HostMemory

SHAPES = [(), (1,), (0, 3), (7, 5), (33, 31), (2, 3, 4)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces of 1,000 bytes, so that small tensors have several."""
    for module in ("reader", "writer"):
        monkeypatch.setattr(f"stun.checkpoint.{module}.PIECE", 1000)


def tensors(dtypes) -> dict[str, torch.Tensor]:
    """A tensor of every dtype and shape, in no order."""
    made = {}
    for dtype in dtypes:
        for shape in SHAPES:
            raw = torch.randint(0, 2 if dtype is torch.bool else 120, (*shape, dtype.itemsize), dtype=torch.uint8)
            made[f'{len(shape)} of {dtype} é" {shape}'] = raw.view(dtype).squeeze(-1) if shape else raw.view(dtype)[0]
    return dict(sorted(made.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest()))


@pytest.mark.parametrize("dtypes", [[dtype] for dtype in DTYPES.values()] + [list(DTYPES.values())], ids=str)
def test_files_are_those_of_safetensors(tmp_path, dtypes):
    own = tensors(dtypes)
    digest = write_tensors(tmp_path / "ours", own, is_hashed=True)
    save_file(own, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert digest == hashlib.sha256((tmp_path / "theirs").read_bytes()).hexdigest()
    assert write_tensors(tmp_path / "ours", own) == "", "nothing is hashed unasked"


def test_no_tensors_and_torn_ones(tmp_path):
    """A file without tensors; columns, and entries that were never joined."""
    wide = torch.randn(40, 50)
    entries = [torch.randn(9, 70) for _ in range(5)]
    for ours, theirs in (
        ({}, {}),
        ({"wide": wide.T, "part": wide[:, 3:7]}, {"wide": wide.T.contiguous(), "part": wide[:, 3:7].contiguous()}),
        ({"experts": Stacked(entries), "a": wide}, {"experts": torch.stack(entries), "a": wide}),
    ):
        write_tensors(tmp_path / "ours", ours)
        save_file(theirs, tmp_path / "theirs", metadata={"format": "pt"})
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert Stacked(entries).nbytes == torch.stack(entries).nbytes


@pytest.mark.parametrize("is_hashed", [False, True])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch, is_hashed):
    """... though the pieces after the one that fails wait for it with their part of the digest."""
    pwrite, threads = os.pwrite, set()

    def full(file, view, start):
        threads.add(threading.current_thread().name)
        if start > 5000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, view, start)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StunError, match=r"model: cannot be written: .*No space left"):
        write_tensors(tmp_path / "model", {"a": torch.ones(20_000)}, is_hashed)
    assert not list(tmp_path.iterdir()) and len(threads) > 1


def test_a_system_that_takes_few_bytes_at_a_time(tmp_path, monkeypatch):
    """... as one does whose disk is nearly full."""
    pwrite, opened = os.pwrite, Path.open

    class Slow(io.FileIO):
        def write(self, data):
            return super().write(data[:100])

    monkeypatch.setattr(os, "pwrite", lambda file, view, start: pwrite(file, view[:100], start))
    monkeypatch.setattr(
        Path, "open", lambda file, mode="r", **how: Slow(file, mode) if "w" in mode else opened(file, mode, **how)
    )
    own = {f"tensor {number}": torch.randn(30) for number in range(9)}
    write_tensors(tmp_path / "ours", own)
    assert all(torch.equal(tensor, own[name]) for name, tensor in load_file(tmp_path / "ours").items())


@pytest.fixture
def source(tmp_path) -> Checkpoint:
    save_file(tensors(DTYPES.values()) | {"large": torch.randn(300, 40)}, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path, {}, read_header(tmp_path / "model.safetensors"))


def test_what_is_read_is_what_is_there(source):
    whole = load_file(source.folder / "model.safetensors")
    with source.reading(HostMemory()) as read:
        found = {name: read(name) for name in source.tensors}
    assert source.bytes_read == sum(tensor.nbytes for tensor in whole.values())
    assert all(found[n].dtype is t.dtype and found[n].shape == t.shape for n, t in whole.items())
    assert all(found[n].view(torch.uint8).equal(t.view(torch.uint8)) for n, t in whole.items() if t.dim())
    assert source.read("large", row=7).equal(whole["large"][7])
    assert source.read("large", "large").equal(torch.cat([whole["large"]] * 2))


def test_pages_are_used_again(source):
    """... once the tensor that had them is gone, for the same size alone, and until they are returned to the system."""
    memory = HostMemory()

    def address(keep: list) -> int:
        with source.reading(memory) as read:
            keep.append(read("large"))
        return keep[-1].data_ptr()

    kept, held = [], []
    first = address(kept)
    assert address(kept) != first, "it is still in use"
    rows = kept[0][3:5]
    kept.clear()
    assert address(held) != first, "a part of it is still in use"
    del rows
    held += [memory.empty(source.tensors["large"].nbytes - 1)]
    assert address(held) == first and held[-1].equal(source.read("large"))
    held.clear()
    memory.trim()
    assert all(not free for free in memory._free.values())


def changed(file):
    file.write_bytes(file.read_bytes() + b" ")


def short(file):
    status = file.stat()
    with file.open("r+b") as handle:
        handle.truncate(status.st_size // 2)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (changed, r"model\.safetensors: has changed since the run began; large was not read"),
        (lambda file: file.unlink(), r"model\.safetensors: large cannot be read: .*No such file"),
        (lambda file: (file.unlink(), file.mkdir()), r"model\.safetensors: large cannot be read: .*Is a directory"),
    ],
)
def test_a_file_that_is_no_longer_the_same(source, damage, says):
    damage(source.folder / "model.safetensors")
    with pytest.raises(StunError, match=says):
        source.read("large")


def test_a_file_that_ends_early(source, monkeypatch):
    short(source.folder / "model.safetensors")
    monkeypatch.setattr(source, "_stamps", {})
    last = max(source.tensors, key=lambda name: source.tensors[name].start)
    with pytest.raises(StunError, match=r"model\.safetensors: ended while reading .*did the file change"):
        source.read(last)


def test_what_fails_is_said_once_and_the_rest_is_dropped(source):
    """A reading of many tensors ends with the first error in their order, and none of its threads stays."""
    shutil.move(source.folder / "model.safetensors", source.folder / "away")
    with pytest.raises(StunError, match="cannot be read"), source.reading(HostMemory()) as read:
        for name in source.tensors:
            read(name)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("copy")]
