"""NCCL with one rank: the collectives that the library uses, and the GPU memory that it takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from gpu.acceptance.memory import outside_tensors
from gpu.acceptance.rows import Row
from stun.preflight.hardware import GIB, best

_MIB = 2**20


def check(folder: Path, pretend: bool) -> Iterator[Row]:
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # there may be no other network
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    before = outside_tensors()
    place = {"init_method": f"file://{folder / 'meeting'}", "rank": 0, "world_size": 1}
    dist.init_process_group("nccl", device_id=device, **place)
    sent_N = torch.arange((1 if pretend else 256) * _MIB // 8, device=device)
    for name, collective in _collectives().items():
        received_N = collective(sent_N)
        is_right = bool(torch.equal(received_N, sent_N))
        seconds = best(lambda collective=collective: collective(sent_N), device)
        yield Row(name, sent_N.nbytes / seconds / GIB, "GiB/s", is_right=is_right)
    yield Row("GPU memory of NCCL", (outside_tensors() - before) / _MIB, "MiB")
    dist.destroy_process_group()


def _collectives() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Collectives by name: each returns what this rank has received, which is what it has sent."""

    def into(call: Callable[[torch.Tensor, torch.Tensor], object]) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(sent_N: torch.Tensor) -> torch.Tensor:
            received_N = torch.zeros_like(sent_N)
            call(received_N, sent_N)
            return received_N

        return run

    return {
        "all_reduce": into(lambda received_N, sent_N: dist.all_reduce(received_N.copy_(sent_N))),
        "broadcast": into(lambda received_N, sent_N: dist.broadcast(received_N.copy_(sent_N), 0)),
        "all_gather": into(lambda received_N, sent_N: dist.all_gather([received_N], sent_N)),
        "all_to_all": into(lambda received_N, sent_N: dist.all_to_all_single(received_N, sent_N, [len(sent_N)], [len(sent_N)])),
    }
