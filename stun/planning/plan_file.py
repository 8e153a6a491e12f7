"""Plan files, perhaps edited by hand: read and checked against a model."""

from dataclasses import replace
from pathlib import Path

from stun.config import Dropped, PruneConfig, StunError
from stun.model.architecture import Architecture
from stun.planning.budget import LayerSize, count_of_heads, floor_of, groups_of, make_budget, unit_of
from stun.planning.plan import LayerPlan, Plan, read_layers


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
