"""The commands on the pages of the documentation."""

from __future__ import annotations

import re
import shlex
import sys

from helpers.launches import run_warm
from helpers.paths import ROOT

README = (ROOT / "README.md").read_text()


def page(name: str) -> str:
    """Text of a page in docs/."""
    return (ROOT / "docs" / f"{name}.md").read_text()


def commands(mark: str, page: str = README) -> list[str]:
    """The commands in the fenced blocks that follow `<!-- mark -->`."""
    return [block.strip() for block in re.findall(rf"<!-- {mark} -->\n+```sh\n(.*?)```", page, re.S)]


def job_and_overrides(command: str) -> tuple[list[str], list[str]]:
    """The words that name the job, as `-m` takes them, and what follows them."""
    words = shlex.split(command.split(" && ")[-1])
    start = next(place for place, word in enumerate(words) if word.rpartition("/")[2] == "stun" or word.startswith("jobs."))
    end = start + (1 if words[start].startswith("jobs.") else 2)
    return [words[start].rpartition("/")[2], *words[start + 1 : end]], words[end:]


def here(command: str, replace: dict[str, str]) -> list[str]:
    """The command's words for this interpreter, with overrides replaced by key or added."""
    job, overrides = job_and_overrides(command)
    ranks = re.search(r"--nproc-per-node (\d+)", command)
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(min(2, int(ranks[1])))]
    given = dict(word.split("=", 1) for word in overrides)
    return [*launcher, "-m", *job, *(f"{key}={value}" for key, value in {**given, **replace}.items())]


def launched(command: list[str]) -> tuple[list[str], int]:
    """The job that a command launches, and on how many ranks; 0 without a launcher."""
    start = len(command) - command[::-1].index("-m") - 1
    ranks = re.search(r"--nproc-per-node[= ](\d+)", " ".join(command[:start]))
    return command[start:], int(ranks[1]) if ranks else 0


def run(command: list[str]) -> str:
    """What the command says, its ranks being started as `run_job` does."""
    return run_warm(*launched(command)).stdout
