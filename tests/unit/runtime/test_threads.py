"""Work that a rank's threads share."""

from __future__ import annotations

import time
from threading import Barrier

import pytest
import torch

from stun.runtime.threads import Workers


@pytest.fixture
def workers(monkeypatch) -> Workers:
    monkeypatch.setattr("stun.runtime.threads.workers_on", lambda device: 3)
    return Workers(torch.device("cpu"))


def test_results_are_in_the_order_of_the_items(workers):
    """Three items at a time, of which the first ends last."""
    three = Barrier(3)

    def work(item: int) -> int:
        three.wait(60)
        time.sleep(0.01 if item % 3 == 0 else 0)
        return 2 * item

    assert workers.map(work, range(9)) == list(range(0, 18, 2))
    assert workers.map(work, []) == []


def test_the_first_error_is_raised(workers):
    """... in the order of the items, also where another came before it; what follows is not begun."""
    begun = []

    def work(item: int) -> None:
        begun.append(item)
        if item in (4, 5):
            time.sleep(0.1 if item == 4 else 0)
            raise ValueError(item)
        time.sleep(0.02)

    with pytest.raises(ValueError, match="4"):
        workers.map(work, range(100))
    assert len(begun) < 20
    assert workers.map(str, [1, 2]) == ["1", "2"]
