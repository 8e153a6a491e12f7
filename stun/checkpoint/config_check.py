"""Whether a config.json can belong to the tensors beside it, seen before anything is built from it.

transformers builds whatever it is told: a billion layers, one by one, or the class that a name leads to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from stun.checkpoint.headers import TensorInfo
from stun.config import StunError

_COUNT = re.compile(r"(^|_)(num|n)_|_(size|dim|rank|layers|heads|experts)$")
_OF_NO_TENSOR = re.compile(r"theta|position|length|window|seq")
_ALWAYS = 2**20  # numbers up to here are let through whatever the tensors are


def check_config(file: Path, config: dict, tensors: dict[str, TensorInfo]) -> None:
    """Raise StunError where a number in the content of config.json cannot be one of this model, or a text leads to code."""
    text = config.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise StunError(f"{file}: text_config: must be an object, is {str(text)[:80]}")
    most = max([_ALWAYS, *(size for info in tensors.values() for size in info.shape)])
    for name, value in _entries(config):
        where = f"{file}: {name}={str(value)[:80]}"
        if _COUNT.search(name) and (isinstance(value, (bool, float)) or (type(value) is int and value < 0)):
            raise StunError(f"{where}: a whole number, 0 or more, is needed")
        if type(value) is int and abs(value) > most and not _OF_NO_TENSOR.search(name):
            raise StunError(f"{where}: no tensor here has that size; at most {most}")
        if name.endswith("_implementation") and "/" in str(value):
            raise StunError(f"{where}: code from elsewhere is not run; leave it out")
        if name == "__float__" and value not in ("Infinity", "-Infinity"):  # transformers' own way to write what JSON cannot
            raise StunError(f"{where}: is not a number")
    layers = (text or config).get("num_hidden_layers", 0)
    if type(layers) is int and layers > len(tensors):
        raise StunError(f"{file}: num_hidden_layers={layers}: at most {len(tensors)} can be, as many as there are tensors")


def _entries(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """(name, value) of all plain values, however deep; those in a list have its name."""
    if isinstance(value, dict):
        for own, entry in value.items():
            yield from _entries(entry, own or name)
    elif isinstance(value, list):
        for entry in value:
            yield from _entries(entry, name)
    else:
        yield name, value
