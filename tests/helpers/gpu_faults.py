"""A run with a fault put in, on a pretend GPU: -m helpers.gpu_faults SOURCE RUN_DIR FAULT."""

from __future__ import annotations

import inspect
import sys
import textwrap
from pathlib import Path

import stun.checkpoint.reader
import stun.checkpoint.writer
import stun.runtime.device_copies
import stun.stream.layer_stream
from helpers.gpu_runs import request
from helpers.pretend import streams
from stun.pruning.job import prune
from stun.runtime.ranks import Ranks


def no_wait_for_events(of_results: bool) -> None:
    """The host does not wait until a pinned buffer has been read by the GPU, or until it has been filled."""
    synchronize = streams.Event.synchronize

    def wait(event: streams.Event) -> None:
        queued = event.stream.queue if event.stream else []
        if not queued or any(getattr(work, "is_result", False) for work in queued) != of_results:
            synchronize(event)

    streams.Event.synchronize = wait


def no_wait_for_streams() -> None:
    """The computation does not wait for the copies that it needs."""
    wait = streams.Stream.wait
    streams.Stream.wait = lambda self, other, mark: None if self is streams.DEFAULT else wait(self, other, mark)


def index_on_the_host() -> None:
    """Rows of the router are chosen by an index that is not on the GPU."""
    scope, stream = vars(stun.stream.layer_stream), stun.stream.layer_stream.LayerStream
    source, right = textwrap.dedent(inspect.getsource(stream.keep)), "torch.tensor(kept, device=self.ranks.device)"
    assert right in source, source
    exec(source.replace(right, "torch.tensor(kept)"), scope)
    stream.keep = scope["keep"]


FAULTS = {
    "none": lambda: None,
    "buffers are filled too early": lambda: no_wait_for_events(False),
    "buffers are emptied too early": lambda: no_wait_for_events(True),
    "weights are used too early": no_wait_for_streams,
    "an index on the host": index_on_the_host,
}


if __name__ == "__main__":
    for module in (stun.runtime.device_copies, stun.checkpoint.reader, stun.checkpoint.writer):
        module.PIECE = 1 << 10  # so that every buffer is used many times
    FAULTS[sys.argv[3]]()
    with Ranks() as ranks:
        prune(request(Path(sys.argv[1]), Path(sys.argv[2])), ranks)
