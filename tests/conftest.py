"""What tests of several folders are given: this process as a rank, small checkpoints, statistics of one."""

from __future__ import annotations

import os
import re
import sys
from itertools import pairwise
from pathlib import Path

# Tests are CPU processes, also where a GPU is, but for `-m gpu`. Workers inherit what the first process decides.
_wanted = " ".join(after for before, after in pairwise(sys.argv) if before == "-m")
if "PYTEST_XDIST_WORKER" not in os.environ and not re.search(r"(?<!not )\bgpu\b", _wanted):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest  # noqa: E402

pytest.register_assert_rewrite("helpers")  # before they are imported, so that their assertions show values too

# Files, and functions that need not stay with their file, and about how many seconds they take.
LONG = {
    "test_slurm.py": 260,
    "test_memory_is_what_was_estimated": 100,
    "test_pretend_runs.py": 90,
    "test_wheel.py": 80,
    "test_more_families.py": 70,
    "test_families.py": 40,
    "test_hub.py": 60,
    "test_same_bytes_on_any_number_of_ranks": 60,
    "test_every_launcher_and_repeat": 40,
    "test_memory.py": 40,
    "test_killed_at_any_instant": 35,
    "test_hostile.py": 120,
    "test_every_job_stopped_at_some_instant": 45,
    "test_peers.py": 25,
    "test_peers": 25,
    "test_report.py": 25,
    "test_accept.py": 30,
    "test_masks.py": 20,
    "test_pretend_faults.py": 20,
    "test_ranks": 20,
    "test_world.py": 20,
    "test_paper_comparison": 20,
    "test_readme.py": 20,
    "test_ends.py": 20,
    "test_terminal.py": 18,
    "test_python_api.py": 18,
    "test_calls.py": 18,
    "test_evaluate.py": 15,
    "test_one_stream_serves_every_selection": 12,
    "test_generate.py": 12,
    "test_preflight.py": 12,
    "test_tracking.py": 12,
    "test_disk_full": 12,
    "test_one_rank_is_killed": 12,
    "test_heterogeneous.py": 10,
    "test_budgets.py": 10,
    "test_pretend_device.py": 10,
    "test_study_runs_and_continues": 10,
    "test_resume.py": 10,
    "test_the_interpreted_kernel_sorts": 8,
}


def pytest_configure(config) -> None:
    """Tests that run side by side get cores of their own: threads of two jobs on one core wait for one another. The process that
    starts the workers, and waits for them, does not import torch."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import stun  # noqa: F401, I001  # first: it sets what OpenMP and MKL read
        import torch

        number, count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        cores = sorted(os.sched_getaffinity(0))
        own = cores[number::count] or cores
        os.sched_setaffinity(0, own)
        torch.set_num_threads(len(own))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config) -> int:
    """One more than cores: some tests wait for Slurm, a browser or other processes."""
    return min(len(os.sched_getaffinity(0)) + 1, 8)


def unit(nodeid: str) -> str:
    """What one worker runs as a whole: a file's tests, which share fixtures, or those of a function in LONG."""
    file, _, test = nodeid.partition("::")
    name = test.partition("[")[0]
    return name if name in LONG else Path(file).name


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """What starts several ranks, Slurm or a browser is slow; what takes longest begins first."""
    for item in items:
        if any(item.get_closest_marker(name) for name in ("ranks", "slurm", "browser")):
            item.add_marker("slow")
    items.sort(key=lambda item: -LONG.get(unit(item.nodeid), 0))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Units to workers, in this order."""
    from xdist.scheduler import LoadScopeScheduling

    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit(nodeid)

    return Units(config, log)


@pytest.fixture(scope="module")
def ranks():
    """This process as the only rank."""
    from stun.runtime.ranks import Ranks

    with Ranks() as started:
        yield started


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(family, **how)`: the folder of such a checkpoint, made once a test run."""
    from helpers.zoo import make_checkpoint

    made: dict[str, Path] = {}

    def get(family: str, **how) -> Path:
        key = f"{family} {sorted((k, str(v)) for k, v in how.items())}"
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(family) / "model", family, **how)
        return made[key]

    return get


@pytest.fixture(scope="module")
def observed(tmp_path_factory, ranks):
    """(checkpoint, run folder with its statistics)."""
    from helpers.selections import config
    from helpers.zoo import make_checkpoint
    from stun.config import ExpertsConfig, Score
    from stun.pruning.job import take_statistics

    folder = tmp_path_factory.mktemp("observed")
    source = make_checkpoint(folder / "source", "mixtral", num_local_experts=12)
    take_statistics(config(source, folder / "run", experts=ExpertsConfig(score=Score.residual)), ranks)  # with all sums
    return source, folder / "run"
