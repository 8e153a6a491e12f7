"""What a compressed or a block-scaled checkpoint may be turned into; see tests/mutations.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from mutations import BROKEN, CODE, HUGE, KINDS, PATHS, Mutation, edit, join, mapped, replaced, rewritten, split, tensor, text_of

INDEX = "model.bitmask.index.json"
MATRIX = "model.layers.0.self_attn.q_proj.weight"
SCALED = "model.layers.1.mlp.experts.0.up_proj.weight"
SCALE = f"{SCALED}_scale_inv"


def shard(folder: Path) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][f"{MATRIX}.bitmask"]


def header(change: Callable[[dict], object]) -> Mutation:
    def mutate(folder: Path) -> None:
        content, data = split(shard(folder))
        change(content)
        join(shard(folder), json.dumps(content), data)

    return mutate


def columns(change: Callable[[dict], object]) -> Mutation:
    """Change what the metadata says of columns; what `change` returns, if a text, takes its place."""

    def inside(content: dict) -> None:
        found = json.loads(content["__metadata__"]["bitmask_columns"])
        changed = change(found)
        content["__metadata__"]["bitmask_columns"] = changed if isinstance(changed, str) else json.dumps(found)

    return header(inside)


def entry(suffix: str, **changes) -> Mutation:
    return header(lambda content: content[MATRIX + suffix].update(changes))


def byte(place: int) -> Mutation:
    """Flip the bits of a byte of the mask."""

    def mutate(folder: Path) -> None:
        content, data = split(shard(folder))
        start = content[f"{MATRIX}.bitmask"]["data_offsets"][0] + place
        join(shard(folder), json.dumps(content), data[:start] + bytes([data[start] ^ 255]) + data[start + 1 :])

    return mutate


COMPRESSED: dict[str, tuple[Mutation, str]] = {
    **{f"index {name}": (text_of(INDEX, text), INDEX) for name, text in BROKEN.items()},
    **{
        f"path {name}": (
            edit(INDEX, lambda index, value=value: index["weight_map"].update({f"{MATRIX}.bitmask": value}) and None),
            f"{INDEX}: {MATRIX}.bitmask: names the file",
        )
        for name, value in PATHS.items()
    },
    **{
        f"config {name}": (text_of("config.json", text), "config.json: ")
        for name, text in BROKEN.items()
        if "{" not in str(text)[:1]
    },
    **{f"notes {name}": (replaced("notes.txt", make), "notes.txt: ") for name, make in KINDS.items()},
    **{
        f"columns {name}": (columns(lambda found, value=value: found.update({MATRIX: value})), f"({MATRIX}|bitmask_columns)")
        for name, value in {"huge": HUGE, "zero": 0, "bool": True, "float": 32.0, "text": CODE, "less": 24, "more": 40}.items()
    },
    **{
        f"columns {name}": (columns(lambda found, text=text: text), "metadata bitmask_columns: cannot be read as JSON")
        for name, text in BROKEN.items()
        if isinstance(text, str) and name not in ("list", "null", "text", "number")
    },
    "columns list": (columns(lambda found: "[]"), "metadata bitmask_columns must map"),
    "no columns": (columns(lambda found: found.pop(MATRIX) and None), f"{MATRIX}.bitmask: is not what"),
    "columns of nothing": (columns(lambda found: found.update(nothing=8)), "nothing.bitmask: missing"),
    "mask of 2^62": (entry(".bitmask", shape=[2**62, 4]), f"{MATRIX}.bitmask: data_offsets"),
    "mask of another kind": (entry(".bitmask", dtype="I8"), f"{MATRIX}.bitmask: must be uint8"),
    "mask flat": (entry(".bitmask", shape=[128]), f"{MATRIX}.bitmask: must be uint8"),
    "mask flipped": (byte(0), f"{MATRIX}.values: holds"),
    "values of another kind": (entry(".values", dtype="F64"), f"{MATRIX}.values: data_offsets"),
    "values beyond the file": (entry(".values", data_offsets=[0, 2**50]), f"{MATRIX}.values"),
    "format of the future": (edit("config.json", lambda c: c.update(stun_format={"version": HUGE})), "config.json: stun_format"),
    "format code": (edit("config.json", lambda c: c.update(stun_format=CODE)), "config.json: stun_format"),
    "format gone": (edit("config.json", lambda c: c.pop("stun_format") and None), "model: is not compressed"),
}


def blocks(value: object) -> Mutation:
    return edit("config.json", lambda content: content["quantization_config"].update(weight_block_size=value))


SCALES: dict[str, tuple[Mutation, str]] = {
    "block huge": (blocks([HUGE, HUGE]), "config.json: weight_block_size"),
    "block of a million": (blocks([10**6, 10**6]), "_scale_inv has shape"),
    "block of one": (blocks([1, 1]), "_scale_inv has shape"),
    "block zero": (blocks([0, 8]), "config.json: weights are quantised"),
    "block bool": (blocks([True, True]), "config.json: weight_block_size|config.json: weights are quantised"),
    "block null": (blocks(None), "config.json: weights are quantised"),
    "scales flat": (tensor(SCALE, torch.flatten), f"safetensors: {SCALE} has shape"),
    "scales transposed": (tensor(SCALE, lambda t: t.T), f"safetensors: {SCALE} has shape"),
    "scales of integers": (tensor(SCALE, lambda t: t.to(torch.int32)), f"safetensors: {SCALE} holds torch.int32"),
    "no scales": (rewritten(lambda tensors: tensors.pop(SCALE), SCALE), f"safetensors: {SCALED} is fp8 but has no"),
    "scales elsewhere": (mapped("../a.safetensors", SCALE), f"{SCALE}: names the file"),
    "matrix flat": (tensor(SCALED, torch.flatten), f"{SCALE} has shape"),
}
