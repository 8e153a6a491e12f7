"""The hardware in a run folder's config.yaml."""

from __future__ import annotations

import pytest
import torch
import transformers
import yaml

from stun.config import StunError
from stun.run.folder import Run
from stun.run.identity import hardware
from stun.run.lock import let_go
from stun.runtime.cpu import multiplies_bfloat16

GPU, OTHER = {"device": "H200", "torch": "2.11"}, {"device": "H200", "torch": "2.12"}


@pytest.fixture
def opened(tmp_path):
    """`opened(hardware, ...)`: the records of hardware after a launch on it."""

    def launch(*arguments) -> list[dict]:
        try:
            Run.open(str(tmp_path), {"config": {}}, *arguments)
        finally:
            let_go()
        return yaml.safe_load((tmp_path / "config.yaml").read_text())["hardware"]

    return launch


def test_other_hardware_is_refused_or_recorded(opened):
    assert opened(GPU) == opened(GPU) == [GPU]
    with pytest.raises(StunError, match=r"began on other hardware \(torch: 2.11 there, 2.12 now\)"):
        opened(OTHER)
    assert opened(OTHER, True) == [GPU, OTHER]
    assert opened(GPU) == [GPU, OTHER]


def test_hidden_states_of_another_dtype_are_refused_at_once(opened):
    """... whatever is allowed: no layer could go on from them."""
    cpu, gpu = {"device": "CPU", "computed_in": "float32"}, {"device": "H200", "computed_in": "bfloat16"}
    opened(cpu)
    said = r"\(computed_in: float32 there, bfloat16 now; device: .*\); go on there, or where layers are computed in float32"
    with pytest.raises(StunError, match=said):
        opened(gpu, True)
    assert opened({**gpu, "computed_in": "float32"}, True)[0] == cpu


def test_hardware_names_what_bits_depend_on(ranks, monkeypatch):
    """The vectors of a CPU, its vendor, the dtype; and also where ranks differ."""
    found = hardware(ranks, torch.float32)
    assert found["computed_in"] == "float32" and found["torch"] == torch.__version__
    assert found["transformers"] == transformers.__version__
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "OTHER")
    monkeypatch.setattr("stun.runtime.cpu.multiplies_bfloat16", multiplies_bfloat16.__wrapped__)  # not what it found before
    monkeypatch.setattr("stun.runtime.cpu._cpuinfo", lambda: {"vendor_id": "Somebody", "flags": "amx_bf16"})
    other = hardware(ranks, torch.float32)
    assert other["device"] == "CPU Somebody OTHER with fast bfloat16" != found["device"]
    gpu = {"device": "H200", "cuda": "13.0", "torch": found["torch"], "computed_in": "bfloat16"}
    monkeypatch.setattr(ranks, "gather_objects", lambda own: [own, gpu])
    mixed = hardware(ranks, torch.float32)
    assert mixed["cuda"] == "13.0" and mixed["device"].endswith(" and H200") and mixed["computed_in"] == "bfloat16 and float32"


def test_runs_of_older_versions_go_on(opened, tmp_path):
    opened(GPU)
    (tmp_path / "config.yaml").write_text("config: {}\n")
    assert opened(OTHER) == [OTHER]


def test_a_damaged_record_is_named(opened, tmp_path):
    opened(GPU)
    for damaged in ("3", "[3]"):
        (tmp_path / "config.yaml").write_text(f"{{config: {{}}, hardware: {damaged}}}\n")
        with pytest.raises(StunError, match="hardware: must be a list"):
            opened(GPU)
