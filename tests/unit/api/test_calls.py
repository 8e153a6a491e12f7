"""Calls of the Python API: the jobs' own results, any number of times in one process that is left as it was."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase
from torch.nn.attention import SDPBackend, sdpa_kernel

import stun
from helpers.launches import run_warm
from helpers.paths import HELDOUT, TEXT
from helpers.selections import config
from helpers.stops import stopped_after
from helpers.tensors import same_tensors
from stun.api import calls
from stun.config import Budget, ExpertsConfig
from stun.pruning.job import prune
from stun.reference import MODEL
from stun.runtime.caller import torch_restored
from stun.runtime.gpus import set_arithmetic

pytestmark = pytest.mark.slow
SMALL = {"calibration": {"path": TEXT, "samples": 8, "length": 40, "micro_batch": 2}, "target": 0.4, "sparsify": "wanda"}
PAPER = {"method": "stun", "score": "reap", "fraction": 0.5, "budget": "global", "refit": False}


@pytest.fixture(scope="module")
def pruned(checkpoint, tmp_path_factory):
    """(source, run folder, summary) of a call."""
    source, run = checkpoint("mixtral"), tmp_path_factory.mktemp("api") / "run"
    return source, run, stun.prune(source, output=run, experts=PAPER, **SMALL)


def test_it_is_the_job(pruned, ranks, tmp_path):
    """The same bytes and summary; a command for the record; the finished run again."""
    source, run, summary = pruned
    job = prune(config(source, tmp_path / "job", experts=ExpertsConfig(budget=Budget["global"])), ranks)
    same_tensors(run / "model", tmp_path / "job" / "model")
    assert (summary["kept"], summary["nonzero"]) == (job["kept"], job["nonzero"])
    assert summary["command"].startswith(f"stun prune model.path={source} target=0.4 calibration.path={TEXT} ")
    assert " experts.budget=global" in summary["command"]
    assert (
        stun.prune(source, output=run, overrides=["experts=stun", "experts.budget=global"], **SMALL)
        == json.loads((run / "manifest.json").read_text())["summary"]
    )


SCRIPT = """
import sys
import stun

model, output, text = sys.argv[1:]
calibration = {"path": text, "samples": 8, "length": 40, "micro_batch": 2}
experts = {"method": "stun", "score": "reap", "fraction": 0.5, "budget": "global", "refit": False}
summary = stun.prune(model, output=output, target=0.4, calibration=calibration, experts=experts, sparsify="wanda")
result = stun.evaluate(f"{output}/model", text={"path": text, "samples": 2, "length": 16}, output=f"{output}/text.json")
print("ranks", summary["ranks"], result["tokens"])
"""


@pytest.mark.ranks
def test_several_ranks_make_the_same_calls(pruned, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run_warm([tmp_path / "script.py", pruned[0], tmp_path / "run", TEXT], ranks=2)
    assert done.stdout.count("ranks 2 30") == 2 and done.stdout.count("wrote ") == 1
    same_tensors(tmp_path / "run" / "model", pruned[1] / "model")


def test_load_uneven_counts(pruned):
    model, tokenizer = stun.load(pruned[1] / "model")
    assert len(set(pruned[2]["kept"])) > 1 and model.dtype is torch.float32
    inputs = tokenizer("one two", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    assert stun.load(str(pruned[0]), dtype=torch.bfloat16)[0].dtype is torch.bfloat16


def test_plan_of_a_run(pruned, tmp_path):
    """Its model is that of the run; a call that prunes takes it."""
    source, run, _ = pruned
    made = stun.plan(run, target=0.5, output=tmp_path / "plan.json", experts={"method": "rank", "score": "energy", "fraction": 1})
    kept = [layer.kept for layer in made.plan.layers]
    assert kept == [layer["kept"] for layer in json.loads((tmp_path / "plan.json").read_text())["layers"]] and made.nbytes > 0
    again = stun.prune(source, output=tmp_path / "run", plan=tmp_path / "plan.json", **{**SMALL, "target": 0.5})
    assert again["kept"] == list(map(len, kept))
    (tmp_path / "statistics").mkdir()
    (tmp_path / "statistics" / "config.yaml").write_text("statistics: {}\n")
    with pytest.raises(stun.StunError, match="statistics alone"):
        stun.plan(tmp_path / "statistics", target=0.5, output=tmp_path / "other.json")


def test_evaluate(pruned, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(HELDOUT.read_text().splitlines(keepends=True)[:4]))
    task = {"path": rows, "max_new_tokens": 2}
    dense = stun.evaluate(pruned[0], task=task, output=tmp_path / "dense.json")
    to_file = {"output": tmp_path / "result.json", "tracking": "tensorboard"}
    result = stun.evaluate(pruned[1] / "model", task=task, dense=tmp_path / "dense.json", **to_file)
    assert (tmp_path / "tracking" / "tensorboard").is_dir()
    assert dense["rows"] == result["rows"] == 4 and result["agreement"]["kl"] > 0
    assert json.loads((tmp_path / "result.json").read_text()) == result


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda tmp_path: stun.prune("/none", output=tmp_path / "x", **SMALL), "model.path=/none: not a folder"),
        (lambda tmp_path: stun.prune("m", output=tmp_path / "x", run_dir="y", **SMALL), "run_dir: is given twice"),
        (
            lambda tmp_path: stun.evaluate(MODEL, task={"path": HELDOUT, "marker": "</s>"}, output=tmp_path / "x"),
            "completions are read without special tokens",
        ),
        (lambda tmp_path: stun.prune("m", output=tmp_path / "x", overrides="target=1"), "'target=1': must be a list of texts"),
        (lambda tmp_path: stun.prune("m", output=tmp_path / "x", overrides=[0.5]), "must be a list of texts"),
        (lambda tmp_path: stun.prune("m", output=tmp_path / "x", overrides=5), "overrides=5: must be a list of texts"),
        (lambda tmp_path: stun.prune("m", output=tmp_path / "x", overrides=(w for w in ["target=x"])), "target: "),
        (
            lambda tmp_path: stun.prune(MODEL, output=tmp_path, target=0.5, task="reference", dense=tmp_path / "result.json"),
            "is the file of the run's own result",
        ),
        (lambda tmp_path: stun.prune("m", output=tmp_path / "x", overrides=None, tarrget=1), "tarrget: no such setting"),
        (lambda tmp_path: stun.evaluate("/none", output=tmp_path / "x"), "nothing to evaluate"),
        (
            lambda tmp_path: stun.evaluate(MODEL, task="reference", dense=tmp_path / "x", output=tmp_path / "y" / ".." / "x"),
            "is the output itself",
        ),
        (lambda tmp_path: stun.load(tmp_path / "none"), "not a folder"),
        (lambda tmp_path: stun.plan(tmp_path, output=tmp_path / "x", target=0.5), "config.yaml: cannot be read"),
    ],
)
def test_errors(tmp_path, call, says):
    with pytest.raises(stun.StunError, match=says):
        call(tmp_path)
    assert not (tmp_path / "x").exists()


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError):
        stun.prnue  # noqa: B018


def test_the_process_is_left_as_it_was(checkpoint, tmp_path):
    """Also within an application of Hydra's own, whose composition goes on; nor is the run folder locked after a failure."""
    (tmp_path / "own.yaml").write_text("number: 1\n")
    logging.getLogger("mine").setLevel(logging.INFO)

    def state() -> tuple:
        root = logging.getLogger()
        levels = (root.level, tuple(root.handlers), logging.getLogger("mine").level, logging.getLogger("transformers").level)
        hydra = (VersionBase.instance().getbase(), sorted(ConfigStore.instance().repo), GlobalHydra.instance().hydra)
        environment = {name: value for name, value in os.environ.items() if name != "KMP_DUPLICATE_LIB_OK"}  # of threadpoolctl
        return (*levels, *hydra, list(sys.argv), environment, os.getcwd())

    with initialize_config_dir(str(tmp_path), version_base="1.2", job_name="theirs"):
        before = state()
        stun.prune(checkpoint("mixtral"), output=tmp_path / "run", **SMALL)
        with pytest.raises(stun.StunError, match="no such setting"):
            stun.prune(checkpoint("mixtral"), output=tmp_path / "other", tarrget=1)
        assert state() == before and compose("own").number == 1
    assert not GlobalHydra.instance().is_initialized()


def arithmetic() -> tuple:
    """State of torch that a rank on a GPU sets."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    places = (torch.backends, cuda.matmul, cudnn, cudnn.conv, cudnn.rnn, torch.backends.mkldnn.matmul)
    return [place.fp32_precision for place in places], cudnn.deterministic, cuda.cudnn_sdp_enabled()


ASKED = {
    "nothing": lambda backends: None,
    "older setting": lambda backends: torch.set_float32_matmul_precision("high"),
    "for all": lambda backends: setattr(backends, "fp32_precision", "tf32"),
    "of products": lambda backends: setattr(backends.cuda.matmul, "fp32_precision", "tf32"),
    "of convolutions": lambda backends: setattr(backends.cudnn.conv, "fp32_precision", "ieee"),
}


@pytest.mark.parametrize("asked", ASKED)
def test_torch_is_left_as_it_was(checkpoint, monkeypatch, asked):
    """Threads and arithmetic, also those that only a GPU's ranks set; in a call they are the job's."""
    inside, tokenizer, count = [], calls.load_tokenizer, torch.get_num_threads()

    def look(place):
        set_arithmetic()
        inside.append((torch.get_num_threads(), arithmetic()))
        return tokenizer(place)

    monkeypatch.setattr(calls, "load_tokenizer", look)
    with torch_restored():
        torch.set_num_threads(count + 1)
        ASKED[asked](torch.backends)
        before = arithmetic()
        stun.load(checkpoint("mixtral"))
        assert arithmetic() == before and torch.get_num_threads() == count + 1
    ((threads, (precision, is_deterministic, has_attention)),) = inside
    assert threads == len(os.sched_getaffinity(0)) and is_deterministic and not has_attention
    assert precision[1] == "ieee" and precision[3] == "ieee"


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "device": lambda: torch.device("meta"),
    "dtype": lambda: default_dtype(torch.bfloat16),
    "attention": lambda: sdpa_kernel(SDPBackend.MATH),
}


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def modes() -> tuple:
    own = torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.get_default_device()
    return own, torch.get_default_dtype(), torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_the_caller_do_not_count(pruned, tmp_path, mode):
    """The same bytes, and the mode again after the call."""
    source, run, _ = pruned
    with MODES[mode]():
        before = modes()
        stun.prune(source, output=tmp_path / "run", experts=PAPER, **SMALL)
        assert modes() == before
    same_tensors(tmp_path / "run" / "model", run / "model")


def test_calls_of_several_threads_take_turns(pruned, tmp_path):
    source, run, _ = pruned
    with ThreadPoolExecutor(3) as pool:
        folders = [tmp_path / name for name in "abc"]
        list(pool.map(lambda folder: stun.prune(source, output=folder, experts=PAPER, **SMALL), folders))
    for folder in folders:
        same_tensors(folder / "model", run / "model")


def test_a_failed_run_is_not_locked(checkpoint, tmp_path):
    """A notebook lives on: a command may go on with its run."""
    run, lock = tmp_path / "run", tmp_path / "run" / ".lock"
    with stopped_after("observe", 1):
        stun.prune(checkpoint("mixtral"), output=run, **SMALL)
    with lock.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert stun.prune(checkpoint("mixtral"), output=run, **SMALL)["kept"]
