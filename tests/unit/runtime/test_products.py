"""Products on CPUs: right, and the same on any number of threads."""

from __future__ import annotations

import time

import pytest
import torch

from stun.runtime.determinism import Steady
from stun.runtime.matmul import linear, stretched
from stun.runtime.threads import Workers

SHAPES = [(1024, 768, 1536), (500, 2048, 1024), (1500, 4864, 768), (33, 4864, 768), (1, 64, 2000), (128, 2048, 256)]


@pytest.fixture
def on_threads():
    """Calls a function with so many threads and workers, and torch's own threads are put back."""
    before = torch.get_num_threads()

    def call(count: int, function):
        torch.set_num_threads(count)
        return function(Workers(torch.device("cpu")))

    with torch.no_grad():
        yield call
    torch.set_num_threads(before)


def test_a_worker_has_one_thread(on_threads):
    """Whatever the calling thread sets before its first operation."""

    def look(workers: Workers) -> list[int]:
        workers.map(time.sleep, [0.05] * 4)
        torch.set_num_threads(2)
        return workers.map(lambda _: torch.get_num_threads(), range(4))

    assert on_threads(2, look) == [1, 1, 1, 1]


def factors(rows: int, inner: int, columns: int, *batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    left = torch.randn(*batch, rows, inner, generator=generator).bfloat16()
    return left, torch.randn(*batch, columns, inner, generator=generator).bfloat16().mT


def check(on_threads, function, exact: torch.Tensor) -> None:
    """The same bits with 1, 2 and 3 threads, near the exact product."""

    def call(workers: Workers) -> torch.Tensor:
        with Steady(workers):
            return function()

    found = [on_threads(count, call) for count in (1, 2, 3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0].double(), exact, rtol=0.01, atol=0.01 * exact.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_matrices(on_threads, shape):
    """Shapes in which torch's own differ with the number of threads."""
    left, right = factors(*shape)
    bias = torch.randn(shape[2]).bfloat16()
    exact = left.double() @ right.double()
    check(on_threads, lambda: left @ right, exact)
    check(on_threads, lambda: torch.nn.functional.linear(left, right.mT, bias), exact + bias)


# Shapes whose bits in float32 depend on the number of threads on some CPU, although MKL is told that they must not.
FEW_ROWS = [(2, 1000, 256), (3, 4096, 33), (5, 32, 16), (8, 4096, 30), (17, 32, 33), (32, 16, 33), (600, 64, 700)]


@pytest.mark.parametrize("shape", FEW_ROWS, ids=str)
def test_products_of_float32(on_threads, shape):
    left, right = (matrix.float() for matrix in factors(*shape))
    bias = torch.randn(shape[2])
    exact = left.double() @ right.double()
    check(on_threads, lambda: left @ right, exact)
    check(on_threads, lambda: torch.nn.functional.linear(left, right.mT, bias), exact + bias)


def test_a_single_head_of_float32(on_threads):
    heads = [torch.randn(1, 1, 12, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    exact = torch.nn.functional.scaled_dot_product_attention(*(own.double() for own in heads), is_causal=True)
    check(on_threads, lambda: torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True), exact)


def test_products_of_batches(on_threads):
    left, right = factors(70, 512, 33, 19)
    added = torch.randn(70, 33).bfloat16()
    exact = left.double() @ right.double()
    check(on_threads, lambda: left @ right, exact)
    check(on_threads, lambda: torch.baddbmm(added, left, right), exact + added)


@pytest.mark.parametrize("mask", ["causal", "own", "shared"])
def test_attention(on_threads, mask):
    """Whole samples side by side are what one call gives."""
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(3, 2, 128, 16, generator=generator).bfloat16() for _ in range(3)]
    given = {"is_causal": True}
    if mask != "causal":
        given = {"attn_mask": torch.rand(3 if mask == "own" else 1, 1, 128, 128, generator=generator).bfloat16()}
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    exact = torch.nn.functional.scaled_dot_product_attention(*(own.double() for own in heads), **wide)
    check(on_threads, lambda: torch.nn.functional.scaled_dot_product_attention(*heads, **given), exact)


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 511, 512, 513, 1700])
def test_an_experts_product(rows):
    left, right = factors(rows, 256, 96)
    bias = torch.randn(96).bfloat16()
    for own in (None, bias):
        exact = left.double() @ right.double() + (0 if own is None else own.double())
        torch.testing.assert_close(linear(left, right.mT, own).double(), exact, rtol=0.02, atol=0.3)
    transposed = linear(left, right.contiguous().mT)  # a weight stored with a row for each input
    torch.testing.assert_close(transposed.double(), left.double() @ right.double(), rtol=0.02, atol=0.3)
    for start in range(0, rows, 97):  # whatever rows follow an expert's own
        count = min(7, rows - start)
        found = linear(stretched(left, start, count), right.mT)[:count]
        torch.testing.assert_close(found, linear(left[start : start + count], right.mT))
