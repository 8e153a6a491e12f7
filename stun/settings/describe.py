"""Documentation of settings, from the dataclasses: for `stun JOB --help`, shell completion and docs/configuration.md."""

import ast
import inspect
import shutil
import textwrap
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import get_type_hints

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from stun.config import StunError
from stun.settings.compose import CONF, SCHEMAS, allowed, choices, nested, own_hydra

GROUPS = ("experiment", "experts", "sparsify", "calibration", "model", "task", "tracking", "launcher", "case")


@dataclass(frozen=True)
class Setting:
    """One setting: its full key, its meaning, the values it takes, and its default, `required` or `none`."""

    key: str
    meaning: str
    allowed: str
    default: str


@cache
def settings(job: str) -> list[Setting]:
    """Settings of a job in the order of its dataclass, with the defaults of its YAML file."""
    with own_hydra(job):
        defaults = compose(job)
    return _settings(SCHEMAS[job], defaults)


def _settings(schema: type, defaults: DictConfig, prefix: str = "") -> list[Setting]:
    hints, meanings, rows = get_type_hints(schema), _meanings(schema), []
    for name in (field.name for field in fields(schema)):
        key, kind = f"{prefix}{name}", nested(hints[name])
        if kind:
            below = None if defaults is None else OmegaConf.select(defaults, name)
            rows += _settings(kind, OmegaConf.structured(kind) if below is None else below, f"{key}.")
        else:
            rows.append(Setting(key, meanings.get(name, ""), allowed(hints[name]), _default(defaults, name)))
    return rows


def _meanings(schema: type) -> dict[str, str]:
    """Field -> the text below it in the source of the dataclass or of those it inherits from."""
    meanings = {}
    for parent in filter(is_dataclass, reversed(schema.__mro__)):
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0].body
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                meanings[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return meanings


def _default(defaults: DictConfig, name: str) -> str:
    if OmegaConf.is_missing(defaults, name):
        return "required"
    value = OmegaConf.to_container(defaults, enum_to_str=True, throw_on_missing=False).get(name)
    return "none" if value in ("", None, [], {}) else _plain(value)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value)


def help_text(job: str, about: str) -> str:
    """Text of `stun JOB --help`: every setting with its meaning and default."""
    width = min(shutil.get_terminal_size().columns, 110)
    wrap = textwrap.TextWrapper(width, initial_indent="      ", subsequent_indent="      ")
    lines = [about, "", f"stun {job} SETTING=VALUE ...", ""]
    for setting in settings(job):
        lines.append(f"  {setting.key}={'' if setting.default in ('none', 'required') else setting.default}")
        need = " Required." if setting.default == "required" else ""
        lines += wrap.wrap(f"{setting.meaning}{need} [{setting.allowed}]".strip())
    sets = [f"  {group}={'|'.join(choices(group))}" for group in groups(job)]
    return "\n".join([*lines, "", "Sets of settings (conf/):", *sets])


def groups(job: str) -> list[str]:
    """Groups of `conf/` that the job's YAML file names."""
    text = (CONF / f"{job}.yaml").read_text() + ((CONF / "prune.yaml").read_text() if job == "observe" else "")
    return [group for group in GROUPS if f"- {group}:" in text]


# A script of the shell, which needs no Python to run.
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


def completion(jobs: list[str], shells: list[str]) -> str:
    """Completion script for bash or zsh, of jobs, settings and their values. Raises StunError for another shell."""
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


PAGES = ("prune", "generate", "evaluate", "serve-check", "preflight", "plan", "report")
INTRODUCTION = """# Configuration

Settings of the jobs; `python -m stun.settings.describe > docs/configuration.md` makes this page from their dataclasses. On the
command line a setting is `key=value`; `stun JOB --help` prints the same. `observe` takes those of `prune` too, and `preflight`,
`plan` and `compare` most of them: `--help` says which.
"""


def page() -> str:
    """Text of docs/configuration.md."""
    common, parts = {row.key for row in settings("prune")}, [INTRODUCTION]
    for job in PAGES:
        rows = [row for row in settings(job) if job in ("prune", "generate", "evaluate") or row.key not in common]
        sets = [f"- `{group}`: {', '.join(choices(group))}" for group in groups(job)]
        parts += [f"## {job.capitalize()}", "", _table(rows), ""]
        parts += ["Sets of settings, as `experiment=best`:", "", *sets, ""] if sets else []
    return "\n".join(parts).rstrip() + "\n"


def _table(rows: list[Setting]) -> str:
    lines = ["| setting | meaning | values | default |", "|---|---|---|---|"]
    for row in rows:
        default = {"none": "", "required": "**required**"}.get(row.default, f"`{row.default}`")
        cells = (f"`{row.key}`", row.meaning, row.allowed, default)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
