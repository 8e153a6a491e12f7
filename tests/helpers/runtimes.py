"""Runtimes that are there at once."""

from __future__ import annotations

import json
from pathlib import Path

from stun.serving.job import PROMPTS


def silent_vllm(folder: Path) -> Path:
    """A Python of a vLLM, `runtime` in the folder, that answers every prompt with nothing."""
    answer = json.dumps({"tokens": [[]] * len(PROMPTS), "versions": {"vllm": "0"}})
    python = folder / "runtime"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || echo \'{answer}\' > "$3"\n')
    python.chmod(0o755)
    return python
