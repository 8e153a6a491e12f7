"""Jobs that are stopped, each at an instant and by a signal that a seed chooses, and go on: `-m helpers.kill_jobs SOURCE FOLDER
COUNT [FIRST] [JOB]` prints a line for each of COUNT seeds from FIRST on.

An instant is just before or after one of the calls that give files their names, make folders or remove something, or that run a
layer, of a stream, a score or a generation. Launches are forks of one process that has imported everything; each works in
a folder of its own, where paths are relative, so that what it writes can be compared byte by byte with what a launch has written
that was not stopped. Files of others lie wherever a job accepts them, and must be as they were. The first seed of every job is of
one rank, the next of two, of which one is stopped, and so on.
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
from functools import partial
from pathlib import Path
from typing import NoReturn

from helpers.kill_runs import wait
from helpers.paths import HELDOUT, TEXT
from helpers.runtimes import silent_vllm
from helpers.warm import fork_ranks, get_ready, redirect
from stun.benchmark.config import CompareConfig, StudyConfig
from stun.config import CalibrationConfig, ExpertsConfig, ModelConfig, PruneConfig, SparsifyConfig
from stun.evaluation.config import EvaluateConfig, GenerateConfig, PruneAndEvaluateConfig, TaskConfig
from stun.evaluation.job import evaluate
from stun.evaluation.self_generated import generate_text
from stun.planning.from_statistics import plan_from_run
from stun.pruning.evaluated import prune_then_evaluate
from stun.pruning.job import prune, take_statistics
from stun.report.write import write_reports
from stun.runtime.ranks import Ranks
from stun.serving.config import Runtime, ServeCheckConfig
from stun.serving.job import serve_check
from stun.stream.layer_stream import LayerStream

CALLS = ("replace", "rename", "unlink", "rmdir", "mkdir")
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
# Figures of time and memory, which no two launches share.
MEASURED = {"seconds", "phases", "read_bytes_per_second", "peak_bytes", "bytes_read", "GiB"}
CALIBRATION = CalibrationConfig(path=str(TEXT), samples=8, length=32, micro_batch=2)


def request(source: str, kind: type = PruneConfig, run_dir: str = "run", **changes) -> PruneConfig:
    own = {"experts": ExpertsConfig(fraction=0.5), "sparsify": SparsifyConfig(), "target": 0.4, **changes}
    return kind(model=ModelConfig(source), calibration=CALIBRATION, run_dir=run_dir, **own)


def task() -> TaskConfig:
    return TaskConfig("rows.jsonl", max_new_tokens=6)


def evaluated(source: str, ranks: Ranks) -> None:
    """The pruned model beside the dense one."""
    prune_then_evaluate(request(source, PruneAndEvaluateConfig, task=task()), ranks)
    evaluate(EvaluateConfig(ModelConfig(source), text=CALIBRATION, output="text.json"), ranks)


def generated(source: str, ranks: Ranks) -> None:
    generate_text(GenerateConfig(ModelConfig(source), "own.jsonl", texts=8, tokens=6, batch=2), ranks)


def compared(source: str, ranks: Ranks) -> None:
    from jobs import compare

    compare.work(request(source, CompareConfig, task=task()), ranks)


def studied(source: str, ranks: Ranks) -> None:
    from jobs import study

    methods = {"ranked": ["experts.method=rank"], "weights": ["experts.fraction=0"]}
    own = {"methods": methods, "targets": [0.3], "seeds": [1], "task": task(), "scores": "scores.json", "target": None}
    study.work(request(source, StudyConfig, **own), ranks)


def planned(source: str, ranks: Ranks) -> None:
    cfg = request(source, experts=ExpertsConfig(fraction=0.3))
    ranks.on_first(lambda: plan_from_run(cfg, Path("plans/own.json")) and None)


def served(source: str, ranks: Ranks) -> None:
    """By a runtime that is there at once, and answers with nothing."""
    serve_check(ServeCheckConfig(ModelConfig("run/model"), Runtime["vllm"], python="./runtime", tokens=2), ranks)


JOBS: dict[str, Callable[[str, Ranks], object]] = {
    "observe": lambda source, ranks: take_statistics(request(source), ranks),
    "search": lambda source, ranks: prune(request(source, experts=ExpertsConfig(fraction="auto")), ranks),
    "prune": lambda source, ranks: prune(request(source, experts=ExpertsConfig(fraction=0.5, refit=True)), ranks),
    "generate": generated,
    "evaluate": evaluated,
    "compare": compared,
    "study": studied,
    "plan": planned,
    "report": lambda source, ranks: ranks.on_first(lambda: write_reports(Path("run"))),
    "serve": served,
}
NEED_A_RUN = ("plan", "report", "serve")
Stop = tuple[int, str, int, str, int]  # rank, kind and number of the call, before or after it, the signal
NEVER: Stop = (0, "files", -1, "before", 0)
OF_OTHERS = ("run/logs/1.log", "run/code/a.py", "run/mine.out", "plans/other.json", "notes.txt", "text.json.bak", "result.json")


def stop_at(kind: str, number: int, when: str, signal_number: int) -> dict[str, int]:
    """Stop this process before or after the call of that kind and number, none if it is negative. The mapping has how many were
    made of each kind."""
    made = {"files": 0, "layers": 0}

    def patch(own: str, operation):
        def call(*arguments, **keywords):
            is_meant = (own, made[own]) == (kind, number)
            made[own] += 1
            if is_meant and when == "before":
                os.kill(os.getpid(), signal_number)
            result = operation(*arguments, **keywords)
            if is_meant and when == "after":
                os.kill(os.getpid(), signal_number)
            return result

        return call

    for name in CALLS:
        setattr(os, name, patch("files", getattr(os, name)))
    LayerStream._rounds = patch("layers", LayerStream._rounds)
    return made


def become_job(name: str, source: str, folder: Path, stop: Stop, told: dict[str, str]) -> NoReturn:
    """Run the job in its folder, as one of two ranks if `told` says so, and end; the numbers of calls go to the file `calls`."""
    code, rank = 1, int(told["RANK"])
    try:
        os.chdir(folder)
        redirect(stdout=folder.with_suffix(".log"), stderr=folder.with_suffix(".log"))
        os.environ.update(told if told["WORLD_SIZE"] != "1" else {})
        made = stop_at(*(stop[1:] if rank == stop[0] else NEVER[1:]))
        with Ranks() as ranks:
            JOBS[name](source, ranks)
        folder.with_suffix(f".calls{rank}").write_text(json.dumps(made))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def launch(name: str, source: str, folder: Path, world: int = 1, stop: Stop = NEVER) -> list[int]:
    """Exit codes of a launch's ranks."""
    return wait(fork_ranks(world, partial(become_job, name, source, folder, stop)), limit=600.0)


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


def case(name: str, source: str, folder: Path, calls: list[dict[str, int]], seed: int) -> str:
    """Stop a launch at the instant of the seed, and go on; returns what differs from a launch that was not stopped. `calls` are
    those of every rank."""
    choice, world = random.Random(f"{name} {seed}"), len(calls)
    rank = choice.randrange(world)
    kind = choice.choice([kind for kind, number in calls[rank].items() if number])
    number, when = choice.randrange(calls[rank][kind]), choice.choice(["before", "after"])
    stop = (rank, kind, number, when, choice.choice(SIGNALS))
    place = folder / f"{name}-{seed}"
    shutil.copytree(folder / f"{name}-start", place)
    launch(name, source, place, world, stop)
    codes = launch(name, source, place, world)
    differences = [f"exit {codes}: {place.with_suffix('.log').read_text()[-3000:]}"] if any(codes) else []
    differences += differing(folder / f"{name}-whole-{world}", place)
    if not differences:
        shutil.rmtree(place)
    instant = f"rank {rank} of {world} {when} {kind} {number} of {calls[rank][kind]}, {signal.Signals(stop[-1]).name}"
    return f"{instant}: {'; '.join(differences) or 'the same'}"


def put_files(folder: Path) -> None:
    """Files of others, and what jobs read."""
    for name in OF_OTHERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'"mine: {name}"')
    (folder / "rows.jsonl").write_text("".join(HELDOUT.read_text().splitlines(keepends=True)[:12]))
    silent_vllm(folder)


def are_whole(folder: Path) -> bool:
    return all((folder / name).read_text() == f'"mine: {name}"' for name in OF_OTHERS)


def begun(name: str, folder: Path, place: Path) -> Path:
    """The folder of a job before its first launch."""
    shutil.copytree(folder / "ready", place) if name in NEED_A_RUN else place.mkdir()
    put_files(place)
    return place


def whole(name: str, source: str, folder: Path, world: int) -> list[dict[str, int]]:
    """Calls of every rank of a launch that is not stopped."""
    place = begun(name, folder, folder / f"{name}-whole-{world}")
    codes = launch(name, source, place, world)
    assert not any(codes), place.with_suffix(".log").read_text()
    assert are_whole(place), f"{name}: a file of others is not as it was"
    return [json.loads(place.with_suffix(f".calls{rank}").read_text()) for rank in range(world)]


def main(source: str, folder: Path, count: int, first: int = 0, only: str = "") -> None:
    get_ready()
    names = [only] if only else list(JOBS)
    (folder / "ready").mkdir(parents=True)
    assert launch("prune", source, folder / "ready") == [0]
    calls = {}
    for seed in range(first, first + count):
        name, world = names[seed % len(names)], 1 + seed // len(names) % 2
        if not (folder / f"{name}-start").is_dir():
            begun(name, folder, folder / f"{name}-start")
        if (name, world) not in calls:
            calls[name, world] = whole(name, source, folder, world)
        print(f"{name} {seed}: {case(name, source, folder, calls[name, world], seed)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:5]), *sys.argv[5:])
