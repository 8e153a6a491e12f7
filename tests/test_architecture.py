"""Imports point downward only, and every configuration composes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

import stun.config
import stun.planning.validation

ROOT = Path(__file__).resolve().parent.parent
ORDER = [
    {"config", "cpu"},
    {"inputs", "validation"},
    {
        "families",
        "layout",
        "plan",
        "stats",
        "powers",
        "select_kernel",
        "headers",
        "meter",
        "trackers",
        "batches",
        "lock",
        "workers",
        "products",
        "transfer",
    },
    {"plausible", "records"},
    {"sweep", "checkpoint", "ranks", "sparsify", "data", "serving", "table", "figure", "models", "experts"},
    {"names", "owned", "identity", "compressed", "steady", "ledger", "tracking", "saliency", "task", "speeds"},
    {"statistics", "partial", "harness"},
    {"run"},
    {"arch", "card"},
    {"budget", "exchange", "precision", "asked"},
    {"stream"},
    {"activations", "hardware", "outside"},
    {"protect", "moments", "shards", "progress", "allocation", "snapshots", "measure"},
    {"reconstruct", "outliers", "recorder", "traffic"},
    {"mask", "room"},
    {"planning", "scoring", "generate"},
    {"planfile", "passes", "search"},
    {"request", "outcome", "evaluate"},
    {"footprint"},
    {"duration"},
    {"preflight"},
    {"prune", "worlds"},
    {"study", "benchmark", "report"},
]
PURE = {"stats", "powers", "plan", "clusters", "distances", "scores", "select"}
PURE |= {"sparsegpt", "alps", "swaps", "refit", "matrix", "ratios"}
PURE_IMPORTS = {
    "torch",
    "numpy",
    "scipy",
    "stun",
    "__future__",
    "collections",
    "contextlib",
    "dataclasses",
    "json",
    "math",
    "pathlib",
    "threading",
}
PURE_FROM_STUN = {"config", "inputs", "plan", "experts", "sparsify", "select_kernel"}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules() -> dict[str, set[str]]:
    return {file.stem: imported(file) for file in (ROOT / "stun").glob("*.py") if file.stem != "__init__"}


def pure_modules() -> dict[str, set[str]]:
    files = [file for room in ("experts", "sparsify") for file in (ROOT / "stun" / room).glob("*.py")]
    own = {file.stem: imported(file) for file in files if file.stem != "__init__"}
    return own | {name: imports for name, imports in modules().items() if name in PURE}


def test_every_module_has_a_place():
    assert modules().keys() | {"models", "experts", "sparsify", "report", "benchmark"} == set().union(*ORDER)


def test_arrows_point_down():
    level = {name: depth for depth, names in enumerate(ORDER) for name in names}
    for name, imports in modules().items():
        for other in level:
            if f"stun.{other}" in imports and other != name:
                assert level[other] < level[name], f"{name} imports {other}"


def test_only_their_owners_import_the_frameworks():
    for name, imports in modules().items():
        roots = {i.split(".")[0] for i in imports}
        assert "deepspeed" not in roots or name == "ranks"
        assert "torch.distributed" not in imports or name == "ranks"
        assert not roots & {"hydra", "omegaconf"} or name in ("config", "sweep")
    for name, imports in pure_modules().items():
        roots = {i.split(".")[0] for i in imports}
        assert name in PURE and roots <= PURE_IMPORTS, name
        own = {i.split(".")[1] for i in imports if i.startswith("stun.")}
        assert own <= PURE_FROM_STUN, name
    for file in (ROOT / "jobs").glob("*.py"):
        assert not any(i.startswith("jobs.") and i != "jobs.launch" for i in imported(file)), file


def composed(job: str, overrides: list[str]):
    stun.config.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(job, overrides)


@pytest.mark.parametrize("name", sorted(f.stem for f in (ROOT / "conf" / "experiment").glob("*.yaml")))
@pytest.mark.parametrize("job", ["prune", "compare", "preflight"])
def test_every_experiment_composes(job, name):
    missing = ["model.path=m", "calibration.path=c", "run_dir=r", "task.path=t"][: 4 if job == "compare" else 3]
    cfg = composed(job, [f"experiment={name}", *missing])
    typed = OmegaConf.to_object(cfg)
    assert isinstance(typed, stun.config.PruneConfig)
    stun.planning.validation.validate(typed)


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
