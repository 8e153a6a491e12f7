"""Settings given in Python, as the words of the command that sets the same."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from numbers import Integral, Real
from os import PathLike, fspath

from stun.config import StunError
from stun.files import load_yaml
from stun.settings.compose import CONF, SCHEMAS, choices

_PLAIN = re.compile(r"([A-Za-z]|\.{0,2}/)[\w./@-]*", re.ASCII)  # texts that Hydra reads as they are ...
_FILES = {  # settings that are one file or folder, with what that is
    "model": "a checkpoint's folder or its name on the hub",
    "calibration": "a file of text or a dataset's name",
    "task": "a file of questions and answers or a dataset's name",
    "text": "a file of text or a dataset's name",
}
_SPECIAL = {"true", "false", "null", "nan", "inf"}  # ... but for these, in any case


class Names:
    """Names that a job knows: the fields of its configuration, and the groups of named options in `conf/`."""

    def __init__(self, job: str):
        self.schema = SCHEMAS[job]
        entries = [entry for entry in load_yaml(CONF / f"{job}.yaml")["defaults"] if isinstance(entry, dict)]
        groups = [name for entry in entries for name in entry if " " not in name and name != "launcher"]
        self.groups = {group.rpartition("@")[2]: group for group in groups}  # text: calibration@text

    def words(self, settings: Mapping[str, object]) -> list[str]:
        """Words of the command; whether the job knows them all is checked when they are composed. Raises StunError for a value
        that they cannot hold."""
        known = {field.name for field in fields(self.schema)} | self.groups.keys()
        given = {name: value for name, value in settings.items() if value is not None or name.partition(".")[0] not in known}
        return [word for name, value in given.items() for word in self._words(name, at_home(value))]

    def _words(self, name: str, value: object) -> Iterator[str]:
        node = getattr(self.schema(), name, None)
        if name == "launcher":
            raise StunError("launcher: is for the command line alone, whose sweeps it starts")
        if isinstance(value, (str, PathLike)) and name in self.groups:
            yield self._choice(name, fspath(value), node)
        elif is_dataclass(node) and not isinstance(value, Mapping):
            single = f"a mapping of settings, such as {{{fields(node)[0].name!r}: ...}}"
            raise StunError(f"{name}={brief(value)}: must be {_FILES[name] + ', or ' if name in _FILES else ''}{single}")
        else:
            yield from self._nested(name, value)

    def _choice(self, name: str, text: str, node: object) -> str:
        """A named option of a group; else, where the group's settings have a path, that path."""
        options = choices(self.groups[name].partition("@")[0])
        if text in options:
            return f"{self.groups[name]}={text}"
        if hasattr(node, "path"):
            return f"{name}.path={written(text)}"
        single = "; a mapping sets single values" if is_dataclass(node) else ""
        raise StunError(f"{name}={text}: known are {', '.join(options)}{single}")

    def _nested(self, key: str, value: object) -> Iterator[str]:
        node = self.schema()
        for part in key.split("."):
            node = getattr(node, part, None)
        if isinstance(node, str) and isinstance(value, (list, tuple, set, Mapping)):  # Hydra takes seconds for a data set
            raise StunError(f"{key}={brief(value)}: must be a text")
        if isinstance(value, Mapping) and is_dataclass(node):
            for name, entry in value.items():
                yield from self._nested(f"{key}.{name}", entry)
        else:
            yield f"{'++' if isinstance(node, dict) else ''}{key}={written(value)}"  # ++: a mapping's keys are new


def at_home(value: object) -> object:
    """A value whose paths that begin with `~/`, as a shell expands them, begin with the home folder."""
    if isinstance(value, Mapping):
        return {key: at_home(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [at_home(entry) for entry in value]
    if isinstance(value, (str, PathLike)) and str(value).startswith("~/"):
        return os.path.expanduser(value)
    return value


def brief(value: object) -> str:
    """A value as a message shows it: a user may have given a whole model or data set."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"


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
        raise StunError(f"{brief(value)}: settings are texts, paths, numbers, lists and mappings, not {type(value).__name__}")
    text = fspath(value)
    return text if _PLAIN.fullmatch(text) and text.lower() not in _SPECIAL else _quoted(text)


def _quoted(text: str) -> str:
    """Text in single quotes. A backslash counts only before a quote, where it is doubled."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text) + "'"


def _key(key: object) -> str:
    if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z_][\w-]*", key, re.ASCII):
        raise StunError(f"{key!r}: a name here has letters, digits, _ and -, and begins with a letter")
    return key
