"""The commands on the pages of the documentation."""

from __future__ import annotations

import re
import shlex
import sys

from helpers.launches import run_warm
from helpers.paths import ROOT

README = (ROOT / "README.md").read_text()


def commands(mark: str, page: str = README) -> list[str]:
    """The commands in the fenced blocks that follow `<!-- mark -->`."""
    return [block.strip() for block in re.findall(rf"<!-- {mark} -->\n+```sh\n(.*?)```", page, re.S)]


def overrides(command: str) -> list[str]:
    """What follows the job in a command."""
    words = shlex.split(command.split(" && ")[-1])
    return words[words.index("-m") + 2 :]


def here(command: str, replace: dict[str, str]) -> list[str]:
    """The command's words for this interpreter, with overrides replaced by key or added."""
    words = shlex.split(command)
    module = words.index("-m")
    ranks = re.search(r"--nproc-per-node (\d+)", command)
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(min(2, int(ranks[1])))]
    given = dict(word.split("=", 1) for word in words[module + 2 :])
    return [*launcher, "-m", words[module + 1], *(f"{key}={value}" for key, value in {**given, **replace}.items())]


def launched(command: list[str]) -> tuple[list[str], int]:
    """The job that a command launches, and on how many ranks; 0 without a launcher."""
    start = len(command) - command[::-1].index("-m") - 1
    ranks = re.search(r"--nproc-per-node[= ](\d+)", " ".join(command[:start]))
    return command[start:], int(ranks[1]) if ranks else 0


def run(command: list[str]) -> str:
    """What the command says, its ranks being started as `run_job` does."""
    return run_warm(*launched(command)).stdout
