"""Reading and writing of tensors beside bare loops of system calls in as many threads, and beside dd.

What is read is in the system's cache, as far as it has room; what is written is on the disk at the end.
"""

import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import torch

from stun.benchmark.checkpoints import qwen3_moe, write_checkpoint
from stun.benchmark.config import BenchmarkConfig
from stun.checkpoint.codecs.grids import GRIDS
from stun.checkpoint.headers import read_header
from stun.checkpoint.reader import SINGLE, Checkpoint
from stun.checkpoint.writer import write_tensors
from stun.files import write_json
from stun.preflight.hardware import best
from stun.runtime.device_copies import PIECE, Memory, memory_to_read_into
from stun.runtime.ranks import Ranks


def benchmark_io(cfg: BenchmarkConfig, folder: Path, ranks: Ranks) -> dict:
    """Bytes/s of reading a file with the tensors of `cfg.shape` to this rank's device, and of writing it from there, with every
    number of `cfg.threads`, each with its ratio to a bare loop; those of dd, in blocks of PIECE bytes; quantised forms beside
    bfloat16."""
    write_checkpoint(folder / "source", qwen3_moe(cfg.shape), torch.device("cpu"))
    whole, memory = Checkpoint.open(folder / "source"), memory_to_read_into(ranks.device)
    file, copy = folder / "model.safetensors", folder / "copy.safetensors"
    write_tensors(file, {name: whole.read(name) for name in whole.tensors})
    source, host_N = Checkpoint(folder, {}, read_header(file)), torch.ones(file.stat().st_size, dtype=torch.uint8)
    tensors, rows = _read(source, memory, 1), {}

    def rate(work: Callable[[], object]) -> float:
        return len(host_N) / best(work, ranks.device)

    for threads in cfg.threads:
        ranks.log(f"io: {threads}")
        read, bare_read = rate(lambda n=threads: _read(source, memory, n)), rate(lambda n=threads: _pread(file, host_N, n))
        write = rate(lambda n=threads: write_tensors(copy, tensors, threads=n))
        hashed = rate(lambda n=threads: write_tensors(copy, tensors, is_hashed=True, threads=n))
        bare_write = rate(lambda n=threads: _pwrite(copy, host_N, n))
        pairs = {"read": (read, bare_read), "write": (write, bare_write), "write with its checksum": (hashed, bare_write)}
        rows[str(threads)] = {name: {"rate": own, "bare": bare, "ratio": own / bare} for name, (own, bare) in pairs.items()}
    dd = {"read": rate(lambda: _dd(file, Path(os.devnull))), "write": rate(lambda: _dd(file, copy, "conv=fsync"))}
    return {"bytes": len(host_N), "runs": rows, "dd": dd, "forms": _forms(whole, memory, folder, max(cfg.threads), ranks)}


def _forms(whole: Checkpoint, memory: Memory, folder: Path, threads: int, ranks: Ranks) -> dict[str, dict[str, float]]:
    """Seconds of reading and dequantising some matrices from every form that they can be rounded to, with those of reading the
    same from bfloat16 and the ratio of both."""
    weights = {name: whole.read(name) for name in sorted(whole.tensors) if name.endswith("proj.weight")}
    names = [name for name, total in zip(weights, accumulate(map(torch.numel, weights.values())), strict=True) if total <= 2**26]
    weights = {name: weights[name] for name in names}

    def seconds(tensors: dict[str, torch.Tensor], settings: dict) -> float:
        own = folder / "form"
        own.mkdir(exist_ok=True)
        write_tensors(own / SINGLE, tensors)
        write_json(own / "config.json", {"quantization_config": settings})
        source = Checkpoint.open(own)
        return best(lambda: _read(source, memory, threads), ranks.device)

    found, plain = {}, seconds(weights, {})
    for form, grid in GRIDS.items():
        if not all(grid.holds(weight_OD.shape) for weight_OD in weights.values()):
            continue
        ranks.log(f"io: {form}")
        rounded = {name: grid.parts(weight_OD, weight_OD.abs().amax()) for name, weight_OD in weights.items()}
        ends = [(name, role, name.removesuffix("weight") + end) for name in rounded for role, end in grid.ends.items()]
        taken = seconds({stored: rounded[name][role] for name, role, stored in ends}, grid.settings([]))
        found[form] = {"seconds": taken, "bfloat16": plain, "ratio": taken / plain}
    return found


def _read(source: Checkpoint, memory: Memory, threads: int) -> dict[str, torch.Tensor]:
    """All tensors; those that are dropped leave their pages to the next reading."""
    with source.reading(memory, threads) as read:
        return {name: read(name) for name in source.tensors}


def _pread(file: Path, target_N: torch.Tensor, threads: int) -> None:
    """Read a file into memory that is in use already."""
    with file.open("rb", buffering=0) as handle:
        _in_pieces(os.preadv, handle.fileno(), target_N, threads)


def _pwrite(file: Path, content_N: torch.Tensor, threads: int) -> None:
    """Write a new file, and sync it."""
    file.unlink(missing_ok=True)
    with file.open("wb", buffering=0) as handle:
        _in_pieces(os.pwritev, handle.fileno(), content_N, threads)
        os.fsync(handle.fileno())


def _in_pieces(call: Callable, file: int, content_N: torch.Tensor, threads: int) -> None:
    """Read or write all pieces by os.preadv or os.pwritev."""
    view = memoryview(content_N.numpy())

    def piece(start: int) -> None:
        end = min(len(view), start + PIECE)
        while start < end:
            start += call(file, [view[start:end]], start)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(piece, range(0, len(view), PIECE)))


def _dd(source: Path, target: Path, *options: str) -> None:
    subprocess.run(["dd", f"if={source}", f"of={target}", f"bs={PIECE}", *options], check=True, capture_output=True)
