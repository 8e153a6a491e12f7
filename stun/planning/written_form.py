"""Form in which weights are written: as a quantised source stores them, dequantised, or rounded to a new form."""

import re
from dataclasses import replace

import torch
from torch import nn

from stun.checkpoint.codecs.grids import GRIDS, Grid
from stun.checkpoint.quantised import settings_of
from stun.config import OutputFormat, PruneConfig, StunError, Uneven
from stun.model.architecture import Architecture
from stun.model.form_settings import kept_by_block, renumbered
from stun.model.layer_layout import LayerLayout

# Last parts of the names of matrices that runtimes merge into one, which are rounded together or not at all.
_MERGED = (
    *(("q_proj", "k_proj", "v_proj"), ("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj"), ("w1", "w3")),
    *(("in_proj_qkv", "in_proj_z"), ("wq_a", "wkv")),
)
# Matrices that runtimes hold plain, whatever quantization_config says.
_PLAIN = re.compile(r"\.indexer\.(weights_proj|wk)\.|\.compressor\.(wkv|wgate)\.")


def settle_format(cfg: PruneConfig, arch: Architecture) -> tuple[PruneConfig, str]:
    """Configuration with the form that weights are written in, and a line that says it; unchanged for a plain source that keeps
    its own. Raises StunError if the model's weights cannot be written so."""
    forms, asked = arch.source.formats, cfg.output.format
    is_padded = cfg.experts.uneven is Uneven.padded
    if grid := GRIDS.get(asked.name):
        _check_grid(cfg, arch, grid)
        return cfg, f"{_stored(arch)}; weights are rounded to {asked.name}, {grid.bits:.3g} bits a weight, layer by layer"
    if not forms:
        if asked is OutputFormat.bfloat16:
            raise StunError("output.format=bfloat16: the source is not quantised; leave it out, and weights keep their dtype")
        return cfg, ""
    if asked is OutputFormat.source and is_padded:
        reason = "experts of zeros have no stored form to copy"
        raise StunError(
            f"output.format=source: experts.uneven=padded: {reason}; give experts.uneven=code, or output.format=bfloat16"
        )
    form = OutputFormat.bfloat16 if asked is OutputFormat.bfloat16 or is_padded else OutputFormat.source
    if form is OutputFormat.source:
        _check_settings(arch)
        note = "what is kept stays as stored, and what a solver changes gets the nearest code on the scale that it has"
        note += "; what experts.refit changes gets a scale of its new size" if cfg.experts.refit else ""
    else:
        reason = ", since experts.uneven=padded adds experts that have no stored form" if is_padded else ""
        note = f"weights are written in bfloat16, {16 / arch.source.bits:.2g} times the bytes{reason}"
    return replace(cfg, output=replace(cfg.output, format=form)), f"{_stored(arch)}; {note}"


def _check_grid(cfg: PruneConfig, arch: Architecture, grid: Grid) -> None:
    """Raise StunError if the experts' matrices cannot be rounded to a new form."""
    setting = f"output.format={cfg.output.format.name}"
    if cfg.experts.uneven is Uneven.padded:
        raise StunError(f"{setting}: experts.uneven=padded: experts of zeros are written plain; give experts.uneven=code")
    for layout in [*arch.layers, *arch.mtp]:
        for part in matrices_of_experts(arch, layout):
            for name in layout.experts[layout.whole[0]][part]:
                _check_matrix(setting, name, arch.info(name).shape, part in layout.fused, grid)
    for name in sorted(rounded_names(arch, grid)):
        if arch.info(name).dtype is not torch.bfloat16:
            raise StunError(f"{setting}: {name} holds {arch.info(name).dtype}; weights of bfloat16 are rounded")


def _check_matrix(setting: str, name: str, shape: tuple[int, ...], is_fused: bool, grid: Grid) -> None:
    """Raise StunError if a matrix of an expert, or a tensor of all, cannot be rounded."""
    if is_fused:
        raise StunError(f"{setting}: {name} holds all experts of a layer; what is rounded must have a tensor for each expert")
    if not grid.holds(shape):
        rows, columns = grid.block
        whole = f"{f'{rows} outputs and ' if rows > 1 else ''}{columns} inputs"
        others = ", ".join(other for other, form in GRIDS.items() if form.holds(shape))
        raise StunError(f"{setting}: {name} is {shape}, which is not whole blocks of {whole}; it can be {others}")


def _check_settings(arch: Architecture) -> None:
    """Raise StunError if a router is quantised, whose rows go with their experts, or the settings pick experts by number."""
    layouts = [*arch.layers, *arch.mtp]
    for name in (name for layout in layouts for name in layout.routed if arch.info(name).codec):
        raise StunError(f"{arch.info(name).file}: {name}: a router that is quantised cannot stay so; give output.format=bfloat16")
    renumbered(settings_of(arch.source.config), kept_by_block(layouts, [layout.whole for layout in layouts]))


def _stored(arch: Architecture) -> str:
    """The source's form, in words."""
    forms = " and ".join(arch.source.formats)
    return f"the source is {f'{forms}, {arch.source.bits:.3g} bits a weight' if forms else 'plain'}"


def rounded_dense(arch: Architecture, layout: LayerLayout, grid: Grid) -> list[list[str]]:
    """Names of a layer's matrices outside the experts that are rounded, those that runtimes merge together in one list."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(name for name in layout.linears if not _PLAIN.search(name)):
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
    """Modules whose matrices are not rounded: by source name, as vLLM looks them up, and by their place in the model, as
    transformers does."""
    rounded, tensors = rounded_names(arch, grid), arch.source.tensors
    plain = {name for name, info in tensors.items() if name.endswith(".weight") and len(info.shape) == 2 and name not in rounded}
    places = {f"{path}.weight" for path, module in arch.whole.named_modules() if isinstance(module, nn.Linear)}
    for layout in arch.layers:
        places -= {f"{arch.path}layers.{layout.index}.{inside}" for name, inside in layout.dense.items() if name in rounded}
    return sorted({"lm_head", *(name.removesuffix(".weight") for name in plain | places)})


def bytes_by_name(arch: Architecture, form: OutputFormat) -> dict[str, int]:
    """Bytes in which every source tensor is written."""
    grid, tensors = GRIDS.get(form.name), arch.source.tensors
    if grid is None:
        return {name: info.nbytes if form is OutputFormat.bfloat16 else info.stored_bytes for name, info in tensors.items()}
    rounded = rounded_names(arch, grid)
    return {name: grid.nbytes(info.shape) if name in rounded else info.nbytes for name, info in tensors.items()}
