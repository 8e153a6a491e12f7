"""One matrix of Arctic's width through the methods that remove weights: seconds, and errors of the outputs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from gpu.acceptance.memory import outside_tensors
from gpu.acceptance.rows import Row
from stun.config import SparsifyConfig
from stun.config import SparsifyMethod as Method
from stun.preflight.hardware import data_sheet, gpu_base, wait_for
from stun.preflight.time import IN_TF32, matrix_flop
from stun.sparsify.matrix import sparsify
from stun.sparsify.scores import output_error

_METHODS = {
    "wanda": SparsifyConfig(),
    "wanda 2:4": SparsifyConfig(pattern="2:4"),
    "SparseGPT": SparsifyConfig(method=Method.sparsegpt),
    "SparseGPT 2:4": SparsifyConfig(method=Method.sparsegpt, pattern="2:4"),
    "ALPS": SparsifyConfig(method=Method.alps),
}
_MIB = 2**20


def check(folder: Path, pretend: bool) -> Iterator[Row]:
    device = torch.device("cuda", 0)
    shape = (48, 128) if pretend else (9728, 7168)
    warm, (weight_OD, gram_DD), errors = _matrix(256, 256, device), _matrix(*shape, device), {}
    energy = _whole(weight_OD.float(), gram_DD)
    for name, config in _METHODS.items():
        sparsify(config, *warm, warm[0].numel() // 2, name)  # first calls load kernels
        wait_for(device)
        start = time.perf_counter()
        sparse_OD = sparsify(config, weight_OD, gram_DD, weight_OD.numel() // 2, name)
        wait_for(device)
        seconds, limit = time.perf_counter() - start, _limit(config, shape, device)
        yield Row(name, seconds, "s", limit or None, "limit by the data sheet")
        errors[name] = 100 * _whole(weight_OD.float() - sparse_OD.float(), gram_DD) / energy
        peer = name.replace("SparseGPT", "wanda").replace("ALPS", "wanda")
        is_right = errors[name] <= errors[peer]
        beside = {"beside": errors[peer], "about": peer} if peer != name else {}
        yield Row(f"{name}, error of the outputs", errors[name], "%", is_right=is_right, **beside)
    yield Row("GPU memory that is no tensor's", outside_tensors() / _MIB, "MiB", gpu_base(1) / _MIB, "preflight")


def _matrix(rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [O, D] and the Gram matrix [D, D] of inputs that go together, some of them large."""
    torch.manual_seed(0)
    weight_OD = (0.02 * torch.randn(rows, columns)).bfloat16().to(device)
    mixed_XD = torch.randn(columns // 8, columns).to(device) * torch.randn(columns).exp().to(device)
    inputs_TD = torch.randn(2 * columns, columns // 8).to(device) @ mixed_XD
    inputs_TD += torch.randn(2 * columns, columns).to(device)
    return weight_OD, inputs_TD.T @ inputs_TD


def _whole(change_OD: torch.Tensor, gram_DD: torch.Tensor) -> float:
    return float(output_error(change_OD, gram_DD).double().sum())


def _limit(config: SparsifyConfig, shape: tuple[int, int], device: torch.device) -> float:
    """Least seconds of the arithmetic; 0 for methods that only select."""
    card = torch.cuda.get_device_properties(device)
    _, _, tf32, float32 = data_sheet(card.name, card.total_memory)
    factors, products, _ = matrix_flop(config, *shape, 0, False)
    return factors / (1e12 * float32) + IN_TF32 * products / (1e12 * tf32)
