"""Lines that tell how far a stream is."""

from __future__ import annotations

import time

from stun.ranks import Ranks
from stun.stream import Layer


class Progress:
    """One line a layer on the first rank: what was done, seconds read, computed and waited for writing, memory, time left."""

    def __init__(self, name: str, layers: int, ranks: Ranks, first: int = 0):
        self.name, self.layers, self.ranks, self.first = name, layers, ranks, first
        self.started = time.perf_counter()

    def layer(self, layer: Layer, what: str) -> None:
        done = layer.layout.index + 1
        left = (time.perf_counter() - self.started) / (done - self.first) * (self.layers - done)
        seconds = " ".join(f"{name} {value:.1f}s" for name, value in layer.seconds.items())
        peak = self.ranks.peak_memory() / 2**30
        self.ranks.log(f"{self.name} {done:02d}/{self.layers} | {what} | {seconds} | peak {peak:.2f}GiB | eta {left:.0f}s")
