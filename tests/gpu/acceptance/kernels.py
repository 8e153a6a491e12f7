"""Tests marked gpu: the selection kernel and copies; the kernel once more under CUDA's memory checker."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from gpu.acceptance.rows import Row

_OPTIONS = ["-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider", "-q"]
_PRETEND = ["tests/gpu/test_transfer_on_gpu.py", "-k", "there_and_back"]  # others want Triton, or minutes of a processor
_LIMIT = 45  # seconds of the memory checker
_CHECKED = """
import torch
from stun.sparsify.select_kernel import cannot_compile, smallest_per_row_gpu
scores = torch.randn(64, 7168, device="cuda").abs()
counts = torch.arange(64, device="cuda") * 100
assert not cannot_compile(scores.device), cannot_compile(scores.device)
assert smallest_per_row_gpu(scores, counts).sum(1).tolist() == counts.tolist()
"""


def check(folder: Path, pretend: bool) -> Iterator[Row]:
    if find_spec("pytest") is None:
        yield Row("tests", "pytest is not installed")
    else:
        yield _tests([*_PRETEND] if pretend else ["tests/gpu"], folder)
    if pretend:
        yield Row("selection kernel", "needs a GPU")
        return
    yield _memory_checked()


def _tests(which: list[str], folder: Path) -> Row:
    import pytest

    outcomes: Counter[str] = Counter()

    class Outcomes:
        def pytest_runtest_logreport(self, report):
            if report.when == "call" or report.outcome != "passed":
                outcomes[report.outcome] += 1

    sys.argv = ["pytest", "-m", "gpu"]  # conftest.py looks here
    pytest.main([*_OPTIONS, "-m", "gpu", f"--basetemp={folder / 'pytest'}", *which], plugins=[Outcomes()])
    only_passed = outcomes["passed"] > 0 and outcomes.total() == outcomes["passed"]
    found = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items()) or "none were found"
    return Row("tests", found, is_right=only_passed)


def _memory_checked() -> Row:
    program = shutil.which("compute-sanitizer")
    if not program:
        return Row("compute-sanitizer", "not installed")
    command = [program, "--error-exitcode", "9", "--report-api-errors", "no", sys.executable, "-c", _CHECKED]
    try:
        done = subprocess.run(command, timeout=_LIMIT, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return Row("compute-sanitizer", f"not finished after {_LIMIT} s")
    if done.returncode:
        print(done.stdout, done.stderr)
    return Row("compute-sanitizer", f"status {done.returncode}", is_right=done.returncode == 0)
