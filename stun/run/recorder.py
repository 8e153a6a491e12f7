"""Background writing of a stream's finished layers, and their restoration at a restart."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from stun.run.ledger import Ledger
from stun.run.snapshots import Snapshots
from stun.runtime.ranks import Ranks
from stun.runtime.threads import threads_on
from stun.runtime.units import duration, size
from stun.stream.layer_stream import States
from stun.stream.progress import on_disk


class Recorder:
    """Entries of one stream in `progress/`, and its hidden states in `hidden/`, of a run folder.

    A layer's files are written while the next layer computes; at most one layer waits, which bounds memory. An interrupted
    stream resumes after the last finished layer. `seconds` is the time that snapshots have taken so far.
    """

    def __init__(self, run: Path, stream: str, ranks: Ranks, layers: int):
        """`layers` is the number of layers; one more where the states after the last one are needed too."""
        self.ranks, self.layers = ranks, layers
        self.ledger, self.snapshots = Ledger(run / "progress", stream), Snapshots(run / "hidden", stream, ranks)
        self.seconds = 0.0
        self._pool = threads_on(ranks.device, 1, "write")
        self._pending: Future | None = None

    def finished(self) -> list[list[dict]]:
        """Entries of all finished layers, the same on every rank, before this launch records its first or after its last."""
        return self.ranks.on_first(self.ledger.restart)

    def restore(self, finished: list[list[dict]], states: States) -> States:
        """States after the last finished layer, with the arguments of `states`, which are those before the first."""
        needed = 0 < len(finished) < self.layers
        return self.snapshots.load([entry["snapshot"] for entry in finished[-1]], states) if needed else states

    def layer(self, index: int, states: States | None, entry: dict, write: Callable[[], dict] = dict) -> None:
        """Queue a finished layer, after the one before is on disk. `write` writes its files and returns further fields of the
        entry; the time this takes joins `seconds` of `entry`, if it has any."""

        def record() -> None:
            began, files = time.perf_counter(), write()
            start = time.perf_counter()
            is_needed = states is not None and index + 1 < self.layers
            snapshot = self.snapshots.save(index, states) if is_needed else None
            self.seconds += time.perf_counter() - start
            fields = {**entry, **files, "snapshot": snapshot}
            if "seconds" in entry:
                fields["seconds"] = {**entry["seconds"], "write": time.perf_counter() - began}
            self.ledger.record(index, self.ranks.rank, self.ranks.world, fields)
            on_disk(self.ledger.stream, index + 1)
            self.snapshots.drop(index)

        self.wait()
        self._pending = self._pool.submit(record)

    def wait(self) -> float:
        """Wait until everything queued is on disk; returns the seconds waited, raises the errors of writing."""
        start = time.perf_counter()
        if self._pending:
            self._pending.result()
        return time.perf_counter() - start

    def close(self) -> None:
        """Wait until everything that any rank has queued is on disk, and end the writing thread."""
        self.wait()
        self._pool.shutdown()
        self.ranks.gather_objects(None)
        if self.snapshots.nbytes:
            saved = f"{size(self.snapshots.nbytes)} a rank in {duration(self.seconds)}, in parallel with the computation"
            self.ranks.log(f"{self.snapshots.stream}: hidden states saved for a restart: {saved}")
