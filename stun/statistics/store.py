"""Statistics of the first stream on disk: written as they are taken, checked as they are read."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from stun.checkpoint.headers import read_header
from stun.checkpoint.writer import write_tensors
from stun.config import StunError
from stun.files import is_count, load_json, write_json
from stun.run.folder import ABOUT
from stun.run.identity import differences
from stun.run.ownership import own_folder, run_id

_RETAKE = "take the statistics anew in another run_dir"


class Statistics:
    """What the first stream saw, in the folder `stats` of a run: a file a layer, and about.json, which is written last.

    A layer's tensors, for S calibration sources: `router_distance` [E, E] float64, `coactivation` [S, E, E] int64, `powers`
    [S, E, 3, 3] and `peak` [S, E] float64 (accumulators.OutputPowers), `weights` [E, 3] float64 (accumulators.weight_sums).
    Where outliers were asked for, a layer with or without experts also holds histograms of Wanda's scores per token and the sums
    of these scores (stun.statistics.outliers): `outliers` [E, bins] and `outlier_sums` [E] of the experts, `outliers of NAME`
    [bins] and `sum of NAME` [] of every dense matrix.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._about = folder / ABOUT

    @property
    def complete(self) -> bool:
        return self._about.is_file()

    @property
    def about(self) -> dict:
        """What they were taken on (`observed`), and the files' digests."""
        about = load_json(self._about)
        kinds = {"sources": dict, "model": str, "calibration_tokens": str, "micro_batch": int, "files": dict}
        for name, kind in kinds.items():
            if type(about.get(name)) is not kind:
                raise StunError(f"{self._about}: {name}: must be {kind.__name__}, is {str(about.get(name))[:80]}; {_RETAKE}")
        if not about["sources"] or not all(map(is_count, about["sources"].values())):
            raise StunError(f"{self._about}: sources must map names to samples; {_RETAKE}")
        return about

    @property
    def sources(self) -> list[str]:
        return list(self.about["sources"])

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"

    def save(self, layer: int, statistics: dict[str, torch.Tensor]) -> None:
        own_folder(self.folder, run_id(self.folder.parent))
        write_tensors(self._file(layer), statistics)

    def load(self, layer: int, experts: int | None = None) -> dict[str, torch.Tensor]:
        """A layer's statistics. Raises StunError where they are not as they were taken, or of another number of `experts`."""
        file = self._file(layer)
        try:
            about, infos = self.about if self.complete else {}, read_header(file)
            if about and about["files"].get(file.name) != _digest(file):
                raise StunError(f"{file}: is damaged: {self._about.name} has another digest; {_RETAKE}")
            found = load_file(file)
        except (OSError, SafetensorError) as error:
            raise StunError(f"{file}: cannot be read: {error}") from error
        if about and (experts is not None or "router_distance" in infos):
            _check_statistics(file, found, len(about["sources"]), experts)
        return found

    def outliers(self, layer: int) -> dict[str, torch.Tensor]:
        """The statistics of a layer, which hold outliers. Raises StunError where they were not asked for."""
        found = self.load(layer) if self._file(layer).is_file() else {}
        if not any(name.startswith("outlier") for name in found):
            raise StunError(f"{self.folder}: its statistics hold no outliers; a run with sparsify.ratios=owl takes them")
        return found

    def finish(self, taken_on: dict) -> None:
        """Declare the statistics complete; `taken_on` is what decided them (`observed`)."""
        own_folder(self.folder, run_id(self.folder.parent))
        files = {file.name: _digest(file) for file in sorted(self.folder.glob("layer-*.safetensors"))}
        write_json(self._about, {**taken_on, "files": files})

    def check(self, wanted: dict) -> None:
        """Raises StunError where they are not complete, or were not taken on what is `wanted` (`observed`)."""
        if not self.complete:
            raise StunError(f"{self.folder}: holds no complete statistics; python -m jobs.observe takes them")
        found = differences({name: self.about.get(name) for name in wanted}, wanted)
        if found:
            raise StunError(f"{self.folder}: its statistics are of something else ({'; '.join(found)})")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _check_statistics(file: Path, found: dict[str, torch.Tensor], sources: int, experts: int | None) -> None:
    """Raise StunError where one of a layer's tensors is missing, has another form, or holds what no stream counts."""
    count = len(found["router_distance"]) if experts is None else experts
    of_experts = (sources, count)
    wanted = {
        "router_distance": ((count, count), torch.float64),
        "coactivation": ((*of_experts, count), torch.int64),
        "powers": ((*of_experts, 3, 3), torch.float64),
        "peak": (of_experts, torch.float64),
        "weights": ((count, 3), torch.float64),
    }
    for name, (shape, dtype) in wanted.items():
        tensor = found.get(name)
        if tensor is None or tensor.shape != shape or tensor.dtype is not dtype:
            is_now = "missing" if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise StunError(f"{file}: {name}: must be {shape} of {dtype}, is {is_now}; {_RETAKE}")
        if not torch.isfinite(tensor).all() or (tensor < 0).any():
            raise StunError(f"{file}: {name}: has negative or infinite entries; {_RETAKE}")
