"""Composition of a job's configuration from its dataclass, the YAML files of `conf/` and overrides of the command line."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from hydra.version import VersionBase
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from stun.benchmark.config import BenchmarkConfig, CompareConfig, StudyConfig
from stun.config import StunError
from stun.evaluation.config import EvaluateConfig, GenerateConfig, PreflightConfig, PruneAndEvaluateConfig
from stun.planning.config import PlanConfig
from stun.report.config import ReportConfig
from stun.run.sweep import parsed
from stun.serving.config import ServeCheckConfig

PACKAGE = Path(__file__).resolve().parent.parent
CONF = PACKAGE / "conf"  # in the repository a link to its folder conf/
SCHEMAS = {
    "prune": PruneAndEvaluateConfig,
    "preflight": PreflightConfig,
    "observe": PruneAndEvaluateConfig,
    "plan": PlanConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "serve-check": ServeCheckConfig,
    "report": ReportConfig,
    "compare": CompareConfig,
    "study": StudyConfig,
    "benchmark": BenchmarkConfig,
}
# Names that other tools have for a setting.
_ELSEWHERE = {
    "sparsity": "target",
    "ratio": "target",
    "output_dir": "run_dir",
    "dataset": "calibration.path",
    "nsamples": "calibration.samples",
    "seqlen": "calibration.length",
    "max_seq_length": "calibration.length",
}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def register(job: str) -> None:
    """Store the job's schema, and the resolver of the embedded reference model's files, under the names that `conf/` uses."""
    schema = SCHEMAS[job]
    ConfigStore.instance().store(name=f"{schema.__name__.removesuffix('Config').lower()}_schema", node=schema)
    OmegaConf.register_new_resolver("reference", reference_file, replace=True)


def reference_file(name: str) -> str:
    """Path of a file or folder of the embedded reference model, relative where it lies below the working folder."""
    path = PACKAGE / "reference" / name
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def composed(job: str, overrides: list[str]) -> object:
    """Configuration of a job, an object of its dataclass. Raises StunError for a setting that does not exist or a bad value."""
    check_overrides(job, overrides)
    try:
        with own_hydra(job):
            cfg = OmegaConf.to_object(compose(job, overrides))
    except MissingMandatoryValue as error:
        raise StunError(f"{error.full_key}: is needed") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise StunError(_explained(job, error)) from error
    if "experts.fraction" in {parsed(word).key_or_group for word in overrides} and cfg.is_counted:
        raise StunError(
            "experts.fraction: is not used beside experts.keep, experts.drop or fit; an experiment's: experts.keep=null"
        )
    return cfg


@contextmanager
def own_hydra(job: str) -> Iterator[None]:
    """Hydra on `conf/` with the job's schema. An application that itself runs under Hydra finds all of its state again."""
    store, base, runtime, hydra = ConfigStore.instance(), VersionBase.instance(), JobRuntime.instance(), GlobalHydra.instance()
    before = dict(store.repo), base.version_base, runtime.conf.copy(), hydra.hydra
    hydra.clear()
    try:
        register(job)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            yield
    finally:
        GlobalHydra.set_instance(hydra)  # Hydra's own end puts a copy in its place
        store.repo, base.version_base, runtime.conf, hydra.hydra = before


def check_overrides(job: str, overrides: list[str], is_sweep: bool = False) -> None:
    """Refuse overrides of settings that the job does not have, also where Hydra would add them. Raises StunError."""
    for word in overrides:
        override = parsed(word)
        key = override.key_or_group
        if key.startswith("hydra"):
            continue
        if override.is_sweep_override() and not is_sweep:
            raise StunError(f"{word}: several values make a sweep: add -m, or quote a list as '{key}=[...]'")
        if _is_group(key, override):
            _check_choice(override)
        else:
            _check_key(job, override)
            _check_form(job, word, override)


def choices(group: str) -> list[str]:
    """Names of the YAML files of a group of `conf/`, such as those of `experiment`."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def _is_group(key: str, override: Override) -> bool:
    """Whether the override chooses a YAML file: `model=reference`, and not a mapping of values."""
    name = key.partition("@")[0]
    return "." not in name and (CONF / name).is_dir() and not isinstance(override.value(), dict)


def _check_choice(override: Override) -> None:
    group = override.key_or_group.partition("@")[0]
    values = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
    for value in values:
        is_none = value is None and group not in ("experts", "sparsify")
        is_removed = override.is_delete() and (value is None or isinstance(value, str))  # of other values Hydra has no error
        if not is_none and not is_removed and str(value) not in choices(group):
            own = f"; for one of your own: {group}.path={value}" if group in ("model", "calibration", "task") else ""
            raise StunError(f"{group}={value}: must be one of {', '.join(choices(group))}{own}")


def _check_key(job: str, override: Override) -> None:
    """Raises StunError if the setting does not exist in the job's dataclass, or is deleted."""
    key, known = override.key_or_group, setting_types(SCHEMAS[job])
    parts = key.split(".")
    is_inside = any(_is_mapping(known.get(".".join(parts[:depth]))) for depth in range(len(parts)))
    if key not in known and not any(name.startswith(f"{key}.") for name in known) and not is_inside:
        alike = [name for name in known if name.rpartition(".")[2] == parts[-1]]
        near = [name for name in (_ELSEWHERE.get(key),) if name in known] or alike or get_close_matches(key, known, 1, 0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else f"stun {job} --help lists them"
        raise StunError(f"{key}: no such setting; {hint}")
    if override.is_delete() and not is_inside and not _is_mapping(known.get(key)):
        raise StunError(f"~{key}: a setting cannot be removed; give it a value")


def _check_form(job: str, word: str, override: Override) -> None:
    """Raises StunError for a setting that is written like a group of files, or added although it is there."""
    key, kind = override.key_or_group, setting_types(SCHEMAS[job]).get(override.key_or_group)
    is_added = override.is_add() and not override.is_force_add() and kind is not None and not _is_mapping(kind)
    if override.package is not None or is_added:
        raise StunError(f"{word}: write {key}=VALUE, with {allowed(kind) if kind else 'a value'}")


def setting_types(schema: type, prefix: str = "") -> dict[str, type]:
    """Types of all settings of a dataclass by their full key; those of nested dataclasses in their place."""
    types = {}
    hints = get_type_hints(schema)
    for name in (field.name for field in fields(schema)):
        kind = nested(hints[name])
        types |= setting_types(kind, f"{prefix}{name}.") if kind else {f"{prefix}{name}": hints[name]}
    return types


def nested(kind: type) -> type | None:
    """The dataclass that a field of this type holds, also where it may be None; no mapping's."""
    inside = () if _is_mapping(kind) else (kind, *getattr(kind, "__args__", ()))
    return next((part for part in inside if is_dataclass(part)), None)


def _is_mapping(kind: type | None) -> bool:
    return getattr(kind, "__origin__", kind) is dict


def allowed(kind: type) -> str:
    """Values that a setting of this type takes, in words."""
    origin, arguments = getattr(kind, "__origin__", kind), getattr(kind, "__args__", ())
    if origin is list:
        return f"a list of {'names' if arguments[0] is str else allowed(arguments[0])}"
    if origin is dict:
        return "a mapping"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(member.name for member in kind)
    if arguments:
        parts = [part for part in arguments if part is not type(None) and not (part is int and float in arguments)]
        return " or ".join(map(allowed, parts))
    return _KINDS.get(kind, str(kind))


def _explained(job: str, error: Exception) -> str:
    """One line for an error of Hydra or OmegaConf: the setting, what is wrong, what is allowed."""
    text = f"{error}\n{error.__cause__ or ''}"
    types = setting_types(SCHEMAS[job])
    new = re.search(r"Could not override '(\S+?)'", text)
    if new and _is_mapping(types.get(new[1])):
        return f"{new[1]}: its entries are new: write +{new[1]}=..."
    found = re.search(r"full_key: (\S+)", text)
    if not found or found[1].partition("[")[0] not in types:
        return str(error).splitlines()[0]
    key = found[1].partition("[")[0]
    reason = str(error.__cause__ or error).splitlines()[0]
    return f"{key}: {reason}; must be {allowed(types[key])}"
