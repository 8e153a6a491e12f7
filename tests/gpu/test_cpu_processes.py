"""Tests are CPU processes, and asking for a GPU starts no CUDA that a fork could not use."""

from __future__ import annotations

import os

import pytest

import stun  # noqa: F401


def test_a_gpu_is_asked_of_the_drivers_library_alone():
    assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"


def test_no_gpu_is_visible_to_tests_of_cpus(request):
    if "gpu" in request.config.option.markexpr:
        pytest.skip("GPUs were asked for")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
