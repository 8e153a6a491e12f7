"""Rounding of a layer's matrices to what is written, before the layer runs and the next one sees its outputs.

That is a new form (`output.format=int4`, ...), or the codes that a quantised source has on its own scales, where its weights get
other values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from stun.checkpoint.codecs.grids import Grid
from stun.checkpoint.reader import Checkpoint
from stun.model.architecture import Architecture
from stun.model.layer_layout import LayerLayout
from stun.planning.job import Job
from stun.planning.plan import Plan
from stun.planning.written_form import matrices_of_experts, rounded_dense
from stun.run.layer_metrics import nonzero_by_kind
from stun.sparsify.compensated import compensated, inverted
from stun.sparsify.joint_refit import damped_factor
from stun.stream.expert_parallel import Layer
from stun.stream.layer_stream import LayerStream

Place = tuple[str, int | None]  # source name of a matrix, and its entry where one tensor holds all experts
Stored = dict[str, torch.Tensor]  # what a matrix is stored in, by source name
_DAMPING = 0.01  # of the mean square of an input, added to every input's (GPTQ's)


class Target:
    """What matrices are rounded to. This one holds all values, so that nothing is rounded."""

    def dense(self, layout: LayerLayout) -> list[list[str]]:
        """Names of a layer's matrices outside the experts, those that share a scale in one list."""
        return []

    def parts(self, layout: LayerLayout) -> list[str]:
        """Parts of its experts."""
        return []

    def rounded(self, place: Place, weight: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, Stored]:
        """Nearest values of a source tensor, or of one entry of it, and the tensors that they are to be stored in, empty if
        writing finds them. `largest` is the largest magnitude among all that share its scale."""
        return weight, {}

    def fitted(
        self, place: Place, weight: torch.Tensor, largest: torch.Tensor, upper_DD: torch.Tensor, is_transposed: bool
    ) -> Stored:
        """Tensors that a matrix is to be stored in so that its outputs too are near those of `weight`, given `inverted` of the
        inputs' Gram matrix; empty if nothing is to be rounded. `is_transposed`: inputs are rows."""
        return {}

    def worth(self, place: Place, stored: Stored, weight: torch.Tensor) -> torch.Tensor:
        """Values of such tensors, on the device and in the dtype of `weight`."""
        raise NotImplementedError


@dataclass(frozen=True)
class NewForm(Target):
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

    def rounded(self, place, weight, largest):
        parts = self.grid.parts(weight.contiguous(), largest)
        return self.grid.values(parts, weight.dtype), self._named(place, parts)

    def fitted(self, place, weight, largest, upper_DD, is_transposed):
        rounded = _by_columns(upper_DD, is_transposed)
        return self._named(place, self.grid.compensated(weight.contiguous(), largest, rounded))

    def worth(self, place, stored, weight):
        names = self._named(place, {role: role for role in self.grid.ends})
        return self.grid.values({role: stored[name] for name, role in names.items()}, weight.dtype)

    def _named(self, place: Place, parts: dict) -> dict:
        """What there is by role, by the names of the tensors."""
        stem = place[0].removesuffix("weight")
        return {stem + end: parts[role] for role, end in self.grid.ends.items()}


@dataclass(frozen=True)
class OwnCodes(Target):
    """Codes of a quantised source on its own scales. `is_solved`: not only what the joint refit changes has other values."""

    source: Checkpoint
    is_solved: bool

    def dense(self, layout: LayerLayout) -> list[list[str]]:
        names = sorted(layout.linears) if self.is_solved else layout.shared_outputs
        return [[name] for name in names if self._has_codes(name)]

    def parts(self, layout: LayerLayout) -> list[str]:
        experts = [layout.experts[number] for number in layout.whole]
        parts = {part for expert in experts for part, names in expert.items() if self._has_codes(names[0])}
        return sorted(part for part in parts if self.is_solved or part == "down_proj")

    def _has_codes(self, name: str) -> bool:
        return self.source.tensors[name].codec is not None

    def rounded(self, place, weight, largest):
        name, row = place
        return (self.source.nearest(name, weight, row) if self._has_codes(name) else weight), {}

    def fitted(self, place, weight, largest, upper_DD, is_transposed):
        # By itself every small change would be rounded off, since the source's own weights are on the grid.
        name, row = place
        return self.source.rescaled(name, weight, row, _by_columns(upper_DD, is_transposed)) if self._has_codes(name) else {}

    def worth(self, place, stored, weight):
        return self.source.worth(*place, stored, weight.device)


def rounding_of(job: Job, plan: Plan, stream: LayerStream) -> Rounding:
    """Rounding of a run with this plan."""
    if job.grid:
        return Rounding(stream, NewForm(job.arch, job.grid))
    is_solved = job.solves(plan)
    is_changed = job.keeps_form and (job.refits or is_solved)
    return Rounding(stream, OwnCodes(job.arch.source, is_solved) if is_changed else Target())


class Rounding:
    """Rounding of layers. Matrices that the joint refit changes (`is_refitted`) are rounded after it, all others before it.

    What is rounded with its inputs in view, where their Gram matrix is at hand, waits in `fits` as it is to be stored, until
    `round` takes it in place of the nearest.
    """

    def __init__(self, stream: LayerStream, target: Target):
        self.stream, self.target = stream, target
        self.fits: dict[Place, Stored] = {}

    def nonzero_before(self, layer: Layer) -> dict[str, int]:
        """Non-zero weights of a layer on this rank before it is rounded, by kind: what rounding makes zero was not removed. Empty
        if nothing is rounded."""
        return {} if self.is_exact else nonzero_by_kind(self.stream, layer)

    def round(self, layer: Layer, is_refitted: tuple[bool, ...] = (False, True)) -> None:
        """Round matrices in place. All ranks call this together."""
        ranks, layout, closing = self.stream.ranks, layer.layout, layer.layout.shared_outputs
        owners = self.stream.writer_of(layout)
        groups = [group for group in self.target.dense(layout) if (group[0] in closing) in is_refitted]
        largest = {name: _largest([layer.dense[n] for n in group]) for group in groups for name in group}
        parts = [part for part in self.target.parts(layout) if (part == "down_proj") in is_refitted]
        mine = [name for name in largest if owners[name] == ranks.rank]
        ranks.workers.map(lambda name: self._put(layer, (name, None), layer.dense[name], largest[name]), mine)
        for name in largest:
            ranks.broadcast(layer.dense[name], owners[name])
        experts = [(expert, part) for expert in sorted(layer.experts) for part in parts]
        ranks.workers.map(lambda entry: self._expert(layer, *entry), experts)
        self.fits.clear()

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
            upper_DD, largest = inverted(damped_factor(gram_DD, damping)), _largest([weight_OD])
            pieces = weight_OD.split([self.stream.arch.info(name).shape[0] for name in names])
            for name, piece in zip(names, pieces, strict=True):
                self.fits[name, None] = self.target.fitted((name, None), piece, largest, upper_DD, False)

    def _put(self, layer: Layer, place: Place, weight: torch.Tensor, largest: torch.Tensor) -> None:
        """Give a matrix its rounded values in place."""
        stored = self.fits.pop(place, None)
        if stored:
            values = self.target.worth(place, stored, weight)
        else:
            values, stored = self.target.rounded(place, weight, largest)
        weight.copy_(values)
        if stored:
            layer.stored[place] = stored

    def _expert(self, layer: Layer, expert: int, part: str) -> None:
        weight = layer.experts[expert][part]
        layout, largest = layer.layout, _largest([weight])
        names, is_fused = layout.experts[expert][part], part in layout.fused
        pieces = [weight] if is_fused else weight.split([self.stream.arch.info(name).shape[0] for name in names])
        for name, piece in zip(names, pieces, strict=True):
            self._put(layer, (name, expert if is_fused else None), piece, largest)

    @property
    def is_exact(self) -> bool:
        """Whether nothing is rounded."""
        return type(self.target) is Target

    def closing(self, layout: LayerLayout, expert: int, weight_DI: torch.Tensor, factor_II: torch.Tensor | None) -> torch.Tensor:
        """What the down projection of an expert becomes if it is `weight_DI`, with the factor of its inputs' Gram matrix if it is
        to be fitted to them."""
        if "down_proj" not in self.target.parts(layout):
            return weight_DI
        (name,), row = layout.experts[expert]["down_proj"], expert if "down_proj" in layout.fused else None
        return layout.oriented(self._fitted((name, row), layout.oriented(weight_DI), factor_II, layout.is_transposed))

    def shared(self, layout: LayerLayout, name: str, weight_DI: torch.Tensor, factor_II: torch.Tensor | None) -> torch.Tensor:
        """The same of a shared expert's."""
        is_rounded = [name] in self.target.dense(layout)
        return self._fitted((name, None), weight_DI, factor_II, False) if is_rounded else weight_DI

    def _fitted(self, place: Place, weight: torch.Tensor, factor: torch.Tensor | None, is_transposed: bool) -> torch.Tensor:
        largest = _largest([weight])
        if factor is None:
            return self.target.rounded(place, weight, largest)[0]
        stored = self.target.fitted(place, weight, largest, inverted(factor), is_transposed)
        if not stored:
            return weight
        self.fits[place] = stored
        return self.target.worth(place, stored, weight)

    def rescaled(self, layout: LayerLayout) -> list[str]:
        """Tensors of all experts that have new scales after a joint refit."""
        has_codes = isinstance(self.target, OwnCodes) and "down_proj" in layout.fused and "down_proj" in self.target.parts(layout)
        return [layout.fused_names["down_proj"]] if has_codes else []


def _by_columns(upper_DD: torch.Tensor, is_transposed: bool) -> Callable[[torch.Tensor, Callable], torch.Tensor]:
    """`compensated` as a function of a weight and `near` of `Codec.near_at`."""

    def rounded(weight: torch.Tensor, near: Callable) -> torch.Tensor:
        at = (lambda column: (column,)) if is_transposed else (lambda column: (slice(None), column))
        oriented_OD = weight.T if is_transposed else weight
        new_OD = compensated(oriented_OD, upper_DD, lambda column, values_O: near(values_O, at(column)))
        return new_OD.T if is_transposed else new_OD

    return rounded


def _largest(weights: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([weight.abs().amax() for weight in weights]).amax()
