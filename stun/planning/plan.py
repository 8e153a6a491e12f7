"""Plans: the experts kept in every layer, and how many single weights are removed beside the other experts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass
class LayerPlan:
    """One layer's `experts` in `clusters`, members by descending score; an expert in none of them is removed alone.

    `kept` are the representatives, one per cluster, ascending. It is empty with `nearest` until the weights are read: then the
    member nearest its cluster's mean is kept. With `mean` a representative takes the mean of its cluster's parameters and router
    rows (STUN's selective reconstruction). `ratio` is the share of the layer's single weights to remove, None if all layers
    have the same.
    """

    experts: int
    clusters: list[list[int]]
    kept: list[int] = field(default_factory=list)
    nearest: bool = False
    mean: bool = False
    ratio: float | None = None

    @classmethod
    def of(cls, experts: int, clusters: list[list[int]], nearest: bool = False, mean: bool = False) -> LayerPlan:
        """A layer's plan, with its representatives chosen where that needs no weights: a pair keeps its first member, since both
        are equally near their mean."""
        is_open = nearest and any(len(cluster) > 2 for cluster in clusters)
        mean = mean and any(len(cluster) > 1 for cluster in clusters)
        return cls(experts, clusters, [] if is_open else sorted(cluster[0] for cluster in clusters), is_open, mean)

    @property
    def needed(self) -> set[int]:
        """Experts whose weights the written checkpoint depends on."""
        return {e for cluster in self.clusters for e in cluster} if self.mean or not self.kept else set(self.kept)


@dataclass
class Plan:
    """Plan of all decoder layers. Parameters are counted over them, routers and norms included.

    `dropped` parameters are removed as whole experts, then `zeros` single weights out of `scope_size` in scope. `mtp` are the
    plans of multi-token-prediction heads, which are not counted. `successors` says for layers whose tokens find their experts in
    a table which survivor takes the tokens of each removed expert.
    """

    target: float
    parameters: int
    dropped: int
    zeros: int
    scope_size: int
    layers: list[LayerPlan]
    mtp: list[LayerPlan] = field(default_factory=list)
    successors: dict[int, dict[int, int]] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Share of the weights in scope, after experts are removed, that is set to zero."""
        return self.zeros / self.scope_size if self.scope_size else 0.0

    @property
    def most(self) -> int:
        """Experts that the layer or prediction head with the most of them keeps."""
        return max(len(layer.clusters) for layer in [*self.layers, *self.mtp])

    def to_json(self) -> dict:
        """Content of plan.json; `successors` only where there are any."""
        content = {**asdict(self), "ratio": self.ratio}
        return content if self.successors else {name: value for name, value in content.items() if name != "successors"}


def cluster_owners(plan: LayerPlan, world: int, reads_all: bool = False) -> list[int | None]:
    """Rank that owns each expert in the second stream: one rank per cluster, clusters spread evenly.

    An expert whose weights are not needed has no owner and is not read; with `reads_all`, these are spread evenly too.
    """
    owners: list[int | None] = [None] * plan.experts
    for place, cluster in enumerate(plan.clusters):
        for expert in plan.needed.intersection(cluster):
            owners[expert] = place * world // len(plan.clusters)
    others = [expert for expert, owner in enumerate(owners) if owner is None] if reads_all else []
    for place, expert in enumerate(others):
        owners[expert] = place * world // len(others)
    return owners


def owners(plan: Plan, world: int, reads_all: bool) -> list[list[int | None]]:
    """Owners of the experts of all layers, with `reads_all` of those too that are not needed, then of prediction heads."""
    return [*(cluster_owners(layer, world, reads_all) for layer in plan.layers), *(cluster_owners(h, world) for h in plan.mtp)]
