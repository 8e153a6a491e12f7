"""Copies between the host and a device, where the device is the host."""

from __future__ import annotations

import torch

from stun.runtime.device_copies import to_device, to_host


def test_on_cpus_nothing_is_copied():
    tensor = torch.randn(3)
    assert to_device(tensor, torch.device("cpu")) is tensor and to_host(tensor) is tensor
