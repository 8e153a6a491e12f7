"""Ranks of a job: start, end, collectives and logging. The only module that imports DeepSpeed."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch

from stun.config import Device, StunError, printable
from stun.files import system_errors
from stun.runtime.gpus import own_device, set_arithmetic
from stun.runtime.threads import Workers, threads_on
from stun.runtime.timers import Meter

T = TypeVar("T")
_WAIT_SECONDS = 30.0  # between signs of life to waiting ranks, whose collectives would time out
_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def take_environment() -> bool:
    """Set the variables of torchrun that are missing, under srun from Slurm's own; returns whether this rank is a task of srun.
    Without either launcher, the job has one rank."""
    if "SLURM_STEP_ID" not in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) == 1:
        return False
    if "RANK" not in os.environ:
        os.environ.update({name: os.environ[slurm] for name, slurm in _SLURM.items()})
        os.environ.setdefault("MASTER_ADDR", _first_host(os.environ["SLURM_STEP_NODELIST"]))
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 12000))
    # A script may have set them for its tasks; torchrun, if a task starts it, has set others.
    is_task = all(os.environ.get(name) == os.environ.get(_SLURM[name]) for name in ("RANK", "WORLD_SIZE"))
    if is_task:
        os.environ.setdefault("LOCAL_RANK", os.environ["SLURM_LOCALID"])
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(_tasks_here()))
    return is_task


def _tasks_here() -> int:
    """Number of srun's tasks on this node, from those of all nodes: `4(x2),3`."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ["SLURM_STEP_TASKS_PER_NODE"])
    return [int(tasks) for tasks, nodes in found for _ in range(int(nodes or 1))][int(os.environ["SLURM_NODEID"])]


def _first_host(nodes: str) -> str:
    """First host of a Slurm node list: `gpu[03-05,9],x1` -> `gpu03`."""
    return re.sub(r"^([^,\[]+)(?:\[([^-,\]]+))?.*", lambda m: m[1] + (m[2] or ""), nodes)


def _start_deepspeed(on_gpu: bool) -> ModuleType:
    """Start DeepSpeed's communication; returns its module of collectives."""
    if on_gpu:
        # Otherwise every rank warns once that sends and receives of one group follow each other, as they may.
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"  # also where GPUs are there and not used
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.comm

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if not on_gpu:
        # Otherwise CPU ranks compile this extension for more than a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if on_gpu else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timedelta(hours=2))
    return deepspeed.comm


def is_lost(error: Exception) -> bool:
    """Whether a collective failed, as it does once another rank has ended. gloo's failures have no type of their own."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


@contextmanager
def _own_gpus() -> Iterator[None]:
    """Context of NCCL's start and of the first collective: in one of them it notices ranks that were given the same GPU. Raises
    StunError for them."""
    try:
        yield
    except torch.distributed.DistError as error:
        if "Duplicate GPU" not in str(error):
            raise
        raise StunError("two ranks were given the same GPU: each rank needs its own; start fewer ranks, or device=cpu") from error


def _libc_call(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None)  # C libraries other than glibc may lack mallopt and malloc_trim
    if function:
        function(*arguments)


def _outcome(function: Callable[[], T]) -> tuple[T | None, StunError | None]:
    """Result or StunError of a call; errors of the system are made one, so that every rank hears of them."""
    try:
        with system_errors():
            return function(), None
    except StunError as error:
        return None, error


def _shared(outcomes: list[tuple[T, StunError | None] | None]) -> T:
    """First result of outcomes that every rank has; None where a rank made no call. Raises the first StunError."""
    made = [outcome for outcome in outcomes if outcome]
    for error in (error for _, error in made if error):
        error.is_shared = True
        raise error
    return made[0][0]


class Ranks:
    """This process as rank `rank` of `world`, computing on `device`."""

    def __init__(self, device: Device = Device.auto) -> None:
        is_task, is_alone = take_environment(), "RANK" not in os.environ
        self.rank, self.world = (0, 1) if is_alone else (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        # The deepspeed launcher has a name of its own for the number of ranks on a node; others may not say it.
        said = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 0)
        local, told = int(os.environ.get("LOCAL_RANK", 0)), 1 if is_alone else said
        self.is_first_of_node = local == 0
        self.device = own_device(device, local, told or local + 1, is_task)
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            os.environ["LOCAL_RANK"] = str(self.device.index)  # DeepSpeed binds its collectives to the GPU of this number
        else:
            # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: keep freed blocks for reuse until `return_memory`. By default every large block
            # is returned to the system, which zeroes its pages at each new use (a third of a small run's time). Larger ones than
            # these are: in the heap, scores of attention took 1.4 times their memory.
            _libc_call("mallopt", -3, 32 << 20)  # older versions of glibc accept no more
            _libc_call("mallopt", -3, 128 << 20)
            _libc_call("mallopt", -1, 256 << 20)
        with _own_gpus():
            self._comm = _start_deepspeed(on_gpu) if self.world > 1 else None
            here, sharing = self._neighbours()
        self.local_world = told or here
        self._threads = max(1, len(os.sched_getaffinity(0)) // min(sharing, self.local_world))
        self.set_torch()
        self.workers = Workers(self.device)
        self.started, self._peak = time.monotonic(), 0
        self.doing = ""  # current step, for the log of a failure: "prune layer 3"
        self.command: list[str] | None = None  # words that start this job, in the form of sys.argv, where these are others
        self.meter = Meter()
        # Replaced by stun.tracking.tracker where a job is tracked.
        self.track: Callable[[dict[str, float], int], None] = lambda metrics, step: None

    def set_torch(self) -> None:
        """Set what torch keeps for the whole process; of a later call, the caller may have changed it in between."""
        torch.set_num_threads(self._threads)
        if self.device.type == "cuda":
            set_arithmetic()

    def _neighbours(self) -> tuple[int, int]:
        """Number of ranks on this node, and of those that share cores with this one: launchers may bind each to its own."""
        node, cores = platform.node(), os.sched_getaffinity(0)
        here = [theirs for place, theirs in self.gather_objects((node, cores)) if place == node]
        return len(here), sum(not cores.isdisjoint(theirs) for theirs in here)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_) -> None:
        if not failed:
            self.end()

    def end(self) -> None:
        """Close the process group after success; after a failure this could wait for ranks that have ended."""
        if self._comm and self._comm.is_initialized():
            torch.distributed.destroy_process_group()

    def log(self, message: str) -> None:
        """Print on the first rank, after the seconds since `started`."""
        if self.is_first:
            print(f"[{time.monotonic() - self.started:7.1f}s] {printable(message)}", flush=True)

    def peak_memory(self) -> int:
        """Peak bytes of this process since `reset_peak_memory`: allocated on the GPU, or resident on a CPU."""
        return max(self._peak, self._lap())

    def lap_memory(self) -> int:
        """Peak bytes since the last lap or reset; starts the next lap."""
        lap = self._lap()
        self._peak = max(self._peak, lap)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")
        return lap

    def reset_peak_memory(self) -> None:
        """Restart `peak_memory`."""
        self.lap_memory()
        self._peak = 0

    def _lap(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024

    def return_memory(self) -> None:
        """Return freed memory, which the C allocator keeps for reuse, to the system."""
        _libc_call("malloc_trim", 0)

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Copy `tensor` of rank `source` into `tensor` of all ranks (same shape and dtype); returns it."""
        if self.world > 1:
            self._comm.broadcast(tensor.view(torch.uint8) if tensor.dim() else tensor, source)
        return tensor

    def moved(
        self, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, source: int, target: int
    ) -> torch.Tensor | None:
        """`tensor` of rank `source` on rank `target`, None elsewhere."""
        if self.rank == source == target:
            return tensor
        if self.rank == source:
            self._comm.send(tensor.contiguous().view(torch.uint8), target)
        if self.rank != target:
            return None
        received = torch.empty(shape, dtype=dtype, device=self.device)
        self._comm.recv(received.view(torch.uint8), source)
        return received

    def broadcast_object(self, value: object) -> object:
        """Small Python object of the first rank, on every rank."""
        box = [value]
        if self.world > 1:
            self._comm.broadcast_object_list(box, 0, device=self.device)
        return box[0]

    def on_first(self, function: Callable[[], T]) -> T:
        """Call `function` on the first rank only; every rank returns its result or raises its StunError."""
        return _shared([self.broadcast_object(_outcome(function) if self.is_first else None)])

    def while_waiting(self, function: Callable[[], T], works: bool) -> T:
        """Call `function`, however long it takes, on the ranks with `works`, the first among them, while the others wait; every
        rank returns the first rank's result or raises the first StunError."""
        if self.world == 1:
            return self.on_first(function)
        with threads_on(self.device, 1, "wait") as pool:
            future = pool.submit(_outcome, function) if works else None
            while not all(self.gather_objects(future is None or bool(wait([future], _WAIT_SECONDS).done))):
                pass
        return _shared(self.gather_objects(future.result() if future else None))

    def gather_objects(self, value: object) -> list:
        """Small objects of all ranks, in rank order, on every rank."""
        boxes = [None] * self.world
        if self.world == 1:
            return [value]
        self._comm.all_gather_object(boxes, value)
        return boxes

    def sum_integers(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of an integer tensor over the ranks; integers, since their sum does not depend on the order."""
        assert not tensor.is_floating_point()
        if self.world > 1:
            self._comm.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[...] on each rank -> [world, ...] on all, in rank order."""
        out = tensor.new_empty((self.world, *tensor.shape))
        if self.world == 1:
            out[0] = tensor
        else:
            self._comm.all_gather(list(out), tensor.contiguous())
        return out

    def exchange(self, rows_ND: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        """All-to-all of rows in rank order: `send[r]` consecutive rows to rank r, `receive[r]` rows from it."""
        if self.world == 1:
            return rows_ND
        out = rows_ND.new_empty((sum(receive), *rows_ND.shape[1:]))
        self._comm.all_to_all_single(out, rows_ND.contiguous(), receive, send)
        return out


class Alone(Ranks):
    """This process as the one rank of a small job of its own on the CPU, whatever ranks it is among."""

    def __init__(self) -> None:
        self.rank, self.world, self.local_world, self.device, self._comm = 0, 1, 1, torch.device("cpu"), None
        self.is_first_of_node, self.workers, self.meter = True, Workers(self.device), Meter()
        self.started, self._peak, self.doing, self.command = time.monotonic(), 0, "", None
        self.track = lambda metrics, step: None
