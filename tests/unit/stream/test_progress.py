"""Progress where there is no terminal."""

from __future__ import annotations

import sys

import pytest

from stun.stream.progress import Progress


class Log:
    """What scripts put in the place of stdout."""

    write = flush = lambda *_: None


@pytest.mark.parametrize("stdout", [None, Log()], ids=["closed", "a log"])
def test_any_stdout(ranks, monkeypatch, stdout):
    monkeypatch.setattr(sys, "stdout", stdout)
    progress = Progress("prune", 2, ranks, first=1)
    progress.close()
