"""The page of the Python API runs from top to bottom."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from helpers.launches import environment
from helpers.paths import ROOT


@pytest.mark.slow
def test_the_page(tmp_path):
    """All blocks in one process, in a folder of its own; what they print is what the page says of it."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python-api.md").read_text(), re.M | re.S)
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, result = done.stdout, json.loads((tmp_path / "runs/half/result.json").read_text())
    assert "50% removed; experts kept in each layer: [" in said and "import stun" in said
    assert "#### A B C D" in said and f"-> {result['average']:.3f}, perplexity" in said and result["average"] > 0.8
    assert re.search(r"layer 3 keeps \d+ of 32 experts", said)
    assert said.splitlines()[-1] == "tarrget: no such setting; did you mean target?"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["runs"] and not (tmp_path / "runs" / "other").exists()
