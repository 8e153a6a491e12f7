"""An interrupted run goes on with the hardware that it began with, or with other where that is allowed; on pretend GPUs."""

from __future__ import annotations

import pytest
import yaml

from helpers.launches import run_pretend, settings

pytestmark = pytest.mark.slow
STOPPED = """
import sys
from helpers.stops import stopped_after
from stun.pruning.job import prune
from stun.runtime.ranks import Ranks
from stun.settings.compose import composed
with Ranks() as ranks, stopped_after("observe", 1):
    prune(composed("prune", sys.argv[1:]), ranks)
"""


def hardware(run_dir) -> list[str]:
    used = yaml.safe_load((run_dir / "config.yaml").read_text())["hardware"]
    assert all(record["computed_in"] == "float32" for record in used)
    return [record["device"] for record in used]


def test_an_interrupted_run_stays_on_its_hardware(checkpoint, tmp_path):
    run_dir = tmp_path / "run"
    arguments = settings(checkpoint("mixtral"), run_dir, calibration__samples=4, calibration__length=12)
    prune = ["-m", "jobs.prune", *arguments]
    (tmp_path / "stopped.py").write_text(STOPPED)
    run_pretend([tmp_path / "stopped.py", *arguments], PRETEND_GPU="NVIDIA H200")
    done = run_pretend(prune, check=False, PRETEND_GPU="NVIDIA A100")
    said = f"error: run_dir={run_dir}: began on other hardware (device: NVIDIA H200 there, NVIDIA A100 now); go on there, or with"
    assert done.returncode == 2 and said in done.stderr
    done = run_pretend([*prune, "device=cpu"], check=False)
    assert done.returncode == 2 and "device: NVIDIA H200 there, CPU " in done.stderr and "cuda: 13.0 there" in done.stderr
    assert hardware(run_dir) == ["NVIDIA H200"]
    run_pretend([*prune, "allow_other_hardware=true"], PRETEND_GPU="NVIDIA A100")
    assert hardware(run_dir) == ["NVIDIA H200", "NVIDIA A100"]
    assert "complete already" in run_pretend([*prune, "device=cpu"]).stdout, "a complete run is the same everywhere"
