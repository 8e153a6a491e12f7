"""Sweep on the command line: `jobs.prune -m experts.fraction=0.1,0.2 run_dir=runs/sweep` makes one run folder per setting, named
by the swept values: runs/sweep/experts.fraction-0.1. Runs whose first streams are the same share their statistics, and those
evaluated on the same task the dense model's result."""

import hashlib
import json
import re
from dataclasses import fields, is_dataclass
from enum import Enum
from itertools import product

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from stun.config import PruneConfig, StunError

# Keys and groups of the configuration that the first stream depends on; so it does on the group `experts`, for its score.
_OBSERVED = ("model.", "calibration.", "experiment.", "precision.", "sparsify.ratios.", "experts.score.")
_EVALUATED = ("model.", "experiment.", "task.")  # those that the dense model's result depends on
_GROUPS = {"experiment", "launcher", "task", *(field.name for field in fields(PruneConfig) if is_dataclass(field.type))}


def stages(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Command lines of the two multiruns of a sweep: what its runs share (jobs.observe), and these.

    Raises StunError if the command line cannot be read, has no `run_dir`, or has no setting with several values.
    """
    flags, overrides = [w for w in arguments if w.startswith("-")], [parsed(w) for w in arguments if not w.startswith("-")]
    roots = [o.value() for o in overrides if o.key_or_group == "run_dir" and not o.is_sweep_override()]
    if not roots:
        raise StunError("run_dir=... is needed: a folder, in which every run of the sweep has its own")
    overrides = [o for o in overrides if o.key_or_group != "run_dir"]
    swept = [o for o in overrides if o.is_sweep_override()]
    if any(o.key_or_group == "push_to" for o in overrides):
        raise StunError("push_to: one repository does not hold the runs of a sweep; push the one you choose by its own command")
    if not swept or any(o.key_or_group == "statistics" for o in overrides):
        raise StunError("a sweep needs a setting with several values, such as target=0.3,0.4, and collects its statistics itself")
    is_evaluated, has_dense = (any(_under((key,), overrides)) for key in ("task.", "dense."))
    observed = [o for o in swept if o.key_or_group == "experts" or _under(_OBSERVED, [o])]
    evaluated = _under(_EVALUATED, swept) if is_evaluated else []
    root = str(roots[-1]).replace("'", "\\'")
    statistics = f"'{root}/statistics{'/' if observed else ''}{_named(observed)}'"
    dense = f"dense='{root}/dense{'-' if evaluated else ''}{_named(evaluated)}.json'"
    common = [*flags, f"hydra.sweep.dir='{root}'", *([dense] if is_evaluated and not has_dense else [])]
    observe = [o.input_line if o in observed or o in evaluated else _values(o)[0] for o in overrides]
    runs = [*common, f"statistics={statistics}", f"run_dir='{root}/{_named(swept)}'", *(o.input_line for o in overrides)]
    return [*common, *observe, f"run_dir={statistics}"], runs


def _under(keys: tuple[str, ...], overrides: list[Override]) -> list[Override]:
    """The overrides of these keys and groups, and of what is below them."""
    return [override for override in overrides if f"{override.key_or_group}.".startswith(keys)]


def parsed(word: str) -> Override:
    """One override of the command line. Raises StunError if it cannot be read."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise StunError(f"{word}: must be key=value, quoted where it has spaces or brackets; {reason}") from error


def runs(arguments: list[str]) -> list[list[str]]:
    """Command line of every run of a sweep. Raises StunError as `stages` does."""
    return [_with_choices(line) for line in product(*(_values(parsed(word)) for word in stages(arguments)[1]))]


def _with_choices(line: tuple[str, ...]) -> list[str]:
    """A run's command line with the groups that it chooses in its names: only Hydra's own sweep resolves them."""
    chosen = {o.key_or_group: str(o.value()) for o in map(parsed, line) if o.key_or_group in _GROUPS}
    return [re.sub(r"\$\{hydra:runtime\.choices\.(\w+)\}", lambda found: chosen[found[1]], word) for word in line]


def _values(override: Override) -> list[str]:
    """One override `key=value` for each value."""
    values = override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_element_as_str()]
    return [f"{override.get_key_element()}={value}" for value in values]


def _named(swept: list[Override]) -> str:
    """Name of a run's folder, `key-value` of every swept setting, with interpolations that Hydra resolves."""
    keys = sorted(override.key_or_group for override in swept)
    values = {key: f"${{hydra:runtime.choices.{key}}}" if key in _GROUPS else f"${{{key}}}" for key in keys}
    return "+".join(f"${{folder_name:{key},{value}}}" for key, value in values.items())


def folder_name(key: str, value: object) -> str:
    """`key-value` in letters, digits, `.`, `_` and `-`, which shells and Hydra take unquoted. Where the value has other
    characters, a digest of it keeps the name unique."""
    if OmegaConf.is_config(value):
        value = json.dumps(OmegaConf.to_container(value, enum_to_str=True))
    text = value.name if isinstance(value, Enum) else str(value).lower() if isinstance(value, bool) else str(value)
    plain = re.sub(r"[^\w.-]+", "-", text, flags=re.A).strip("-")[:60]
    return f"{key}-{plain}" if plain == text else f"{key}-{plain}.{hashlib.sha256(text.encode()).hexdigest()[:6]}"


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
