"""Hardware of a launch: data sheets of GPUs, and rates measured on this machine."""

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from stun.checkpoint.reader import Checkpoint
from stun.config import PruneConfig, StunError
from stun.model.architecture import Architecture
from stun.model.precision import compute_dtype
from stun.preflight.config import ClusterConfig
from stun.runtime.matmul import linear
from stun.runtime.ranks import Ranks
from stun.runtime.threads import Workers

GIB = 2**30
_WRITTEN = 2**26  # bytes written to measure the disk of the run folder
_ROWS, _WIDTH = 256, 1024  # of the product that measures a CPU
SAMPLE = 2**28  # bytes read, written or copied to measure a rate
_ROUNDS = 3
_CHUNK = 2**24
_LARGE = {"cpu": (512, 2048), "cuda": (8192, 8192)}  # rows and width of a product that takes the device's peak


# Data sheets of GPUs: memory in bytes, TFLOP/s in dense bfloat16, in TF32 and in float32.
GPUS = {
    "a100-40": (40 * 10**9, 312, 156, 19.5),
    "a100": (80 * 10**9, 312, 156, 19.5),
    "h100": (80 * 10**9, 989, 495, 67),
    "h200": (141 * 10**9, 989, 495, 67),
    "b200": (180 * 10**9, 2250, 1125, 75),
}


# Estimates, until they are measured: a GPU's memory that is no tensor's. CUDA's context with the kernels that are loaded, cuBLAS'
# and cuSOLVER's workspaces, and NCCL's buffers for its channels where there are several ranks.
_CONTEXT, _WORKSPACES, _NCCL = 534 * 2**20, 96 * 2**20, 384 * 2**20


def gpu_base(world: int) -> int:
    """Bytes of a GPU that a rank of `world` takes before any tensor; an estimate."""
    return _CONTEXT + _WORKSPACES + (_NCCL if world > 1 else 0)


@dataclass(frozen=True)
class Launch:
    """`nodes` with `per_node` ranks each. `gpu_memory` is bytes per GPU (0: ranks compute on the CPU), `host_memory` bytes per
    node, `flops` peak FLOP/s per rank in the compute dtype, `tf32` and `float32` those of the methods that use Gram matrices,
    `read` and `write` bytes/s per node, `base` the bytes of a rank's process before it reads any weight."""

    name: str
    nodes: int
    per_node: int
    gpu_memory: int
    host_memory: int
    flops: float
    tf32: float
    float32: float
    read: float
    write: float
    base: int

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.gpu_memory else "cpu")


def described(cluster: ClusterConfig, arch: Architecture, base: int) -> Launch:
    """Launch described by `cluster`. Raises StunError for a GPU that is not in the table, and for impossible numbers."""
    if cluster.gpu not in GPUS:
        raise StunError(f"cluster.gpu={cluster.gpu}: known are {', '.join(GPUS)}")
    if min(cluster.read_gib_s, cluster.write_gib_s) < 0:
        raise StunError("cluster.read_gib_s and cluster.write_gib_s must be 0 or more")
    if min(cluster.nodes, cluster.gpus, cluster.host_gib) <= 0:
        raise StunError("cluster.nodes, cluster.gpus and cluster.host_gib must be above 0")
    (memory, *tflops), read = GPUS[cluster.gpu], cluster.read_gib_s * GIB or read_speed(arch.source)
    place = (cluster.nodes, cluster.gpus, memory, int(cluster.host_gib * GIB))
    return Launch(cluster.gpu, *place, *(1e12 * rate for rate in tflops), read, cluster.write_gib_s * GIB or read, base)


def this_launch(ranks: Ranks, arch: Architecture, cfg: PruneConfig, base: int) -> Launch:
    """Launch that is running, measured. All ranks call this together; on CPUs they measure at the same time, as they compute."""
    local = ranks.local_world
    place, host = (-(-ranks.world // local), local), host_memory(local)
    disk = ranks.on_first(lambda: _disk_speeds(arch, cfg.run_dir))
    if ranks.device.type == "cpu":
        speeds = [_product_speed(ranks.workers, dtype) for dtype in (compute_dtype(arch, ranks.device), torch.float32)]
        flops, float32 = map(min, zip(*ranks.gather_objects(speeds), strict=True))
        ranks.return_memory()
        return Launch("cpu", *place, 0, host, flops, float32, float32, *disk, base)
    properties = torch.cuda.get_device_properties(ranks.device)
    _, *tflops = data_sheet(properties.name, properties.total_memory)
    rates = (1e12 * rate for rate in tflops)
    return Launch(properties.name, *place, properties.total_memory, host, *rates, *disk, base)


def data_sheet(name: str, nbytes: int) -> tuple[float, ...]:
    """Entry of GPUS for a GPU of that name and memory; an A100's for one that is not in the table."""
    alike = [gpu for known, gpu in GPUS.items() if known.split("-")[0] in name.lower()] or [GPUS["a100"]]
    return min(alike, key=lambda gpu: abs(gpu[0] - nbytes))


@lru_cache(maxsize=2)
def _product_speed(workers: Workers, dtype: torch.dtype) -> float:
    """FLOP/s of a rank, measured once a process."""
    return product_speed(workers, dtype, _ROWS, _WIDTH)


def _disk_speeds(arch: Architecture, run_dir: str) -> tuple[float, float]:
    """Bytes/s of reading the source and of writing the run folder, of no more bytes than the source has. If a sample cannot be
    written, the write rate is set to the read rate: the run itself reports that it cannot write."""
    read = read_speed(arch.source)
    try:
        most = min(_WRITTEN, arch.source.file_bytes, disk_free(run_dir) // 2)
        return read, write_speed(_existing_folder(run_dir), max(1, most))
    except StunError:
        return read, read


def resident() -> int:
    """Resident memory of this process in bytes."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def host_memory(ranks: int) -> int:
    """Bytes that the `ranks` of this job on this node can have together, including what they hold: the least of the limits of the
    system, the cgroup and Slurm."""
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]
    limits, groups = [int(available) * 1024 + ranks * resident()], Path("/proc/self/cgroup").read_text()
    for form, root, name in (
        (r"^0::/(.*)$", "/sys/fs/cgroup", "memory.max"),
        (r"^\d+:memory:/(.*)$", "/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
    ):
        group = re.search(form, groups, re.M)
        for folder in (Path(root) / group[1], *(Path(root) / group[1]).parents) if group else ():
            with contextlib.suppress(OSError, ValueError):  # no limit, or not readable
                limits.append(int((folder / name).read_text()))
    if os.environ.get("SLURM_MEM_PER_NODE", "0") != "0":
        limits.append(int(os.environ["SLURM_MEM_PER_NODE"]) * 2**20)
    return min(limits)


def free_memory(ranks: Ranks) -> int:
    """Bytes that every rank can still allocate on its GPU, or in its share of the host. The same number on every rank."""
    if ranks.device.type == "cuda":
        unused = torch.cuda.memory_reserved(ranks.device) - torch.cuda.memory_allocated(ranks.device)
        free = torch.cuda.mem_get_info(ranks.device)[0] + unused
    else:
        free = host_memory(ranks.local_world) // ranks.local_world - resident()
    return max(0, min(ranks.gather_objects(free)))


def disk_free(run_dir: str) -> int:
    """Free bytes on the disk of the run folder, which need not exist yet."""
    return shutil.disk_usage(_existing_folder(run_dir)).free


def _existing_folder(run_dir: str) -> Path:
    """Run folder, or the nearest parent that exists."""
    folder = Path(run_dir).absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def best(work: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """Seconds of the fastest round after one to warm up."""
    seconds = []
    for _ in range(1 + _ROUNDS):
        wait_for(device)
        start = time.perf_counter()
        work()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def wait_for(device: str | torch.device) -> None:
    """Wait until a GPU has finished its work; a no-op for CPUs."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def read_speed(source: Checkpoint) -> float:
    """Bytes/s of reading the start of the largest shard, or of writing where the shards are still to come. The system is asked to
    drop the shard from its cache first; if it does not, this is the speed of the cache."""
    if not source.is_here:
        return write_speed(source.folder)
    file = max({info.file for info in source.tensors.values()}, key=lambda file: file.stat().st_size)
    with file.open("rb", buffering=0) as handle:
        os.posix_fadvise(handle.fileno(), 0, SAMPLE, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(min(_CHUNK, file.stat().st_size))
        read, start = 0, time.perf_counter()
        while read < SAMPLE and (count := handle.readinto(buffer)):
            read += count
        return read / (time.perf_counter() - start)


def write_speed(folder: Path, nbytes: int = SAMPLE) -> float:
    """Bytes/s of writing and syncing a file in `folder`, which is then removed. Raises StunError if it cannot be written."""
    content = os.urandom(min(_CHUNK, nbytes))
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as handle:
            written, start = 0, time.perf_counter()
            while written < nbytes:
                written += handle.write(content)
            os.fsync(handle.fileno())
            return written / (time.perf_counter() - start)
    except OSError as error:
        raise StunError(f"{folder}: cannot be written: {error}") from error


def product_speed(workers: Workers, dtype: torch.dtype, rows: int, width: int, device: str | torch.device = "cpu") -> float:
    """FLOP/s of products [rows, width] x [width, width], computed like those of an expert, two per worker."""
    rows_nD = torch.ones(rows, width, dtype=dtype, device=device)
    weights = [torch.ones(width, width, dtype=dtype, device=device) for _ in range(2 * workers.count)]
    seconds = best(lambda: workers.map(lambda weight_OD: linear(rows_nD, weight_OD), weights), device)
    return len(weights) * 2 * rows * width**2 / seconds


def measure_rates(source: Checkpoint, folder: Path, ranks: Ranks, dtype: torch.dtype) -> dict[str, float]:
    """Bytes/s to `read` the disk of `source` (without cache), to `write` to that of `folder` (synced), and to `copy` in
    the memory of this rank's device (read and written together); `flops` of a large product in the compute dtype, in FLOP/s."""
    flops = product_speed(ranks.workers, dtype, *_LARGE[ranks.device.type], ranks.device)
    disk = {"read": read_speed(source), "write": write_speed(folder)}
    content = torch.ones(SAMPLE, dtype=torch.uint8, device=ranks.device)
    target = torch.empty_like(content)
    return {**disk, "copy": 2 * SAMPLE / best(lambda: target.copy_(content), ranks.device), "flops": flops}
