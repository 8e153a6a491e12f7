"""What a rank makes of its launcher's variables, with the answers of the other ranks and of the driver put in."""

from __future__ import annotations

import os
import re
from types import SimpleNamespace

import pytest
import torch

from stun.config import StunError
from stun.runtime import ranks
from stun.runtime.ranks import Ranks

TASK = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "5", "SLURM_PROCID": "4"}
TASK |= {"SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "3,2"}
SCRIPT = {"RANK": "4", "WORLD_SIZE": "5", "LOCAL_RANK": "1"}  # as a script for srun may set them
OWN = set(range(16))  # cores of this rank


@pytest.fixture
def started(monkeypatch):
    """`started(variables, visible, others)`: a rank whose torch sees so many GPUs, beside ranks on (node, cores)."""
    threads = torch.get_num_threads()
    for name in list(os.environ):
        if re.match(r"RANK$|WORLD_SIZE$|LOCAL_|SLURM_|MASTER_", name):
            monkeypatch.delenv(name)

    def start(variables: dict[str, str], visible: int = 0, others=()) -> Ranks:
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", os.environ | variables)
            patch.setattr(os, "sched_getaffinity", lambda _: OWN)
            patch.setattr("platform.node", lambda: "here")
            for name, value in {"is_available": visible > 0, "device_count": visible, "set_device": None}.items():
                patch.setattr(torch.cuda, name, lambda *_, value=value: value)
            everywhere = lambda boxes, own: boxes.__setitem__(slice(None), [own, *others])  # noqa: E731
            patch.setattr(ranks, "_start_deepspeed", lambda on_gpu: SimpleNamespace(all_gather_object=everywhere))
            return Ranks()

    yield start
    torch.set_num_threads(threads)


@pytest.mark.parametrize("variables", [TASK, TASK | SCRIPT], ids=["srun", "a script for srun"])
def test_a_task_of_srun_has_the_gpu_that_it_sees(started, variables):
    found = started(variables, visible=1)
    assert (found.rank, found.world, found.local_world, found.device) == (4, 5, 2, torch.device("cuda", 0))


def test_ranks_that_a_task_starts_do_not_share_its_gpu(started):
    """torchrun under srun."""
    with pytest.raises(StunError, match="8 ranks on a node with 1 visible GPU"):
        started({**TASK, "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}, visible=1)


def test_ranks_of_other_nodes_need_no_gpu_here(started):
    """... where the launcher does not say how many are here: they are counted."""
    variables = {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "3"}
    others = [("here" if number < 8 else "there", OWN) for number in range(1, 16)]
    found = started(variables, visible=8, others=others)
    assert (found.device, found.local_world) == (torch.device("cuda", 3), 8)
    with pytest.raises(StunError, match="4 ranks on a node with 3 visible GPUs"):
        started(variables, visible=3)


@pytest.mark.parametrize("tasks, node, count", [("4", 0, 4), ("4(x2),3", 1, 4), ("4(x2),3", 2, 3), ("8(x1),7", 1, 7)])
def test_tasks_of_every_node(started, tasks, node, count):
    assert started({**TASK, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node)}).local_world == count


@pytest.mark.parametrize("theirs, threads", [(OWN, 8), (set(range(16, 32)), 16)], ids=["shared", "bound"])
def test_cores_of_its_own_are_not_divided(started, theirs, threads):
    two = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    started(two, others=[("here", theirs)])
    assert torch.get_num_threads() == threads


def test_a_gpu_that_two_ranks_were_given_is_named():
    """NCCL's own words of it."""
    with pytest.raises(StunError, match="two ranks were given the same GPU"), ranks._own_gpus():
        raise torch.distributed.DistBackendError(
            "NCCL error ...\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 50"
        )
