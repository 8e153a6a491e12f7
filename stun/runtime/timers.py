"""Counters of a process: seconds by phase, bytes read, tokens run."""

import time
from collections import defaultdict


class Meter:
    """Counters that are always on. `seconds[stream][phase]` are totals. `bytes_read`, `read_seconds` (of the reading thread) and
    `tokens` (counted once per layer) run from the start of the process; `began` is the start of the job."""

    def __init__(self) -> None:
        self.stream = self.phase = ""
        self.seconds: dict[str, dict[str, float]] = {}
        self.bytes_read, self.read_seconds, self.tokens = 0, 0.0, 0
        self.began = self._since = time.perf_counter()

    def begin(self, stream: str) -> None:
        """Start a stream, in the phase that waits for its first layer."""
        self.end()
        self.stream, self.seconds[stream] = stream, defaultdict(float)
        self.enter("read")

    def enter(self, phase: str) -> None:
        """End the current phase and start `phase`."""
        now = time.perf_counter()
        if self.stream and self.phase:
            self.seconds[self.stream][self.phase] += now - self._since
        self.phase, self._since = phase, now

    def end(self) -> None:
        """End the stream."""
        self.enter("")
        self.stream = ""
