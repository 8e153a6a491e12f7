"""What the streams measured of every layer, put together from all ranks: layers.json of a run folder.

`{"observe": [...], "prune": [...], "mtp": [...]}`, a mapping for each layer: `seconds` (read, compute, write; of the slowest
rank) and `peak_bytes` (of the rank that held most, since the layer before). In the second stream also

kinds      kind of tensor -> `parameters` before and `nonzero` after; experts that left count as removed
kurtosis   kind, or `scope` for all in the configured scope -> stage -> kurtosis of the matrices (stun.run.kurtosis). Stages:
           `dense`, `experts_left`, and `weights_left`, of the non-zero weights then;
           null where it was not measured or is not defined
saliency   `all` and `removed`: bin -> weights with such a score (stun.sparsify.saliency); only where single weights left

and in the first one `powers`: sums of powers of the dense experts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from stun.config import Scope
from stun.files import is_count
from stun.run.kurtosis import kurtosis, together

FILE = "layers.json"
KINDS = (*(scope.name for scope in Scope), "other")
PHASES = ("read", "compute", "write")
STAGES = ("dense", "experts_left", "weights_left")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _maps(keys: Callable[[str], bool], values: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(keys(key) and values(entry) for key, entry in value.items())


def _is_sums(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() != {"count", "sums"} or not is_count(value["count"]):
        return False
    sums = value["sums"]
    return type(sums) is list and len(sums) in (0, 4) and all(type(own) is list and all(map(_is_number, own)) for own in sums)


# What a rank may enter into the ledger, by field.
FIELDS: dict[str, Callable[[object], bool]] = {
    "seconds": _maps(PHASES.__contains__, lambda value: _is_number(value) and value >= 0),
    "peak_bytes": is_count,
    "nonzero": _maps(KINDS.__contains__, is_count),
    "powers": _maps(STAGES.__contains__, _maps(KINDS.__contains__, _is_sums)),
    "saliency": _maps(
        lambda name: name in ("all", "removed"), _maps(lambda place: place.removeprefix("-").isdecimal(), is_count)
    ),
}


def _time_and_memory(entries: list[dict]) -> dict:
    seconds = {phase: max(entry["seconds"].get(phase, 0.0) for entry in entries) for phase in PHASES}
    return {"seconds": seconds, "peak_bytes": max(entry["peak_bytes"] for entry in entries)}


def observed_layer(entries: list[dict]) -> dict:
    """A layer of the first stream, from the ledger's entries of all ranks."""
    own = [entry["powers"]["dense"]["experts"] for entry in entries if entry["powers"]]
    return _time_and_memory(entries) | ({"powers": together(own)} if own else {})


def pruned_layer(entries: list[dict], parameters: dict[str, int], scope: list[str], dense_experts: dict | None) -> dict:
    """A layer of the second stream, from the ledger's entries of all ranks, the parameters by kind before it, the kinds in scope,
    and the sums of powers that the first stream has of its experts, if any."""
    nonzero = sum((Counter(entry["nonzero"]) for entry in entries), Counter())
    kinds = {k: {"parameters": count, "nonzero": nonzero[k]} for k, count in parameters.items() if count}
    sums = {stage: _by_kind(entries, stage) for stage in STAGES}
    if "experts" in kinds and dense_experts and not sums["dense"].get("experts"):
        sums["dense"]["experts"] = [dense_experts]
    saliency = {
        name: sum((Counter(entry["saliency"].get(name, {})) for entry in entries), Counter()) for name in ("all", "removed")
    }
    found = {"kinds": kinds, "kurtosis": _kurtoses(sums, [kind for kind in kinds if kind != "other"], scope)}
    if saliency["all"]:
        found["saliency"] = {name: dict(sorted(counts.items(), key=lambda i: int(i[0]))) for name, counts in saliency.items()}
    return _time_and_memory(entries) | found


def _by_kind(entries: list[dict], stage: str) -> dict[str, list[dict]]:
    """What the ranks have of each kind at a stage."""
    found: dict[str, list[dict]] = {}
    for entry in entries:
        for kind, own in entry["powers"].get(stage, {}).items():
            found.setdefault(kind, []).append(own)
    return found


def _kurtoses(sums: dict[str, dict[str, list[dict]]], kinds: list[str], scope: list[str]) -> dict[str, dict[str, float | None]]:
    of = {kind: {stage: kurtosis(sums[stage].get(kind, [])) for stage in STAGES} for kind in kinds}
    inside = [kind for kind in kinds if kind in scope]
    of["scope"] = {}
    for stage in STAGES:
        is_whole = inside and all(sums[stage].get(kind) for kind in inside)
        of["scope"][stage] = kurtosis([part for kind in inside for part in sums[stage][kind]]) if is_whole else None
    return of


def read_observed(content: dict, layers: int) -> list[dict]:
    """The layers of the first stream in a layers.json; none where it is not of so many layers."""
    found = content.get("observe")
    fits = type(found) is list and len(found) == layers
    return found if fits and all(isinstance(own, dict) and _is_sums(own.get("powers", _NO_SUMS)) for own in found) else []


_NO_SUMS = {"count": 0, "sums": []}


def sparsity_by_kind(layers: dict) -> dict[str, tuple[int, int]]:
    """From the content of layers.json: parameters before and non-zero ones after, of all decoder layers, by kind."""
    found: dict[str, tuple[int, int]] = {}
    for layer in layers.get("prune", []):
        for kind, counts in layer["kinds"].items():
            before, after = found.get(kind, (0, 0))
            found[kind] = (before + counts["parameters"], after + counts["nonzero"])
    return {kind: found[kind] for kind in KINDS if kind in found}
