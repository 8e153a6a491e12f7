"""The acceptance script on a pretend GPU: all of its steps work, and one that hangs or crashes ends alone."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest

from gpu.acceptance.child import run_child
from gpu.acceptance.rows import NeedsGPU, Row
from helpers.launches import launch
from helpers.paths import TESTS
from helpers.pretend.device import missing

pytestmark = pytest.mark.slow
STEPS = ("1 versions", "2 kernels", "4 bits", "6 rates", "7 layer", "3 families", "8 solvers", "5 nccl")


@pytest.fixture(scope="module")
def accepted(tmp_path_factory):
    """(findings, output)."""
    if reason := missing():
        pytest.skip(reason)
    file = tmp_path_factory.mktemp("accept") / "found.json"
    done = launch([sys.executable, str(TESTS / "gpu" / "accept.py"), "--pretend", "--json", str(file)])
    return json.loads(file.read_text()), done.stdout


def test_every_step_is_taken_in_order(accepted):
    assert tuple(accepted[0]["steps"]) == STEPS


@pytest.mark.parametrize("step", STEPS)
def test_a_step_works_and_its_findings_are_in_the_table(accepted, step):
    found, output = accepted
    outcome = found["steps"][step]
    assert outcome["status"] in ("ok", "needs a GPU") and outcome["rows"], outcome
    assert all(str(Row(**row)) in output for row in outcome["rows"])


def hangs():
    yield Row("before", 1.0)
    time.sleep(60)


def crashes():
    yield Row("before", 1.0)
    os.kill(os.getpid(), signal.SIGSEGV)


def fails():
    yield Row("before", 1.0)
    raise ValueError("of this step")


def finds_a_fault():
    yield Row("before", 1.0, "s", 2.0, "limit", is_right=False)


def needs_more():
    yield Row("before", 1.0)
    raise NeedsGPU("Triton compiles for one")


@pytest.mark.parametrize(
    "step, status, words",
    [
        (hangs, "timed out", "in hangs"),
        (crashes, "ended by signal 11", "Segmentation fault"),
        (fails, "failed", "ValueError: of this step"),
        (finds_a_fault, "failed", ""),
        (needs_more, "needs a GPU", "Triton compiles for one"),
    ],
)
def test_a_step_that_goes_wrong_ends_alone_and_leaves_what_it_found(tmp_path, step, status, words):
    outcome = run_child(step, tmp_path, 1.0)
    assert (outcome["status"], [row["name"] for row in outcome["rows"]]) == (status, ["before"]), outcome
    assert words in outcome["error"]
    assert outcome["seconds"] < 20
