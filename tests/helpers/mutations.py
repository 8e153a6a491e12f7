"""What a checkpoint, or a file of a run, may be turned into: each mutation changes one thing in a folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
ROUTER = "model.layers.0.block_sparse_moe.gate.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
HUGE = 10**12
CODE = "__import__('os').system('touch /tmp/hostile')"
DEEP = "[" * 100_000 + "]" * 100_000
Mutation = Callable[[Path], None]


def shard_of(folder: Path, name: str = ROUTER) -> Path:
    """The file that holds a tensor."""
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def split(file: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(file: Path, header: bytes | str, data: bytes, length: int | None = None) -> None:
    header = header.encode() if isinstance(header, str) else header
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def header(change: Callable[[dict], object]) -> Mutation:
    """Change the header that describes the router; what `change` returns, if anything, takes its place."""

    def mutate(folder: Path) -> None:
        file = shard_of(folder)
        content, data = split(file)
        changed = change(content)
        join(file, json.dumps(content if changed is None else changed), data)

    return mutate


def header_text(change: Callable[[str], str | bytes]) -> Mutation:
    """Change the text of the header."""

    def mutate(folder: Path) -> None:
        file = shard_of(folder)
        content, data = split(file)
        join(file, change(json.dumps(content)), data)

    return mutate


def entry(**changes) -> Mutation:
    """Change fields of the router's entry; None removes one."""

    def change(content: dict) -> None:
        for name, value in changes.items():
            content[ROUTER].pop(name) if value is None else content[ROUTER].update({name: value})

    return header(change)


def shard_bytes(change: Callable[[bytes], bytes]) -> Mutation:
    return lambda folder: shard_of(folder).write_bytes(change(shard_of(folder).read_bytes()))


def renamed(name: str) -> Mutation:
    return header(lambda content: content.update({name: content.pop(ROUTER)}))


def length(value: int) -> Mutation:
    return shard_bytes(lambda content: value.to_bytes(8, "little") + content[8:])


def overlap(content: dict) -> None:
    """The router's bytes once more under another name, whose own are of the same size."""
    other = next(n for n, e in content.items() if n != ROUTER and "dtype" in e and e["data_offsets"] != [0, 0])
    content[other] = dict(content[ROUTER])


def hole(folder: Path) -> None:
    """All tensors after the first lie 64 bytes later."""
    file = shard_of(folder)
    content, data = split(file)
    entries = sorted((e for n, e in content.items() if n != "__metadata__"), key=lambda e: e["data_offsets"])
    end = entries[0]["data_offsets"][1]
    for each in entries[1:]:
        each["data_offsets"] = [offset + 64 for offset in each["data_offsets"]]
    join(file, json.dumps(content), data[:end] + bytes(64) + data[end:])


def twice(text: str) -> str:
    """The header with the router's entry twice."""
    own = json.dumps(json.loads(text)[ROUTER])
    return text[:-1] + f', "{ROUTER}": {own}}}'


# name -> (mutation, what the message says beside the file's name)
SHAPES = {
    "negative": [-8, -32],
    "float": [8.0, 32],
    "bool": [True, 32],
    "text": ["8", "32"],
    "null inside": [None, 32],
    "nested": [[8, 32]],
    "object": {"0": 8},
    "text alone": "8,32",
    "number": 256,
    "too large": [2**20, 2**20],
    "of 2^124": [2**62, 2**62],
    "of 10^30": [10**30, 1],
    "wraps to its size": [2**61 + 8, 32],
    "many of 2": [2] * 5000,
    "too small": [8, 31],
    "empty list": [],
    "zero": [0, 32],
}
DTYPES = {"unknown": "F128", "lower case": "f32", "number": 1, "list": ["F32"], "empty": "", "code": CODE, "wider": "F64"}
OFFSETS = {
    "one": [0],
    "three": [0, 1024, 2048],
    "reversed": [1024, 0],
    "float": [0.0, 1024.0],
    "bool": [False, 1024],
    "text": ["0", "1024"],
    "negative": [-1024, 0],
    "beyond the file": [2**40, 2**40 + 1024],
    "around zero": [2**64 - 1024, 2**64],
    "number": 1024,
    "object": {"0": 0, "1": 1024},
    "nested": [[0, 1024]],
}
ENTRIES = {"null": None, "list": ["F32", [8, 32], [0, 1024]], "text": "F32", "number": 1, "empty": {}}
NAMES = {
    "empty": "",
    "slash": "../router",
    "backslash": "..\\router",
    "line": "router\nother",
    "null": "router\0",
    "long": "r/" * 5000,
}

HEADERS: dict[str, tuple[Mutation, str]] = {
    **{f"shape {name}": (entry(shape=value), ROUTER) for name, value in SHAPES.items()},
    **{f"dtype {name}": (entry(dtype=value), f"{ROUTER}: (dtype|data_offsets)") for name, value in DTYPES.items()},
    **{f"offsets {name}": (entry(data_offsets=value), "data_offsets") for name, value in OFFSETS.items()},
    **{f"without {name}": (entry(**{name: None}), f"{ROUTER}: must have") for name in ("shape", "dtype", "data_offsets")},
    "entry with more": (entry(strides=[1, 1]), f"{ROUTER}: must have"),
    **{
        f"entry {name}": (header(lambda content, value=value: content.update({ROUTER: value})), f"{ROUTER}: must have")
        for name, value in ENTRIES.items()
    },
    **{f"name {name}": (renamed(value), "a name has one printable character") for name, value in NAMES.items()},
    "other name": (renamed("model.router"), f"holds {ROUTER}; it does not"),
    "shape huge number": (header_text(lambda text: text.replace("[8, 32]", f"[1{'0' * 5000}, 32]")), "header: .*5001 digits"),
    "shape NaN": (header_text(lambda text: text.replace("[8, 32]", "[NaN, 32]")), "header: .*NaN is not a finite number"),
    "shape overflows": (header_text(lambda text: text.replace("[8, 32]", "[1e999, 32]")), "header: .*1e999 is not a finite"),
    "overlap": (header(overlap), "begins at byte .* ends at"),
    "hole": (hole, "begins at byte .* ends at"),
    "same name twice": (header_text(twice), f"header: .*{ROUTER}' occurs twice"),
    "metadata list": (header(lambda content: content.update(__metadata__=["pt"])), "__metadata__ must map"),
    "metadata number": (header(lambda content: content.update(__metadata__={"format": 1})), "__metadata__ must map"),
    "metadata null": (header(lambda content: content.update(__metadata__=None)), "__metadata__ must map"),
    "list": (header(lambda content: [content]), "header: must be a JSON object"),
    "null": (header_text(lambda text: "null"), "header: must be a JSON object"),
    "text": (header_text(lambda text: '"router"'), "header: must be a JSON object"),
    "nothing": (header_text(lambda text: ""), "header: cannot be read as JSON"),
    "blank": (header_text(lambda text: " " * len(text)), "header: cannot be read as JSON"),
    "torn": (header_text(lambda text: text[:-5]), "header: cannot be read as JSON"),
    "more behind it": (header_text(lambda text: text + "{}"), "header: cannot be read as JSON"),
    "not UTF-8": (header_text(lambda text: text.encode().replace(b"model.", b"\xff\xfe.", 1)), "header: cannot be read as JSON"),
    "UTF-16": (header_text(lambda text: text.encode("utf-16")), "header: cannot be read as JSON"),
    "byte order mark": (header_text(lambda text: "\ufeff" + text), "header: cannot be read as JSON"),
    "deep": (header_text(lambda text: DEEP), "header: cannot be read as JSON"),
    "rather deep": (header_text(lambda text: "[" * 100 + "]" * 100), "header: .*nested more than"),
    "half a character": (header_text(lambda text: text.replace(ROUTER, "\\ud800")), "a name has one printable character"),
    **{
        f"length {name}": (length(value), "truncated")
        for name, value in {"2^62": 2**62, "2^63": 2**63, "2^64": 2**64 - 1}.items()
    },
    "length 0": (length(0), "header: cannot be read as JSON"),
    "length of half": (length(300), "header: cannot be read as JSON"),
    "length of all": (shard_bytes(lambda c: (len(c) - 8).to_bytes(8, "little") + c[8:]), "header: cannot be read as JSON"),
    "length one more": (shard_bytes(lambda c: (len(c) - 7).to_bytes(8, "little") + c[8:]), "truncated"),
    "empty file": (shard_bytes(lambda content: b""), "truncated"),
    "seven bytes": (shard_bytes(lambda content: content[:7]), "truncated"),
    "header alone": (shard_bytes(lambda c: c[: 8 + int.from_bytes(c[:8], "little")]), "truncated"),
    "one byte less": (shard_bytes(lambda content: content[:-1]), "truncated"),
    "one byte more": (shard_bytes(lambda content: content + b"x"), "ends at byte"),
    "a pickle": (shard_bytes(lambda content: b"\x80\x04cos\nsystem\n"), "truncated"),
}


def text_of(name: str, text: str | bytes) -> Mutation:
    """Another content for a file."""
    content = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / name).write_bytes(content) and None


def edit(name: str, change: Callable[[dict], object]) -> Mutation:
    """Change the JSON object in a file."""

    def mutate(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        changed = change(content)
        (folder / name).write_text(json.dumps(content if isinstance(changed, (type(None), str, int, list)) else changed))

    return mutate


def mapped(value: object, tensor: str = ROUTER) -> Mutation:
    """Another file for a tensor in the index."""
    return edit(INDEX, lambda index: index["weight_map"].update({tensor: value}))


def unmapped(part: str) -> Mutation:
    def change(index: dict) -> None:
        for name in [name for name in index["weight_map"] if part in name]:
            del index["weight_map"][name]

    return edit(INDEX, change)


# Files that are no JSON object, as whatever JSON file.
BROKEN: dict[str, str | bytes] = {
    "empty": "",
    "torn": '{"a": ',
    "list": "[]",
    "null": "null",
    "text": '"a"',
    "number": "1",
    "not UTF-8": b'{"\xff\xfe": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deep": DEEP,
    "deep object": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "same name twice": '{"a": 1, "a": 2}',
    "NaN": '{"a": NaN}',
    "infinite": '{"a": -Infinity}',
    "overflows": '{"a": 1e999}',
    "long number": '{"a": 1' + "0" * 5000 + "}",
    "NUL": "\0" * 64,
    "python": "{'a': " + CODE + "}",
}
PATHS = {
    "above": "../model-00001-of-00003.safetensors",
    "absolute": "/etc/model.safetensors",
    "below": "sub/model.safetensors",
    "through here": "./model.safetensors",
    "other suffix": "model.bin",
    "suffix alone in a folder": "/.safetensors",
    "empty": "",
    "dots": "..",
    "NUL": "model\0.safetensors",
    "line": "model\n.safetensors",
    "long": "m" * 5000 + ".safetensors",
    "number": 1,
    "null": None,
    "list": ["model.safetensors"],
    "object": {"file": "model.safetensors"},
    "bool": True,
}
INDEXES: dict[str, tuple[Mutation, str]] = {
    **{f"index {name}": (text_of(INDEX, text), INDEX) for name, text in BROKEN.items()},
    **{
        f"weight_map {name}": (
            edit(INDEX, lambda index, value=value: index.update(weight_map=value)),
            f"{INDEX}: has no weight_map",
        )
        for name, value in {"null": None, "list": [[ROUTER, "a"]], "empty": {}, "text": "a", "number": 1}.items()
    },
    "no weight_map": (edit(INDEX, lambda index: index.pop("weight_map") and None), f"{INDEX}: has no weight_map"),
    **{f"path {name}": (mapped(value), f"{INDEX}: {ROUTER}: names the file") for name, value in PATHS.items()},
    "missing file": (mapped("other.safetensors"), "other.safetensors: missing"),
    "phantom": (lambda folder: mapped(shard_of(folder).name, "model.phantom")(folder), f"{INDEX}.*model.phantom; it does not"),
    "wrong file": (lambda folder: mapped(shard_of(folder, "lm_head.weight").name)(folder), f"{INDEX}.*{ROUTER}; it does not"),
    "without router": (unmapped(ROUTER), "layer 0: no tensor for .*gate.weight"),
    "without an expert": (unmapped("layers.1.block_sparse_moe.experts.7."), "layer 1 holds 7 experts"),
    "without a part": (unmapped(EXPERT), "layer 0, expert 3"),
    "without the embedding": (unmapped("embed_tokens"), "no tensor for model.embed_tokens.weight"),
    "without a layer": (unmapped("model.layers.1."), "layer 1"),
}


def replaced(name: str, make: Callable[[Path], object]) -> Mutation:
    def mutate(folder: Path) -> None:
        file = folder / name
        file.unlink(missing_ok=True)
        file.parent.mkdir(exist_ok=True)
        make(file)

    return mutate


def beside(file: Path) -> None:
    """A link to a file next to the checkpoint's folder."""
    secret = next(folder for folder in file.parents if folder.name == "model").with_name("secret")
    secret.write_text("{}")
    file.symlink_to(secret)


def bound(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as own:
        here = os.getcwd()
        os.chdir(file.parent)  # a socket's path must be short
        try:
            own.bind(file.name)
        finally:
            os.chdir(here)


KINDS = {
    "a link out": beside,
    "a link to a device": lambda file: file.symlink_to("/dev/zero"),
    "a link to nothing": lambda file: file.symlink_to("nothing"),
    "a link to itself": lambda file: file.symlink_to(file.name),
    "a pipe": os.mkfifo,
    "a socket": bound,
}
PLACES = [
    "config.json",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "notes.txt",
    ".hidden",
    "additional_chat_templates/a.jinja",
]
FILES: dict[str, tuple[Mutation, str]] = {
    **{f"{place} {name}": (replaced(place, make), Path(place).name) for place in PLACES for name, make in KINDS.items()},
    **{
        f"a shard {name}": (lambda folder, make=make: replaced(shard_of(folder).name, make)(folder), r"model-0.*\.safetensors")
        for name, make in {**KINDS, "a folder": Path.mkdir}.items()
    },
    "templates elsewhere": (
        lambda folder: (folder / "additional_chat_templates").symlink_to("/etc"),
        "additional_chat_templates: links to",
    ),
    "config a folder": (replaced("config.json", Path.mkdir), "config.json"),
    "index a folder": (replaced(INDEX, Path.mkdir), INDEX),
}


def rewritten(change: Callable[[dict], None], name: str = ROUTER) -> Mutation:
    """Change the tensors of the file that holds `name`, and the index with them."""

    def mutate(folder: Path) -> None:
        file = shard_of(folder, name)
        tensors = load_file(file)
        change(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != file.name} | dict.fromkeys(tensors, file.name)
        (folder / INDEX).write_text(json.dumps(index))

    return mutate


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Mutation:
    return rewritten(lambda tensors: tensors.update({name: change(tensors[name])}), name)


def copied_elsewhere(folder: Path) -> None:
    """The router in a second file too."""
    other = shard_of(folder, "lm_head.weight")
    tensors = load_file(other) | {ROUTER: load_file(shard_of(folder))[ROUTER]}
    save_file(tensors, other, metadata={"format": "pt"})


TENSORS: dict[str, tuple[Mutation, str]] = {
    "router of another model": (tensor(ROUTER, lambda t: t[:7]), f"safetensors: {ROUTER} has shape"),
    "router transposed": (tensor(ROUTER, lambda t: t.T), f"safetensors: {ROUTER} has shape"),
    "router flat": (tensor(ROUTER, torch.flatten), f"safetensors: {ROUTER} has shape"),
    "router of integers": (tensor(ROUTER, lambda t: t.to(torch.int32)), f"safetensors: {ROUTER} holds torch.int32"),
    "router of bools": (tensor(ROUTER, lambda t: t > 0), f"safetensors: {ROUTER} holds torch.bool"),
    "expert transposed": (tensor(EXPERT, lambda t: t.T), "layer 0, expert 3: gate_up_proj must be"),
    "expert flat": (tensor(EXPERT, torch.flatten), "layer 0, expert 3: gate_up_proj must be"),
    "expert of one number": (tensor(EXPERT, lambda t: t[0, 0]), "layer 0, expert 3: gate_up_proj must be"),
    "expert without rows": (tensor(EXPERT, lambda t: t[:0]), "layer 0, expert 3: gate_up_proj must be"),
    "expert of integers": (tensor(EXPERT, lambda t: t.to(torch.int8)), f"safetensors: {EXPERT} holds torch.int8"),
    "expert in fp8": (tensor(EXPERT, lambda t: t.to(torch.float8_e4m3fn)), f"safetensors: {EXPERT} holds torch.float8"),
    "expert too many": (
        rewritten(lambda tensors: tensors.update({EXPERT.replace(".3.", ".8."): tensors[EXPERT].clone()}), EXPERT),
        "layer 0 holds 9 experts",
    ),
    "expert far off": (
        rewritten(lambda tensors: tensors.update({EXPERT.replace(".3.", f".{HUGE}."): tensors.pop(EXPERT)}), EXPERT),
        "layer 0 holds 9 experts",
    ),
    "expert of no layer": (
        rewritten(
            lambda tensors: tensors.update({EXPERT.replace("layers.0", f"layers.{HUGE}"): tensors[EXPERT].clone()}), EXPERT
        ),
        "neither in one of the 2 layers",
    ),
    "expert of another kind": (
        rewritten(lambda tensors: tensors.update({EXPERT.replace("w1", "w9"): tensors[EXPERT].clone()}), EXPERT),
        "w9.* belongs to an expert",
    ),
    "router in two files": (copied_elsewhere, f"{ROUTER}: is also in .*safetensors"),
    "embedding of another vocabulary": (
        tensor("model.embed_tokens.weight", lambda t: t[:100]),
        "model.embed_tokens.weight has shape",
    ),
    "norm of another width": (tensor("model.norm.weight", lambda t: t[:5]), "model.norm.weight has shape"),
}
