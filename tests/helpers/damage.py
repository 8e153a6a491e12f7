"""Damage to files, chosen by a seed: another value in JSON or YAML, other bytes, another kind of file, other tensors."""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

CODE = "__import__('os').system('touch /tmp/hostile')"
DEEP = "[" * 100_000 + "]" * 100_000
NUMBERS = [0, 1, -1, 3, 7, 1.5, -0.5, 10**6, 10**12, 2**62, 2**63, 10**27, 10**39, 1e-300, 1e308]
WORDS = ["", "8", "false", CODE, "../../x", "/etc/passwd", "..", "a\nb", "a\0b", "x" * 5000, "evil/kernel", "mixtral", "é\u2028"]
VALUES = [*NUMBERS, *WORDS, None, True, False, [], [[]], {}, [None], [-1], ["a"], {"a": 1}, {"": {}}, [10**30], [[0], [1]], 4.0]
WHOLE: list[str | bytes] = [
    *("", '{"a": ', "[]", "null", '"a"', "1", "{}", DEEP, '{"a":' * 50_000 + "1" + "}" * 50_000, '{"a": 1, "a": 2}'),
    *('{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', '{"a": 1' + "0" * 5000 + "}", "\0" * 64, f"{{'a': {CODE}}}"),
    *("!!python/object/apply:os.system ['touch hostile']", "a: &a [*a]", "a:\n\t- b", "a: 2020-99-99"),
    *(b'{"\xff\xfe": 1}', '{"a": 1}'.encode("utf-16"), "\ufeff{}".encode(), b"PK\3\4", b"\x80\x04cos\nsystem\n"),
]
Damage = Callable[[random.Random, Path], None]


def places(value: object, found: list) -> list[tuple[dict | list, object]]:
    """Containers and keys of all values inside a value; of a long list or mapping some."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in [*keys[:20], *keys[-5:]] if len(keys) > 25 else keys:
        found.append((value, key))
        places(value[key], found)
    return found


def edited(rng: random.Random, value: object) -> object:
    """The value with one part changed."""
    found = places(value, [])
    if not found or rng.random() < 0.03:
        return rng.choice(VALUES)
    # Near the root as often as deep inside: most values of a tokenizer are tokens.
    shallow = [place for place in found if place[0] is value]
    container, key = rng.choice(rng.choice([found, shallow]))
    old = container[key]
    kind = rng.choice(["other", "other", "other", "gone", "sibling", "wrapped", "text", "nudged", "renamed"])
    if kind == "gone":
        del container[key]
    elif kind == "renamed" and isinstance(container, dict):
        container[rng.choice([f"{key}x", "", "type", "a\nb"])] = container.pop(key)
    elif kind == "sibling":
        container[key] = rng.choice(list(container.values()) if isinstance(container, dict) else container)
    elif kind == "wrapped":
        container[key] = rng.choice([[old], {"a": old}, [old, old]])
    elif kind == "text":
        container[key] = str(old)
    elif kind == "nudged" and type(old) in (int, float):
        container[key] = rng.choice([old + 1, old - 1, -old, 2 * old, old * 10**9, float(old) + 0.5])
    elif kind == "nudged" and isinstance(old, list) and old:
        container[key] = rng.choice([old[:-1], old * 2, old[::-1], [*old, old[0]]])
    else:
        container[key] = rng.choice(VALUES)
    return value


def of_json(rng: random.Random, file: Path) -> None:
    file.write_text(json.dumps(edited(rng, json.loads(file.read_text()))))


def of_yaml(rng: random.Random, file: Path) -> None:
    file.write_text(yaml.safe_dump(edited(rng, yaml.safe_load(file.read_text()))))


def of_bytes(rng: random.Random, file: Path) -> None:
    content = file.read_bytes()
    place, end = rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)
    flipped = bytearray(content or b"x")
    flipped[place % len(flipped)] ^= 1 << rng.randrange(8)
    changes = [content[:place], bytes(flipped), content[:place] + content[end:], content + b"x", b"", bytes(len(content))]
    file.write_bytes(rng.choice([*changes, content[:place] + rng.randbytes(8) + content[place:]]))


def of_whole(rng: random.Random, file: Path) -> None:
    text = rng.choice(WHOLE)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())


def bound(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as own:
        here = os.getcwd()
        os.chdir(file.parent)  # a socket's path must be short
        try:
            own.bind(file.name)
        finally:
            os.chdir(here)


def beside(file: Path) -> None:
    """A link to a file that is not of the folder."""
    secret = file.parent.parent / "secret"
    secret.write_text("{}")
    file.symlink_to(secret)


KINDS: list[Callable[[Path], object]] = [
    beside,
    lambda file: file.symlink_to("/dev/zero"),
    lambda file: file.symlink_to("nothing"),
    lambda file: file.symlink_to(file.name),
    os.mkfifo,
    bound,
    Path.mkdir,
    lambda file: None,
]


def of_kind(rng: random.Random, file: Path) -> None:
    """Another kind of file in its place, or none."""
    file.unlink()
    rng.choice(KINDS)(file)


def split(file: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(file: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def of_header(rng: random.Random, file: Path) -> None:
    """Another value in a safetensors header, other text, or another length of it."""
    content, data = split(file)
    text = json.dumps(content).encode()
    kind = rng.choice(["value", "value", "value", "text", "length", "overlap", "hole", "twice"])
    names = sorted(name for name in content if name != "__metadata__")
    if kind == "value":
        join(file, json.dumps(edited(rng, content)).encode(), data)
    elif kind == "text":
        whole = rng.choice(WHOLE)
        join(file, whole if isinstance(whole, bytes) else whole.encode(), data)
    elif kind == "length":
        join(file, text, data, rng.choice([0, 7, 300, len(text) - 1, len(text) + 1, len(text) + len(data), 2**62, 2**64 - 1]))
    elif kind == "overlap":
        content[rng.choice(names)] = content[rng.choice(names)]
        join(file, json.dumps(content).encode(), data)
    elif kind == "hole":
        last = max(names, key=lambda name: content[name]["data_offsets"])
        content[last]["data_offsets"] = [offset + 64 for offset in content[last]["data_offsets"]]
        join(file, json.dumps(content).encode(), data[:-64] + bytes(128))
    else:
        name = rng.choice(names)
        join(file, text[:-1] + f", {json.dumps(name)}: {json.dumps(content[name])}}}".encode(), data)


SHAPES: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda t: t[:-1],
    lambda t: t[:0],
    lambda t: t.T,
    torch.flatten,
    lambda t: t.to(torch.int32),
    lambda t: t.float() > 0,  # fp8 cannot be compared
    lambda t: t.to(torch.int8),
    lambda t: t.float().to(torch.float8_e4m3fn),
    lambda t: (t.float() * float("nan")).to(t.dtype),
    lambda t: t.float() + float("inf"),
    lambda t: t.half() if t.is_floating_point() else -1 - t,
    lambda t: t.reshape(-1)[0],
    lambda t: torch.cat([t, t]) if t.dim() else t,
]


def of_tensor(rng: random.Random, file: Path) -> None:
    """Another shape, dtype or content of a tensor, another name, one more or one less."""
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    kind = rng.choice(["other", "other", "other", "gone", "renamed", "more"])
    if kind == "other":
        tensors[name] = rng.choice(SHAPES)(tensors[name])
    elif kind == "gone":
        del tensors[name]
    else:
        numbers = [name.replace(".0.", f".{number}.", 1) for number in (7, 9, 10**12)]
        other = rng.choice([f"{name}.x", name.replace("weight", "bias"), *numbers, "x"])
        tensors[other] = (tensors.pop(name) if kind == "renamed" else tensors[name]).clone()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})


def damage(rng: random.Random, file: Path) -> str:
    """Damage a file; returns how."""
    by_suffix = {".json": [of_json] * 5, ".yaml": [of_yaml] * 5, ".safetensors": [of_header] * 3 + [of_tensor] * 3}
    chosen = rng.choice([*by_suffix.get(file.suffix, [of_whole]), of_bytes, of_whole, of_kind])
    chosen(rng, file)
    return f"{chosen.__name__} {file.name}"
