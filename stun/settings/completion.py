"""Shell completion of the `stun` command: a script that names jobs, settings and their values, and needs no Python to run."""

from stun.config import StunError
from stun.settings.compose import SCHEMAS, choices
from stun.settings.describe import groups, settings

_SCRIPT = """{zsh}_stun() {{
    local word=${{COMP_WORDS[COMP_CWORD]}}
    COMP_WORDBREAKS=${{COMP_WORDBREAKS//=}}
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W '{jobs}' -- "$word"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
}}
complete -o nospace -o default -F _stun stun"""
_CASE = """        {job}) COMPREPLY=($(compgen -W '{words}' -- "$word"));;"""


def script(jobs: list[str], shells: list[str]) -> str:
    """Completion script for bash or zsh. Raises StunError for another shell."""
    if shells not in (["bash"], ["zsh"]):
        raise StunError(f"stun completion {' '.join(shells)}: give bash or zsh")
    cases = [_CASE.format(job=job, words=" ".join(_words("compare" if job == "demo" else job))) for job in jobs]
    zsh = "autoload -U +X bashcompinit && bashcompinit\n" if shells == ["zsh"] else ""
    return _SCRIPT.format(zsh=zsh, jobs=" ".join(jobs), cases="\n".join(cases))


def _words(job: str) -> list[str]:
    """Settings as `key=`, with one word a value where the values are few; groups of `conf/` with their choices."""
    words = [f"{group}={choice}" for group in groups(job) for choice in choices(group)] if job in SCHEMAS else []
    for setting in settings(job):
        values = setting.allowed.removeprefix("one of ").split(", ") if setting.allowed.startswith("one of ") else [""]
        words += [f"{setting.key}={value}" for value in values]
    return words
