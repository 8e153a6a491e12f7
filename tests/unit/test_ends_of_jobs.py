"""What a job prints where the system fails."""

from __future__ import annotations

import errno

import pytest
from safetensors import SafetensorError

import jobs
from stun.config import StunError

FULL = "No space left on device"


@pytest.mark.parametrize(
    "error, says",
    [
        (PermissionError(errno.EACCES, "Permission denied", "/data/config.json"), "Permission denied: '/data/config.json'"),
        (OSError(errno.ENOSPC, FULL), f"the output, or a file without a name: [Errno 28] {FULL}"),
        (
            SafetensorError(f"Error while serializing: I/O error: {FULL}"),
            f"safetensors: Error while serializing: I/O error: {FULL}",
        ),
        (StunError("a\nb: cannot be"), "error: a b: cannot be"),
    ],
)
def test_one_line_that_says_what_stays(monkeypatch, capsys, error, says):
    def work(cfg, ranks) -> None:
        raise error

    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(jobs, "_exit", end)
    monkeypatch.setattr(jobs, "process_ranks", lambda device: None)
    with pytest.raises(SystemExit) as ended, jobs._ends_clearly():
        jobs._start(work, None)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and says in said and "Traceback" not in said
    assert isinstance(error, StunError) or "the same command goes on" in said
