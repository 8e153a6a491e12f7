"""The wheel, in an environment of its own: the commands of the README from an empty folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from helpers.launches import environment
from helpers.pages import commands
from helpers.paths import ROOT
from helpers.tensors import load_tensors

BUILT = ("stun", "jobs", "conf", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def stun(tmp_path_factory) -> list[str]:
    """The command of a wheel that was built from a copy of the repository and installed into a new environment, where the
    libraries that it needs are found in this one."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in BUILT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "source" / name, **({"symlinks": True} if (ROOT / name).is_dir() else {}))
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder / "dist", folder / "source"], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    python = folder / "env" / "bin" / "python"
    (wheel,) = (folder / "dist").glob("*.whl")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    (packages,) = (folder / "env" / "lib").glob("*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return [str(folder / "env" / "bin" / "stun")]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    own = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env={**own, "COLUMNS": "100"}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_prune_from_an_empty_folder(stun, tmp_path):
    """A run with the files that travel with the wheel, and none of the repository's."""
    assert "experts.keep=" in run([*stun, "prune", "--help"], tmp_path).stdout
    small = ["calibration.samples=8", "calibration.length=32", "calibration.micro_batch=2", "run_dir=run"]
    done = run([*stun, "prune", "model=reference", "calibration=reference", "target=0.5", "experiment=quick", *small], tmp_path)
    assert "32 -> " in done.stdout and (tmp_path / "run" / "manifest.json").is_file()
    loaded = (
        "import os, stun, transformers; m = transformers.AutoModelForCausalLM.from_pretrained('run/model'); print(stun.__file__)"
    )
    where = run([str(Path(stun[0]).with_name("python")), "-c", loaded], tmp_path).stdout
    assert "site-packages" in where and not where.startswith(str(ROOT))


@pytest.mark.slow
def test_demo(stun, tmp_path):
    """The README's command ends in its table and the path of a page."""
    (command,) = commands("demo")
    assert command.endswith("-m venv .venv && .venv/bin/pip install -q . && .venv/bin/stun demo")
    output = run([*stun, "demo"], tmp_path).stdout
    results = json.loads((tmp_path / "runs" / "demo" / "comparison.json").read_text())
    assert list(results) == ["dense", "STUN", "experts only", "weights only"]
    dense, both, weights = (results[name]["average"] for name in ("dense", "STUN", "weights only"))
    print(output)
    assert results["dense"]["rows"] >= 1000
    assert dense >= 0.90
    assert both >= weights + 0.03  # four standard errors of the paired difference over 1,000 prompts
    for name in list(results)[1:]:
        assert abs(results[name]["prune"]["sparsity"] - 0.5) < 1e-4
        tensors = load_tensors(tmp_path / "runs" / "demo" / name.lower().replace(" ", "-") / "model")
        inside = {key: t for key, t in tensors.items() if ".layers." in key}
        assert sum(int(t.count_nonzero()) for t in inside.values()) == results[name]["prune"]["nonzero"]
    report = tmp_path / "runs" / "demo" / "report" / "index.html"
    assert report.is_file() and output.splitlines()[-1] == "runs/demo/report/index.html"
    for line in (
        "exact match, average",
        "perplexity",
        "KL from dense",
        "same first choice",
        "error of the last layer",
        "nonzero share",
        "experts kept",
        "seconds to prune",
        "peak memory",
    ):
        assert line in output
