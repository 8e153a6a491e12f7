"""Settings given in Python, as the words of the command that sets the same."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from numbers import Integral, Real
from os import PathLike, fspath
from pathlib import Path

from stun.config import StunError
from stun.files import load_yaml

_PLAIN = re.compile(r"([A-Za-z]|\.{0,2}/)[\w./@-]*", re.ASCII)  # texts that Hydra reads as they are ...
_SPECIAL = {"true", "false", "null", "nan", "inf"}  # ... but for these, in any case


class Names:
    """Names that a job knows: the fields of its configuration `schema`, and the groups of named options in `conf`."""

    def __init__(self, job: str, schema: type, conf: Path):
        self.call, self.schema = f"stun.{job}", schema
        entries = [entry for entry in load_yaml(conf / f"{job}.yaml")["defaults"] if isinstance(entry, dict)]
        groups = [name for entry in entries for name in entry if " " not in name and name != "launcher"]
        self.groups = {group.rpartition("@")[2]: group for group in groups}  # text: calibration@text
        self.options = {
            name: sorted(file.stem for file in (conf / group.partition("@")[0]).glob("*.yaml"))
            for name, group in self.groups.items()
        }

    def words(self, settings: Mapping[str, object]) -> list[str]:
        """Words of the command. Raises StunError for a name that the job does not know."""
        return [word for name, value in settings.items() if value is not None for word in self._words(name, value)]

    def checked(self, word: str) -> str:
        """A word of the command line. Raises StunError as `check` does."""
        self.check(word.partition("=")[0].lstrip("+~"))
        return word

    def check(self, key: str) -> None:
        """Raise StunError, with the nearest known name, unless `key` is a group or a dotted path to a setting."""
        node, path = self.schema(), ""
        for part in key.split(".") if key not in {*self.groups, *self.groups.values()} else ():
            if isinstance(node, dict):  # whose keys are the user's own
                return
            known = {field.name for field in fields(node)} if is_dataclass(node) else set()
            if part not in known:
                nearest = _nearest(part, known if path else known | self.groups.keys(), path)
                raise StunError(f"{key}: {self.call} knows no such setting{nearest}")
            node, path = getattr(node, part), f"{path}{part}."

    def _words(self, name: str, value: object) -> Iterator[str]:
        self.check(name)
        node = getattr(self.schema(), name, None)
        if isinstance(value, (str, PathLike)) and name in self.groups:
            yield self._choice(name, fspath(value), node)
        elif is_dataclass(node) and not isinstance(value, Mapping):
            raise StunError(f"{name}={value!r}: must be a mapping of settings, such as {{{fields(node)[0].name!r}: ...}}")
        else:
            yield from self._nested(name, value)

    def _choice(self, name: str, text: str, node: object) -> str:
        """A named option of a group; else, where the group's settings have a path, that path."""
        options = self.options[name]
        if text in options:
            return f"{self.groups[name]}={text}"
        if hasattr(node, "path"):
            return f"{name}.path={written(text)}"
        single = "; a mapping sets single values" if is_dataclass(node) else ""
        raise StunError(f"{name}={text}: known are {', '.join(options)}{_nearest(text, options)}{single}")

    def _nested(self, key: str, value: object) -> Iterator[str]:
        self.check(key)
        node = self.schema()
        for part in key.split("."):
            node = getattr(node, part, None)
        if isinstance(value, Mapping) and is_dataclass(node):
            for name, entry in value.items():
                yield from self._nested(f"{key}.{name}", entry)
        else:
            yield f"{'++' if isinstance(node, dict) else ''}{key}={written(value)}"  # ++: a mapping's keys are new


def _nearest(name: str, known: object, path: str = "") -> str:
    nearest = get_close_matches(name, list(known), 1)
    return f"; did you mean {path}{nearest[0]}?" if nearest else ""


def written(value: object) -> str:
    """A value in the grammar of Hydra's command line. Raises StunError for what it cannot hold."""
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{_key(key)}:{written(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, (list, tuple, set)):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Real):  # numpy's too
        return repr(int(value) if isinstance(value, Integral) else float(value))
    if not isinstance(value, (str, PathLike)):
        raise StunError(f"{value!r}: settings are texts, paths, numbers, lists and mappings, not {type(value).__name__}")
    text = fspath(value)
    return text if _PLAIN.fullmatch(text) and text.lower() not in _SPECIAL else _quoted(text)


def _quoted(text: str) -> str:
    """Text in single quotes. A backslash counts only before a quote, where it is doubled."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text) + "'"


def _key(key: object) -> str:
    if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z_][\w-]*", key, re.ASCII):
        raise StunError(f"{key!r}: a name here has letters, digits, _ and -, and begins with a letter")
    return key
