"""Measurements of every layer, combined from all ranks: layers.json of a run folder.

`{"observe": [...], "prune": [...], "mtp": [...]}`, a mapping for each layer: `seconds` (read, compute, write; maximum over the
ranks) and `peak_bytes` (since the layer before, maximum over the ranks). In the second stream also

kinds      kind of tensor -> `parameters` before and `nonzero` after; those of removed experts count as zero
kurtosis   kind, or `scope` for all in the configured scope -> stage -> kurtosis of the matrices (stun.run.kurtosis). Stages:
           `dense`, `experts_removed`, and `weights_removed` (non-zero weights only); null if not measured or undefined
saliency   `all` and `removed`: bin -> weights with such a score (stun.sparsify.saliency); only if single weights were removed
refit      of the joint refit: `steps`, and the squared `error` of the layer's output before and after; only where there was one

and in the first one `powers`: power sums of the dense experts.
"""

from collections import Counter

from stun.config import Scope
from stun.run.kurtosis import kurtosis, together
from stun.schema import COUNT, INTEGER, NULL, NUMBER, POSITIVE, SIZE, Leaf, is_number, misfit, one_of

FILE = "layers.json"
KINDS = (*(scope.name for scope in Scope), "other")
PHASES = ("read", "compute", "write")
STAGES = ("dense", "experts_removed", "weights_removed")


def is_pair(value: object) -> bool:
    """Whether a JSON value is a list of two numbers, 0 or more."""
    return type(value) is list and len(value) == 2 and all(is_number(number) and number >= 0 for number in value)


def _is_sums(value: object) -> bool:
    is_known = type(value) is list and len(value) in (0, 4)
    return is_known and all(type(part) is list and all(map(is_number, part)) for part in value)


_EMPTY = Leaf("empty", lambda value: value == {})
_SUMS = {"count": COUNT, "sums": Leaf("four lists of numbers, or an empty list", _is_sums)}
_REFIT = {"steps": COUNT, "error": Leaf("two numbers, 0 or more", is_pair)}
# Kinds of the fields in a rank's ledger entry.
FIELDS = {
    "seconds": {one_of(*PHASES): SIZE},
    "peak_bytes": COUNT,
    "nonzero": {one_of(*KINDS): COUNT},
    "powers": {one_of(*STAGES): {one_of(*KINDS): _SUMS}},
    "saliency": {one_of("all", "removed"): {INTEGER: COUNT}},
    "refit": (_EMPTY, _REFIT),
}
POWERS_SEEN = (_EMPTY, {"dense": {"experts": _SUMS}})  # those in the first stream's entry
_KURTOSIS = {one_of(*STAGES): (NUMBER, NULL)}
_TIMED = {"seconds": dict.fromkeys(PHASES, SIZE), "peak_bytes": COUNT}
_PRUNED = {
    **_TIMED,
    "kinds": {one_of(*KINDS): {"parameters": POSITIVE, "nonzero": COUNT}},
    "kurtosis": {"scope": _KURTOSIS, **{f"{kind}?": _KURTOSIS for kind in KINDS}},
    "saliency?": {name: {INTEGER: COUNT} for name in ("all", "removed")},
    "refit?": _REFIT,
}
LAYERS = {"observe?": [{**_TIMED, "powers?": _SUMS}], "prune?": [_PRUNED], "mtp?": [_PRUNED]}  # kind of layers.json


def _time_and_memory(entries: list[dict]) -> dict:
    seconds = {phase: max(entry["seconds"].get(phase, 0.0) for entry in entries) for phase in PHASES}
    return {"seconds": seconds, "peak_bytes": max(entry["peak_bytes"] for entry in entries)}


def observed_layer(entries: list[dict]) -> dict:
    """Record of a layer of the first stream, from all ranks' ledger entries."""
    powers = [entry["powers"]["dense"]["experts"] for entry in entries if entry["powers"]]
    return _time_and_memory(entries) | ({"powers": together(powers)} if powers else {})


def pruned_layer(entries: list[dict], parameters: dict[str, int], scope: list[str], dense_experts: dict | None) -> dict:
    """Record of a layer of the second stream, from all ranks' ledger entries, its parameters by kind in the source, the kinds in
    scope, and the power sums of its experts in the first stream, if any."""
    nonzero = sum((Counter(entry["nonzero"]) for entry in entries), Counter())
    kinds = {k: {"parameters": count, "nonzero": nonzero[k]} for k, count in parameters.items() if count}
    sums = {stage: _by_kind(entries, stage) for stage in STAGES}
    if "experts" in kinds and dense_experts and not sums["dense"]["experts"]:
        sums["dense"]["experts"] = [dense_experts]
    saliency = {
        name: sum((Counter(entry["saliency"].get(name, {})) for entry in entries), Counter()) for name in ("all", "removed")
    }
    record = {"kinds": kinds, "kurtosis": _kurtoses(sums, [kind for kind in kinds if kind != "other"], scope)}
    if saliency["all"]:
        record["saliency"] = {name: dict(sorted(counts.items(), key=lambda i: int(i[0]))) for name, counts in saliency.items()}
    if entries[0]["refit"]:  # every rank says the same
        record["refit"] = entries[0]["refit"]
    return _time_and_memory(entries) | record


def left_by_refit(told: dict) -> float:
    """Share of a layer's squared error that its joint refit left."""
    before, after = told["error"]
    return after / before if before else 1.0


def left_by_refits(layers: dict) -> list[float | None]:
    """The same of every decoder layer in the content of a layers.json; None where there was none."""
    return [left_by_refit(layer["refit"]) if layer.get("refit") else None for layer in layers.get("prune", [])]


def _by_kind(entries: list[dict], stage: str) -> dict[str, list[dict]]:
    """Kind -> power sums of the ranks at a stage."""
    stages = [entry["powers"].get(stage, {}) for entry in entries]
    return {kind: [powers[kind] for powers in stages if kind in powers] for kind in KINDS}


def _kurtoses(sums: dict[str, dict[str, list[dict]]], kinds: list[str], scope: list[str]) -> dict[str, dict[str, float | None]]:
    values = {kind: {stage: kurtosis(sums[stage][kind]) for stage in STAGES} for kind in kinds}
    inside = [kind for kind in kinds if kind in scope]
    values["scope"] = {}
    for stage in STAGES:
        is_whole = inside and all(sums[stage][kind] for kind in inside)
        values["scope"][stage] = kurtosis([part for kind in inside for part in sums[stage][kind]]) if is_whole else None
    return values


def read_observed(content: dict, layers: int) -> list[dict]:
    """Records of the first stream in the content of a layers.json; empty if it is malformed or has another number of layers."""
    records = content.get("observe", [])
    return records if not misfit(content, {"observe": LAYERS["observe?"]}) and len(records) == layers else []


def sparsity_by_kind(layers: dict) -> dict[str, tuple[int, int]]:
    """Kind -> parameters before and non-zero ones after, of all decoder layers in the content of a layers.json."""
    totals: dict[str, tuple[int, int]] = {}
    for layer in layers.get("prune", []):
        for kind, counts in layer["kinds"].items():
            before, after = totals.get(kind, (0, 0))
            totals[kind] = (before + counts["parameters"], after + counts["nonzero"])
    return {kind: totals[kind] for kind in KINDS if kind in totals}
