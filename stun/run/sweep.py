"""Sweep on the command line: `jobs.prune -m experts.fraction=0.1,0.2 run_dir=runs/sweep` makes one run folder per setting, named
by the swept values. Runs whose first streams are the same share their statistics."""

from itertools import product

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from stun.config import StunError

# Keys and groups of the configuration that the first stream depends on.
_OBSERVED = ("model.", "calibration.", "experiment.", "precision.", "sparsify.ratios.")


def stages(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Command lines of the two multiruns of a sweep: its statistics (jobs.observe), and its runs.

    Raises StunError if the command line cannot be read, has no `run_dir`, or has no setting with several values.
    """
    flags, overrides = [w for w in arguments if w.startswith("-")], [_parsed(w) for w in arguments if not w.startswith("-")]
    roots = [o.value() for o in overrides if o.key_or_group == "run_dir" and not o.is_sweep_override()]
    if not roots:
        raise StunError("run_dir=... is needed: a folder, in which every run of the sweep has its own")
    overrides = [o for o in overrides if o.key_or_group != "run_dir"]
    swept = [o for o in overrides if o.is_sweep_override()]
    if any(o.key_or_group == "push_to" for o in overrides):
        raise StunError("push_to: one repository does not hold the runs of a sweep; push the one you choose by its own command")
    if not swept or any(o.key_or_group == "statistics" for o in overrides):
        raise StunError("a sweep needs a setting with several values, such as target=0.3,0.4, and collects its statistics itself")
    observed = [o for o in swept if f"{o.key_or_group}.".startswith(_OBSERVED)]
    unnamed = ["run_dir", "statistics", *sorted({o.key_or_group for o in overrides} - {o.key_or_group for o in swept})]
    root = str(roots[-1]).replace("'", "\\'")
    statistics = f"'{root}/statistics{'/' if observed else ''}{','.join(map(_named, observed))}'"
    common = [*flags, f"hydra.sweep.dir='{root}'"]
    observe = [o.input_line if o in observed else _values(o)[0] for o in overrides]
    settings = [*common, f"hydra.job.config.override_dirname.exclude_keys=[{','.join(unnamed)}]", f"statistics={statistics}"]
    runs = [*settings, f"run_dir='{root}/${{hydra:job.override_dirname}}'", *(o.input_line for o in overrides)]
    return [*common, *observe, f"run_dir={statistics}"], runs


def _parsed(word: str) -> Override:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        raise StunError(f"{word}: {str(error).splitlines()[0]}") from error


def runs(arguments: list[str]) -> list[list[str]]:
    """Command line of every run of a sweep. Raises StunError as `stages` does."""
    return list(map(list, product(*(_values(_parsed(word)) for word in stages(arguments)[1]))))


def _values(override: Override) -> list[str]:
    """One override `key=value` for each value."""
    values = override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_element_as_str()]
    return [f"{override.get_key_element()}={value}" for value in values]


def _named(swept: Override) -> str:
    """`key=value` of one run, with an interpolation that Hydra resolves."""
    key = swept.key_or_group
    return f"{key}=${{{key}}}" if "." in key or key == "precision" else f"{key}=${{hydra:runtime.choices.{key}}}"
