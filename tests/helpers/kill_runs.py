"""Launches of the job that are killed: python -m helpers.kill_runs SOURCE FOLDER KILLS prints a line for every kill.

The package is imported once and every rank is a fork of this process, so that a launch takes a fraction of a second.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import NoReturn

from helpers.paths import TEXT
from helpers.warm import fork_ranks, get_ready, redirect
from stun.config import Budget, CalibrationConfig, ExpertsConfig, ModelConfig, PruneConfig, SparsifyConfig
from stun.pruning.job import prune
from stun.runtime.ranks import Ranks


def request(source: str, run_dir: Path) -> PruneConfig:
    calibration = CalibrationConfig(path=str(TEXT), samples=16, length=64, micro_batch=2)
    experts = ExpertsConfig(fraction=0.5, budget=Budget["global"])
    return PruneConfig(ModelConfig(source), calibration, experts, SparsifyConfig(ratios="owl"), 0.5, str(run_dir))


def become_rank(source: str, run_dir: Path, told: dict[str, str]) -> NoReturn:
    """Prune as one of the ranks, and end."""
    code, log = 1, run_dir.with_suffix(".log")
    try:
        redirect(stdout=log, stderr=log)
        os.environ.update(told)
        with Ranks() as ranks:
            prune(request(source, run_dir), ranks)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def start(source: str, run_dir: Path, world: int) -> list[int]:
    """The processes of a launch."""
    return fork_ranks(world, partial(become_rank, source, run_dir))


def wait(children: list[int], limit: float = 120.0) -> list[int]:
    """Exit codes; once one has failed the others have a second left, as under a launcher."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + limit
    while len(codes) < len(children):
        for child in (c for c in children if c not in codes):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:
                    deadline = min(deadline, time.monotonic() + 1)
        if time.monotonic() > deadline:
            for child in (c for c in children if c not in codes):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[child] for child in children]


def kill_and_continue(source: str, run_dir: Path, instant: float, victim: int | None, dice: random.Random) -> int:
    """Launches that the run took: the first has two ranks, of which one or, for None, both are killed."""
    for launch in range(1, 5):
        children = start(source, run_dir, 2 if launch == 1 else dice.choice([1, 2, 4]))
        if launch == 1:
            time.sleep(instant)
            for child in children if victim is None else [children[victim]]:
                os.kill(child, signal.SIGKILL)
        if not any(wait(children)):
            return launch
    raise RuntimeError(run_dir.with_suffix(".log").read_text())


def main(source: str, folder: Path, kills: int) -> None:
    get_ready()
    dice = random.Random(0)
    for name in ("first", "whole"):  # the first launch of all takes longer than any later one
        began = time.monotonic()
        assert wait(start(source, folder / name, 2)) == [0, 0]
        whole = time.monotonic() - began
    for number in range(kills):
        run_dir, victim = folder / str(number), dice.choice([0, 1, None])
        instant = whole * (number + dice.random()) / kills
        while (launches := kill_and_continue(source, run_dir, instant, victim, dice)) == 1:
            shutil.rmtree(run_dir)  # it was done before the kill: once more, earlier
            run_dir.with_suffix(".log").unlink()
            instant *= 0.9
        log = run_dir.with_suffix(".log").read_text()
        print(f"{number} killed {'all' if victim is None else victim} at {instant:.2f}s of {whole:.2f}s, {launches} launches")
        repeated = [log.count(f"] {stream} {layer:02d}/") for stream in ("observe", "prune") for layer in range(1, 6)]
        print("layers done", repeated, flush=True)


if __name__ == "__main__":
    shutil.rmtree(sys.argv[2], ignore_errors=True)
    Path(sys.argv[2]).mkdir(parents=True)
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
