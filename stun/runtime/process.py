"""Ranks of this process. Torch is imported with the first of them, so that help and refused settings need not wait for it."""

from __future__ import annotations

import atexit
import os
from typing import TYPE_CHECKING

from stun.config import Device, StunError

if TYPE_CHECKING:
    from stun.runtime.ranks import Ranks

_started: list[Ranks] = []  # those of this process, once it has any


def process_ranks(device: Device = Device.auto) -> Ranks:
    """Ranks of this process, started by the first call and ended with the process. Raises StunError for another device than they
    were started on."""
    if not _started:
        from stun.runtime.ranks import Ranks

        _started.append(Ranks(device))
        atexit.register(_started[0].end)
    if device not in (Device.auto, Device[_started[0].device.type]):
        raise StunError(f"device={device.name}: this process has started on {_started[0].device.type}, and stays there")
    return _started[0]


def any_ranks() -> Ranks:
    """Ranks of this process for work that has no device. A process on its own that has not started gets others for this work
    alone, and may start on any device later."""
    from stun.runtime.ranks import Ranks, take_environment

    take_environment()
    return started_ranks() or (process_ranks() if "RANK" in os.environ else Ranks(Device.cpu))


def started_ranks() -> Ranks | None:
    """Ranks of this process, if they have started."""
    return next(iter(_started), None)
