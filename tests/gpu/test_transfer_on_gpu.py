"""Tensors come from files to a GPU, and go from it to files, whole, whatever else the GPU is doing."""

from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import load_file

from stun.checkpoint.headers import read_header
from stun.checkpoint.reader import Checkpoint
from stun.checkpoint.writer import write_tensors
from stun.runtime.device_copies import PIECE, memory_to_read_into

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SHAPES = [(), (0, 3), (7,), (PIECE // 2 + 1,), (3, PIECE // 4), (5, PIECE // 2 - 3)]


def test_there_and_back(tmp_path):
    device = torch.device("cuda", torch.cuda.current_device())
    tensors = {str(shape): torch.randint(-99, 99, shape).bfloat16() for shape in SHAPES}
    write_tensors(tmp_path / "host", tensors)
    memory = memory_to_read_into(device)
    with Checkpoint(tmp_path, {}, read_header(tmp_path / "host")).reading(memory) as read:
        moved = {name: read(name) for name in tensors}
    memory.arrive()
    assert all(moved[name].is_cuda and torch.equal(moved[name].cpu(), tensor) for name, tensor in tensors.items())
    write_tensors(tmp_path / "gpu", moved)
    assert (tmp_path / "gpu").read_bytes() == (tmp_path / "host").read_bytes()


def test_beside_a_busy_gpu(tmp_path):
    """Memory that the queue still uses is not overwritten, and results that are still being computed arrive."""
    device = torch.device("cuda", torch.cuda.current_device())
    busy, host, memory = torch.randn(4096, 4096, device=device), torch.arange(PIECE).float(), memory_to_read_into(device)
    for turn in range(8):
        write_tensors(tmp_path / "in", {"a": host + turn})
        scratch = busy @ busy
        del scratch
        with Checkpoint(tmp_path, {}, read_header(tmp_path / "in")).reading(memory) as read:
            moved = read("a")
        memory.arrive()
        for _ in range(8):
            moved = moved + (busy @ busy)[0, 0] * 0 + 1
        thread = threading.Thread(target=write_tensors, args=(tmp_path / "out", {"a": moved}))
        thread.start()
        thread.join()
        assert torch.equal(load_file(tmp_path / "out")["a"], host + turn + 8)
