"""Jobs that are stopped, each at an instant and by a signal that a seed chooses, and go on: `-m helpers.kill_jobs SOURCE FOLDER
COUNT [FIRST] [JOB]` prints a line for each of COUNT seeds from FIRST on.

An instant is just before or after one of the calls that give files their names, make folders or remove something. Launches are
forks of one process that has imported everything; each works in a folder of its own, where paths are relative, so that what it
writes can be compared byte by byte with what a launch has written that was not stopped. Files of others lie wherever a job
accepts them, and must be as they were.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from helpers.kill_runs import wait
from helpers.paths import HELDOUT, TEXT
from helpers.warm import get_ready, redirect
from stun.benchmark.config import CompareConfig, StudyConfig
from stun.config import CalibrationConfig, ExpertsConfig, ModelConfig, PruneConfig, SparsifyConfig
from stun.evaluation.config import EvaluateConfig, PruneAndEvaluateConfig, TaskConfig
from stun.evaluation.job import evaluate
from stun.planning.from_statistics import plan_from_run
from stun.pruning.evaluated import prune_then_evaluate
from stun.pruning.job import prune, take_statistics
from stun.report.write import write_reports
from stun.runtime.ranks import Ranks

CALLS = ("replace", "rename", "unlink", "rmdir", "mkdir")
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
# Figures of time and memory, which no two launches share.
MEASURED = {"seconds", "phases", "read_bytes_per_second", "peak_bytes", "bytes_read", "GiB"}
CALIBRATION = CalibrationConfig(path=str(TEXT), samples=8, length=32, micro_batch=2)


def request(source: str, kind: type = PruneConfig, run_dir: str = "run", **changes) -> PruneConfig:
    own = {"experts": ExpertsConfig(fraction=0.5), "sparsify": SparsifyConfig(), "target": 0.4, **changes}
    return kind(model=ModelConfig(source), calibration=CALIBRATION, run_dir=run_dir, **own)


def task() -> TaskConfig:
    rows = Path("rows.jsonl")
    if not rows.is_file():
        rows.write_text("".join(HELDOUT.read_text().splitlines(keepends=True)[:12]))
    return TaskConfig(str(rows), max_new_tokens=6)


def evaluated(source: str, ranks: Ranks) -> None:
    """The pruned model beside the dense one."""
    prune_then_evaluate(request(source, PruneAndEvaluateConfig, task=task()), ranks)
    evaluate(EvaluateConfig(ModelConfig(source), text=CALIBRATION, output="text.json"), ranks)


def compared(source: str, ranks: Ranks) -> None:
    from jobs import compare

    compare.work(request(source, CompareConfig, task=task()), ranks)


def studied(source: str, ranks: Ranks) -> None:
    from jobs import study

    methods = {"ranked": ["experts.method=rank"], "weights": ["experts.fraction=0"]}
    own = {"methods": methods, "targets": [0.3], "seeds": [1], "task": task(), "scores": "scores.json", "target": None}
    study.work(request(source, StudyConfig, **own), ranks)


def planned(source: str, ranks: Ranks) -> None:
    plan_from_run(request(source, experts=ExpertsConfig(fraction=0.3)), Path("plans/own.json"))


JOBS: dict[str, Callable[[str, Ranks], object]] = {
    "observe": lambda source, ranks: take_statistics(request(source), ranks),
    "search": lambda source, ranks: prune(request(source, experts=ExpertsConfig(fraction="auto")), ranks),
    "prune": lambda source, ranks: prune(request(source, experts=ExpertsConfig(fraction=0.5, refit=True)), ranks),
    "evaluate": evaluated,
    "compare": compared,
    "study": studied,
    "plan": planned,
    "report": lambda source, ranks: write_reports(Path("run")),
}
NEED_A_RUN = ("plan", "report")
OF_OTHERS = ("run/logs/1.log", "run/code/a.py", "run/mine.out", "plans/other.json", "notes.txt", "text.json.bak", "result.json")


def stop_at(number: int, when: str, signal_number: int) -> list[int]:
    """Stop this process before or after the call of that number, none if it is negative. The list has how many were made."""
    made = [0]

    def patch(operation):
        def call(*arguments, **keywords):
            is_meant = made[0] == number
            made[0] += 1
            if is_meant and when == "before":
                os.kill(os.getpid(), signal_number)
            result = operation(*arguments, **keywords)
            if is_meant and when == "after":
                os.kill(os.getpid(), signal_number)
            return result

        return call

    for name in CALLS:
        setattr(os, name, patch(getattr(os, name)))
    return made


def become_job(name: str, source: str, folder: Path, stop: tuple[int, str, int]) -> NoReturn:
    """Run the job in its folder, and end; the number of calls goes to the file `calls`."""
    code = 1
    try:
        os.chdir(folder)
        redirect(stdout=folder.with_suffix(".log"), stderr=folder.with_suffix(".log"))
        made = stop_at(*stop)
        with Ranks() as ranks:
            JOBS[name](source, ranks)
        folder.with_suffix(".calls").write_text(str(made[0]))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def launch(name: str, source: str, folder: Path, stop: tuple[int, str, int] = (-1, "before", 0)) -> int:
    """Exit code of a launch."""
    child = os.fork()
    if not child:
        become_job(name, source, folder, stop)
    return wait([child], limit=600.0)[0]


def comparable(file: Path) -> object:
    """Content of a file without what no two launches share."""
    return without_figures(json.loads(file.read_text())) if file.suffix == ".json" else file.read_bytes()


def without_figures(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_figures(entry) for key, entry in value.items() if key not in MEASURED}
    return [without_figures(entry) for entry in value] if isinstance(value, list) else value


def differing(one: Path, other: Path) -> list[str]:
    """Files that are not the same, or in one of the folders alone. Pictures of times are left out."""
    files = [{str(f.relative_to(each)) for f in each.rglob("*") if f.is_file()} for each in (one, other)]
    shown = {name for name in files[0] & files[1] if "timeline" not in name and not name.endswith(".html")}
    return sorted((files[0] ^ files[1]) | {n for n in shown if comparable(one / n) != comparable(other / n)})


def case(name: str, source: str, folder: Path, calls: int, seed: int) -> str:
    """Stop a launch at the instant of the seed, and go on; returns what differs from a launch that was not stopped."""
    choice = random.Random(f"{name} {seed}")
    stop = (choice.randrange(calls), choice.choice(["before", "after"]), choice.choice(SIGNALS))
    place = folder / f"{name}-{seed}"
    shutil.copytree(folder / f"{name}-start", place)
    launch(name, source, place, stop)
    code = launch(name, source, place)
    differences = [f"exit {code}: {place.with_suffix('.log').read_text()[-3000:]}"] if code else []
    differences += differing(folder / f"{name}-whole", place)
    if not differences:
        shutil.rmtree(place)
    return f"{stop[1]} call {stop[0]} of {calls}, {signal.Signals(stop[2]).name}: {'; '.join(differences) or 'the same'}"


def put_files_of_others(folder: Path) -> None:
    for name in OF_OTHERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'"mine: {name}"')


def are_whole(folder: Path) -> bool:
    return all((folder / name).read_text() == f'"mine: {name}"' for name in OF_OTHERS)


def main(source: str, folder: Path, count: int, first: int = 0, only: str = "") -> None:
    get_ready()
    names, calls = [only] if only else list(JOBS), {}
    (folder / "ready").mkdir(parents=True)
    assert launch("prune", source, folder / "ready") == 0
    for name in names:
        for end in ("start", "whole"):
            place = folder / f"{name}-{end}"
            shutil.copytree(folder / "ready", place) if name in NEED_A_RUN else place.mkdir()
            put_files_of_others(place)
        code = launch(name, source, folder / f"{name}-whole")
        assert code == 0, (folder / f"{name}-whole.log").read_text()
        assert are_whole(folder / f"{name}-whole"), f"{name}: a file of others is not as it was"
        calls[name] = int((folder / f"{name}-whole.calls").read_text())
    for seed in range(first, first + count):
        name = names[seed % len(names)]
        print(f"{name} {seed}: {case(name, source, folder, calls[name], seed)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:5]), *sys.argv[5:])
