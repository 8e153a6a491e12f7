"""What has no device to choose does not fail for want of one: a GPU that torch cannot use."""

from __future__ import annotations

import pytest
import torch

import jobs
import stun
from stun.config import Device, StunError
from stun.report.config import ReportConfig
from stun.runtime import gpus, process


@pytest.fixture(autouse=True)
def unusable(monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(gpus, "_FILES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(process, "_started", [])
    with pytest.raises(StunError, match="device=cpu computes on the CPU"):
        process.process_ranks()


def test_a_report_is_written():
    found = []
    jobs._start(lambda cfg, started: found.append(started.device.type), ReportConfig("runs"))
    assert found == ["cpu"]


def test_a_model_is_loaded_and_the_device_stays_open(checkpoint):
    assert stun.load(checkpoint("mixtral"))[0].dtype is torch.float32
    assert not process._started and process.process_ranks(Device.cpu).device.type == "cpu"
