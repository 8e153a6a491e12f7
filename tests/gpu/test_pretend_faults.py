"""Faults that a CPU does not show are caught on the pretend device."""

from __future__ import annotations

import pytest

from helpers.gpu_faults import FAULTS
from helpers.launches import run_pretend
from helpers.tensors import same_tensors

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def right(checkpoint, tmp_path_factory):
    """A run without a fault."""
    folder = tmp_path_factory.mktemp("right")
    run_pretend(["-m", "helpers.gpu_faults", checkpoint("mixtral"), folder / "run", "none"])
    return folder / "run"


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "none"])
def test_a_fault_is_caught(checkpoint, right, tmp_path, fault):
    done = run_pretend(["-m", "helpers.gpu_faults", checkpoint("mixtral"), tmp_path / "run", fault], check=False)
    if done.returncode:
        assert "Fault" in done.stderr or "not finite" in done.stderr, done.stderr
        return
    with pytest.raises(AssertionError):
        same_tensors(right / "model", tmp_path / "run" / "model")
