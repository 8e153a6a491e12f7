"""Settings of the Python API become words of the command line that mean the same, and unknown names are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from stun.api.words import Names, written
from stun.config import Scope, Score, StunError
from stun.evaluation.config import PruneAndEvaluateConfig
from stun.settings.compose import composed

NEEDED = {"model": "m", "calibration": "c", "target": 0.5, "run_dir": "r"}
TEXTS = st.text(st.sampled_from("ab'\"\\ =,:[]{}()#~@?*|+-./\n\té1")).filter(lambda text: "${" not in text)
VALUES = st.recursive(
    st.one_of(TEXTS, st.integers(), st.floats(allow_nan=False), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_-]{0,5}", fullmatch=True), inner)),
)


def read(text: str) -> object:
    """The value that Hydra reads."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {str(key): plain(entry) for key, entry in value.items()}
        return [plain(entry) for entry in value] if isinstance(value, list) else getattr(value, "text", value)

    return plain(OverridesParser.create().parse_override(f"key={text}").value())


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_hydra_reads_what_was_given(value):
    assert read(written(value)) == value


def test_other_kinds_of_values():
    assert [read(written(value)) for value in (Path("/a b/c"), np.float32(0.5), np.int64(3), Score.energy, [Scope.mlp])] == [
        "/a b/c",
        0.5,
        3,
        "energy",
        ["mlp"],
    ]
    for value in (object(), {"a b": 1}, {1: 2}):
        with pytest.raises(StunError):
            written(value)


def prune_config(**changes) -> PruneAndEvaluateConfig:
    return composed("prune", Names("prune").words({**NEEDED, **changes}))


def test_settings_are_those_of_the_command():
    """Groups by name, single values by mappings, files in the place of settings that have a path."""
    mixture = {"math": {"path": "a.jsonl", "weight": 2}, "code": {"path": "b.jsonl"}}
    cfg = prune_config(
        experiment="best",
        target=0.3,
        sparsify="sparsegpt",
        experts={"score": "ean", "protect": {"experts": ["L0E3"]}, "source_weights": {"code": 0.5}},
        calibration={"mixture": mixture, "samples": 9},
        tracking="wandb_offline",
    )
    assert (cfg.target, cfg.model.path, cfg.run_dir) == (0.3, "m", "r")
    assert (cfg.sparsify.method.name, cfg.sparsify.reconstruct, cfg.tracking.wandb.name) == ("sparsegpt", False, "offline")
    assert (cfg.experts.method.name, cfg.experts.budget.name, cfg.experts.score.name) == ("rank", "global", "ean")
    assert cfg.experts.protect.experts == ["L0E3"] and cfg.experts.source_weights == {"code": 0.5}
    assert {name: source.weight for name, source in cfg.calibration.mixture.items()} == {"math": 2.0, "code": 1.0}
    assert (cfg.calibration.samples, cfg.calibration.length) == (9, 2048)


def test_defaults_are_those_of_the_command():
    words = ["model.path=m", "calibration.path=c", "target=0.5", "run_dir=r"]
    assert prune_config() == composed("prune", words)


def test_an_evaluation():
    words = Names("evaluate").words({"model": "m", "task": "gsm8k", "text": Path("t.txt"), "output": "o"})
    assert words == ["model.path=m", "task=gsm8k", "text.path=t.txt", "output=o"]
    assert composed("evaluate", words).task.path == "openai/gsm8k"


def test_paths_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    calibration = {"mixture": {"a": {"path": "~/a.jsonl"}, "b": {"path": Path("~/b.jsonl")}}}
    cfg = prune_config(model="~/m", run_dir=Path("~/r"), calibration=calibration)
    assert (cfg.model.path, cfg.run_dir) == ("/home/me/m", "/home/me/r")
    assert [source.path for source in cfg.calibration.mixture.values()] == ["/home/me/a.jsonl", "/home/me/b.jsonl"]
    assert prune_config(model="a~/m").model.path == "a~/m"


@pytest.mark.parametrize(
    "given_, says",
    [
        ({"tarrget": 0.5}, "tarrget: no such setting; did you mean target?"),
        ({"tarrget": None}, "tarrget: no such setting; did you mean target?"),
        ({"experts": {"scroe": "ean"}}, "experts.scroe: no such setting; did you mean experts.score?"),
        ({"experiment": "bset"}, "experiment=bset: known are arctic, best, demo, mixtral, paper, quick, qwen3"),
        ({"sparsify": "sparsegtp"}, "wanda; a mapping sets single values"),
        ({"experts": 3}, "experts=3: must be a mapping of settings, such as {'method': ...}"),
        ({"calibration": ["some text"]}, "=['some text']: must be a file of text or a dataset's name, or a mapping of settings"),
        ({"calibration": ["some text"] * 10**4}, "'some t... (list): must be a file of text"),
        ({"calibration": {"path": ["some text"] * 10**4}}, "'some t... (list): must be a text"),
        ({"model": torch.nn.Sequential(*[torch.nn.Linear(2, 2)] * 9)}, "(Sequential): must be a checkpoint's folder or its name"),
        ({"target": torch.zeros(400)}, "(Tensor): settings are texts, paths, numbers"),
        ({"launcher": "slurm"}, "launcher: is for the command line alone"),
        ({"experts": {"score": "enegry"}}, "experts.score: Invalid value 'enegry'"),
        ({"run_dir": None}, "run_dir: is needed"),
    ],
)
def test_what_is_refused(given_, says):
    with pytest.raises(StunError) as caught:
        prune_config(**given_)
    assert says in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
