"""Kinds of JSON values. Files that a job wrote are input like any other, and are checked when they are read.

A kind is a `Leaf`; `[kind]`, a list; `{Leaf: kind}`, a mapping of such names; `{"name": kind, "other?": kind}`, an object, which
may lack fields marked by `?` and have others too; or a tuple of kinds, of which one must fit.
"""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from stun.config import StunError
from stun.files import is_count, load_json


class Leaf(NamedTuple):
    """Kind of a plain value: what it must be, in words, and the check."""

    words: str
    fits: Callable[[object], bool]


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


COUNT = Leaf("a whole number, 0 or more", is_count)
POSITIVE = Leaf("a whole number, 1 or more", lambda value: is_count(value) and value > 0)
NUMBER = Leaf("a number", is_number)
SIZE = Leaf("a number, 0 or more", lambda value: is_number(value) and 0 <= value < 2**63)
SHARE = Leaf("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
FLAG = Leaf("true or false", lambda value: type(value) is bool)
TEXT = Leaf("a text", lambda value: type(value) is str)
NULL = Leaf("null", lambda value: value is None)
INTEGER = Leaf("a whole number as a text", lambda value: value.removeprefix("-").isdecimal() and len(value) < 20)  # of names
ASCENDING = Leaf(
    "whole numbers, ascending", lambda value: type(value) is list and all(map(is_count, value)) and value == sorted(set(value))
)
_THERE = Leaf("there", lambda value: False)


def one_of(*words: str) -> Leaf:
    """Kind of a text among some."""
    return Leaf(f"one of {', '.join(words)}", lambda value: type(value) is str and value in words)


def list_of(kind: object, count: int) -> Leaf:
    """Kind of a list of so many."""
    fits = lambda value: type(value) is list and len(value) == count and not misfit(value, [kind])  # noqa: E731
    return Leaf(f"a list of {count}, each {kind.words if isinstance(kind, Leaf) else 'as the others'}", fits)


def load_record(file: Path, kind: object, advice: str = "") -> dict:
    """JSON object of that kind in a file. Raises StunError, with `advice` if there is any."""
    content = load_json(file)
    if reason := misfit(content, kind):
        raise StunError(f"{file}: {reason}{'; ' if advice else ''}{advice}")
    return content


def check_output(file: Path, kind: object, where: str) -> None:
    """Check, before any work, that what is in the place of an output, if anything, is a record of its kind, which may be
    replaced. Raises StunError, named `where`, otherwise."""
    if not os.path.lexists(file):
        return
    try:
        load_record(file, kind)
    except StunError as error:
        raise StunError(f"{where}: something else is there, and stays ({error}); move it, or choose another place") from error


def misfit(value: object, kind: object, where: str = "") -> str:
    """First part of a JSON value that is not of its kind, in words, such as `summary.kept.3: must be a number, is 'a'`; empty if
    there is none. `where` names the value."""
    if isinstance(kind, Leaf):
        return "" if kind.fits(value) else f"{where}: must be {kind.words}, is {repr(value)[:80]}"
    if isinstance(kind, tuple):
        found = [misfit(value, each, where) for each in kind]
        return "" if "" in found else found[-1]
    form, words = (list, "a list") if isinstance(kind, list) else (dict, "an object")
    if not isinstance(value, form):
        return f"{where or 'it'}: must be {words}, is {repr(value)[:80]}"
    parts = _parts(value, kind)
    return next(filter(None, (misfit(part, own, f"{where}.{name}".lstrip(".")) for name, part, own in parts)), "")


def _parts(value: dict | list, kind: dict | list) -> Iterator[tuple[str, object, object]]:
    """Name, content and kind of the parts of a list, a mapping or an object. Names that do not fit, and fields that are missing
    and may not be, come with a kind that they are not of."""
    if isinstance(kind, list):
        yield from ((str(place), part, kind[0]) for place, part in enumerate(value))
        return
    for name, own in kind.items():
        if isinstance(name, Leaf):
            yield from (("a name", each, name) for each in value)
            yield from ((each, part, own) for each, part in value.items())
        elif (plain := name.removesuffix("?")) in value:
            yield plain, value[plain], own
        elif plain == name:
            yield plain, None, _THERE
