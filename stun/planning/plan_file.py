"""Plan files, perhaps edited by hand: read and checked against a model."""

from dataclasses import replace
from pathlib import Path

from stun.config import Dropped, PruneConfig, StunError
from stun.files import read_json
from stun.model.architecture import Architecture
from stun.planning.budget import LayerSize, count_of_heads, floor_of, groups_of, make_budget, unit_of
from stun.planning.plan import LayerPlan, Plan
from stun.schema import COUNT, FLAG, NULL, SHARE, Leaf, is_number, misfit

PLAN = {"layers": [{"experts": COUNT, "clusters": [[COUNT]]}]}  # kind of a plan's file, as far as it tells one from another file
_LAYER = {"experts": COUNT, "clusters": [[COUNT]], "kept?": [COUNT], "nearest?": FLAG, "mean?": FLAG, "ratio?": (NULL, SHARE)}
_TARGET = Leaf("total sparsity, which lies in [0, 1)", lambda value: is_number(value) and 0 <= value < 1)
_READ = {"layers": [_LAYER], "mtp?": [_LAYER], "target?": _TARGET}  # ... and of one that is read


def read_layers(file: Path) -> tuple[list[LayerPlan], list[LayerPlan], float]:
    """Decoder layers, prediction heads and target of a plan file, perhaps edited by hand. Raises StunError if it is not valid."""
    content = read_json(file, f"plan={file}")
    if reason := misfit(content, _READ):
        raise StunError(f"plan={file}: {reason}")
    layers = [_read_layer(f"plan={file}: layer {number}", entry) for number, entry in enumerate(content["layers"])]
    heads = [_read_layer(f"plan={file}: layer mtp {number}", entry) for number, entry in enumerate(content.get("mtp", []))]
    return layers, heads, float(content.get("target", 0.0))


def _read_layer(where: str, entry: dict) -> LayerPlan:
    """Plan of a layer from an entry of its kind."""
    known = {name.removesuffix("?") for name in _LAYER}
    if entry.keys() - known:
        raise StunError(f"{where}: unknown entries {sorted(entry.keys() - known)}; known: {sorted(known)}")
    plan = LayerPlan(**entry)
    members = [expert for cluster in plan.clusters for expert in cluster]
    if len(set(members)) != len(members) or max(members, default=-1) >= plan.experts or [] in plan.clusters:
        raise StunError(f"{where}: clusters must be lists of experts 0 to {plan.experts - 1}, each in one cluster at most")
    if plan.kept and sorted(plan.kept) != plan.kept:
        raise StunError(f"{where}: kept must be ascending, is {plan.kept}")
    chosen = [len(set(plan.kept).intersection(cluster)) for cluster in plan.clusters]
    if plan.kept and (set(chosen) != {1} or len(plan.kept) != len(plan.clusters)):
        raise StunError(f"{where}: of every cluster one member must be kept, and no other expert")
    if not plan.kept and plan.clusters and not plan.nearest:
        raise StunError(f"{where}: no expert is kept; set nearest to keep the member nearest each cluster's mean")
    return plan


def read_plan(file: str, arch: Architecture, sizes: list[LayerSize], cfg: PruneConfig, target: float | None) -> Plan:
    """Plan in `file`, with its zeros counted for `target` (None: its own). Raises StunError if it does not fit the model."""
    layers, heads, own_target = read_layers(Path(file))
    where, floor = f"plan={file}", floor_of(cfg, arch)
    if len(layers) != len(arch.layers) or len(heads) != len(arch.mtp):
        needed = f"{len(arch.layers)} layers and {len(arch.mtp)} prediction heads"
        raise StunError(f"{where}: {len(layers)} layers and {len(heads)} prediction heads; the model has {needed}")
    for layout, layer in zip([*arch.layers, *arch.mtp], [*layers, *heads], strict=True):
        if layer.experts != layout.num_experts:
            raise StunError(f"{where}: layer {layout.index}: {layer.experts} experts; the model has {layout.num_experts}")
        if layer.experts and len(layer.clusters) < floor and len(layer.clusters) < layer.experts:
            raise StunError(f"{where}: layer {layout.index} keeps {len(layer.clusters)} experts; at least {floor} are needed")
        _check_groups(layer, groups_of(cfg, arch), f"{where}: layer {layout.index}")
    if cfg.sparsify.pattern and any(layer.ratio is not None for layer in layers):
        raise StunError(f"{where}: has ratios, and sparsify.pattern={cfg.sparsify.pattern} fixes every matrix; set only one")
    counts = {len(layer.clusters) for layer in layers if layer.experts}
    if cfg.experts.dropped is Dropped.novice and any(layer.mean for layer in layers):
        raise StunError(f"{where}: a layer has mean: its experts' means need experts.dropped=reroute")
    if len(counts) > 1 and arch.cannot_differ:
        raise StunError(f"{where}: layers keep different numbers of experts; {arch.cannot_differ}, so they cannot")
    for layer in heads:
        wanted = count_of_heads(cfg, counts) or layer.experts
        if len(layer.clusters) != wanted:
            raise StunError(f"{where}: a prediction head must keep {wanted} experts, as the layers do, or all where these differ")
    target = own_target if target is None else target
    plan = make_budget(replace(cfg, target=target), sizes, [len(layer.clusters) for layer in layers])
    removed = plan.dropped + plan.zeros
    if cfg.sparsify.pattern and abs(removed - target * plan.parameters) > 0.51 * groups_of(cfg, arch) * unit_of(cfg, sizes):
        total = f"with sparsify.pattern={cfg.sparsify.pattern} it removes {removed / plan.parameters:.7f}"
        raise StunError(f"{where}: {total}, not target={target}; set the target to that")
    if plan.dropped > round(target * plan.parameters):
        share = plan.dropped / plan.parameters
        raise StunError(f"{where}: the removed experts are {share:.4f} of the parameters, more than target={target}")
    plan.layers, plan.mtp = layers, heads
    return plan


def _check_groups(layer: LayerPlan, groups: int, where: str) -> None:
    size = max(1, layer.experts // groups)
    homes = [{expert // size for expert in cluster} for cluster in layer.clusters]
    if layer.experts and (any(len(home) > 1 for home in homes) or len({homes.count({g}) for g in range(groups)}) > 1):
        raise StunError(
            f"{where}: routing is limited to {groups} groups of experts: each must keep as many, no cluster may span two"
        )
