"""Weight updates, refits and ratios against brute force and the published formulas, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.naive import naive_mask
from helpers.select_cases import cases
from stun.config import SparsifyConfig, SparsifyMethod, StunError
from stun.runtime.matmul import _in_three
from stun.sparsify.alps import _by_cholesky, _by_eigenvectors, alps
from stun.sparsify.matrix import sparsify
from stun.sparsify.ratios import BINS, LOWEST, OCTAVE, meet, owl, score_histogram, share_above
from stun.sparsify.refit import refit
from stun.sparsify.scores import damped, output_error, unit_norm
from stun.sparsify.select import Pattern, quotas, smallest_of_matrix, smallest_of_pattern
from stun.sparsify.sparsegpt import BLOCK, _by_outer_products, sparsegpt

TWO_OF_FOUR = Pattern(2, 4)


def case(seed: int, rows: int = 6, columns: int = 16, tokens: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and the Gram matrix of correlated inputs of uneven size, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns, dtype=torch.float64) + 0.3 * torch.randn(
        columns, columns, generator=generator, dtype=torch.float64
    )
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    inputs *= 0.1 + torch.rand(columns, generator=generator, dtype=torch.float64) ** 2
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), inputs.T @ inputs


def error(weight, dense, gram) -> float:
    return float(torch.trace((dense - weight) @ gram @ (dense - weight).T))


def naive_pattern(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    groups = scores.reshape(-1, pattern.of)
    return torch.stack([naive_mask(group[None], pattern.of - pattern.keep)[0] for group in groups]).view(scores.shape)


def naive_overall(scores: torch.Tensor, total: int) -> torch.Tensor:
    """Ties to the lower column, then to the lower row."""
    rows, columns = scores.shape
    order = sorted((scores[i, j].item(), j, i) for i in range(rows) for j in range(columns))[:total]
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for _, j, i in order:
        mask[i, j] = True
    return mask


@pytest.mark.parametrize("tied", [False, True])
def test_selection_in_groups_and_overall(tied):
    scores = torch.rand(6, 24, generator=torch.Generator().manual_seed(1))
    scores = (scores * 3).floor() if tied else scores
    for pattern in (TWO_OF_FOUR, Pattern(4, 8), Pattern(1, 3)):
        mask = smallest_of_pattern(scores, pattern)
        assert torch.equal(mask, naive_pattern(scores, pattern)) and int(mask.sum()) == pattern.zeros(scores.numel())
    for total in (0, 1, 50, 143, 144):
        assert torch.equal(smallest_of_matrix(scores, total), naive_overall(scores, total))
    assert smallest_of_matrix(torch.ones(3, 4), 7)[:, 0].all(), "of equals the first columns leave, not the first rows"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "1:2", "3:7", "40:64"])
def test_patterns_are_those_of_a_stable_sort(pattern, dtype):
    """Ties, infinities, zeros of both signs and NaN, which sorts last; from transposed scores too."""
    pattern = Pattern.parse(pattern)
    for rows in cases(30, 8 * pattern.of).values():
        rows = rows.clone()
        rows[3, ::3] = math.nan
        for scores in (rows.to(dtype), rows.T.contiguous().T.to(dtype)):
            order = scores.reshape(-1, pattern.of).sort(dim=1, stable=True).indices
            expected = torch.zeros(order.shape, dtype=torch.bool)
            expected.scatter_(1, order[:, : pattern.of - pattern.keep], True)
            assert torch.equal(smallest_of_pattern(scores, pattern), expected.view(scores.shape))


def naive_sparsegpt(weight, gram, total: int, pattern: Pattern | None, width: int):
    """Optimal brain surgeon, column by column: the inverse Hessian of the columns that are left, by its definition."""
    weight, hessian, columns = weight.clone(), damped(gram), weight.shape[1]
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    done, mask = 0, torch.zeros(weight.shape, dtype=torch.bool)
    for start in range(0, columns, width):
        block = range(start, min(start + width, columns))
        upto = total * block.stop * len(weight) // weight.numel()
        scale = torch.stack([inverses[j][0, 0].sqrt() for j in block])
        if pattern is None:
            mask[:, block.start : block.stop] = naive_overall((weight[:, block.start : block.stop] / scale).square(), upto - done)
            done = upto
        for j in block:
            if pattern and j % pattern.of == 0:
                group = slice(j, j + pattern.of)
                scores = (weight[:, group] / scale[j - start : j - start + pattern.of]).square()
                mask[:, group] = naive_pattern(scores, pattern)
            step = weight[:, j].where(mask[:, j], 0) / inverses[j][0, 0]
            weight[:, j:] -= step[:, None] * inverses[j][0]
            weight[mask[:, j], j] = 0
    return weight


@pytest.mark.parametrize("pattern", [None, TWO_OF_FOUR])
@pytest.mark.parametrize("columns", [16, BLOCK + 12])
def test_sparsegpt_is_the_formula(pattern, columns):
    weight, gram = case(columns, columns=columns, tokens=3 * columns)
    total = pattern.zeros(weight.numel()) if pattern else weight.numel() * 6 // 10
    found = sparsegpt(weight, gram, total, pattern)
    torch.testing.assert_close(found, naive_sparsegpt(weight, gram, total, pattern, BLOCK))
    assert int((found == 0).sum()) == total


def naive_alps(weight, gram, total: int, pattern: Pattern | None):
    """The published loop, with a fresh inverse every time and conjugate gradients of one row at a time."""
    gram = damped(gram)
    norm = gram.diagonal().sqrt()
    gram, dense = gram / torch.outer(norm, norm), weight * norm
    eye = torch.eye(len(gram), dtype=gram.dtype)

    def project(value):
        scores = value.square()
        return value.masked_fill(naive_pattern(scores, pattern) if pattern else naive_overall(scores, total), 0)

    stay, rho, moved = weight.numel() - total, 0.1, False
    start = project(dense)
    sparse, dual, before = start, torch.zeros_like(dense), start == 0
    for number in range(1, 301):
        value = torch.linalg.solve(gram + rho * eye, (dense @ gram - dual + rho * sparse).T).T
        sparse = project(value + dual / rho)
        dual = dual + rho * (value - sparse)
        if number % 3 == 0:
            changed = int(((sparse == 0) ^ before).sum())
            before = sparse == 0
            if changed / stay > 0.1:
                rho, moved = 1.3 * rho, True
            elif changed / stay > 0.005:
                rho, moved = 1.2 * rho, True
            elif changed > 0.5 and moved:
                rho = 1.1 * rho
            elif changed > 0.5:
                rho, sparse, dual = rho / 5, start, torch.zeros_like(dense)
            elif moved:
                break
            else:
                rho = rho / 5
            if number >= 30 and changed / stay < 0.0003:
                break
    return (
        torch.stack([naive_gradients(row, gram, gram @ wanted, 10) for row, wanted in zip(project(value), dense, strict=True)])
        / norm
    )


def naive_gradients(row, gram, target, steps: int):
    """Conjugate gradients with the diagonal as preconditioner, on the system of the kept columns alone."""
    kept = row.nonzero().flatten()
    matrix, value = gram[kept][:, kept], row[kept].clone()
    residual = target[kept] - matrix @ value
    scaled = residual / matrix.diagonal()
    step = scaled.clone()
    for _ in range(steps):
        length = (residual @ scaled) / (step @ matrix @ step)
        value += length * step
        after = residual - length * (matrix @ step)
        next_scaled = after / matrix.diagonal()
        step = next_scaled + (after @ next_scaled) / (residual @ scaled) * step
        residual, scaled = after, next_scaled
    out = row.clone()
    out[kept] = value
    return out


@pytest.mark.parametrize("pattern", [None, TWO_OF_FOUR])
@pytest.mark.parametrize("seed", range(3))
def test_alps_is_the_formula(pattern, seed):
    weight, gram = case(seed, rows=5, columns=24, tokens=90)
    total = pattern.zeros(weight.numel()) if pattern else weight.numel() * 65 // 100
    found = alps(weight, gram, total, pattern)
    torch.testing.assert_close(found, naive_alps(weight, gram, total, pattern), rtol=1e-6, atol=1e-9)
    assert int((found == 0).sum()) == total


def test_refit_is_least_squares():
    weight, gram = case(5, rows=4, columns=12, tokens=400)
    start = weight.masked_fill(smallest_of_pattern(weight.abs(), TWO_OF_FOUR), 0)
    outputs = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) @ gram
    for cross in (None, outputs):
        found = refit(start, weight, gram, cross, steps=200)
        for row, own in enumerate(found):
            kept = start[row].nonzero().flatten()
            full = damped(gram)
            wanted = (weight[row] @ gram if cross is None else cross[row]) + weight[row] @ (full - gram)
            torch.testing.assert_close(own[kept], torch.linalg.solve(full[kept][:, kept], wanted[kept]))
        assert torch.equal(found == 0, start == 0)


METHODS = list(SparsifyMethod)


@pytest.mark.parametrize("seed", range(50))
def test_never_worse_than_wanda(seed):
    """SparseGPT and ALPS against Wanda on the same inputs; refits after each of them, in bfloat16 too."""
    generator = torch.Generator().manual_seed(1000 + seed)
    rows, columns = (int(n) for n in torch.randint(2, 14, (2,), generator=generator) * 4)
    weight, gram = case(seed, rows, columns, tokens=int(torch.randint(4, 300, (1,), generator=generator)))
    dtype = torch.bfloat16 if seed % 2 else torch.float64
    weight = weight.to(dtype)
    pattern = "" if seed % 3 else "2:4"
    share = float(torch.rand(1, generator=generator)) * 0.8 + 0.1
    total = TWO_OF_FOUR.zeros(weight.numel()) if pattern else int(weight.numel() * share)

    def run(method, **more) -> float:
        how = SparsifyConfig(method=method, pattern=pattern, gram_gib=1, **more)
        moment = gram if how.reads_grams else gram.diagonal()
        found = sparsify(how, weight, moment, total, "matrix")
        assert found.dtype == dtype and int((found == 0).sum()) >= total
        return error(found.double(), weight.double(), gram)

    wanda = run(SparsifyMethod.wanda)
    for method in METHODS:
        plain = run(method)
        assert plain <= wanda * (1 + 1e-12) or method not in (SparsifyMethod.sparsegpt, SparsifyMethod.alps)
        assert run(method, reconstruct=True) <= plain * (1 + 1e-12), method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["", "2:4"])
def test_degenerate_inputs(method, pattern):
    """No inputs at all, dead and equal columns, constant rows: the count is exact and nothing is NaN; NaN itself is refused."""
    weight, gram = case(0, 6, 16)
    dead = gram.clone()
    dead[:, :8] = dead[:8] = 0
    constant = torch.ones(16, 16, dtype=torch.float64)
    for weights in (weight, torch.ones_like(weight)):
        for moment in (torch.zeros_like(gram), dead, constant, gram.diagonal().diag()):
            how = SparsifyConfig(method=method, pattern=pattern, reconstruct=True)
            found = sparsify(how, weights, moment, 48, "matrix")
            assert torch.isfinite(found).all() and int((found == 0).sum()) == 48
            assert method is SparsifyMethod.alps or method is SparsifyMethod.sparsegpt or (found == 0).sum(1).eq(8).all()
    weight[1, 2] = math.nan
    with pytest.raises(StunError, match=r"matrix.*\[1, 2\]"):
        sparsify(SparsifyConfig(method=method, pattern=pattern), weight, gram, 48, "matrix")


def test_tiny_inputs():
    """Gram matrices far from 1 in size, and columns far from each other."""
    weight, gram = case(4, 16, 32, tokens=8)
    uneven = gram.clone()
    uneven[3] *= 1e-22
    uneven[:, 3] *= 1e-22
    for method in (SparsifyMethod.sparsegpt, SparsifyMethod.alps):
        for moment in (gram * 1e-40, uneven, gram * 1e30):
            found = sparsify(SparsifyConfig(method=method, reconstruct=True), weight.float(), moment.float(), 256, "m")
            assert torch.isfinite(found).all() and int((found == 0).sum()) == 256


def test_histogram_counts_outliers():
    scores = torch.rand(40, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    counts, total = score_histogram(scores)
    assert int(counts.sum()) == 2000 and total == pytest.approx(float(scores.sum()))
    for edge in (2.0 ** (LOWEST + k / OCTAVE) for k in (250, 280, 310)):
        assert share_above(counts, edge) == pytest.approx(float((scores >= edge).double().mean()))
    for threshold in (0.01, 0.1, 0.5):
        low, high = (float((scores > threshold * f).double().mean()) for f in (2 ** (1 / OCTAVE), 2 ** (-1 / OCTAVE)))
        assert low <= share_above(counts, threshold) <= high
    assert share_above(counts, 0.0) == 1 and share_above(counts, 2.0**40) == 0
    zeros, nothing = score_histogram(torch.zeros(2, 3))
    assert nothing == 0 and int(zeros[0]) == 6 and len(zeros) == BINS


def test_owl_is_the_formula():
    outliers, sizes, ratio, spread = [0.01, 0.04, 0.02], [100, 300, 200], 0.5, 0.08
    found = owl(outliers, sizes, ratio, spread)
    stretched = [0, 0.16, 0.16 / 3]
    mean = sum(s * n for s, n in zip(stretched, sizes, strict=True)) / 600
    assert found == pytest.approx([ratio - s + mean for s in stretched])
    assert sum(r * n for r, n in zip(found, sizes, strict=True)) == pytest.approx(ratio * 600)
    assert max(found) - min(found) == pytest.approx(2 * spread)
    assert owl([0.02] * 3, sizes, 0.3, 0.08) == [0.3] * 3
    assert owl([0.5, *outliers], [0, *sizes], ratio, spread)[1:] == pytest.approx(found), "a part without weights has no say"
    cut = owl([0.0, 1.0], [10, 1000], 0.97, 0.5)
    assert all(0 <= r <= 1 for r in cut) and cut[0] * 10 + cut[1] * 1000 == pytest.approx(0.97 * 1010)


@pytest.mark.parametrize("seed", range(20))
def test_ratios_meet_any_total(seed):
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 12, (1,), generator=generator))
    sizes = torch.randint(1, 5000, (count,), generator=generator).tolist()
    ratios = torch.rand(count, generator=generator).tolist()
    total = int(sum(sizes) * float(torch.rand(1, generator=generator)))
    met = meet(ratios, sizes, total)
    assert sum(r * n for r, n in zip(met, sizes, strict=True)) == pytest.approx(total, abs=1e-6 * sum(sizes))
    shift = {round(new - old, 9) for new, old in zip(met, ratios, strict=True) if 0 < new < 1}
    assert len(shift) <= 1
    for wanted in (0, total, sum(sizes)):
        shares = quotas(sizes, wanted, meet(ratios, sizes, wanted))
        assert sum(shares) == wanted and all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
        assert all(abs(s - r * n) < 2 for s, r, n in zip(shares, meet(ratios, sizes, wanted), sizes, strict=True))


def test_output_error_is_the_trace():
    weight, gram = case(1)
    assert float(output_error(weight, gram).sum()) == pytest.approx(error(weight, torch.zeros_like(weight), gram))


def test_cholesky_is_eigenvectors():
    """The inverses of ALPS' rounds on a GPU and on a CPU, in float32."""
    for seed, rho in itertools.product(range(5), (1e-3, 0.1, 3.0, 200.0)):
        _, gram = case(seed, columns=64, tokens=40)
        scaled, _ = unit_norm(gram.float())
        one, other = (inverse(scaled)(rho) for inverse in (_by_cholesky, _by_eigenvectors))
        exact = torch.linalg.inv(scaled.double() + rho * torch.eye(64))
        for found in (one, other):
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4 * float(exact.abs().max()))


class Tf32(TorchDispatchMode):
    """Products as tensor cores make them, of 10 bits of fraction."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            *added, left, right = arguments
            arguments = (*added, *map(self._rounded, (left, right)))
        return function(*arguments, **(keywords or {}))

    @staticmethod
    def _rounded(matrix: torch.Tensor) -> torch.Tensor:
        return ((matrix.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_three_products_in_tf32_are_exact():
    left, right = torch.randn(40, 300), torch.randn(300, 50)
    exact = left.double() @ right.double()
    with Tf32():
        plain, three = left @ right, _in_three(left, right)
    errors = [float((found - exact).abs().max() / exact.abs().max()) for found in (plain, three, left @ right)]
    assert errors[1] < 2 * errors[2] + 1e-6 and errors[0] > 20 * errors[1]


@pytest.mark.parametrize("pattern", [None, TWO_OF_FOUR])
def test_what_a_gpu_computes_is_as_good(monkeypatch, pattern):
    """SparseGPT, ALPS and refits by a GPU's ways, TF32 as tensor cores have it, beside a CPU's: outputs as near."""
    errors = {"cpu": [], "gpu": []}
    for seed in range(6):
        weight, gram = (tensor.float() for tensor in case(seed, rows=32, columns=64, tokens=200))
        total = pattern.zeros(weight.numel()) if pattern else weight.numel() * 6 // 10
        for kind, found in errors.items():
            with monkeypatch.context() as patched:
                if kind == "gpu":
                    as_on_a_gpu(patched)
                pruned = [solve(weight, gram, total, pattern) for solve in (sparsegpt, alps)]
                pruned.append(refit(weight.masked_fill(pruned[0] == 0, 0), weight, gram))
            assert all(int((own == 0).sum()) == total for own in pruned)
            found.append([error(own.double(), weight.double(), gram.double()) for own in pruned])
    for cpu, gpu in zip(*(zip(*found, strict=True) for found in errors.values()), strict=True):
        assert sum(gpu) < 1.01 * sum(cpu), (cpu, gpu)


def as_on_a_gpu(patched: pytest.MonkeyPatch) -> None:
    """The ways of GPUs in the place of those of CPUs."""

    patched.setattr("stun.sparsify.alps._by_eigenvectors", _by_cholesky)
    for module in ("alps", "refit", "scores"):
        patched.setattr(f"stun.sparsify.{module}.product", _in_three)
    patched.setattr("stun.sparsify.sparsegpt._column_by_column", _by_outer_products)
    patched.setattr("stun.runtime.matmul.tf32", Tf32)
