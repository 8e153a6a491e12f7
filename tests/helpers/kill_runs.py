"""Launches of the job that are killed, each at another instant, and go on: `-m helpers.kill_runs SOURCE FOLDER` prints what the
ranks' logs say.

The package is imported once and every rank is a fork of this process, so that a launch takes a fraction of a second.
"""

from __future__ import annotations

import os
import re
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

LAYERS = 4
# A rank of two is killed just before or after a file gets its name, while it computes what follows; alone or with the other rank.
# What goes on has so many ranks, or dies at another instant before what goes on.
KILLS = {
    "a snapshot is half written": ("before", "observe-00001-1-of-2.safetensors", "alone", 1),
    "statistics without their entry": ("after", "layer-00002.safetensors", "alone", 2),
    "the entry of one rank without the other's": ("after", "observe-00003-0-of-2.json", "all", 4),
    "all statistics, not yet declared whole": ("before", "about.json", "alone", 1),
    "between the streams": ("after", "plan.json", "all", 2),
    "what is outside the layers without its entry": ("after", "outside.safetensors", "alone", 4),
    "a shard without its entry": ("after", "layer-00001-1-of-2.safetensors", "all", 1),
    "an entry is half written": ("before", "prune-00002-1-of-2.json", "alone", 2),
    "again in that layer": ("before", "prune-00002-1-of-2.json", "alone", 2, ("before", "layer-00002-0-of-2.safetensors")),
    "an entry of the last layer but one": ("after", "prune-00002-0-of-2.json", "alone", 4),
    "some shards have their final names": ("after", "model-00004-of-00009.safetensors", "all", 1),
    "all but the index": ("before", "model.safetensors.index.json", "alone", 2),
    "complete, its remains not removed": ("after", "manifest.json", "all", 4),
}


def request(source: str, run_dir: Path) -> PruneConfig:
    calibration = CalibrationConfig(path=str(TEXT), samples=8, length=32, micro_batch=2)
    experts = ExpertsConfig(fraction=0.5, budget=Budget["global"], refit=True)
    return PruneConfig(ModelConfig(source), calibration, experts, SparsifyConfig(ratios="owl"), 0.5, str(run_dir))


def die_at(when: str, name: str) -> None:
    """Kill this process before or after it gives a file that name."""

    def patch(operation):
        def call(file: Path, target):
            meant = Path(target).name == name
            if meant and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = operation(file, target)
            if meant:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    Path.replace, Path.rename = patch(Path.replace), patch(Path.rename)


def become_rank(source: str, run_dir: Path, instant: tuple[str, str] | None, told: dict[str, str]) -> NoReturn:
    """Prune as one of the ranks, and end."""
    code, log = 1, run_dir.with_suffix(".log")
    try:
        redirect(stdout=log, stderr=log)
        os.environ.update(told)
        if instant:
            die_at(*instant)
        with Ranks() as ranks:
            prune(request(source, run_dir), ranks)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def start(source: str, run_dir: Path, world: int, instant: tuple[str, str] | None = None) -> list[int]:
    """The processes of a launch."""
    return fork_ranks(world, partial(become_rank, source, run_dir, instant))


def wait(children: list[int], grace: float = 1.0, limit: float = 120.0) -> list[int]:
    """Exit codes; once one has failed the others have `grace` seconds left, as under a launcher."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + limit
    while len(codes) < len(children):
        for child in (c for c in children if c not in codes):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:
                    deadline = min(deadline, time.monotonic() + grace)
        if time.monotonic() > deadline:
            for child in (c for c in children if c not in codes):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[child] for child in children]


def main(source: str, folder: Path) -> None:
    get_ready()
    assert wait(start(source, folder / "whole", 2)) == [0, 0]
    for number, (name, (when, file, victims, world, *again)) in enumerate(KILLS.items()):
        run_dir = folder / str(number)
        for instant in ((when, file), *again):
            codes, victim = wait(start(source, run_dir, 2, instant), 0 if victims == "all" else 1), "-1-of-2" in instant[1]
            assert codes[victim] == -signal.SIGKILL, f"{name}: ended with {codes}"
        assert not any(wait(start(source, run_dir, world))), f"{name}\n{run_dir.with_suffix('.log').read_text()}"
        log = run_dir.with_suffix(".log").read_text()
        lines = [f"{stream} 0{layer}/" for stream in ("observe", "prune") for layer in range(1, LAYERS + 1)]
        done = [len(re.findall(rf"\] {line}", log)) for line in lines]
        print(f"{number} {name}: layers done {done}", flush=True)


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(parents=True)
    main(sys.argv[1], Path(sys.argv[2]))
