"""Selection of the smallest against sorting. Triton's interpreter runs the kernel where there is no GPU, in its own process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from helpers.paths import TESTS
from helpers.select_cases import cases, naive_mask
from stun.sparsify import select_kernel
from stun.sparsify.select_kernel import smallest_overall, smallest_per_row_gpu

INTERPRETED = """
import sys, types
sys.modules["stun"] = types.ModuleType("stun")  # the package without its __init__, whose imports take seconds
sys.modules["stun"].__path__ = ["../stun"]
from helpers.select_cases import check_interpreted
for case in sys.argv[1:]:
    dtype, columns, held = case.split()
    check_interpreted(dtype, int(columns), int(held))
"""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.slow
@needs_triton
def test_the_interpreted_kernel_sorts():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    sizes = ("40 32", "701 32", "2200 2")  # columns, tiles that are held
    command = [sys.executable, "-c", INTERPRETED, *(f"{dtype} {size}" for dtype in ("float32", "bfloat16") for size in sizes)]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_it_sorts(monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC\nMore lines.")

    monkeypatch.setattr(select_kernel, "_by_kernel", no_compiler)
    select_kernel.cannot_compile.cache_clear()
    try:
        assert "Failed to find C compiler" in select_kernel.cannot_compile(torch.device("cpu"))
        for dtype in (torch.float32, torch.bfloat16):
            scores = torch.cat(list(cases(2, 701).values())).to(dtype)
            counts = ([0, 1, 233, 351, 700, 701, 140] * 3)[: len(scores)]
            assert torch.equal(smallest_per_row_gpu(scores, torch.tensor(counts)), naive_mask(scores, counts))
    finally:
        select_kernel.cannot_compile.cache_clear()


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
