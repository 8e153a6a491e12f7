"""Puts what a stream has finished on disk behind its computation, and finds it again."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from stun.run.ledger import Ledger
from stun.run.snapshots import Snapshots
from stun.runtime.ranks import Ranks
from stun.runtime.units import size
from stun.stream.layer_stream import States


class Recorder:
    """One stream's entries in `progress/` and hidden states in `hidden/` of a run folder.

    Files of a layer are written while the next one computes: one layer at a time, at most one waiting, so memory stays bounded.
    A stream that is interrupted goes on after the last finished layer. `seconds` is what snapshots have taken so far.
    """

    def __init__(self, run: Path, stream: str, ranks: Ranks, layers: int):
        """`layers` is the number of those whose outputs a next layer needs, and one."""
        self.ranks, self.layers = ranks, layers
        self.ledger, self.snapshots = Ledger(run / "progress", stream), Snapshots(run / "hidden", stream, ranks)
        self.seconds = 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._pending: Future | None = None

    def finished(self) -> list[list[dict]]:
        """The entries of all finished layers; the same on every rank."""
        return self.ranks.on_first(self.ledger.finished)

    def restore(self, finished: list[list[dict]], states: States) -> States:
        """The states after the last finished layer, from those before the first."""
        needed = 0 < len(finished) < self.layers
        return self.snapshots.load([entry["snapshot"] for entry in finished[-1]], states) if needed else states

    def layer(self, index: int, states: States | None, entry: dict, write: Callable[[], dict] = dict) -> None:
        """Queue a finished layer, once the one before is on disk: `write` puts its files there and returns what else to enter,
        beside the seconds this takes where `entry` has some."""

        def record() -> None:
            began, files = time.perf_counter(), write()
            start = time.perf_counter()
            is_needed = states is not None and index + 1 < self.layers
            snapshot = self.snapshots.save(index, states) if is_needed else None
            self.seconds += time.perf_counter() - start
            entered = {**entry, **files, "snapshot": snapshot}
            if "seconds" in entry:
                entered["seconds"] = {**entry["seconds"], "write": time.perf_counter() - began}
            self.ledger.record(index, self.ranks.rank, self.ranks.world, entered)
            self.snapshots.drop(index)

        self.wait()
        self._pending = self._pool.submit(record)

    def wait(self) -> float:
        """Return once everything queued is on disk, with the seconds that took; raises what writing raised."""
        start = time.perf_counter()
        if self._pending:
            self._pending.result()
        return time.perf_counter() - start

    def close(self) -> None:
        """Return once everything that any rank has queued is on disk."""
        self.wait()
        self._pool.shutdown()
        self.ranks.gather_objects(None)
        if self.snapshots.nbytes:
            saved = f"{size(self.snapshots.nbytes)} a rank in {self.seconds:.1f}s, beside the computation"
            self.ranks.log(f"{self.snapshots.stream}: hidden states saved for a restart: {saved}")
