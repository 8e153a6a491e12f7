"""Figures of a peer's run, printed as one JSON line, the last on stdout: seconds by phase, peak memory, and the sparsity of the
tensors that it saved."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.")


class Phases:
    """`seconds[name]` is the time inside `phase(name)`, `device` the first GPU or the CPU, `peak_bytes` the peak up to the end of
    the last phase: allocated memory of a GPU, or else resident memory of this process."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.peak_bytes = 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context timed as phase `name`; waits for a GPU at its start and end."""
        start = self._now()
        yield
        self.seconds[name] = self._now() - start
        self.peak_bytes = self._peak()

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    def report(self, **extra) -> None:
        """Print seconds, peak memory and further figures."""
        figures = {"seconds": self.seconds, "peak_bytes": self.peak_bytes, "device": self.device.type}
        print(json.dumps({**figures, **extra}), flush=True)


def count(folder: Path) -> dict:
    """Parameters and zeros in the decoder layers of a checkpoint in the hub's layout, and experts by layer that has any."""
    parameters, zeros, experts = 0, 0, {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in filter(_LAYER.match, tensors.keys()):
                tensor = tensors.get_tensor(name)
                parameters += tensor.numel()
                zeros += tensor.numel() - int(tensor.count_nonzero())
                match = _EXPERT.match(name)
                if match:
                    experts.setdefault(int(match[1]), set()).add(int(match[2]))
    return {"parameters": parameters, "zeros": zeros, "experts": [len(experts[layer]) for layer in sorted(experts)]}


def removed(source: Path, pruned: Path) -> dict:
    """`sparsity`, 1 - nonzero after / parameters before in the decoder layers, and `experts` kept by layer that has any."""
    before, after = count(source), count(pruned)
    sparsity = 1 - (after["parameters"] - after["zeros"]) / before["parameters"]
    return {"sparsity": sparsity, "zeros": after["zeros"], "experts": after["experts"]}
