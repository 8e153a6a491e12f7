"""On a terminal a view is drawn and leaves nothing behind; elsewhere the lines are plain."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time

import pytest
from safetensors.torch import save_file

from helpers.launches import environment, run_job, settings
from helpers.paths import ROOT
from helpers.tensors import load_tensors
from helpers.zoo import make_checkpoint

pytestmark = pytest.mark.slow
SHOWN, HIDDEN = "\x1b[?25h", "\x1b[?25l"
SMALL = {"calibration__samples": 16, "calibration__length": 32}


class Terminal:
    """`jobs.prune` with a terminal of its own. `text` is all it has written."""

    def __init__(self, arguments: list[str]):
        self.ours, theirs = pty.openpty()
        self.before, self.text = termios.tcgetattr(theirs), ""
        termios.tcsetwinsize(theirs, (40, 110))
        env = {**environment(), "TERM": "xterm-256color"}
        command = [sys.executable, "-m", "jobs.prune", *arguments]
        # A background job of a shell, which a test run may be, ignores the signal of Ctrl-C; nobody at a terminal does.
        setup = (
            "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
        )
        self.job = subprocess.Popen(
            [sys.executable, "-c", setup, *command],
            cwd=ROOT,
            env=env,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        self.theirs = theirs

    def read(self, until: str = "") -> None:
        """Up to the text `until`, or to the end."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (until and until in self.text):
            if select.select([self.ours], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.ours, 65536).decode(errors="replace")
                except OSError:  # nobody writes any more
                    return
            elif self.job.poll() is not None:
                return

    def end(self) -> int:
        """The exit status; the terminal must be as it was."""
        os.close(self.theirs)
        self.read()
        status = self.job.wait(60)
        os.close(self.ours)
        assert self.text.rfind(SHOWN) > self.text.rfind(HIDDEN)
        return status


def drawn(text: str) -> str:
    """Without escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_the_view_is_drawn_and_goes(checkpoint, tmp_path):
    terminal = Terminal(settings(checkpoint("mixtral"), tmp_path / "run", **SMALL))
    assert terminal.end() == 0, terminal.text
    text = drawn(terminal.text)
    for stream in ("observe", "prune"):
        assert re.search(rf"{stream}\s+━+\s+layer [123]/3\s+\w", text), text
    assert re.search(r"[\d.]+ [GMK]iB/s read \| [\d,]+ tokens/s \| peak [\d.]+ [GM]iB \| elapsed 0:00:\d\d \| eta", text)
    for line in (
        r"\] observe 03/3 \| experts 8 \|",
        r"\] prune 01/3 \| experts 8->\d \| nonzero 0",
        "loads in vLLM",
        "stun report folder=",
    ):
        assert re.search(line, text), line
    table = terminal.text[terminal.text.rfind("experts kept") :]
    assert "\x1b[" not in table.replace(SHOWN, "") and "elapsed" not in table


def test_after_ctrl_c(checkpoint, tmp_path):
    arguments = settings(checkpoint("mixtral"), tmp_path / "run", calibration__samples=1500)
    terminal = Terminal(arguments)
    terminal.read("elapsed")
    attributes = termios.tcgetattr(terminal.theirs)
    assert attributes == terminal.before
    os.write(terminal.ours, b"\x03")
    assert terminal.end() == 130, terminal.text
    last = drawn(terminal.text).strip().splitlines()[-1]
    assert re.fullmatch(r"interrupted (in|after) layer [123] of 3 \(\w+\); the same command continues", last), last
    assert "Traceback" not in terminal.text


def test_an_error_stands_below_the_view(tmp_path):
    source = make_checkpoint(tmp_path / "source", "mixtral", shard="1GB")
    tensors = load_tensors(source)
    tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"][3, 4] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    terminal = Terminal(settings(source, tmp_path / "run", **SMALL))
    assert terminal.end() == 2
    last = drawn(terminal.text).strip().splitlines()[-1]
    assert re.match(r"error: rank 0, (observe|prune) layer 1: ", last), last


def test_plain_lines_where_it_is_no_terminal(checkpoint, tmp_path):
    done = run_job("prune", settings(checkpoint("mixtral"), tmp_path / "run", **SMALL))
    assert "\x1b" not in done.stdout and "elapsed" not in done.stdout
    what = r"prune 02/3 \| experts 8->\d \| nonzero 0\.\d{3}"
    line = rf"^\[ *[\d.]+s\] {what} \| read [\d.]+s compute [\d.]+s write [\d.]+s \| peak [\d.]+ [GM]iB \| eta \d:\d\d:\d\d$"
    assert len(re.findall(line, done.stdout, re.M)) == 1
    rows = dict(re.split(r"  +", row.strip(), maxsplit=1) for row in done.stdout.partition("\n\n")[2].strip().splitlines())
    assert rows["sparsity"] == "0.4000 (target 0.4)" and rows["the model"] == f"{tmp_path / 'run'}/model"
    assert re.fullmatch(r"[\d.]+ [KM]iB of [\d.]+ [KM]iB", rows["size on disk"])
    assert re.fullmatch(r"[\d.]+ (seconds|ms) on 1 rank", rows["time"])
    assert {"experts kept", "size on disk", "... observe", "... prune", "read", "peak memory", "next"} <= rows.keys()
