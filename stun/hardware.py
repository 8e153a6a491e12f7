"""What a launch runs on: stated figures for GPUs, measured ones for this machine."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from stun.checkpoint import Checkpoint
from stun.config import ClusterConfig, StunError
from stun.ranks import Ranks

GIB = 2**30
ACHIEVED = 0.3  # share of the data sheet's arithmetic that is assumed to be reached; never measured here


@dataclass(frozen=True)
class Gpu:
    """`memory` in bytes; `tflops` of dense bfloat16; `link` to the host in GB/s, one way. From the vendor's data sheets."""

    memory: int
    tflops: float
    link: float


GPUS = {
    "a100-40": Gpu(40 * 10**9, 312, 32),
    "a100": Gpu(80 * 10**9, 312, 32),
    "h100": Gpu(80 * 10**9, 989, 64),
    "h200": Gpu(141 * 10**9, 989, 64),
    "b200": Gpu(180 * 10**9, 2250, 64),
}


@dataclass(frozen=True)
class Launch:
    """`nodes` of `per_node` ranks each, and what each of them has: bytes of memory of a GPU (0: ranks compute on the CPU) and of
    a node's host, FLOP/s of a rank, bytes/s that a node reads and that go to a GPU, FLOP/s of the CPU here. `base` is what a
    rank's process holds before it reads any weight."""

    name: str
    nodes: int
    per_node: int
    gpu_memory: int
    host_memory: int
    flops: float
    read: float
    link: float
    here: float
    base: int

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.gpu_memory else "cpu")


def described(cluster: ClusterConfig, source: Checkpoint, base: int) -> Launch:
    """The launch that `cluster` describes. Raises StunError where it names a GPU that is not in the table."""
    if cluster.gpu not in GPUS:
        raise StunError(f"cluster.gpu={cluster.gpu}: known are {', '.join(GPUS)}")
    if min(cluster.nodes, cluster.gpus, cluster.host_gib) <= 0 or cluster.read_gib_s < 0:
        raise StunError("cluster.nodes, cluster.gpus and cluster.host_gib must be above 0")
    gpu, read = GPUS[cluster.gpu], cluster.read_gib_s * GIB or read_speed(source)
    flops, host = gpu.tflops * 1e12 * ACHIEVED, int(cluster.host_gib * GIB)
    return Launch(cluster.gpu, cluster.nodes, cluster.gpus, gpu.memory, host, flops, read, gpu.link * 1e9, matmul_speed(), base)


def this_launch(ranks: Ranks, source: Checkpoint, base: int) -> Launch:
    """The launch that is running. Call it on one rank."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    place = (ranks.world // local, local)
    if ranks.device.type == "cpu":
        speed = matmul_speed()
        return Launch("cpu", *place, 0, host_memory(local), speed, read_speed(source), float("inf"), speed, base)
    found = torch.cuda.get_device_properties(ranks.device)
    known = next(
        (gpu for name, gpu in sorted(GPUS.items(), reverse=True) if name.split("-")[0] in found.name.lower()), GPUS["a100"]
    )
    flops = known.tflops * 1e12 * ACHIEVED
    return Launch(
        found.name,
        *place,
        found.total_memory,
        host_memory(local),
        flops,
        read_speed(source),
        known.link * 1e9,
        matmul_speed(),
        base,
    )


def resident() -> int:
    """Bytes of this process in memory."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def host_memory(ranks: int) -> int:
    """Bytes that the `ranks` of this job on this node may have together, with what they have already: what the system, the cgroup
    and Slurm allow, the least of them."""
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]
    limits, groups = [int(available) * 1024 + ranks * resident()], Path("/proc/self/cgroup").read_text()
    for form, root, name in (
        (r"^0::/(.*)$", "/sys/fs/cgroup", "memory.max"),
        (r"^\d+:memory:/(.*)$", "/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
    ):
        own = re.search(form, groups, re.M)
        for folder in (Path(root) / own[1], *(Path(root) / own[1]).parents) if own else ():
            with contextlib.suppress(OSError, ValueError):  # it limits nothing
                limits.append(int((folder / name).read_text()))
    if os.environ.get("SLURM_MEM_PER_NODE", "0") != "0":
        limits.append(int(os.environ["SLURM_MEM_PER_NODE"]) * 2**20)
    return min(limits)


def free_memory(ranks: Ranks) -> int:
    """Bytes that every rank can still allocate: on its GPU, or its share of the host. The same on every rank."""
    if ranks.device.type == "cuda":
        unused = torch.cuda.memory_reserved(ranks.device) - torch.cuda.memory_allocated(ranks.device)
        free = torch.cuda.mem_get_info(ranks.device)[0] + unused
    else:
        free = host_memory(ranks.local_world) // ranks.local_world - resident()
    return max(0, min(ranks.gather_objects(free)))


def disk_free(run_dir: str) -> int:
    """Bytes free where the run folder is or will be."""
    folder = Path(run_dir).absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free


def matmul_speed(seconds: float = 0.1, size: int = 512) -> float:
    """FLOP/s of float32 products here, with the threads that this rank has."""
    matrix, done = torch.ones(size, size), 0
    matrix @ matrix
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        matrix @ matrix
        done += 1
    return done * 2 * size**3 / spent


def read_speed(source: Checkpoint, nbytes: int = 256 * 2**20) -> float:
    """Bytes/s of reading the head of the largest shard. The system is asked to forget it first; where it does not, this is the
    speed of its cache."""
    file = max({info.file for info in source.tensors.values()}, key=lambda file: file.stat().st_size)
    with file.open("rb", buffering=0) as handle:
        os.posix_fadvise(handle.fileno(), 0, nbytes, os.POSIX_FADV_DONTNEED)
        buffer, read, start = bytearray(2**24), 0, time.perf_counter()
        while read < nbytes and (count := handle.readinto(buffer)):
            read += count
        return read / (time.perf_counter() - start)
