"""Form in which a quantised checkpoint's weights are written: as stored, or dequantised."""

from __future__ import annotations

from dataclasses import replace

from stun.config import Dropped, ExpertsMethod, OutputFormat, PruneConfig, SparsifyMethod, StunError, Uneven
from stun.model.architecture import Architecture
from stun.model.form_settings import kept_by_block, renumbered
from stun.planning.plan import Plan


def settle_format(cfg: PruneConfig, arch: Architecture, plan: Plan, is_open: bool) -> tuple[PruneConfig, str]:
    """Configuration with the form in which a quantised source's weights are written, and a line that says it; unchanged for a
    plain source. `is_open`: a search decides later how much is removed as single weights.

    Raises StunError if what is asked for changes weights whose codes it would keep, or a plain source would be dequantised.
    """
    forms, asked = arch.source.formats, cfg.output.format
    if not forms:
        if asked is OutputFormat.bfloat16:
            raise StunError("output.format=bfloat16: the source is not quantised; leave it out, and weights keep their dtype")
        return cfg, ""
    drops = is_open or any(layer.experts > len(layer.clusters) for layer in plan.layers)
    masks = is_open or bool(plan.zeros)
    changes = _changes(cfg, plan, drops, masks)
    if asked is OutputFormat.source and changes:
        what, instead = ", ".join(changes), " ".join(changes.values())
        reason = f"{what}: would change weights whose codes are kept"
        raise StunError(f"output.format=source: {reason}; give {instead}, or output.format=bfloat16")
    without = not masks and set(changes) == {"experts.refit=true"} and asked is OutputFormat.auto
    is_kept = asked is not OutputFormat.bfloat16 and (without or not changes)
    if is_kept:
        _check_settings(arch)
    form = OutputFormat.source if is_kept else OutputFormat.bfloat16
    experts = replace(cfg.experts, refit=False) if without else cfg.experts
    return replace(cfg, experts=experts, output=replace(cfg.output, format=form)), _note(arch, form, changes, without)


def _changes(cfg: PruneConfig, plan: Plan, drops: bool, masks: bool) -> dict[str, str]:
    """Settings that change the values of weights that are kept -> what does not."""
    found = {}
    if cfg.experts.refit and (drops or masks):
        found["experts.refit=true"] = "experts.refit=false"
    if masks and cfg.sparsify.method in (SparsifyMethod.sparsegpt, SparsifyMethod.alps):
        found[f"sparsify.method={cfg.sparsify.method.name}"] = "sparsify.method=wanda"
    if masks and cfg.sparsify.reconstruct:
        found["sparsify.reconstruct=true"] = "sparsify.reconstruct=false"
    if drops and cfg.experts.uneven is Uneven.padded:
        found["experts.uneven=padded"] = "experts.uneven=code"
    if any(layer.mean for layer in plan.layers) or (drops and _may_have_means(cfg, plan)):
        found[f"experts.kappa={cfg.experts.kappa}"] = "experts.kappa=0"
    return found


def _may_have_means(cfg: PruneConfig, plan: Plan) -> bool:
    """Whether some layer keeps so few clusters that it keeps their means."""
    clusters = [len(layer.clusters) for layer in plan.layers if layer.experts]
    is_clustered = not cfg.plan and cfg.experts.method is not ExpertsMethod.rank and cfg.experts.dropped is not Dropped.novice
    return is_clustered and min(clusters, default=0) <= cfg.experts.kappa


def _check_settings(arch: Architecture) -> None:
    """Raise StunError if the quantisation settings pick experts by number."""
    layouts = [*arch.layers, *arch.mtp]
    renumbered(arch.source.quantisation, kept_by_block(layouts, [layout.whole for layout in layouts]))


def _note(arch: Architecture, form: OutputFormat, changes: dict[str, str], without: bool) -> str:
    """What is read, in which form it is written, and why."""
    source = arch.source
    stored = f"the source is {' and '.join(source.formats)}, {source.bits:.3g} bits a weight"
    if form is OutputFormat.source:
        refit = "; experts.refit is off, since it changes weights: output.format=bfloat16 refits" if without else ""
        return f"{stored}; what is kept is copied as stored{refit}"
    reason = f", since {', '.join(changes)} changes weights; whole experts alone (experts.drop) keep the form" if changes else ""
    return f"{stored}; weights are written in bfloat16, {16 / source.bits:.2g} times the bytes{reason}"
