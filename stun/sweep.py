"""A sweep on the command line: `jobs.prune -m experts.fraction=0.1,0.2 run_dir=runs/sweep` prunes into one run folder for each
setting, named by what differs, with statistics taken once for all runs that differ in nothing that the first stream sees."""

from __future__ import annotations

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from stun.config import StunError

# What the first stream sees, as keys or groups of the configuration.
_OBSERVED = ("model", "calibration", "experiment", "sparsify.ratios", "sparsify.per_expert")


def stages(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The command lines of the two multiruns that a sweep is made of: its statistics (jobs.observe), and its runs.

    Raises StunError where the command line cannot be read, names no `run_dir`, or asks for no sweep.
    """
    flags = [word for word in arguments if word.startswith("-")]
    overrides = [_parsed(word) for word in arguments if not word.startswith("-")]
    roots = [o.value() for o in overrides if o.key_or_group == "run_dir" and not o.is_sweep_override()]
    if not roots:
        raise StunError("run_dir=... is needed: one folder, in which every run of the sweep gets its own")
    overrides = [o for o in overrides if o.key_or_group != "run_dir"]
    swept = [o for o in overrides if o.is_sweep_override()]
    if not swept or any(o.key_or_group == "statistics" for o in overrides):
        raise StunError("a sweep needs a setting with several values, such as target=0.3,0.4, and takes its statistics itself")
    seen = [o for o in swept if any(o.key_or_group == key or o.key_or_group.startswith(f"{key}.") for key in _OBSERVED)]
    unnamed = ["run_dir", "statistics", *sorted({o.key_or_group for o in overrides} - {o.key_or_group for o in swept})]
    root = str(roots[-1]).replace("'", "\\'")
    statistics = f"'{root}/statistics{'/' if seen else ''}{','.join(map(_named, seen))}'"
    common = [*flags, f"hydra.sweep.dir='{root}'", "hydra.sweep.subdir=."]
    observe = [_first(o) if o in swept and o not in seen else o.input_line for o in overrides]
    runs = [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(unnamed)}]", f"statistics={statistics}"]
    run_dir = f"run_dir='{root}/${{hydra:job.override_dirname}}'"
    return [*common, *observe, f"run_dir={statistics}"], [*common, *(o.input_line for o in overrides), *runs, run_dir]


def _parsed(word: str) -> Override:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        raise StunError(f"{word}: {str(error).splitlines()[0]}") from error


def runs(arguments: list[str]) -> list[list[str]]:
    """The command line of every run of a sweep. Raises StunError as `stages` does."""
    overrides = OverridesParser.create().parse_overrides(stages(arguments)[1])
    return [run for batch in BasicSweeper.split_arguments(overrides, None) for run in batch]


def _first(swept: Override) -> str:
    """The override with the first of its values."""
    return f"{swept.get_key_element()}={next(swept.sweep_string_iterator())}"


def _named(swept: Override) -> str:
    """`key=value` of one run, as Hydra fills it in."""
    key = swept.key_or_group
    return f"{key}=${{{key}}}" if "." in key else f"{key}=${{hydra:runtime.choices.{key}}}"
