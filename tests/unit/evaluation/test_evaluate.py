"""An evaluation as a whole: its result, its folder, what it refuses; on 1 and 2 ranks; beside the lm-evaluation-harness."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import stun.evaluation.job
from helpers.forms import damaged, fp8
from helpers.harness import HARNESS_TASK
from helpers.launches import environment, run_job
from helpers.paths import HELDOUT, REFERENCE, ROOT, TEXT
from helpers.stock import full
from stun.config import CalibrationConfig, ModelConfig, StunError
from stun.data.tokenizer import load_tokenizer
from stun.evaluation.config import EvaluateConfig, HarnessConfig, TaskConfig
from stun.evaluation.job import evaluate
from stun.evaluation.resume import Partial
from stun.evaluation.task import completion, extract, task_rows
from stun.run.lock import let_go

MODEL = REFERENCE / "model"
PACKED = CalibrationConfig(path=str(TEXT), samples=4, length=24)
VARYING = ("seconds", "ranks")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Twelve questions of several kinds."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(HELDOUT.read_text().splitlines(keepends=True)[:12]))
    return file


def asking(model, rows, output, **changes) -> EvaluateConfig:
    task = TaskConfig(path=str(rows), max_new_tokens=6, batch=4) if rows else TaskConfig()
    return replace(EvaluateConfig(ModelConfig(str(model)), task, output=str(output)), **changes)


def numbers(result: dict) -> dict:
    return {key: value for key, value in result.items() if key not in VARYING}


def test_result_and_what_is_there_already(checkpoint, ranks, rows, tmp_path, capsys, monkeypatch):
    """Rows alone, then beside the dense model, then text alone; the same command once more computes nothing."""
    dense, model = checkpoint("mixtral"), damaged(checkpoint("mixtral"), tmp_path / "model")
    first = evaluate(asking(dense, rows, tmp_path / "dense.json"), ranks)
    assert first == json.loads((tmp_path / "dense.json").read_text())
    assert first["rows"] == len(first["right"]) == len(first["groups"]) == 12 and first["batch"] == 4
    texts = [row["question"] + row["answer"] for row in map(json.loads, rows.read_text().splitlines())]
    ids = load_tokenizer(dense)(texts)["input_ids"]
    losses = [-full(dense, own)[0][:-1].gather(1, torch.tensor(own[1:])[:, None]).sum() for own in ids]
    assert first["tokens"] == sum(map(len, ids)) - 12
    assert first["perplexity"] == pytest.approx(float(torch.exp(sum(losses) / first["tokens"])), rel=1e-4)

    pair = asking(model, rows, tmp_path / "run" / "result.json", dense=str(tmp_path / "dense.json"))
    second = evaluate(pair, ranks)
    assert second["agreement"]["tokens"] == second["tokens"] == first["tokens"] and 0 < second["agreement"]["top1"] < 1
    assert second["agreement"]["kl"] > 0 and len(second["layer_error"]) == 3 and min(second["layer_error"]) > 0
    assert second["dense"] == {key: first[key] for key in ("model", "exact_match", "average", "perplexity")}
    assert not list((tmp_path / "run").glob("*.partial"))
    stamp = (tmp_path / "run" / "result.json").stat().st_mtime_ns
    assert evaluate(pair, ranks) == second and "complete already" in capsys.readouterr().out
    assert (tmp_path / "run" / "result.json").stat().st_mtime_ns == stamp

    alone = replace(pair, dense="", output=str(tmp_path / "alone.json"))
    evaluate(alone, ranks)
    with monkeypatch.context() as patch:  # what it lacks is added; nothing is generated again
        patch.setattr("stun.evaluation.job.generate", None)
        assert numbers(evaluate(replace(pair, output=alone.output), ranks)) == numbers(second)
    with pytest.raises(StunError, match=r"holds another result \(dense: \w+ there, None now\)"):
        evaluate(alone, ranks)

    text = evaluate(asking(model, None, tmp_path / "text.json", text=PACKED), ranks)
    assert text["tokens"] == 4 * 23 and not text.keys() & {"rows", "right", "groups", "exact_match", "average", "dense"}


def test_rows_of_text_without_a_value_are_skipped(checkpoint, ranks, tmp_path, capsys):
    """The log says so, and the result is that of the other rows."""
    (tmp_path / "holes.jsonl").write_text('{"text": null}\n' + TEXT.read_text())
    results = []
    for name, path in (("whole", TEXT), ("holes", tmp_path / "holes.jsonl")):
        asked = asking(checkpoint("mixtral"), None, tmp_path / f"{name}.json", text=replace(PACKED, path=str(path)))
        results.append(numbers(evaluate(asked, ranks)))
    assert results[0] == results[1]
    assert f"text.path={tmp_path}/holes.jsonl: 1 of the 2 rows read have no value" in capsys.readouterr().out


def test_interrupted_evaluation_goes_on(checkpoint, ranks, rows, tmp_path, monkeypatch):
    """Ended while it generates: scores and finished rows are not computed again, with the batch of the first launch."""
    asked = asking(checkpoint("olmoe"), rows, tmp_path / "a.json", task=TaskConfig(path=str(rows), max_new_tokens=6))
    whole = evaluate(asked, ranks)
    again = replace(asked, output=str(tmp_path / "b.json"))
    with monkeypatch.context() as patch:
        patch.setattr("stun.evaluation.job.extract", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            evaluate(again, ranks)
    folder = tmp_path / "b.json.partial"
    assert len(list((folder / f"generate-{whole['batch']}").glob("tokens-*.json"))) == -(-12 // whole["batch"])
    with pytest.raises(StunError, match=r"holds another evaluation \(task.max_new_tokens: 6 there, 7 now\)"):
        evaluate(replace(again, task=replace(again.task, max_new_tokens=7)), ranks)
    read = []
    with monkeypatch.context() as patch:
        patch.setattr("stun.evaluation.memory.free_memory", lambda ranks: 2**40)
        patch.setattr("stun.evaluation.job.score", lambda *_: read.append(1))
        assert numbers(evaluate(again, ranks)) == numbers(whole) and not read
    assert not folder.exists()


def test_block_scaled_checkpoint(ranks, rows, tmp_path):
    """fp8 is evaluated as the bfloat16 it is read as."""
    exact = fp8(tmp_path / "fp8", "deepseek_v3", 8, 8)
    assert exact and evaluate(asking(tmp_path / "fp8", rows, tmp_path / "fp8.json"), ranks)["perplexity"] > 1


def test_fewer_rows_at_once_after_a_launch_that_was_killed(checkpoint, ranks, rows, tmp_path, monkeypatch, capsys):
    """As it is advised where a host's memory was too small; what an earlier launch had to halve is not raised again."""
    asked = asking(checkpoint("mixtral"), rows, tmp_path / "a.json")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("stun.evaluation.job.score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        evaluate(asked, ranks)
    fewer = replace(asked, task=replace(asked.task, batch=2))
    assert evaluate(fewer, ranks)["batch"] == 2 and "sequences, 2 at once" in capsys.readouterr().out
    partial = Partial(str(tmp_path / "b.json"))
    partial.open({}, {})
    assert [partial.batch("score", 8, True), partial.batch("score", 4, False), partial.batch("score", 3, True)] == [8, 8, 3]
    assert partial.batch("score", 8, True) == 3


def test_an_interrupted_evaluation_stays_on_its_hardware(tmp_path):
    partial = Partial(str(tmp_path / "a.json"))
    for device in ("H200", "H200"):
        partial.open({}, {"device": device})
        let_go()
    with pytest.raises(StunError, match=r"a\.json\.partial: began on other hardware \(device: H200 there, A100 now\)"):
        partial.open({}, {"device": "A100"})
    let_go()


def test_one_launch_at_a_time(checkpoint, ranks, rows, tmp_path):
    """A second one is refused; what a launch left that was killed after it had written its output is removed."""
    asked = asking(checkpoint("mixtral"), rows, tmp_path / "a.json")
    (tmp_path / "a.json.partial").mkdir()
    with (tmp_path / "a.json.partial" / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StunError, match=r"a\.json\.partial: another launch is at work in it"):
            evaluate(asked, ranks)
    result = evaluate(asked, ranks)
    (tmp_path / "a.json.partial").mkdir()
    assert evaluate(asked, ranks) == result and not (tmp_path / "a.json.partial").exists()


@pytest.mark.ranks
@pytest.mark.parametrize("family", ["arctic", "jamba"])
def test_one_and_two_ranks(checkpoint, ranks, rows, tmp_path, family):
    """The same numbers, to the last bit: scores beside the dense model, of rows or of text; completions."""
    dense, model = checkpoint(family), damaged(checkpoint(family), tmp_path / "model")
    text = PACKED if family == "jamba" else CalibrationConfig()
    evaluate(asking(dense, rows, tmp_path / "dense.json", text=text), ranks)
    one = evaluate(asking(model, rows, tmp_path / "one.json", text=text, dense=str(tmp_path / "dense.json")), ranks)
    own = [f"model.path={model}", f"dense={tmp_path}/dense.json", f"output={tmp_path}/two.json", f"task.path={rows}"]
    own += ["task.max_new_tokens=6", "task.batch=4"]
    own += [f"text.path={TEXT}", "text.samples=4", "text.length=24"] if text.path else []
    done = run_job("evaluate", own, 2)
    assert "KL from dense" in done.stdout and "exact match, average" in done.stdout
    two = json.loads((tmp_path / "two.json").read_text())
    assert (one["ranks"], two["ranks"]) == (1, 2) and one["agreement"]["kl"] > 0
    assert numbers(one) == numbers(two)


@pytest.mark.ranks
@pytest.mark.slow
def test_killed_on_one_rank_it_goes_on_on_two(ranks, tmp_path):
    """Killed while it scores; the layers that were finished are not run again, and the numbers are those of a whole run."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(HELDOUT.read_text().splitlines(keepends=True)[:150]))
    task = TaskConfig(path=str(rows), max_new_tokens=3, batch=32)
    whole = evaluate(EvaluateConfig(ModelConfig(str(MODEL)), task, output=str(tmp_path / "whole.json")), ranks)
    own = [f"model.path={MODEL}", f"task.path={rows}", "task.max_new_tokens=3", "task.batch=32", f"output={tmp_path}/a.json"]
    command = [sys.executable, "-m", "jobs.evaluate", *own]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as job:
        assert any("score 02/4" in line for line in job.stdout)
        job.kill()
    entries = {file.name[:11] for file in (tmp_path / "a.json.partial" / "score-32" / "progress").iterdir()}
    assert "score-00000" in entries and not (tmp_path / "a.json").exists()
    done = run_job("evaluate", own, 2)
    assert "score 01/4" not in done.stdout and numbers(json.loads((tmp_path / "a.json").read_text())) == numbers(whole)


def test_half_the_rows_where_the_gpu_is_too_small(checkpoint, ranks, rows, tmp_path, monkeypatch, capsys):
    """Which is remembered for the next launch."""
    fits, score = 2, stun.evaluation.job.score

    def small(arch, dense, sequences, size, *others):
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(arch, dense, sequences, size, *others)

    asked = asking(checkpoint("mixtral"), rows, tmp_path / "a.json", task=TaskConfig(path=str(rows), max_new_tokens=2, batch=12))
    monkeypatch.setattr("stun.evaluation.job.score", small)
    evaluate(asked, ranks)
    said = capsys.readouterr().out
    assert [f"score: out of GPU memory; {size} at once" in said for size in ("6 rows", "3 rows", "1 row")] == [True, True, True]
    fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(replace(asked, output=str(tmp_path / "b.json")), ranks)
    assert json.loads((tmp_path / "b.json.partial" / "batch.json").read_text()) == {"score": 1}


WRONG = [
    ({"task": TaskConfig()}, "nothing to evaluate"),
    ({"task": TaskConfig(path="/no/rows.jsonl")}, "no such file"),
    ({"task": TaskConfig(path="ROWS", batch=-1)}, "task.batch=-1: 0 or more"),
    ({"task": TaskConfig(path="ROWS", max_new_tokens=0)}, "task.max_new_tokens=0: 1 or more"),
    ({"task": TaskConfig(path="ROWS", rows=13)}, "task.rows=13: .* has 12"),
    ({"task": TaskConfig(path="ROWS", prompt="Q:")}, "must contain {question}"),
    ({"task": TaskConfig(path="ROWS", marker="####", number=True)}, "row 1: no number after '####'"),
    ({"task": TaskConfig(path="ROWS", marker="@@")}, "row 0: no '@@' in its answer"),
    ({"task": TaskConfig(path="ROWS", answer="reply")}, "task.answer=reply: .* has the fields .*answer"),
    ({"task": TaskConfig(path="HOLES")}, "row 1: no value in field 'answer'; remove rows without"),
    ({"task": TaskConfig(path="NUMBERS")}, "row 0: field 'answer' is int; a text is needed"),
    ({"text": replace(PACKED, path="/no/text.csv.gz")}, "text.path=/no/text.csv.gz: no such file"),
    ({"task": TaskConfig(path="/no/rows.tsv")}, "task.path=/no/rows.tsv: no such file"),
    ({"task": TaskConfig(path="ROWS", stop=[""])}, "must not be empty"),
    ({"text": replace(PACKED, length=1)}, "text.length=1: 2 or more"),
    ({"text": replace(PACKED, samples=10**6)}, "text.length=24 need"),
    ({"harness": HarnessConfig(["no_such_task"])}, "no_such_task.*not known"),
    ({"harness": HarnessConfig(["no_such_task"], "/no/folder")}, "harness.include_path=/no/folder: no such folder"),
    ({"dense": "/no/dense.json"}, "no such file"),
    ({"output": "FOLDER"}, "is a folder"),
]


@pytest.mark.parametrize(
    "changes, message",
    [pytest.param(*case, id=case[1][:30], marks=[pytest.mark.slow] if "harness" in case[0] else []) for case in WRONG],
)
def test_bad_requests_are_refused(checkpoint, ranks, rows, tmp_path, changes, message):
    lines = rows.read_text().splitlines(keepends=True)
    text = tmp_path / "rows.jsonl"
    text.write_text(lines[0] + json.dumps({"question": "q", "answer": "#### none"}) + "\n" + "".join(lines[2:]))
    task = changes.get("task")
    (tmp_path / "holes.jsonl").write_text(lines[0] + '{"question": "q", "answer": null}\n')
    (tmp_path / "numbers.jsonl").write_text('{"question": "q", "answer": 7}\n')
    files = {"ROWS": text, "HOLES": tmp_path / "holes.jsonl", "NUMBERS": tmp_path / "numbers.jsonl"}
    own = {**changes, **({"task": replace(task, path=str(files[task.path]))} if task and task.path in files else {})}
    own |= {"output": str(tmp_path)} if changes.get("output") else {}
    asked = replace(asking(checkpoint("mixtral"), rows, tmp_path / "result.json"), **own)
    with pytest.raises(StunError, match=message):
        evaluate(asked, ranks)
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "result.json.partial").exists()


def test_a_dense_result_of_something_else_is_refused(checkpoint, ranks, rows, tmp_path):
    dense, model = checkpoint("mixtral"), damaged(checkpoint("mixtral"), tmp_path / "model")
    evaluate(asking(dense, rows, tmp_path / "dense.json"), ranks)
    pair = asking(model, rows, tmp_path / "result.json", dense=str(tmp_path / "dense.json"))
    for changes, message in (
        ({"task": replace(pair.task, max_new_tokens=5)}, "another task or text .task.max_new_tokens: 6 there, 5 now"),
        ({"task": replace(pair.task, rows=5)}, "task.rows: 0 there, 5 now"),
        ({"text": PACKED}, "another task or text .sequences: "),
    ):
        with pytest.raises(StunError, match=message):
            evaluate(replace(pair, **changes), ranks)
    content = json.loads((tmp_path / "dense.json").read_text())
    for change, message in (
        ({"model": str(checkpoint("mixtral", num_hidden_layers=2))}, "has layers 2, .* 3"),
        ({"model": "/no/model"}, "its model cannot be read: model.path=/no/model"),
        ({"model": str(model)}, "has changed since it was evaluated"),
        ({"request": None}, "is not the output of an evaluation"),
    ):
        (tmp_path / "other.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(StunError, match=message):
            evaluate(replace(pair, dense=str(tmp_path / "other.json")), ranks)
    with pytest.raises(StunError, match=r"dense\.json: holds another result \(model: .*; choose another file"):
        evaluate(asking(model, rows, tmp_path / "dense.json"), ranks)


@pytest.mark.parametrize(
    "text, number, wanted",
    [
        ("so\n#### 12 \nand", False, "12"),
        ("#### 1 #### 2", False, "2"),
        ("nothing", True, None),
        ("#### none", True, None),
        ("#### $1,234.50.", True, "1234.5"),
        ("#### -3.", True, "-3"),
        ("#### 18.00 dollars, not 19", True, "18"),
        ("#### 1000000", True, "1000000"),
        ("#### -$7", True, "-7"),
        ("#### .5", True, "0.5"),
    ],
)
def test_extraction(text, number, wanted):
    assert extract(text, TaskConfig(number=number)) == wanted


def test_stops_prompts_and_the_rows_that_are_drawn(tmp_path):
    assert completion("a\nQuestion: b #### 3", TaskConfig(stop=["\nQuestion:", "#"])) == "a"
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": f"{{q}} {n}", "answer": f"#### {n}"}) + "\n" for n in range(30)))
    cfg = TaskConfig(path=str(file), rows=7, seed=1, prompt="Q: {question}\nA:")
    drawn = task_rows(cfg)
    assert drawn == task_rows(cfg) != task_rows(replace(cfg, seed=2)) and len(drawn) == 7
    assert [int(row.answer[5:]) for row in drawn] == sorted({int(row.answer[5:]) for row in drawn})
    assert all(row.prompt == f"Q: {{q}} {row.answer[5:]}\nA:" and row.group == "all" for row in drawn)
    groups = [{"task": "adding"}, {}]  # a field that only some rows have is null in the others
    file.write_text("".join(json.dumps({"question": "q", "answer": "#### 1", **own}) + "\n" for own in groups))
    assert [row.group for row in task_rows(TaskConfig(path=str(file)))] == ["adding", "all"]


def test_gsm8k(tmp_path):
    """Its own marker in every worked example, and rows in its form are read."""
    from helpers.configs import composed

    task = composed("evaluate", ["task=gsm8k", "model.path=m", "output=o"]).task
    assert (task.path, task.config, task.split) == ("openai/gsm8k", "main", "test")
    examples = task.prompt.split("Question: ")
    assert len(examples) == 6 and all(extract(shot, TaskConfig(number=True)) for shot in examples[1:5])
    assert examples[5] == "{question}\nAnswer:"
    file = tmp_path / "gsm8k.jsonl"
    file.write_text(json.dumps({"question": "How many?", "answer": "2 * 600 = <<2*600=1200>>1200\n#### 1,200"}) + "\n")
    (row,) = task_rows(TaskConfig(**{**task, "path": str(file)}))
    assert row.prompt.endswith("Question: How many?\nAnswer:") and extract(row.answer, TaskConfig(number=True)) == "1200"


@pytest.mark.slow
def test_the_harness_agrees(ranks, tmp_path):
    """Its exact match of a task on local rows is ours."""
    rows = tmp_path / "rows.jsonl"
    lines = [line for line in HELDOUT.read_text().splitlines(keepends=True) if '"task": "modulo"' in line]
    rows.write_text("".join(lines[:40]))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "heldout.yaml").write_text(HARNESS_TASK.format(rows=rows))
    task = TaskConfig(path=str(rows), max_new_tokens=64)
    harness = HarnessConfig(["stun_heldout"], str(tmp_path / "tasks"))
    found = evaluate(EvaluateConfig(ModelConfig(str(MODEL)), task, harness=harness, output=str(tmp_path / "r.json")), ranks)
    assert found["harness"]["stun_heldout"]["exact_match,marker"] == pytest.approx(sum(found["right"]) / 40)
    assert 0.5 < sum(found["right"]) / 40 < 1
