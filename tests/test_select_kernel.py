"""Selection of the smallest against sorting. Triton's interpreter runs the kernel where there is no GPU, in its own process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stun.sparsify import select_kernel
from stun.sparsify.select_kernel import smallest_overall, smallest_per_row_gpu

TESTS = Path(__file__).resolve().parent
INTERPRETED = """
import sys, types
sys.modules["stun"] = types.ModuleType("stun")  # the package without its __init__, whose imports take seconds
sys.modules["stun"].__path__ = ["../stun"]
from test_select_kernel import check_interpreted
check_interpreted(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
"""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def naive_mask(scores: torch.Tensor, counts: list[int]) -> torch.Tensor:
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row, values in enumerate(scores.tolist()):
        mask[row, sorted(range(len(values)), key=lambda column: (values[column], column))[: counts[row]]] = True
    return mask


def sorted_mask(scores: torch.Tensor, count_O: torch.Tensor) -> torch.Tensor:
    order = scores.sort(dim=1, stable=True).indices
    leaves = torch.arange(scores.shape[1], device=scores.device) < count_O[:, None]
    return torch.zeros_like(leaves).scatter_(1, order, leaves)


def cases(rows: int, columns: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(columns)
    uniform = torch.rand(rows, columns, generator=generator)
    normal = torch.randn(rows, columns, generator=generator).abs()
    return {
        "random": uniform,
        "wide": normal * (10 * torch.randn(columns, generator=generator)).exp(),
        "rising": uniform * torch.logspace(-30, 30, columns),
        "tied": (uniform * 4).floor(),
        "mostly zero": (uniform - 0.7).clamp(min=0),
        "negative zero": torch.where(normal < 1, -0.0, (uniform * 3).floor()),
        "infinite": torch.where(normal < 1, float("inf"), uniform),
        "constant": torch.full((rows, columns), 0.37),
        "zero": torch.zeros(rows, columns),
    }


def check_interpreted(dtype: str, columns: int, held: int) -> None:
    """Two rows of every case, with another count each, in one call."""
    select_kernel.HELD = held
    scores = torch.cat(list(cases(2, columns).values())).to(getattr(torch, dtype))
    counts = [0, 1, columns // 3, columns // 2 + 1, columns - 1, columns, columns // 5] * 3
    mask = smallest_per_row_gpu(scores, torch.tensor(counts[: len(scores)]))
    wrong = (mask != naive_mask(scores, counts)).any(dim=1).nonzero().flatten().tolist()
    assert not wrong, f"rows {wrong} of {list(cases(2, columns))}, two each"


@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("columns, held", [(40, 32), (701, 32), (2200, 2)])
def test_the_interpreted_kernel_sorts(dtype, columns, held):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRETED, dtype, str(columns), str(held)]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@needs_triton
@pytest.mark.parametrize("words, ones, bits", [(3584, 0x10001, 15), (4864, 1, 31)])
def test_the_kernel_compiles_for_hopper(words, ones, bits):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"WORDS": words, "SPAN": select_kernel.SPAN, "HELD": select_kernel.HELD, "ONES": ones, "BITS": bits}
    types = {"scores_ptr": "*i32", "count_ptr": "*i64", "mask_ptr": "*i16" if bits == 15 else "*i8"}
    source = ASTSource(select_kernel.kernel(), {**types, **dict.fromkeys(constants, "constexpr")}, constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["cubin"]


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [4864, 7168, 5001, 40000])
def test_the_kernel_sorts_on_a_gpu(dtype, columns):
    generator = torch.Generator().manual_seed(0)
    for name, scores in cases(300, columns).items():
        scores = scores.to("cuda", dtype)
        count_O = torch.randint(0, columns + 1, (300,), generator=generator).cuda()
        count_O[0], count_O[1] = 0, columns
        assert torch.equal(smallest_per_row_gpu(scores, count_O), sorted_mask(scores, count_O)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 17, 250, 7 * 60 - 1, 7 * 60])
def test_smallest_overall_is_sorting(dtype, count):
    for name, scores in cases(7, 60).items():
        scores = scores.to(dtype)
        expected = naive_mask(scores.view(1, -1), [count]).view(scores.shape)
        assert torch.equal(smallest_overall(scores, count), expected), name


def test_smallest_overall_takes_any_layout():
    scores = (torch.rand(5, 6, 7, generator=torch.Generator().manual_seed(0)) * 8).floor().transpose(0, 2)
    expected = naive_mask(scores.reshape(1, -1), [100]).view(scores.shape)
    assert torch.equal(smallest_overall(scores, 100), expected)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_smallest_overall_is_the_same_on_a_gpu(dtype):
    for name, scores in cases(100, 2000).items():
        scores = scores.to(dtype)
        assert torch.equal(smallest_overall(scores.cuda(), 70_001).cpu(), smallest_overall(scores, 70_001)), name
