"""Hostile cases by class, each made by a seed: `-m helpers.hostile FOLDER COUNT [FIRST] [CLASS]` runs COUNT seeds of every class
from FIRST on, in this process, and prints those that fail.

A case damages what a job reads, or lets a call of the system fail. The job must then end in a StunError of one line that names
the damaged file or its folder, or do its work; in bounded time and memory; and change nothing outside its run folder. What goes
on from a damaged run folder must give the tensors of the whole run.
"""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from helpers.bounds import Hang, bounded, causes
from helpers.damage import VALUES, damage
from helpers.forms import fp8
from helpers.paths import HELDOUT, TEXT
from helpers.selections import config
from helpers.stops import stopped_after
from helpers.tensors import same_tensors
from helpers.zoo import make_checkpoint
from stun.config import CalibrationConfig, ModelConfig, SparsifyConfig, StunError
from stun.data.samples import calibration_samples
from stun.data.tokenizer import load_tokenizer
from stun.evaluation.config import EvaluateConfig, TaskConfig
from stun.evaluation.job import evaluate
from stun.files import system_errors
from stun.planning.from_statistics import plan_from_run
from stun.planning.validation import validate
from stun.pruning.job import prune
from stun.report.write import report
from stun.run.lock import let_go
from stun.settings.compose import SCHEMAS, composed, setting_types

CALIBRATION = CalibrationConfig(path=str(TEXT), samples=2, length=16, micro_batch=1)
CHAT = '{"text": [{"role": "user", "content": "What is it?"}]}\n'
LINE = '{"text": "Some text that is long enough for one sample of the calibration."}\n'


@dataclass
class Case:
    """One case: its random choices, its folder, the folder with what is ready, and this process as a rank."""

    rng: random.Random
    folder: Path
    ready: Path
    ranks: object
    about: str = ""

    def like(self, *names: str) -> Path:
        """Copy parts of what is ready; returns the first copy."""
        for name in names:
            (shutil.copytree if (self.ready / name).is_dir() else shutil.copy)(
                self.ready / name, self.folder / name.rpartition("/")[2]
            )
        return self.folder / names[0].rpartition("/")[2]

    def harm(self, folder: Path, *patterns: str) -> None:
        """Damage one of the files."""
        files = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
        self.about = damage(self.rng, self.rng.choice(files))

    def request(self, **changes):
        own = {"calibration": CALIBRATION, **changes}
        return config(self.folder / "model", self.folder / "run", **own)

    def half(self, **changes):
        """The request of the run that was interrupted: its model's folder is part of its identity."""
        return replace(self.request(**changes), model=ModelConfig(str(self.ready / "model")))


def weights(case: Case) -> Callable:
    folder = case.like(case.rng.choice(["model", "model", "scaled"]))
    folder.rename(case.folder / "model") if folder.name != "model" else None
    case.harm(case.folder / "model", "*.safetensors", "*.index.json")
    return lambda: prune(case.request(), case.ranks)


def settings_of_a_model(case: Case) -> Callable:
    folder = case.like(case.rng.choice(["model", "model", "scaled", "gpt_oss", "jamba"]))
    folder.rename(case.folder / "model") if folder.name != "model" else None
    case.harm(case.folder / "model", "config.json")
    return lambda: prune(case.request(), case.ranks)


def tokenizers(case: Case) -> Callable:
    case.harm(case.like("model"), "tokenizer*.json")
    return lambda: calibration_samples(CALIBRATION, load_tokenizer(case.folder / "model"), 260)


def other_files(case: Case) -> Callable:
    """Files that are copied, or folders in their place."""
    model = case.like("model")
    (model / "additional_chat_templates").mkdir()
    for name in ("notes.txt", ".hidden", "generation_config.json", "additional_chat_templates/a.jinja", "README.md"):
        (model / name).write_text("{}")
    case.harm(model, "notes.txt", ".hidden", "*/a.jinja", "README.md", "generation_config.json")
    return lambda: prune(case.request(), case.ranks)


LOOPS = ["range(10**9)", "range(3)", "messages", "''.__class__.__mro__", "'a' * 10**9", "cycler.__init__.__globals__"]
WORDS = [
    "a",
    "loop.index",
    "10 ** 10 ** 9",
    "'%9999999999d' % 1",
    "'x' * 10 ** 10",
    "1 / 0",
    "messages[0].a.b",
    "namespace().x",
    "a|join",
]
WORDS += [
    "raise_exception('no')",
    "strftime_now('%Y')",
    "a|tojson(indent=10**9)",
    "'{:>{w}}'.format(1, w=10**10)",
    "a|list|length",
]


def templates(case: Case) -> Callable:
    rng, text = case.rng, ""
    for _ in range(rng.randrange(1, 9)):
        text = rng.choice(
            [
                f"{{% for a in {rng.choice(LOOPS)} %}}{text}{{% endfor %}}",
                f"{text}{{{{ {rng.choice(WORDS)} }}}}",
                f"{{% macro m() %}}{text}{{{{ m() }}}}{{% endmacro %}}{{{{ m() }}}}",
                f"{{% set x = {rng.choice(WORDS)} %}}{text}{{{{ x }}}}",
                f"{{% if a %}}{text}",
                f"{text}{{% include '/etc/passwd' %}}",
            ]
        )
    (case.like("model") / "chat_template.jinja").write_text(text)
    (case.folder / "chat.jsonl").write_text(CHAT * 4)
    case.about = text[:200]
    calibration = replace(CALIBRATION, path=str(case.folder / "chat.jsonl"))
    return lambda: calibration_samples(calibration, load_tokenizer(case.folder / "model"), 260)


def plans(case: Case) -> Callable:
    case.like("model", "run/plan.json")
    (case.folder / "ratios.json").write_text("[0.2, 0.5]")
    if case.rng.random() < 0.3:
        case.harm(case.folder, "ratios.json")
        return lambda: prune(case.request(sparsify=SparsifyConfig(ratios=str(case.folder / "ratios.json"))), case.ranks)
    case.harm(case.folder, "plan.json")
    return lambda: prune(case.request(plan=str(case.folder / "plan.json")), case.ranks)


def texts(case: Case) -> Callable:
    case.like("model")
    (case.folder / "text.jsonl").write_text(case.rng.choice([LINE * 8, CHAT * 8]))
    line = case.folder / "line.json"
    line.write_text(LINE)
    of = case.rng.choice(["text.jsonl", "line.json"])
    case.harm(case.folder, of)
    if of == "line.json" and line.is_file() and line.stat().st_size < 10**6:
        (case.folder / "text.jsonl").write_bytes((LINE * 4).encode() + line.read_bytes() + b"\n" + (LINE * 4).encode())
    calibration = replace(CALIBRATION, path=str(case.folder / "text.jsonl"))
    return lambda: calibration_samples(calibration, load_tokenizer(case.folder / "model"), 260)


def interrupted(case: Case) -> Callable:
    run = case.like("half/run")
    case.harm(run, "progress/*", "progress/*", "hidden/*", "model/*", "config.yaml", "stats/*", ".stun", ".lock", "layers.json")
    return lambda: _same(case, prune(case.half(), case.ranks))


def _same(case: Case, summary: dict) -> None:
    same_tensors(case.ready / "run" / "model", case.folder / "run" / "model")


def finished(case: Case) -> Callable:
    run = case.like("run")
    case.harm(
        run, "manifest.json", "manifest.json", "layers.json", "result.json", "plan.json", "config.yaml", "stats/*", "search.json"
    )

    jobs = {
        "prune": lambda: prune(case.half(), case.ranks),
        "report": lambda: report(run),
        "plan": lambda: plan_from_run(case.half(), case.folder / "run" / "made.json"),
    }
    job = case.rng.choice(list(jobs))
    case.about = f"{job}: {case.about}"
    return jobs[job]


def evaluations(case: Case) -> Callable:
    shutil.copytree(case.ready / "partial", case.folder / "run")
    case.harm(case.folder / "run", "*.partial/*.json", "*.partial/*/*", "*.partial/*/*/*", "dense.json", "result.json")
    return lambda: evaluate(asked(case.ready, case.folder / "run"), case.ranks)


def asked(ready: Path, folder: Path, has_dense: bool = True) -> EvaluateConfig:
    task = TaskConfig(str(ready / "rows.jsonl"), max_new_tokens=4)
    dense, output = (str(folder / f"{name}.json") for name in ("dense", "result"))
    if not has_dense:
        return EvaluateConfig(ModelConfig(str(ready / "model")), task, output=dense)
    return EvaluateConfig(ModelConfig(str(ready / "run" / "model")), task, dense=dense, output=output)


GIVEN = ["model.path=m", "calibration.path=c", "target=0.4", "run_dir=r"]
SPELT = [
    "1e308",
    "-1",
    "null",
    "~",
    "nan",
    "inf",
    "[]",
    "{}",
    "[1",
    "'",
    "a=b",
    "${x}",
    "${oc.env:HOME}",
    "1,2",
    "range(1,3)",
    "true",
]


def values(case: Case) -> Callable:
    """Settings as words of a command."""
    job = case.rng.choice(["prune", "observe", "compare", "preflight"])
    known = [*setting_types(SCHEMAS[job]), "experiment", "experts", "sparsify", "model", "task", "hydra.run.dir", "x.y"]
    key, value = case.rng.choice(known), case.rng.choice([*SPELT, *(str(value)[:300] for value in VALUES)])
    word = case.rng.choice(["{}={}", "{}={}", "{}={}", "+{}={}", "++{}={}", "~{}", "~{}={}", "{}", "{}@x={}", "{}.x={}"]).format(
        key, value
    )
    case.about = f"{job} {word!r}"
    return lambda: validate(composed(job, [*GIVEN, word]))


SYSTEM = {
    "os": ["stat", "mkdir", "rename", "replace", "unlink", "fsync", "pwrite", "preadv", "scandir", "listdir"],
    "io": ["open"],
}
ERRORS = (errno.EACCES, errno.ENOSPC, errno.EIO, errno.ENAMETOOLONG, errno.EROFS, errno.EDQUOT, errno.ESTALE)


@contextmanager
def failing(rng: random.Random, folder: Path):
    """One call of the system on a path below `folder`, or on an open file, fails."""
    module, name = rng.choice([(module, name) for module, names in SYSTEM.items() for name in names])
    owner, number, after = {"os": os, "io": io}[module], rng.choice(ERRORS), rng.randrange(12)
    made, operation = [0], getattr(owner, name)

    def call(path, *arguments, **keywords):
        is_own = isinstance(path, int) or str(path).startswith(str(folder))
        made[0] += is_own
        if is_own and made[0] == after + 1:
            raise OSError(number, os.strerror(number), None if isinstance(path, int) else str(path))
        return operation(path, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield f"{name} {errno.errorcode[number]} at call {after}"


def systems(case: Case) -> Callable:
    """A run that goes on; where it fails, it does so once more without the fault."""
    case.like("half/run")

    def work() -> None:
        with failing(case.rng, case.folder / "run") as case.about:
            _refused(lambda: prune(case.half(), case.ranks))
        let_go()
        _same(case, prune(case.half(), case.ranks))

    return work


CLASSES: dict[str, Callable[[Case], Callable]] = {
    "weights": weights,
    "config": settings_of_a_model,
    "tokenizer": tokenizers,
    "others": other_files,
    "template": templates,
    "plan": plans,
    "text": texts,
    "interrupted": interrupted,
    "finished": finished,
    "evaluation": evaluations,
    "values": values,
    "system": systems,
}
FRESH = ("weights", "config", "others", "plan")  # runs that begin
FREE = ("values", "system", "template")  # the message names a setting, or the file that the system failed on


def _refused(work: Callable) -> str:
    """Message of the StunError in which the work ends; empty if it does not. Raises AssertionError for one of several lines."""
    try:
        with system_errors():  # as every job
            work()
    except StunError as error:
        said = str(error)
        assert said and "\n" not in said and len(said) < 3000, f"not one line: {said[:500]!r}"
        assert "HYDRA_FULL_ERROR" not in said, said
        for each in causes(error):
            assert not isinstance(each, MemoryError) and "allocate" not in str(each), f"ran out of memory: {each!r}"
        return said
    return ""


def content(folder: Path) -> dict[str, int]:
    """Files outside of the run folder, and when they were written."""
    own = (file for file in folder.rglob("*") if not file.is_dir() or file.is_symlink())
    return {str(file): file.lstat().st_mtime_ns for file in own if file.relative_to(folder).parts[0] != "run"}


def failure(name: str, seed: int, folder: Path, ready: Path, ranks) -> str:
    """What is wrong with a case; empty if nothing is."""
    case = Case(random.Random(f"{name} {seed}"), folder, ready, ranks)
    folder.mkdir()
    try:
        work = CLASSES[name](case)
        before, lasting = content(folder), content(ready)
        with bounded(2**30), pytest.MonkeyPatch.context() as patch:
            patch.setattr("stun.runtime.child.SECONDS", 1)
            patch.setattr("os.fsync", lambda number: None)  # no case asks what a loss of power leaves
            said = _refused(work)
        is_late = any(words in said for words in ("layer", "finite", "expert"))  # noticed as a layer is read or runs
        assert name not in FRESH or is_late or not said or not (folder / "run").exists(), f"written before it was refused: {said}"
        names = [case.about.rpartition(" ")[2], "model", "run", folder.name]
        assert not said or name in FREE or any(each in said for each in names), f"names no file: {said}"
        assert content(folder) == before and content(ready) == lasting, "something was written outside of the run folder"
    except (Exception, Hang) as error:
        return f"{name} {seed}: {case.about}: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
    finally:
        let_go()
        shutil.rmtree(folder)
    return ""


def make_ready(folder: Path, ranks) -> Path:
    """A folder with checkpoints, a finished run, its evaluation, an interrupted run, and an interrupted evaluation."""
    folder.mkdir(parents=True)
    make_checkpoint(folder / "model", "mixtral", shard="150KB", num_hidden_layers=2)
    fp8(folder / "scaled", "deepseek_v3", 8, 8)
    for family in ("gpt_oss", "jamba"):
        make_checkpoint(folder / family, family, shard="1GB")
    request = config(folder / "model", folder / "run", calibration=CALIBRATION)
    prune(request, ranks)
    (folder / "rows.jsonl").write_text("".join(HELDOUT.read_text().splitlines(keepends=True)[:4]))
    (folder / "partial").mkdir()
    evaluate(asked(folder, folder / "partial", has_dense=False), ranks)
    evaluate(asked(folder, folder / "partial"), ranks)
    shutil.copy(folder / "partial" / "result.json", folder / "run" / "result.json")
    (folder / "run" / "search.json").write_text('{"error": {"0.2": 0.5, "0.4": 0.25}}')
    (folder / "partial" / "result.json").unlink()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("stun.evaluation.job.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        evaluate(asked(folder, folder / "partial"), ranks)
    let_go()
    with stopped_after("prune", 0):
        prune(replace(request, run_dir=str(folder / "half" / "run")), ranks)
    let_go()
    return folder


def main(folder: Path, count: int, first: int = 0, only: str = "") -> None:
    from stun.runtime.ranks import Ranks

    with Ranks() as ranks:
        printed, sys.stdout = sys.stdout, io.StringIO()
        ready = folder / "ready" if (folder / "ready").is_dir() else make_ready(folder / "ready", ranks)
        prune(config(ready / "model", folder / "warm", calibration=CALIBRATION), ranks)  # threads and libraries are then there
        shutil.rmtree(folder / "warm")
        for name in [only] if only else CLASSES:
            failures = [failure(name, seed, folder / "case", ready, ranks) for seed in range(first, first + count)]
            failures = list(filter(None, failures))
            print(f"{name}: {count - len(failures)} of {count} hold", *failures, sep="\n  ", file=printed, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:4]), *sys.argv[4:])
