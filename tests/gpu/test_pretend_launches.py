"""How ranks find their GPU, on pretend ones."""

from __future__ import annotations

import json

import pytest

from helpers.launches import run_pretend, settings

pytestmark = pytest.mark.ranks
SHOW = """
import json, os, sys
from helpers.pretend.records import CHOSEN, CONTEXTS
from stun.runtime.ranks import Ranks
import torch
with Ranks() as ranks:
    ranks.sum_integers(torch.ones(2, dtype=torch.int64, device=ranks.device))
    found = {"device": str(ranks.device), "contexts": sorted(CONTEXTS), **CHOSEN, "first": ranks.is_first_of_node}
    found["cores"] = len(os.sched_getaffinity(0))
    with open(os.path.join(sys.argv[1], f"{ranks.rank}.json"), "w") as file:
        json.dump(found, file)
"""
# As srun starts the second task: a shim, since forks are given torchrun's variables.
SRUN = """
import os
for key, value in {"SLURM_PROCID": os.environ["RANK"], "SLURM_LOCALID": os.environ["RANK"], "SLURM_NTASKS": "2"}.items():
    os.environ[key] = value
os.environ |= {"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "1"}
os.environ |= {"SLURM_NODEID": "0"}
for key in DELETED:
    del os.environ[key]
"""
UNSAID = ["LOCAL_WORLD_SIZE"]  # by scripts that set torchrun's variables themselves
# A rank of two, each alone on its node.
NODES = """
import os
del os.environ["LOCAL_WORLD_SIZE"]
os.environ["LOCAL_RANK"] = "0"
"""


def shown(folder) -> list[dict]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_two_ranks_share_the_cores_and_print_no_warnings(tmp_path):
    (tmp_path / "show.py").write_text(SHOW)
    done = run_pretend([tmp_path / "show.py", tmp_path], 2, gpus=2)
    found = shown(tmp_path)
    assert [entry["device"] for entry in found] == ["cuda:0", "cuda:1"] and [entry["contexts"] for entry in found] == [[0], [1]]
    assert [entry["threads"] for entry in found] == [max(1, entry["cores"] // 2) for entry in found]
    assert "compatibility check failed" not in done.stdout + done.stderr


@pytest.mark.parametrize("deleted", [["RANK", "LOCAL_RANK", "WORLD_SIZE", *UNSAID], UNSAID], ids=["srun", "a script for srun"])
def test_slurm_gives_every_task_a_gpu_of_its_own(tmp_path, deleted):
    (tmp_path / "show.py").write_text(f"DELETED = {deleted}\n{SRUN}{SHOW}")
    run_pretend([tmp_path / "show.py", tmp_path], 2, gpus=1)
    found = shown(tmp_path)
    assert [(entry["device"], entry["bound"], entry["first"]) for entry in found] == [("cuda:0", 0, True), ("cuda:0", 0, False)]


def test_ranks_of_other_nodes_need_no_gpu_here(tmp_path):
    (tmp_path / "show.py").write_text(NODES + SHOW)
    run_pretend([tmp_path / "show.py", tmp_path], 2, gpus=1)
    assert [(entry["device"], entry["first"]) for entry in shown(tmp_path)] == [("cuda:0", True)] * 2


def test_more_ranks_than_gpus_are_refused(checkpoint, tmp_path):
    done = run_pretend(["-m", "jobs.prune", *settings(checkpoint("mixtral"), tmp_path / "run")], 2, check=False)
    assert done.returncode == 2 and "2 ranks on a node with 1 visible GPU:" in done.stderr and "Traceback" not in done.stderr


def test_a_gpu_machine_computes_on_the_cpu_where_it_is_told_to(checkpoint, tmp_path):
    done = run_pretend(["-m", "jobs.prune", *settings(checkpoint("mixtral"), tmp_path / "run", device="cpu")])
    assert "1 rank on cpu" in done.stdout
