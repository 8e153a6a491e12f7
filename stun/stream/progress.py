"""Progress of a stream: one line per layer, and on a terminal a live view below these lines."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stun.runtime.units import size

if TYPE_CHECKING:  # jobs end by `close_view`, also before torch is imported
    from stun.runtime.ranks import Ranks
    from stun.stream.expert_parallel import Layer

_view: Live | None = None  # the live view on the screen
_current: Progress | None = None  # of the stream at work


def close_view() -> None:
    """Remove the live view; the lines printed so far remain."""
    global _view
    if _view:
        _view.stop()
        _view = None


def on_disk(stream: str, layers: int) -> None:
    """Note that `layers` layers of `stream` are on disk, from which another launch continues."""
    if _current and _current.name == stream:
        _current.saved = layers


def reached() -> str:
    """Place of the stream at work: `after layer 2 of 4 (prune)`, the last one on disk; empty between streams."""
    if not _current:
        return ""
    place = f"after layer {_current.saved}" if _current.saved else f"in layer {min(_current.done + 1, _current.layers)}"
    again = "" if _current.is_kept else ", which begins again"
    return f"{place} of {_current.layers} ({_current.name}{again})"


class Progress:
    """Progress of one stream. A layer's line gives the work done, seconds (reading, computing, waiting for writing), memory and
    remaining time. An earlier launch has finished `first` layers. With `step`, the first layer's tracking step, the numbers go to
    `ranks.track` too. `is_kept`: finished layers are on disk for another launch."""

    is_kept = True

    def __init__(self, name: str, layers: int, ranks: Ranks, first: int = 0, step: int | None = None):
        self.name, self.layers, self.ranks, self.first, self.step = name, layers, ranks, first, step
        global _current
        self.done, self.saved, self.eta, self.started = first, first, None, time.perf_counter()
        self.latest = self.started  # end of the last finished layer
        ranks.meter.begin(name)
        self.at_start = (ranks.meter.bytes_read, ranks.meter.read_seconds, ranks.meter.tokens)
        close_view()
        _current = self
        if first:
            place = f"at layer {first + 1}" if first < layers else f"after layer {layers}"
            ranks.log(f"continuing {place} of {layers} ({name})")
        # There is none where it was closed, and what a script puts in its place may not say whether it is a terminal.
        if ranks.is_first and getattr(sys.stdout, "isatty", bool)():
            self._draw()

    def layer(self, layer: Layer, text: str, **numbers: float) -> None:
        """Report a finished layer; `numbers` are tracked in addition to those of the line."""
        self.done, self.latest = layer.layout.index + 1, time.perf_counter()
        self.eta = (self.latest - self.started) / (self.done - self.first) * (self.layers - self.done)
        seconds = " ".join(f"{name} {value:.1f}s" for name, value in layer.seconds.items())
        peak = self.ranks.peak_memory()
        line = f"{self.name} {self.done:02d}/{self.layers} | {text} | {seconds} | peak {size(peak)} | eta {_clock(self.eta)}"
        self.ranks.log(line)
        if self.step is not None:
            times = {f"{name}_seconds": value for name, value in layer.seconds.items()}
            metrics = {f"{self.name}/{name}": value for name, value in {**numbers, **times, "peak_gib": peak / 2**30}.items()}
            self.ranks.track(metrics, self.step + layer.layout.index)

    def close(self) -> None:
        """End the stream and its view."""
        global _current
        _current, self.ranks.doing = None, f"{self.name} after the last layer"
        self.ranks.meter.end()
        close_view()

    def _draw(self) -> None:
        """Start the view."""
        global _view
        console = Console(highlight=False)
        _view = Live(get_renderable=self._rendered, console=console, refresh_per_second=4, transient=True)
        _view.start(refresh=True)
        # A process that is killed cannot show the cursor again.
        console.show_cursor(True)

    def _rendered(self) -> Group:
        """Bar with the layer and its phase; below it speeds, memory and times."""
        meter, now = self.ranks.meter, time.perf_counter()
        nbytes, seconds, tokens = self.at_start
        read = (meter.bytes_read - nbytes) / max(meter.read_seconds - seconds, 1e-9)
        ran = (meter.tokens - tokens) / max(now - self.started, 1e-9)
        eta = "?" if self.eta is None else _clock(max(0.0, self.eta - (now - self.latest)))
        numbers = [
            f"{size(read)}/s read",
            f"{ran:,.0f} tokens/s{' a rank' if self.ranks.world > 1 else ''}",
            f"peak {size(self.ranks.peak_memory())}",
            f"elapsed {_clock(now - self.started)}",
            f"eta {eta}",
        ]
        bar = Table.grid(padding=(0, 2))
        layer = f"layer {min(self.done + 1, self.layers)}/{self.layers}"
        bar.add_row(Text(self.name, style="bold"), ProgressBar(self.layers, self.done, width=30), layer, meter.phase)
        return Group(bar, Text(" | ".join(numbers), style="dim", no_wrap=True, overflow="ellipsis"))


def _clock(seconds: float) -> str:
    """Seconds as `0:01:05`."""
    return str(timedelta(seconds=int(seconds)))
