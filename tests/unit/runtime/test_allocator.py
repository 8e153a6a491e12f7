"""The GPU's allocator is told to join freed blocks before torch starts, unless the user tells it something."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers.paths import ROOT

NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, ["expandable_segments:True", None]),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:99"}, [None, "max_split_size_mb:99"]),
    ],
    ids=["nothing", "another setting"],
)
def test_the_allocators_setting(given, found):
    env = {key: value for key, value in os.environ.items() if key not in NAMES} | given
    code = f"import os, stun; print([os.environ.get(name) for name in {NAMES}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(found)
