"""Plans as files: made from a run's saved statistics, described, and taken back, perhaps edited by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from stun.checkpoint.reader import Checkpoint
from stun.config import PruneConfig, StunError
from stun.files import write_json
from stun.model.architecture import Architecture
from stun.planning.budget import (
    LayerSize,
    check_pattern,
    experts_to_drop,
    floor_of,
    make_budget,
    measure_layers,
    model_bytes,
    unit_of,
)
from stun.planning.layer_ratios import check_ratios
from stun.planning.make import check_loadable, make_plan
from stun.planning.plan import LayerPlan, Plan, read_layers
from stun.planning.protection import check_listed
from stun.planning.validation import validate_experts
from stun.run.identity import model_digest
from stun.statistics.store import Statistics


@dataclass(frozen=True)
class Described:
    """A plan, the bytes of all tensors of the checkpoint it makes, and by calibration source the experts that serve most of its
    tokens: how many there are, and how many of them stay (None where weights are yet to decide that)."""

    plan: Plan
    nbytes: int
    needs: dict[str, tuple[int, int | None]]


def plan_from_run(cfg: PruneConfig, output: Path, compare: str = "") -> dict[str, Described]:
    """Make a plan from the statistics of `cfg.run_dir` and write it to `output`; the plan file `compare` beside it, where given.

    Raises StunError where the statistics are missing or belong to another model, or the file cannot be written.
    """
    source = Checkpoint.open(cfg.model.path)
    arch = Architecture(source)
    stats = Statistics(Path(cfg.run_dir) / "stats")
    if not stats.complete:
        raise StunError(f"run_dir={cfg.run_dir}: holds no complete statistics; a run that drops experts takes them")
    if stats.about["model"] != model_digest(source):
        raise StunError(f"run_dir={cfg.run_dir}: its statistics belong to another model than {cfg.model.path}")
    if output.resolve() in ((Path(cfg.run_dir) / "plan.json").resolve(), Path(compare).resolve()):
        raise StunError(f"output={output}: is the plan of the run itself, or the one to compare with; choose another file")
    validate_experts(cfg, list(stats.sources))
    if cfg.experts.fraction == "auto":
        raise StunError("experts.fraction=auto: a search runs the model; jobs.prune does that")
    check_loadable(cfg, arch)
    check_ratios(cfg.sparsify, arch)
    check_pattern(cfg.sparsify, arch)
    sizes = measure_layers(arch, cfg.sparsify.scope)
    other = read_plan(compare, arch, sizes, cfg, None) if compare else None
    drops = experts_to_drop(cfg, sizes, arch)
    check_listed(cfg, arch, drops)
    plan = make_plan(cfg, arch, sizes, drops, stats)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, plan.to_json())
    except OSError as error:
        raise StunError(f"output={output}: cannot be written: {error}") from error
    plans = {str(output): plan} | ({compare: other} if other else {})
    return {name: Described(made, model_bytes(arch, made), _needs(arch, made, stats)) for name, made in plans.items()}


def _needs(arch: Architecture, plan: Plan, stats: Statistics, share: float = 0.9) -> dict[str, tuple[int, int | None]]:
    """For each source the fewest experts of all layers that serve `share` of its routed tokens, and how many of them stay."""
    needs: dict[str, tuple[int, int]] = {name: (0, 0) for name in stats.sources}
    is_open = any(layer.clusters and not layer.kept for layer in plan.layers)
    for layout in (layout for layout in arch.layers if layout.experts):
        served_SE = stats.load(layout.index, layout.num_experts)["coactivation"].diagonal(dim1=1, dim2=2).double()
        kept = set(plan.layers[layout.index].kept)
        for name, served_E in zip(needs, served_SE, strict=True):
            order = served_E.argsort(descending=True, stable=True)
            enough = int((served_E[order].cumsum(0) < share * served_E.sum()).sum()) + 1
            needed, stay = needs[name]
            needs[name] = (needed + enough, stay + len(kept.intersection(order[:enough].tolist())))
    return {name: (needed, None if is_open else stay) for name, (needed, stay) in needs.items()}


def read_plan(file: str, arch: Architecture, sizes: list[LayerSize], cfg: PruneConfig, target: float | None) -> Plan:
    """The plan in `file`, its weights counted anew for `target` (None: its own). Raises StunError where it does not fit."""
    layers, heads, own_target = read_layers(Path(file))
    where, floor = f"plan={file}", floor_of(cfg, arch)
    if len(layers) != len(arch.layers) or len(heads) != len(arch.mtp):
        here = f"{len(arch.layers)} layers and {len(arch.mtp)} prediction heads"
        raise StunError(f"{where}: {len(layers)} layers and {len(heads)} prediction heads; the model has {here}")
    for layout, layer in zip([*arch.layers, *arch.mtp], [*layers, *heads], strict=True):
        if layer.experts != layout.num_experts:
            raise StunError(f"{where}: layer {layout.index}: {layer.experts} experts; the model has {layout.num_experts}")
        if layer.experts and len(layer.clusters) < floor and len(layer.clusters) < layer.experts:
            raise StunError(f"{where}: layer {layout.index} keeps {len(layer.clusters)} experts; at least {floor} are needed")
        _check_groups(layer, arch.groups, f"{where}: layer {layout.index}")
    if cfg.sparsify.pattern and any(layer.ratio is not None for layer in layers):
        raise StunError(f"{where}: has ratios, and sparsify.pattern={cfg.sparsify.pattern} fixes every matrix; leave one out")
    counts = {len(layer.clusters) for layer in layers if layer.experts}
    if len(counts) > 1 and arch.cannot_differ:
        raise StunError(f"{where}: layers keep different numbers of experts; {arch.cannot_differ}, so they cannot")
    for layer in heads:
        wanted = min(counts) if len(counts) == 1 else layer.experts
        if len(layer.clusters) != wanted:
            raise StunError(
                f"{where}: a prediction head must keep {wanted} experts, as every layer does, or all where layers differ"
            )
    asked = own_target if target is None else target
    plan = make_budget(replace(cfg, target=asked), sizes, [len(layer.clusters) for layer in layers])
    removed = plan.dropped + plan.zeros
    if cfg.sparsify.pattern and abs(removed - asked * plan.parameters) > 0.51 * arch.groups * unit_of(cfg, sizes):
        both = f"with sparsify.pattern={cfg.sparsify.pattern} it removes {removed / plan.parameters:.7f}"
        raise StunError(f"{where}: {both}, not target={asked}; set the target to that")
    if plan.dropped > round(asked * plan.parameters):
        share = plan.dropped / plan.parameters
        raise StunError(f"{where}: the experts that leave are {share:.4f} of the parameters, more than target={asked}")
    plan.layers, plan.mtp = layers, heads
    return plan


def _check_groups(layer: LayerPlan, groups: int, where: str) -> None:
    size = max(1, layer.experts // groups)
    homes = [{expert // size for expert in cluster} for cluster in layer.clusters]
    if layer.experts and (any(len(home) > 1 for home in homes) or len({homes.count({g}) for g in range(groups)}) > 1):
        raise StunError(
            f"{where}: routing is limited to {groups} groups of experts: each must keep as many, no cluster may span two"
        )
