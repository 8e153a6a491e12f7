"""The largest models of today, from their headers alone: preflight needs little memory, and less than half a minute."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers.launches import environment
from helpers.paths import TEXT
from helpers.published_shapes import SHAPES, write

WHY = "STUN_ALL_FAMILIES: not set, and each shape takes a minute to lay out"
# Runs a command; prints the processor seconds and the peak memory in GiB of it and its children.
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("STUN_ALL_FAMILIES"), reason=WHY)
@pytest.mark.parametrize("model_type", SHAPES)
def test_preflight_of_a_published_shape(tmp_path, model_type):
    source = write(tmp_path / "model", model_type)
    words = [f"model.path={source}", f"calibration.path={TEXT}", "calibration.samples=8", "calibration.length=64"]
    words += ["target=0.4", f"run_dir={tmp_path / 'run'}", "cluster.nodes=2", "cluster.gpus=8", "cluster.gpu=h200"]
    words += ["cluster.host_gib=2000", "cluster.read_gib_s=5"]
    command = [sys.executable, "-m", "stun", "preflight", *words]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command], env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 or "disk" in done.stderr, done.stdout + done.stderr  # of this machine it may be too small
    seconds, peak = map(float, done.stdout.splitlines()[-1].split())
    print(f"{model_type}: {seconds:.1f} processor seconds, {peak:.2f} GiB")
    assert "experts a layer" in done.stdout and peak < 2
