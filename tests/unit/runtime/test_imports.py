"""Calls after the first import of a module, and what the command imports."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

from helpers.launches import environment
from helpers.paths import ROOT
from jobs import launch
from stun.runtime.imports import after_import


def test_the_call_follows_the_first_import(tmp_path, monkeypatch):
    (tmp_path / "some_late_module.py").write_text("seen = []\nvalue = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))

    def note() -> None:
        module = importlib.import_module("some_late_module")
        module.seen.append(module.value)

    after_import("some_late_module", note)
    importlib.util.find_spec("some_late_module")  # libraries ask so whether it is installed
    assert "some_late_module" not in sys.modules
    module = importlib.import_module("some_late_module")
    importlib.import_module("some_late_module")
    assert module.seen == [1]
    after_import("some_late_module", note)  # at once
    assert module.seen == [1, 1]
    del sys.modules["some_late_module"]


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--version"], ["--help"], ["prune", "--help"], ["prune", "tarrget=0.5"]], ids=" ".join)
def test_neither_help_nor_a_refusal_waits_for_torch(words):
    command = [sys.executable, "-X", "importtime", "-m", "stun", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    imported = set(re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.M))
    assert "stun" in imported and done.returncode == (2 if "tarrget=0.5" in words else 0)
    assert not imported & {"torch", "transformers", "numpy", "datasets"}


def test_jobs_take_no_kernels_that_happen_to_be_installed(tmp_path, monkeypatch, capsys):
    """transformers asks whether it can import them."""
    (tmp_path / "causal_conv1d.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.util.find_spec("causal_conv1d")
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    monkeypatch.setattr(sys, "argv", ["stun", "--help"])
    launch("report", None, "")
    assert importlib.util.find_spec("causal_conv1d") is None
    with pytest.raises(ImportError):
        importlib.import_module("causal_conv1d")


@pytest.mark.slow
def test_calls_from_python_take_none_either(checkpoint, tmp_path):
    """A process that has them finds them again. This one has not imported the family's module."""
    (tmp_path / "causal_conv1d.py").write_text("def causal_conv1d_fn(*_, **__):\n    raise RuntimeError('no CPU')\n")
    words = """
import stun, sys
text = {"path": stun.reference.CALIBRATION, "samples": 4, "length": 16}
stun.prune(sys.argv[1], output=sys.argv[2], experts={"drop": 0.25, "refit": False}, calibration=text)
import causal_conv1d
print(causal_conv1d.__file__)
"""
    env = {**environment(), "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    command = [sys.executable, "-c", words, checkpoint("jamba"), tmp_path / "run"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith(f"{tmp_path / 'causal_conv1d.py'}\n"), done.stderr
