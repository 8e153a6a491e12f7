"""Imports point downward only, and every configuration composes."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

import stun.config
import stun.planning.validation
from helpers.configs import composed
from helpers.paths import ROOT

# A package may import those before it; config and files are modules.
ORDER = (
    "config < files < schema < runtime < sparsify, data, checkpoint, tracking < model < stream < run < statistics < planning"
    " < preflight < evaluation < serving < report < pruning < benchmark, reference < settings < api"
)
PURE = ("sparsify", "planning/experts")
PURE_IMPORTS = {"torch", "numpy", "scipy", "__future__", "collections", "contextlib", "dataclasses", "functools", "json", "math"}
PURE_IMPORTS |= {"threading", "typing"}
PURE_FROM_STUN = {"stun.config", "stun.runtime.matmul", "stun.runtime.threads", "stun.planning.plan"}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "stun" else {node.module}
    return names


def library() -> dict[Path, set[str]]:
    return {file.relative_to(ROOT / "stun"): imported(file) for file in (ROOT / "stun").rglob("*.py")}


def test_packages_import_those_before_them():
    level = {name: depth for depth, names in enumerate(ORDER.split(" < ")) for name in names.split(", ")}
    packages = {file.parts[0].removesuffix(".py") for file in library()} - {"__init__", "__main__", "cli"}
    assert packages == set(level)
    for file, imports in library().items():
        own = file.parts[0].removesuffix(".py")
        others = {name.split(".")[1] for name in imports if name.startswith("stun.")} - {own}
        assert own not in level or all(level[other] < level[own] for other in others), f"{file} imports {others}"


def test_the_root_is_small_and_every_package_says_what_it_is_for():
    assert len(list((ROOT / "stun").glob("*.py"))) <= 5
    for file in (ROOT / "stun").glob("*/__init__.py"):
        assert ast.get_docstring(ast.parse(file.read_text())), file


def test_only_their_owners_import_the_frameworks():
    for file, imports in library().items():
        roots, name = {i.split(".")[0] for i in imports}, file.as_posix()
        assert "deepspeed" not in roots or name == "runtime/ranks.py"
        assert "torch.distributed" not in imports or name == "runtime/ranks.py"
        assert (
            not roots & {"hydra", "omegaconf"}
            or name.endswith("config.py")
            or name.startswith("settings/")
            or name in ("run/sweep.py", "reference/train.py")
        ), name
        if name.startswith(PURE):
            assert roots - {"stun", "triton"} <= PURE_IMPORTS, name
            assert {
                i
                for i in imports
                if i.startswith("stun.") and not i.startswith(tuple(f"stun.{p.replace('/', '.')}" for p in PURE))
            } <= PURE_FROM_STUN, name
    for file in (ROOT / "jobs").glob("*.py"):
        assert not any(i.startswith("jobs.") and i != "jobs.launch" for i in imported(file)), file


def test_git_ignores_what_jobs_and_builds_write():
    written = ["build/x", "dist/x", "slurm-12.out", "runs/x", "outputs/x", "multirun/x", "stun_moe.egg-info/x"]
    ignored = subprocess.run(
        ["git", "check-ignore", *written, "tests/runs/x", "stun/run/x"], cwd=ROOT, capture_output=True, text=True
    )
    assert ignored.stdout.split() == written


@pytest.mark.parametrize("name", sorted(f.stem for f in (ROOT / "conf" / "experiment").glob("*.yaml")))
@pytest.mark.parametrize("job", ["prune", "compare", "preflight"])
def test_every_experiment_composes(job, name):
    missing = ["model.path=m", "calibration.path=c", "run_dir=r", "target=0.6", "task.path=t"][: 5 if job == "compare" else 4]
    cfg = composed(job, [f"experiment={name}", *missing])
    typed = OmegaConf.to_object(cfg)
    assert isinstance(typed, stun.config.PruneConfig)
    stun.planning.validation.validate(typed)


def test_a_named_option_replaces_that_of_an_experiment():
    cfg = composed("prune", ["experiment=best", "experts=stun", "sparsify=sparsegpt"])
    assert (cfg.experts.method.name, cfg.sparsify.method.name, cfg.experts.score.name) == ("stun", "sparsegpt", "energy")


@pytest.mark.parametrize("value", ["0", "1", "0.25", "auto"])
def test_fractions_on_the_command_line(value):
    typed = OmegaConf.to_object(
        composed("prune", [f"experts.fraction={value}", "model.path=m", "calibration.path=c", "target=0.4", "run_dir=r"])
    )
    stun.planning.validation.validate(typed)
    assert str(typed.experts.fraction) == value


@pytest.mark.parametrize("wrong", ["experts.fractoin=0.3", "tarrget=0.4", "experts.budget=globl", "calibration.samples=few"])
def test_wrong_keys_and_values_are_refused(wrong):
    with pytest.raises(ConfigCompositionException):
        composed("prune", [wrong])
