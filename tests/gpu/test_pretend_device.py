"""The pretend device refuses what CUDA and NCCL refuse, and shows what they would."""

from __future__ import annotations

import threading

import pytest

from helpers.launches import run_pretend
from helpers.pretend import streams

pytestmark = pytest.mark.slow

# What is run, and the words of the Fault; "" if there is none.
CASES = {
    "several devices": ("torch.ones(3, device='cuda') + torch.ones(3)", "same device"),
    "a number of the host": ("torch.ones(3, device='cuda') * torch.tensor(2.0)", ""),
    "several GPUs": ("torch.ones(3, device='cuda:0') + torch.ones(3, device='cuda:1')", "several GPUs"),
    "numpy": ("torch.ones(3, device='cuda').numpy()", "numpy"),
    "sums in no fixed order": ("torch.zeros(3, device='cuda').index_add_(0, *pair('cuda'))", "no fixed order"),
    "integers in no fixed order": ("torch.zeros(3, device='cuda').long().index_add_(0, pair('cuda')[0], pair('cuda')[0])", ""),
    "a GPU that is not there": ("torch.cuda.set_device(2)", "invalid device ordinal"),
    "a pinned copy, read too early": ("assert pinned().isnan().all(); torch.cuda.synchronize()", ""),
    "a pinned copy, read in time": ("host = pinned(); torch.cuda.synchronize(); assert (host == 1).all()", ""),
    "new memory": ("assert torch.empty(3, device='cuda').isnan().all()", ""),
}
PROGRAM = """
import sys, torch
from helpers.pretend.records import Fault
def pair(device):
    return torch.tensor([0, 0, 1], device=device), torch.ones(3, device=device)
def pinned():
    host = torch.full((3,), torch.nan).pin_memory()
    return host.copy_(torch.ones(3, device="cuda"), non_blocking=True)
for number, case in enumerate(CASES):
    try:
        exec(case)
        print(number, "none")
    except Fault as fault:
        print(number, fault)
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    file = tmp_path_factory.mktemp("cases") / "cases.py"
    file.write_text(f"CASES = {[code for code, _ in CASES.values()]}\n{PROGRAM}")
    lines = run_pretend([file], gpus=2).stdout.splitlines()
    return dict(zip(CASES, lines, strict=True))


def test_an_event_is_not_over_while_its_copy_runs():
    stream, event, runs, may_end = streams.Stream("cuda:0"), streams.Event(), threading.Event(), threading.Event()
    stream.queue.append(lambda: (runs.set(), may_end.wait(20)))
    event.record(stream)
    thread = threading.Thread(target=stream.synchronize)
    thread.start()
    runs.wait(20)
    was_over = event.query()
    may_end.set()
    thread.join()
    assert not was_over and event.query()


@pytest.mark.parametrize("case", CASES)
def test_the_pretend_device_refuses_what_cuda_refuses(faults, case):
    words = CASES[case][1]
    assert (words or "none") in faults[case]
