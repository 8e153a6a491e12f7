"""Work in a child: its answers, its errors, and its end."""

from __future__ import annotations

import faulthandler
import os
import signal
from pathlib import Path

import pytest

from stun.runtime import child as module
from stun.runtime.child import Ended, child


def children() -> set[str]:
    """Processes that this one has begun and that are not gone."""
    return {number for task in Path("/proc/self/task").iterdir() for number in (task / "children").read_text().split()}


def work(request: str) -> object:
    faulthandler.disable()  # pytest's
    if request == "abort":
        os.kill(os.getpid(), signal.SIGABRT)
    if request == "memory":
        return len(b"x" * 2**36)
    if request == "for ever":
        while True:
            pass
    return {"twice": 2 * int(request)}


def test_answers_errors_and_ends(monkeypatch):
    """... of one child, but where it ends."""
    monkeypatch.setattr(module, "SECONDS", 1)
    before = children()
    with child(work) as ask:
        assert children() == before, "nothing is asked yet"
        assert ask("2") == {"twice": 4}
        with pytest.raises(Ended, match="invalid literal for int"):
            ask("two")
        with pytest.raises(Ended, match="MemoryError"):
            ask("memory")
        assert ask("3") == {"twice": 6}
        with pytest.raises(Ended, match="takes more than 1 seconds"):
            ask("for ever")
    with child(work) as ask, pytest.raises(Ended, match="ends its process"):
        ask("abort")
    assert children() == before


def test_a_child_that_is_not_asked_is_not_begun(monkeypatch):
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    with child(work):
        pass
