"""What a run does to a checkpoint: the experts of every layer that stay, and how many single weights leave with the others."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from stun.config import StunError
from stun.files import is_count, read_json


@dataclass
class LayerPlan:
    """One layer's `experts`, grouped into `clusters`; an expert in none of them leaves without a successor.

    The members of a cluster stand in order of worth. `kept` are the experts that stay, one a cluster, ascending; empty until
    they are chosen, where weights must be seen for it: with `nearest` the member nearest the cluster's mean stays. With `mean`
    it takes the mean of the cluster's parameters and router rows (STUN's selective reconstruction).

    `ratio` is the share of the layer's single weights that leave, None where all layers lose the same.
    """

    experts: int
    clusters: list[list[int]]
    kept: list[int] = field(default_factory=list)
    nearest: bool = False
    mean: bool = False
    ratio: float | None = None

    @classmethod
    def of(cls, experts: int, clusters: list[list[int]], nearest: bool = False, mean: bool = False) -> LayerPlan:
        """A plan whose representatives are chosen as far as they can be: of one or two members the first stays, since both of
        a pair are as near their mean."""
        open_ones = nearest and any(len(cluster) > 2 for cluster in clusters)
        mean = mean and any(len(cluster) > 1 for cluster in clusters)
        return cls(experts, clusters, [] if open_ones else sorted(cluster[0] for cluster in clusters), open_ones, mean)

    @property
    def needed(self) -> set[int]:
        """Experts whose weights decide what is written."""
        return {e for cluster in self.clusters for e in cluster} if self.mean or not self.kept else set(self.kept)


@dataclass
class Plan:
    """What a run does to the decoder layers. Parameters are counted over them, routers and norms included.

    `zeros` single weights are removed from `scope_size` candidates, after `dropped` parameters left with whole experts. `mtp`
    are the experts of multi-token-prediction heads, which are not counted.
    """

    target: float
    parameters: int
    dropped: int
    zeros: int
    scope_size: int
    layers: list[LayerPlan]
    mtp: list[LayerPlan] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Share of the surviving candidates that is set to zero."""
        return self.zeros / self.scope_size if self.scope_size else 0.0

    def to_json(self) -> dict:
        """The content of plan.json."""
        return {**asdict(self), "ratio": self.ratio}


def read_layers(file: Path) -> tuple[list[LayerPlan], list[LayerPlan], float]:
    """The decoder layers, prediction heads and target of a plan file, which may have been edited by hand. Raises StunError."""
    content = read_json(file, f"plan={file}")
    if not isinstance(content, dict) or not all(isinstance(content.get(key, []), list) for key in ("layers", "mtp")):
        raise StunError(f"plan={file}: must be a JSON object, in which layers and mtp are lists")
    if "layers" not in content:
        raise StunError(f"plan={file}: has no layers")
    layers = [_read_layer(file, number, entry) for number, entry in enumerate(content["layers"])]
    heads = [_read_layer(file, f"mtp {number}", entry) for number, entry in enumerate(content.get("mtp", []))]
    target = content.get("target", 0.0)
    if type(target) not in (int, float) or not 0 <= target < 1:
        raise StunError(f"plan={file}: target={target}: total sparsity lies in [0, 1)")
    return layers, heads, float(target)


def _read_layer(file: Path, number: int | str, entry: object) -> LayerPlan:
    where, known = f"plan={file}: layer {number}", {f.name for f in LayerPlan.__dataclass_fields__.values()}
    if not isinstance(entry, dict) or not {"experts", "clusters"} <= entry.keys():
        raise StunError(f"{where}: must be an object with experts and clusters")
    if entry.keys() - known:
        raise StunError(f"{where}: unknown entries {sorted(entry.keys() - known)}; known: {sorted(known)}")
    plan = LayerPlan(**entry)
    lists = [plan.clusters, plan.kept, *(plan.clusters if type(plan.clusters) is list else [])]
    if not all(type(part) is list for part in lists) or not all(type(flag) is bool for flag in (plan.nearest, plan.mean)):
        raise StunError(f"{where}: clusters and kept must be lists, nearest and mean true or false")
    if plan.ratio is not None and (type(plan.ratio) not in (int, float) or not 0 <= plan.ratio <= 1):
        raise StunError(f"{where}: ratio is a share from 0 to 1")
    if not all(map(is_count, [plan.experts, *plan.kept, *(e for cluster in plan.clusters for e in cluster)])):
        raise StunError(f"{where}: experts are whole numbers")
    members = [expert for cluster in plan.clusters for expert in cluster]
    if len(set(members)) != len(members) or max(members, default=-1) >= plan.experts or [] in plan.clusters:
        raise StunError(f"{where}: clusters must be lists of experts 0 to {plan.experts - 1}, each in one cluster at most")
    if plan.kept and sorted(plan.kept) != plan.kept:
        raise StunError(f"{where}: kept must be ascending, is {plan.kept}")
    stay = set(plan.kept)
    chosen = [len(stay.intersection(cluster)) for cluster in plan.clusters]
    if plan.kept and (set(chosen) != {1} or len(plan.kept) != len(plan.clusters)):
        raise StunError(f"{where}: of every cluster one member must be kept, and nobody else")
    if not plan.kept and plan.clusters and not plan.nearest:
        raise StunError(f"{where}: nobody is kept; set nearest to have the member nearest each cluster's mean chosen")
    return plan


def nearest_member(cluster: list[int], squared_distance: list[float]) -> int:
    """The member nearest the cluster's mean; of a pair, whose members are equally near, and of equals, the first."""
    if len(cluster) < 3:
        return cluster[0]
    return cluster[squared_distance.index(min(squared_distance))]


def cluster_owners(plan: LayerPlan, world: int) -> list[int | None]:
    """Owner of every expert for the second stream: clusters stay together, survivors are spread evenly.

    An expert whose weights are not needed has no owner: nobody reads it.
    """
    owners: list[int | None] = [None] * plan.experts
    for place, cluster in enumerate(plan.clusters):
        for expert in plan.needed.intersection(cluster):
            owners[expert] = place * world // len(plan.clusters)
    return owners
