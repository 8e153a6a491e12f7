"""What jobs.prune refuses, jobs.preflight and jobs.observe refuse in the same words, before anything is written."""

from __future__ import annotations

import json
import re

import pytest
from omegaconf import OmegaConf

import jobs.preflight
from helpers import configs
from helpers.paths import TEXT
from stun.config import StunError
from stun.planning.job import resolve
from stun.pruning.job import prune, take_statistics

# A name: the words on the command line, and what the error says. {tmp} is a folder with the files below.
BAD = {
    "ratios of no file": ("sparsify.ratios=/nonexistent.json", "sparsify.ratios=/nonexistent.json"),
    "ratios of too few layers": ("sparsify.ratios={tmp}/ratios.json", "a list of 3 numbers from 0 to 1 is needed"),
    "a pattern that the width does not hold": ("sparsify.pattern=3:7", "sparsify.pattern=3:7: .* not a multiple of 7"),
    "no pattern at all": ("sparsify.pattern=4:2", "sparsify.pattern=4:2"),
    "a pattern with ratios": ("sparsify.pattern=2:4 sparsify.ratios=owl", "keep ratios uniform"),
    "no such text": ("calibration.path=/nonexistent.jsonl", "calibration.path=/nonexistent.jsonl: no such file"),
    "no text": ("calibration.path=", "calibration.path="),
    "a text that is too short": ("calibration.path={tmp}/short.jsonl", "tokens, but 8 samples of calibration.length=32 need 256"),
    "a field that is not there": ("calibration.field=nothing", "calibration.field=nothing"),
    "too few samples to hold any out": ("experts.fraction=auto calibration.samples=4", "8 are needed to hold some out"),
    "a target out of range": ("target=1.5", r"target=1.5: total sparsity lies in \[0, 1\)"),
    "a target that experts cannot meet": ("target=0.95 experts.fraction=1", "at most .* can be"),
    "a target that the scope cannot meet": ("target=0.9 experts.fraction=0 sparsify.scope=[attention]", "not reachable"),
    "a plan of no file": ("plan=/nonexistent.json", "/nonexistent.json"),
    "a plan that is none": ("plan={tmp}/ratios.json", "ratios.json"),
    "statistics of no folder": ("statistics=/nonexistent", "/nonexistent/stats: holds no complete statistics"),
    "an expert that is none": ("experts.protect.experts=[L9E1]", "names no expert"),
    "a source that is none": ("+experts.source_weights={{code:1}}", "experts.source_weights"),
    "no micro-batch": ("calibration.micro_batch=0", "calibration.micro_batch=0"),
    "no model": ("model.path=/nonexistent", "/nonexistent"),
    "no model of experts": ("model.path={tmp}", "{tmp}"),
    "a project that W&B takes for none": ("tracking.project=a/b", "tracking.project=a/b"),
}
# What jobs.observe does not read: its statistics serve every target, plan and pattern.
UNREAD = ("pattern", "plan", "target", "statistics", "samples to hold")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "ratios.json").write_text("[0.5]")
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "too short"}) + "\n")
    return tmp_path


def composed(job: str, words: str, source, folder):
    usual = [f"model.path={source}", f"calibration.path={TEXT}", "calibration.samples=8", "calibration.length=32"]
    usual += ["target=0.4", f"run_dir={folder}/run"]
    return OmegaConf.to_object(configs.composed(job, [*usual, *words.format(tmp=folder).split()]))


def refusal(call) -> str:
    with pytest.raises(StunError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("name", BAD)
def test_the_same_words_everywhere(name, checkpoint, folder, ranks):
    words, says = BAD[name]
    source = checkpoint("mixtral")
    before = sorted(file.name for file in folder.iterdir())
    pruning = refusal(lambda: prune(composed("prune", words, source, folder), ranks))
    assert refusal(lambda: jobs.preflight.work(composed("preflight", words, source, folder), ranks)) == pruning
    if not any(unread in name for unread in UNREAD):
        assert refusal(lambda: take_statistics(composed("observe", words, source, folder), ranks)) == pruning
    assert re.search(says.format(tmp=folder), pruning), pruning
    assert sorted(file.name for file in folder.iterdir()) == before


def test_a_good_request_is_resolved_once(checkpoint, folder, ranks):
    job = resolve(composed("prune", "experts.fraction=auto", checkpoint("mixtral"), folder), ranks)
    assert job.fractions and job.samples.tokens_ST.shape == (8, 32) and not job.is_finished
    split = job.with_fraction(0.5)
    assert split.cfg.experts.fraction == 0.5 and not split.fractions and sum(split.drops) > sum(job.drops)
