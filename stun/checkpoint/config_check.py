"""Check of config.json against the checkpoint's tensors, before a model is built from it.

transformers would build a billion layers one by one, or fetch the code that a setting names.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from stun.checkpoint.headers import TensorInfo
from stun.config import StunError
from stun.schema import NULL, TEXT, misfit

_COUNT = re.compile(r"(^|_)(num|n)_|_(size|dim|rank|layers|heads|experts)$")
_NO_COUNT = re.compile(r"scale")  # mscale_all_dim is a factor
_OF_NO_TENSOR = re.compile(r"theta|position|length|window|seq")
_ALWAYS = 2**20  # numbers up to this are accepted whatever the tensors are


def check_config(file: Path, config: dict, tensors: dict[str, TensorInfo]) -> None:
    """Raise StunError if a number in config.json is impossible for these tensors, or a text names code to fetch."""
    text = config.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise StunError(f"{file}: text_config: must be an object, is {str(text)[:80]}")
    if reason := misfit(config, {"architectures?": (NULL, [TEXT])}):
        raise StunError(f"{file}: {reason}")
    most = max([_ALWAYS, *(size for info in tensors.values() for size in info.shape)])
    for name, value in entries(config):
        where = f"{file}: {name}={str(value)[:80]}"
        is_count = _COUNT.search(name) and not _NO_COUNT.search(name)
        if is_count and (isinstance(value, (bool, float)) or (type(value) is int and value < 0)):
            raise StunError(f"{where}: a whole number, 0 or more, is needed")
        if type(value) is int and abs(value) > most and not _OF_NO_TENSOR.search(name):
            raise StunError(f"{where}: no tensor here has that size; at most {most}")
        if name.endswith("_implementation") and "/" in str(value):
            raise StunError(f"{where}: code from elsewhere is not run; remove it")
        # transformers writes infinities, which JSON lacks, as {"__float__": "Infinity"}.
        if name == "__float__" and value not in ("Infinity", "-Infinity"):
            raise StunError(f"{where}: is not a number")
    layers = (text or config).get("num_hidden_layers", 0)
    if type(layers) is int and layers > len(tensors):
        raise StunError(f"{file}: num_hidden_layers={layers}: at most {len(tensors)}, the number of tensors, is possible")


def entries(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """(name, value) of all plain values at any depth; entries of a list have the list's name."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from entries(entry, key or name)
    elif isinstance(value, list):
        for entry in value:
            yield from entries(entry, name)
    else:
        yield name, value
