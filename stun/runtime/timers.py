"""What this process is about and what it has done so far: phases and their seconds, bytes read, tokens run."""

from __future__ import annotations

import time
from collections import defaultdict


class Meter:
    """Cheap enough to be always on. `seconds[stream][phase]` adds up; `bytes_read` and `tokens` (run through a layer, as often as
    they are) count from the start of the process, `read_seconds` are those of the thread that reads.
    `began` is when the job did."""

    def __init__(self) -> None:
        self.stream = self.phase = ""
        self.seconds: dict[str, dict[str, float]] = {}
        self.bytes_read, self.read_seconds, self.tokens = 0, 0.0, 0
        self.began = self._since = time.perf_counter()

    def begin(self, stream: str) -> None:
        """A stream starts, with waiting for its first layer."""
        self.end()
        self.stream, self.seconds[stream] = stream, defaultdict(float)
        self.enter("read")

    def enter(self, phase: str) -> None:
        """The phase before this one is over."""
        now = time.perf_counter()
        if self.stream and self.phase:
            self.seconds[self.stream][self.phase] += now - self._since
        self.phase, self._since = phase, now

    def end(self) -> None:
        """The stream is over."""
        self.enter("")
        self.stream = ""

    def read(self, nbytes: int, seconds: float) -> None:
        self.bytes_read += nbytes
        self.read_seconds += seconds
