"""Copies between the host and a GPU arrive whole, whatever else the GPU is doing."""

from __future__ import annotations

import threading

import pytest
import torch

from stun.runtime.device_copies import BUFFER, to_device, to_host

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SHAPES = [(), (0, 3), (7,), (BUFFER // 2 + 1,), (3, BUFFER // 4), (5, BUFFER // 2 - 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_there_and_back(shape):
    tensor = torch.randint(-99, 99, shape).bfloat16()
    moved = to_device(tensor, torch.device("cuda", torch.cuda.current_device()))
    assert moved.is_cuda and torch.equal(moved.cpu(), tensor) and torch.equal(to_host(moved), tensor)


def test_beside_a_busy_gpu():
    """Memory that the queue still uses is not overwritten, and results that are still being computed arrive."""
    device, found = torch.device("cuda", torch.cuda.current_device()), []
    busy, host = torch.randn(4096, 4096, device=device), torch.arange(BUFFER).float()
    for turn in range(8):
        scratch = busy @ busy
        del scratch
        moved = to_device(host + turn, device)
        for _ in range(8):
            moved = moved + (busy @ busy)[0, 0] * 0 + 1
        thread = threading.Thread(target=lambda own=moved: found.append(to_host(own)))
        thread.start()
        thread.join()
        assert torch.equal(found[-1], host + turn + 8)
