"""The lm-evaluation-harness' own command on a checkpoint whose layers keep different numbers of experts."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest

from helpers.harness import LIKELIHOOD_TASK
from helpers.pages import commands, page
from helpers.uneven import pruned, steep
from stun.config import SparsifyConfig
from stun.evaluation.config import HarnessConfig
from stun.evaluation.lm_eval import run_harness

TEXTS = ("One and one is two.", "The sky over the port was grey.", "3 * 4 = 12")


@pytest.mark.slow
def test_its_command_measures_what_this_package_does(tmp_path, ranks):
    """`lm_eval --model hf` with trust_remote_code, in a process that does not import this package, and `harness.tasks`."""
    folder, kept = pruned(steep(tmp_path / "source", "mixtral"), tmp_path / "run", ranks, target=0.199, sparsify=SparsifyConfig())
    assert len({len(experts) for experts in kept}) > 1
    rows, tasks = tmp_path / "rows.jsonl", tmp_path / "tasks"
    rows.write_text("".join(json.dumps({"question": text}) + "\n" for text in TEXTS))
    tasks.mkdir()
    (tasks / "text.yaml").write_text(LIKELIHOOD_TASK.format(rows=rows))
    places = {name: str(tmp_path / name) for name in ("HF_MODULES_CACHE", "HF_DATASETS_CACHE")}
    environment = {**os.environ, **places, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    _, shown = commands("uneven", page("serving"))[0].splitlines()  # the command of the page, with another folder and task
    words = shlex.split(shown.replace("runs/best/model", str(folder)).replace("gsm8k", "stun_text"))
    assert words[:2] == ["lm_eval", "run"]
    command = [*words[2:], "--include_path", str(tasks), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lm_eval", "run", *command, "--batch_size", "1", "--output_path", str(tmp_path / "out")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]["stun_text"]
    ours = run_harness(folder, HarnessConfig(["stun_text"], str(tasks)), ranks)["stun_text"]
    for metric in ("bits_per_byte,none", "byte_perplexity,none"):
        assert theirs[metric] == pytest.approx(ours[metric], rel=1e-5) and theirs[metric] > 1
