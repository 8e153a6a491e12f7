"""Rounding of a layer's matrices to what is written, before the layer runs and the next one sees its outputs.

That is a new form (`output.format=int4`, ...), or the codes that a quantised source has on its own scales, where its weights get
other values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from stun.checkpoint.codecs.grids import Grid
from stun.checkpoint.reader import Checkpoint
from stun.model.architecture import Architecture
from stun.model.layer_layout import LayerLayout
from stun.planning.job import Job
from stun.planning.plan import Plan
from stun.planning.written_form import matrices_of_experts, rounded_dense
from stun.run.layer_metrics import kind_of
from stun.sparsify.compensated import compensated
from stun.sparsify.joint_refit import damped_factor
from stun.stream.expert_parallel import Layer
from stun.stream.layer_stream import LayerStream

_DAMPING = 0.01  # of the mean square of an input, added to every input's (GPTQ's)


class Target(Protocol):
    """What matrices are rounded to."""

    def dense(self, layout: LayerLayout) -> list[list[str]]:
        """Names of a layer's matrices outside the experts, those that share a scale in one list."""

    def parts(self, layout: LayerLayout) -> list[str]:
        """Parts of its experts."""

    def rounded(
        self, name: str, weight: torch.Tensor, row: int | None, largest: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Rounded values of a source tensor, or of one entry of it, and the tensors by name that they are to be stored in, empty
        if writing finds them. `largest` is the largest magnitude among all that share its scale."""

    def fitted(
        self, name: str, weight: torch.Tensor, row: int | None, factor_DD: torch.Tensor | None, is_transposed: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The same of a matrix that shares its scale with no other. Given the factor of the inputs' Gram matrix, outputs are near
        those of `weight` too. `is_transposed`: inputs are rows."""


@dataclass(frozen=True)
class NewForm:
    """A new form of plain weights."""

    arch: Architecture
    grid: Grid

    def dense(self, layout: LayerLayout) -> list[list[str]]:
        return rounded_dense(self.arch, layout, self.grid)

    def alone(self, layout: LayerLayout) -> set[str]:
        """Names of matrices outside the experts that share a scale with no other."""
        return {name for group in self.dense(layout) if len(group) == 1 or not self.grid.is_shared for name in group}

    def parts(self, layout: LayerLayout) -> list[str]:
        return matrices_of_experts(self.arch, layout)

    def rounded(self, name, weight, row, largest):
        return self._stored(name, self.grid.parts(weight.contiguous(), largest), weight.dtype)

    def fitted(self, name, weight, row, factor_DD, is_transposed):
        if factor_DD is None:
            return self.rounded(name, weight, row, _largest([weight]))
        return self.compensated(name, weight, factor_DD, _largest([weight]))

    def compensated(self, name: str, weight_OD: torch.Tensor, factor_DD: torch.Tensor, largest: torch.Tensor):
        """As `rounded`, column by column, given the factor of the inputs' Gram matrix."""

        def chosen(near: Callable) -> torch.Tensor:
            return compensated(weight_OD, factor_DD, lambda column, values_O: near(values_O, (slice(None), column)))

        return self._stored(name, self.grid.compensated(weight_OD.contiguous(), largest, chosen), weight_OD.dtype)

    def _stored(self, name: str, parts: dict[str, torch.Tensor], dtype: torch.dtype):
        stem = name.removesuffix("weight")
        return self.grid.values(parts, dtype), {stem + end: parts[role] for role, end in self.grid.ends.items()}


@dataclass(frozen=True)
class OwnCodes:
    """Codes of a quantised source on its own scales. `is_solved`: not only what the joint refit changes has other values."""

    source: Checkpoint
    is_solved: bool

    def dense(self, layout: LayerLayout) -> list[list[str]]:
        names = sorted(layout.linears) if self.is_solved else layout.shared_outputs
        return [[name] for name in names if self.source.tensors[name].codec]

    def parts(self, layout: LayerLayout) -> list[str]:
        some = layout.experts[layout.whole[0]] if layout.experts else {}
        stored = [part for part, names in some.items() if self.source.tensors[names[0]].codec]
        return [part for part in stored if self.is_solved or part == "down_proj"]

    def rounded(self, name, weight, row, largest):
        return self.source.nearest(name, weight, row), {}

    def fitted(self, name, weight, row, factor_DD, is_transposed):
        # By itself every small change would be rounded off, since the source's own weights are on the grid.
        def rounded(weight: torch.Tensor, near: Callable) -> torch.Tensor:
            place = (lambda column: (column,)) if is_transposed else (lambda column: (slice(None), column))
            oriented_OD = weight.T if is_transposed else weight
            new_OD = compensated(oriented_OD, factor_DD, lambda column, values_O: near(values_O, place(column)))
            return new_OD.T if is_transposed else new_OD

        if factor_DD is None:
            return self.rounded(name, weight, row, weight)
        return self.source.rescaled(name, weight, row, rounded)


@dataclass(frozen=True)
class AllValues:
    """What holds all values, so that nothing is rounded."""

    def dense(self, layout: LayerLayout) -> list[list[str]]:
        return []

    def parts(self, layout: LayerLayout) -> list[str]:
        return []

    def rounded(self, name, weight, row, largest):
        return weight, {}

    def fitted(self, name, weight, row, factor_DD, is_transposed):
        return weight, {}


def rounding_of(job: Job, plan: Plan, stream: LayerStream) -> Rounding:
    """Rounding of a run with this plan."""
    if job.grid:
        return Rounding(stream, NewForm(job.arch, job.grid))
    is_solved = job.solves(plan)
    is_changed = job.keeps_form and (job.refits or is_solved)
    return Rounding(stream, OwnCodes(job.arch.source, is_solved) if is_changed else AllValues())


class Rounding:
    """Rounding of layers. Matrices that the joint refit changes (`is_refitted`) are rounded after it, all others before it.

    What is rounded with its inputs in view, where their Gram matrix is at hand, waits in `fits` by source name and entry, as
    values and stored tensors, until `round` takes it in place of the nearest.
    """

    def __init__(self, stream: LayerStream, target: Target):
        self.stream, self.target = stream, target
        self.fits: dict[tuple[str, int | None], tuple[torch.Tensor, dict[str, torch.Tensor]]] = {}

    def round(self, layer: Layer, is_refitted: tuple[bool, ...] = (False, True)) -> Counter[str]:
        """Round matrices in place; returns the weights of this rank that became zero, by kind. All ranks call this together."""
        ranks, layout, closing = self.stream.ranks, layer.layout, layer.layout.shared_outputs
        owners = self.stream.writer_of(layout)
        groups = [group for group in self.target.dense(layout) if (group[0] in closing) in is_refitted]
        largest = {name: _largest([layer.dense[n] for n in group]) for group in groups for name in group}
        parts = [part for part in self.target.parts(layout) if (part == "down_proj") in is_refitted]
        mine = [name for name in largest if owners[name] == ranks.rank]
        lost = Counter()
        for name, count in zip(mine, ranks.workers.map(lambda name: self._dense(layer, name, largest[name]), mine), strict=True):
            lost[kind_of(layout, name)] += count
        for name in largest:
            ranks.broadcast(layer.dense[name], owners[name])
        experts = [(expert, part) for expert in sorted(layer.experts) for part in parts]
        lost["experts"] += sum(ranks.workers.map(lambda entry: self._expert(layer, *entry), experts))
        self.fits.clear()
        return lost

    def fit(
        self, layer: Layer, refits: bool, place: tuple[int, str] | str, weight_OD: torch.Tensor, gram_DD: torch.Tensor
    ) -> None:
        """Round a solved matrix to a new form, a part of an expert or one outside them by name, with its inputs in view; `round`
        puts it in place. Left to the nearest: one that shares its scale with others outside the experts; and to the joint refit,
        if the layer `refits`, what that changes."""
        layout, is_dense = layer.layout, isinstance(place, str)
        closes = place in layout.shared_outputs if is_dense else place[1] == "down_proj"
        if not isinstance(self.target, NewForm) or (refits and closes):
            return
        names = [place] if is_dense else layout.experts[place[0]][place[1]]
        if place in self.target.alone(layout) if is_dense else place[1] in self.target.parts(layout):
            damping = _DAMPING * float(gram_DD.diagonal().double().mean()) or 1.0
            factor_DD, largest = damped_factor(gram_DD, damping), _largest([weight_OD])
            pieces = weight_OD.split([self.stream.arch.info(name).shape[0] for name in names])
            for name, piece in zip(names, pieces, strict=True):
                self.fits[name, None] = self.target.compensated(name, piece, factor_DD, largest)

    def nonzero(self, layer: Layer) -> Counter[str]:
        """Non-zero weights of this rank in matrices that are rounded after the joint refit, by kind."""
        owners, counts = self.stream.writer_of(layer.layout), Counter()
        for name in (group[0] for group in self.target.dense(layer.layout) if group[0] in layer.layout.shared_outputs):
            if owners[name] == self.stream.ranks.rank:
                counts[kind_of(layer.layout, name)] += int(layer.dense[name].count_nonzero())
        if "down_proj" in self.target.parts(layer.layout):
            counts["experts"] += sum(int(parts["down_proj"].count_nonzero()) for parts in layer.experts.values())
        return counts

    def _dense(self, layer: Layer, name: str, largest: torch.Tensor) -> int:
        weight_OD = layer.dense[name]
        return _put(layer, (name, None), weight_OD, *self._rounded(name, weight_OD, None, largest))

    def _rounded(self, name: str, weight: torch.Tensor, row: int | None, largest: torch.Tensor):
        return self.fits[name, row] if (name, row) in self.fits else self.target.rounded(name, weight, row, largest)

    def _expert(self, layer: Layer, expert: int, part: str) -> int:
        weight = layer.experts[expert][part]
        rounded = self._of_expert(layer.layout, expert, part, weight)
        row = expert if part in layer.layout.fused else None
        return sum(_put(layer, (name, row), piece, values, stored) for name, piece, values, stored in rounded)

    def _of_expert(self, layout: LayerLayout, expert: int, part: str, weight: torch.Tensor):
        """Name, piece of `weight`, its rounded values and their stored form, of each source tensor of one part of an expert."""
        names, largest = layout.experts[expert][part], _largest([weight])
        if part in layout.fused:
            return [(names[0], weight, *self._rounded(names[0], weight, expert, largest))]
        pieces = weight.split([self.stream.arch.info(name).shape[0] for name in names])
        return [(n, piece, *self._rounded(n, piece, None, largest)) for n, piece in zip(names, pieces, strict=True)]

    @property
    def is_exact(self) -> bool:
        """Whether nothing is rounded."""
        return isinstance(self.target, AllValues)

    def closing(self, layout: LayerLayout, expert: int, weight_DI: torch.Tensor, factor_II: torch.Tensor | None) -> torch.Tensor:
        """What the down projection of an expert becomes if it is `weight_DI`, with the factor of its inputs' Gram matrix if it is
        to be fitted to them."""
        if "down_proj" not in self.target.parts(layout):
            return weight_DI
        (name,), row = layout.experts[expert]["down_proj"], expert if "down_proj" in layout.fused else None
        return layout.oriented(self._fitted(name, layout.oriented(weight_DI), row, factor_II, layout.is_transposed))

    def shared(self, layout: LayerLayout, name: str, weight_DI: torch.Tensor, factor_II: torch.Tensor | None) -> torch.Tensor:
        """The same of a shared expert's."""
        is_rounded = [name] in self.target.dense(layout)
        return self._fitted(name, weight_DI, None, factor_II, False) if is_rounded else weight_DI

    def _fitted(self, name: str, weight: torch.Tensor, row: int | None, factor: torch.Tensor | None, is_transposed: bool):
        values, stored = self.target.fitted(name, weight, row, factor, is_transposed)
        if stored and factor is not None:
            self.fits[name, row] = values, stored
        return values

    def rescaled(self, layout: LayerLayout) -> list[str]:
        """Tensors of all experts that have new scales after a joint refit."""
        has_codes = isinstance(self.target, OwnCodes) and "down_proj" in layout.fused and "down_proj" in self.target.parts(layout)
        return [layout.fused_names["down_proj"]] if has_codes else []


def _largest(weights: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([weight.abs().amax() for weight in weights]).amax()


def _put(layer: Layer, place: tuple[str, int | None], weight: torch.Tensor, values: torch.Tensor, stored: dict) -> int:
    """Give a matrix its rounded values in place; returns how many entries became zero."""
    lost = int(weight.count_nonzero()) - int(values.count_nonzero())
    weight.copy_(values)
    if stored:
        layer.stored[place] = stored
    return lost
