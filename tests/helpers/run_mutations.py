"""What a plan, calibration text and the files of a run folder may be turned into; see tests/helpers/mutations.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers.mutations import BROKEN, CODE, DEEP, HUGE, Mutation, edit, text_of

PLAN = "plan.json"


def layer(**changes) -> Mutation:
    """Change fields of the plan's first layer; a function gets the old value."""

    def change(content: dict) -> None:
        for name, value in changes.items():
            content["layers"][0][name] = value(content["layers"][0][name]) if callable(value) else value

    return edit(PLAN, change)


def plan(**changes) -> Mutation:
    return edit(PLAN, lambda content: content.update(changes))


PLANS: dict[str, tuple[Mutation, str]] = {
    **{name: (text_of(PLAN, text), f"plan=.*{PLAN}: ") for name, text in BROKEN.items()},
    **{
        f"layers {name}": (plan(layers=value), f"plan=.*{PLAN}: ")
        for name, value in {"null": None, "object": {"0": {}}, "empty": [], "numbers": [1, 2], "lists": [[], []]}.items()
    },
    **{f"mtp {name}": (plan(mtp=value), f"plan=.*{PLAN}: ") for name, value in {"text": "no", "number": 1, "one": [{}]}.items()},
    **{
        f"target {name}": (plan(target=value), f"plan=.*{PLAN}: target=")
        for name, value in {"text": "0.4", "bool": True, "list": [0.4], "1": 1, "negative": -0.1, "null": None}.items()
    },
    **{
        f"experts {name}": (layer(experts=value), f"plan=.*{PLAN}: layer 0: ")
        for name, value in {
            "huge": HUGE,
            "bool": True,
            "negative": -8,
            "text": "8",
            "float": 8.0,
            "null": None,
            "less": 7,
        }.items()
    },
    **{
        f"clusters {name}": (layer(clusters=value), f"plan=.*{PLAN}: layer 0: ")
        for name, value in {
            "null": None,
            "text": "0",
            "flat": [0, 1],
            "of texts": [["0"], ["1"]],
            "of floats": [[0.0], [1.0]],
            "of bools": [[False], [True]],
            "negative": [[-1], [0]],
            "beyond": [[0], [8]],
            "huge": [[0], [HUGE]],
            "twice": [[0], [0]],
            "empty inside": [[0], []],
            "none": [],
            "nested": [[[0]], [[1]]],
        }.items()
    },
    **{
        f"kept {name}": (layer(kept=value), f"plan=.*{PLAN}: layer 0: ")
        for name, value in {
            "null": None,
            "object": {"0": 0},
            "texts": ["0", "1"],
            "of nobody": [HUGE],
            "backwards": lambda kept: kept[::-1],
            "twice": lambda kept: kept + kept[-1:],
            "one less": lambda kept: kept[:-1],
            "none": [],
        }.items()
    },
    **{
        f"{field} {name}": (layer(**{field: value}), f"plan=.*{PLAN}: layer 0: ")
        for field, name, value in [
            ("nearest", "number", 1),
            ("mean", "text", "false"),
            ("ratio", "text", CODE),
            ("ratio", "above 1", 1.5),
            ("ratio", "bool", True),
            ("ratio", "list", [0.5]),
            ("expert_ratios", "of one", [0.5]),
            ("code", "more", CODE),
        ]
    },
    "a layer less": (edit(PLAN, lambda content: content["layers"].pop() and None), f"plan=.*{PLAN}: 1 layers"),
    "a thousand layers": (
        edit(PLAN, lambda content: content.update(layers=content["layers"] * 500)),
        f"plan=.*{PLAN}: 1000 layers",
    ),
}

SHARES = {
    "text": "half",
    "bools": [True, False],
    "texts": ["0.2", "0.5"],
    "above 1": [0.2, 1.5],
    "null": [None, 0.5],
    "three": [0.1] * 3,
}
RATIOS = {**BROKEN, **{name: json.dumps(value) for name, value in SHARES.items()}, "of a loop": DEEP}

LINE = '{"text": "Some text that is long enough for one sample."}\n'
MESSAGES = '{"text": [{"role": "user", "content": "What?"}]}\n'
LINES: dict[str, tuple[str | bytes, str]] = {
    "not JSON": (LINE + "{text: 1}\n", "line 2"),
    "torn": (LINE + LINE[:20], "line 2"),
    "a list": (LINE + "[1, 2]\n", "line 2"),
    "a number": (LINE + "7\n", "line 2"),
    "not UTF-8": (LINE.encode() + b'{"text": "\xff\xfe"}\n', "line 2"),
    "UTF-16": (LINE.encode("utf-16"), "line 1"),
    "NUL": ("\0" * 100, "line 1"),
    "deep": (LINE + f'{{"text": {DEEP}}}\n', "line 2"),
    "code": (LINE + CODE + "\n", "line 2"),
    "empty": ("", "the file is empty"),
    "blank": ("\n\n\n", "datasets cannot load it"),
    "no object holds anything": ("{}\n{}\n", "datasets cannot load it"),
    "another field": ('{"body": "text"}\n', "has the fields body"),
    "field of numbers": ('{"text": 1}\n', "row 0: field 'text' is int"),
    "field null": (LINE + '{"text": null}\n' + LINE, r"tokens \(1 of 3 rows have no value\), but 4 samples"),
    "field missing": (LINE + '{"body": "text"}\n' + LINE, r"tokens \(1 of 3 rows have no value\), but 4 samples"),
    "field bool": ('{"text": true}\n', "row 0: field 'text' is bool"),
    "field object": ('{"text": {"a": "b"}}\n', "row 0: field 'text' is dict"),
    "field of two kinds": (LINE + '{"text": 7}\n', "row 1: field 'text' is int"),
    "text, then messages": (LINE + MESSAGES, "row 1: field 'text'"),
    "list of texts": ('{"text": ["a", "b"]}\n', "row 0: field 'text': chat messages need a role"),
    "list of numbers": ('{"text": [1, 2]}\n', "row 0: field 'text': chat messages need a role"),
    "message without a role": ('{"text": [{"content": "What?"}]}\n', "row 0: field 'text': chat messages need a role"),
    "message without content": ('{"text": [{"role": "user"}]}\n', "row 0: field 'text': chat messages need a role"),
    "message of null": (MESSAGES.replace('"What?"', "null"), "row 0: field 'text': chat messages need a role"),
    "message of numbers": (MESSAGES.replace('"What?"', "7"), "row 0: field 'text': chat messages need a role"),
    "no template": (MESSAGES, "row 0: field 'text': the chat template of .* fails"),
    "too little": ('{"text": "a"}\n', "2 tokens"),
    "blank texts": ('{"text": "  "}\n', "no text in field"),
    "half a character": ('{"text": "\\ud800"}\n', "datasets cannot load it"),
}


def stored(name: str, change: Callable[[dict], object]) -> Mutation:
    """Change the tensors in a file."""

    def mutate(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)

    return mutate


def cast(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], object]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


ABOUT, FIRST = "stats/about.json", "stats/layer-00000.safetensors"
ABOUTS: dict[str, Mutation] = {
    **{name: text_of(ABOUT, text) for name, text in BROKEN.items()},
    **{
        f"{field} {name}": edit(ABOUT, lambda content, field=field, value=value: content.update({field: value}))
        for field, name, value in [
            ("sources", "list", ["all"]),
            ("sources", "empty", {}),
            ("sources", "texts", {"all": "2"}),
            ("sources", "negative", {"all": -2}),
            ("model", "number", 1),
            ("files", "null", None),
        ]
    },
    **{
        f"no {field}": edit(ABOUT, lambda content, field=field: content.pop(field) and None)
        for field in ("sources", "model", "files")
    },
}
# The digests in about.json are made to fit these.
STATISTICS: dict[str, tuple[Callable[[dict], object], str]] = {
    **{
        f"{name} {how}": (cast(name, change), name)
        for name in ("router_distance", "coactivation", "powers", "peak", "weights")
        for how, change in {
            "of half its rows": lambda t: t[: len(t) // 2],
            "in float16": lambda t: t.half(),
            "flat": torch.flatten,
        }.items()
    },
    **{
        f"no {name}": (lambda tensors, name=name: tensors.pop(name), name)
        for name in ("router_distance", "coactivation", "powers", "peak", "weights")
    },
    "distance NaN": (cast("router_distance", lambda t: t * float("nan")), "router_distance: has negative or infinite"),
    "powers infinite": (cast("powers", lambda t: t + float("inf")), "powers: has negative or infinite"),
    "counts negative": (cast("coactivation", lambda t: -1 - t), "coactivation: has negative or infinite"),
}


def progress(change: Callable[[dict], object], stream: str = "prune", layer: int = 0) -> Mutation:
    """Change the entry of a finished layer."""

    def mutate(folder: Path) -> None:
        (file,) = (folder / "progress").glob(f"{stream}-{layer:05d}-*")
        edit(str(file.relative_to(folder)), change)(folder)

    return mutate


def fields(**changes) -> Mutation:
    return progress(lambda entry: entry.update(changes))


def snapshot(**changes) -> Mutation:
    return progress(lambda entry: entry["snapshot"].update(changes))


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def damaged(pattern: str, change: Callable[[bytes], bytes]) -> Mutation:
    return lambda folder: first(folder, pattern).write_bytes(change(first(folder, pattern).read_bytes()))


def flipped(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


OUTSIDE = "../../../model/config.json"
RESUMED: dict[str, tuple[Mutation, str]] = {
    **{
        f"entry {name}": (
            lambda folder, text=text: text_of(first(folder, "progress/prune-*").name, text)(folder / "progress"),
            "prune-0",
        )
        for name, text in BROKEN.items()
    },
    **{
        f"{field} {name}": (fields(**{field: value}), f"prune-00000-0-of-1.json: {field}")
        for field, name, value in [
            ("kept", "text", "0"),
            ("kept", "floats", [0.0]),
            ("kept", "twice", [0, 0]),
            ("kept", "negative", [-1, 0]),
            ("kept", "backwards", [3, 2, 1, 0]),
            ("nonzero", "text", CODE),
            ("nonzero", "negative", {"experts": -1}),
            ("nonzero", "of no kind", {CODE: 1}),
            ("seconds", "text", {"read": CODE}),
            ("seconds", "negative", {"read": -1.0}),
            ("peak_bytes", "float", 1.5),
            ("powers", "of no stage", {"late": {}}),
            ("powers", "without sums", {"dense": {"experts": {"count": 1}}}),
            ("powers", "with texts", {"dense": {"experts": {"count": 1, "sums": [[CODE]] * 4}}}),
            ("saliency", "of no number", {"all": {CODE: 1}}),
            ("saliency", "negative", {"removed": {"-3": -1}}),
            ("refit", "without an error", {"steps": 1}),
            ("refit", "negative", {"steps": 1, "error": [1.0, -1.0]}),
            ("unseen", "bool", True),
            ("file", "above", OUTSIDE),
            ("file", "absolute", "/etc/passwd"),
            ("file", "above, of weights", "../../model/model-00001-of-00003.safetensors"),
            ("file", "number", 7),
            ("file", "dots", ".."),
            ("tensors", "list", ["a"]),
            ("tensors", "texts", {"a": "1"}),
            ("tensors", "negative", {"a": -1}),
            ("snapshot", "text", "here"),
            ("snapshot", "empty", {}),
        ]
    },
    **{
        f"snapshot {field} {name}": (snapshot(**{field: value}), "prune-00000-0-of-1.json: snapshot")
        for field, name, value in [
            ("file", "above", "../progress/a.safetensors"),
            ("file", "null", None),
            ("sha256", "number", 7),
            ("micro_batches", "text", "0"),
            ("micro_batches", "floats", [0.5]),
            ("micro_batches", "object", {"0": 0}),
        ]
    },
    "kept of others": (fields(kept=[0]), "progress: layer 0: kept"),
    "kept huge": (fields(kept=[0, 1, 2, 3, 4, HUGE]), "progress: layer 0: kept"),
    "no field kept": (progress(lambda entry: entry.pop("kept") and None), "prune-00000-0-of-1.json: has the fields"),
    "a field more": (fields(code=CODE), "prune-00000-0-of-1.json: has the fields"),
    "no snapshot": (fields(snapshot=None), "hidden: the last finished layer of prune has no snapshot"),
    "micro-batches of others": (snapshot(micro_batches=[5, 6]), "do not hold all micro-batches"),
    "another digest": (snapshot(sha256="0" * 64), "hidden/prune-.*is damaged"),
    "another snapshot": (snapshot(file="prune-00009-0-of-1.safetensors"), "prune-00009-.*is missing"),
    "another shard": (fields(file="other.safetensors"), "other.safetensors: is missing"),
    "the shard of another": (fields(file="outside.safetensors"), "name the same file"),
    "tensors of others": (fields(tensors={"a": 1}), "layer-00000-.*holds other tensors"),
    "snapshot flipped": (damaged("hidden/prune-*", flipped), "hidden/prune-.*is damaged"),
    "snapshot torn": (damaged("hidden/prune-*", lambda content: content[:50]), "hidden/prune-.*is damaged"),
    "snapshot empty": (damaged("hidden/prune-*", lambda content: b""), "hidden/prune-.*is damaged"),
    "shard torn": (damaged("model/layer-*", lambda content: content[:50]), "layer-00000-.*is too short"),
    "shard of nothing": (damaged("model/layer-*", lambda content: bytes(len(content))), "layer-00000-.*header"),
    "outside torn": (damaged("model/outside*", lambda content: content[:50]), "outside.safetensors: is too short"),
    "outside entry above": (
        progress(lambda entry: entry.update(file=OUTSIDE), "outside"),
        "outside-00000-0-of-1.json: file",
    ),
    **{
        f"manifest {name}": (text_of("manifest.json", text), "manifest.json: ")
        for name, text in {**BROKEN, "without a summary": "{}", "summary list": '{"summary": []}'}.items()
    },
    **{
        f"config {name}": (text_of("config.yaml", text), "config.yaml: cannot be read as YAML|holds another run")
        for name, text in {
            "code": "!!python/object/apply:os.system ['touch hostile']",
            "code inside": "config: !!python/name:os.system",
            "torn": "config: {",
            "not UTF-8": b"\xff\xfe\xfd",
            "deep": DEEP,
            "aliases": "a: &a [x, x]\n" + "".join(f"{k}: &{k} [*{j}, *{j}]\n" for j, k in pairwise("abcdefghi")),
            "its own alias": "a: &a [*a]",
            "tab": "a:\n\t- b",
            "number": "7",
            "long number": "a: 1" + "0" * 5000,
            "date": "a: 2020-99-99",
        }.items()
    },
}
