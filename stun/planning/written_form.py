"""What is written of each source tensor: matrices that are rounded to a new form, and bytes."""

from __future__ import annotations

from stun.checkpoint.codecs.grids import GRIDS, Grid
from stun.config import OutputFormat
from stun.model.architecture import Architecture
from stun.model.layer_layout import LayerLayout

# Last parts of the names of matrices that runtimes merge into one, which are rounded together or not at all.
_MERGED = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


def rounded_dense(arch: Architecture, layout: LayerLayout, grid: Grid) -> list[list[str]]:
    """Names of a layer's matrices outside the experts that are rounded, those that runtimes merge together in one list."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(layout.linears):
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        merged = next((leaves for leaves in _MERGED if leaf in leaves), (leaf,))
        groups.setdefault((parent, *merged), []).append(name)
    return [names for names in groups.values() if all(grid.holds(arch.info(name).shape) for name in names)]


def matrices_of_experts(arch: Architecture, layout: LayerLayout) -> list[str]:
    """Parts of a layer's experts that are matrices."""
    some = layout.experts[layout.whole[0]] if layout.experts else {}
    return [part for part in some if len(arch.piece(layout, layout.whole[0], part)[0].shape) > 1]


def rounded_names(arch: Architecture, grid: Grid) -> set[str]:
    """Source names of all matrices that are rounded."""
    names = {name for layout in arch.layers for group in rounded_dense(arch, layout, grid) for name in group}
    for layout in [*arch.layers, *arch.mtp]:
        parts = matrices_of_experts(arch, layout)
        names |= {name for number in layout.whole for part in parts for name in layout.experts[number][part]}
    return names


def plain_modules(arch: Architecture, grid: Grid) -> list[str]:
    """Modules whose matrices are not rounded, by source name."""
    rounded, tensors = rounded_names(arch, grid), arch.source.tensors
    plain = {name for name, info in tensors.items() if name.endswith(".weight") and len(info.shape) == 2 and name not in rounded}
    return sorted({"lm_head", *(name.removesuffix(".weight") for name in plain)})


def bytes_by_name(arch: Architecture, form: OutputFormat) -> dict[str, int]:
    """Bytes in which every source tensor is written."""
    grid, tensors = GRIDS.get(form.name), arch.source.tensors
    if grid is None:
        return {name: info.nbytes if form is OutputFormat.bfloat16 else info.stored_bytes for name, info in tensors.items()}
    rounded = rounded_names(arch, grid)
    return {name: grid.nbytes(info.shape) if name in rounded else info.nbytes for name, info in tensors.items()}
