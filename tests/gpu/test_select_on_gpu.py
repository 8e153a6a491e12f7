"""Selection of the smallest on a GPU is sorting."""

from __future__ import annotations

import pytest
import torch

from helpers.select_cases import cases
from stun.sparsify.select_kernel import _by_sort, cannot_compile, smallest_overall, smallest_per_row_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [4864, 7168, 5001, 40000])
def test_the_kernel_sorts_on_a_gpu(dtype, columns):
    generator = torch.Generator().manual_seed(0)
    for name, scores in cases(300, columns).items():
        scores = scores.to("cuda", dtype)
        count_O = torch.randint(0, columns + 1, (300,), generator=generator).cuda()
        count_O[0], count_O[1] = 0, columns
        assert torch.equal(smallest_per_row_gpu(scores, count_O), _by_sort(scores, count_O)), name
    assert not cannot_compile(scores.device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_smallest_overall_is_the_same_on_a_gpu(dtype):
    for name, scores in cases(100, 2000).items():
        scores = scores.to(dtype)
        assert torch.equal(smallest_overall(scores.cuda(), 70_001).cpu(), smallest_overall(scores, 70_001)), name
