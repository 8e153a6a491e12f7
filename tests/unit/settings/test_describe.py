"""Documentation of settings: complete, and the same on the command line and in the docs."""

from __future__ import annotations

import subprocess
from functools import cache

import pytest

from helpers.paths import ROOT
from stun.__main__ import ABOUT
from stun.config import StunError
from stun.settings.compose import SCHEMAS
from stun.settings.describe import completion, help_text, page, settings

SELF_EXPLAINING = ("shape.", "gpu_shape.")


@pytest.mark.parametrize("job", SCHEMAS)
def test_every_setting_has_a_meaning(job):
    rows = [row for row in settings(job) if not row.key.startswith(SELF_EXPLAINING)]
    assert rows and not [row.key for row in rows if len(row.meaning) < 5]
    text = help_text(job, "")
    assert all(f"  {row.key}=" in text for row in rows)


def test_defaults_are_those_of_the_command():
    defaults = {row.key: row.default for row in settings("prune")}
    assert defaults["model.path"] == defaults["run_dir"] == "required" and defaults["calibration.path"] == "none"
    assert defaults["calibration.samples"] == "128" and defaults["sparsify.scope"] == "experts, shared, mlp, attention"


def test_the_configuration_page_is_up_to_date():
    """`python -m stun.settings.describe > docs/configuration.md` writes it."""
    assert (ROOT / "docs" / "configuration.md").read_text() == page()


def completions(words: str) -> list[str]:
    line = f"""{_script()}
    COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _stun; printf '%s\\n' "${{COMPREPLY[@]}}" """
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.split()


@cache
def _script() -> str:
    return completion(list(ABOUT), ["bash"])


def test_completion_in_bash():
    assert completions("stun pre") == ["preflight"]
    assert completions("stun prune experts.bud") == ["experts.budget=uniform", "experts.budget=global", "experts.budget=measured"]
    assert "experiment=best" in completions("stun prune exp")
    with pytest.raises(StunError, match="give bash or zsh"):
        completion([], ["fish"])
