"""Runs that end at a given place."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from stun.run.recorder import Recorder


class _Stop(Exception):
    """Ends a run at a given place."""


@contextmanager
def stopped_after(stream: str, layer: int):
    """What runs inside ends once that layer of that stream is on disk."""
    queue = Recorder.layer

    def stop(self, index, *arguments, **keywords):
        queue(self, index, *arguments, **keywords)
        if (self.ledger.stream, index) == (stream, layer):
            self.close()
            raise _Stop

    with pytest.MonkeyPatch.context() as patched, pytest.raises(_Stop):
        patched.setattr(Recorder, "layer", stop)
        yield
