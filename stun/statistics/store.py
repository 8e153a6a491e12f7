"""Statistics of the first stream on disk: written layer by layer, checked when they are read."""

import math
from pathlib import Path

import torch

from stun.checkpoint.headers import read_header
from stun.checkpoint.reader import Checkpoint
from stun.checkpoint.writer import write_tensors
from stun.config import StunError
from stun.files import digest, write_json
from stun.run.folder import ABOUT
from stun.run.identity import differences
from stun.run.ownership import own_part
from stun.schema import COUNT, TEXT, load_record

_RETAKE = "collect the statistics again in another run_dir"
_IDENTITY = {"sources": {TEXT: COUNT}, "model": TEXT, "calibration_tokens": TEXT, "micro_batch": COUNT, "files": {TEXT: TEXT}}


class Statistics:
    """Statistics in the folder `stats` of a run: one file per layer, and about.json, which is written last.

    A layer's tensors, for S calibration sources: `router_distance` [E, E] float64, `coactivation` [S, E, E] int64, `powers`
    [S, E, 3, 3] and `peak` [S, E] float64 (accumulators.OutputPowers), `weights` [E, 3] float64 (accumulators.weight_sums); on
    request `outputs` [S, E, D] float32 (output_sums).
    If outliers were counted, every layer, with or without experts, also has histograms of Wanda's scores per token and the sums
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
        """Identity of the statistics (`observed`) and the digests of their files. Raises StunError for an invalid entry."""
        about = load_record(self._about, _IDENTITY, _RETAKE)
        if not about["sources"]:
            raise StunError(f"{self._about}: sources: must name one or more; {_RETAKE}")
        return about

    @property
    def sources(self) -> list[str]:
        return list(self.about["sources"])

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"

    def save(self, layer: int, statistics: dict[str, torch.Tensor]) -> None:
        own_part(self.folder)
        write_tensors(self._file(layer), statistics)

    def load(self, layer: int, experts: int | None = None) -> dict[str, torch.Tensor]:
        """Statistics of a layer. Raises StunError if its file was changed or has another number of `experts`."""
        file = self._file(layer)
        about, source = self.about if self.complete else {}, Checkpoint(self.folder, {}, read_header(file))
        if about and about["files"].get(file.name) != digest(file):
            raise StunError(f"{file}: is damaged: {self._about.name} has another digest; {_RETAKE}")
        tensors = {name: source.read(name) for name in source.tensors}
        if about and (experts is not None or "router_distance" in tensors):
            _check_statistics(file, tensors, len(about["sources"]), experts)
        return tensors

    def outliers(self, layer: int) -> dict[str, torch.Tensor]:
        """Statistics of a layer with outliers. Raises StunError if outliers were not counted."""
        tensors = self.load(layer) if self._file(layer).is_file() else {}
        if not any(name.startswith("outlier") for name in tensors):
            raise StunError(f"{self.folder}: its statistics have no outliers; a run with sparsify.ratios=owl collects them")
        return tensors

    def finish(self, identity: dict) -> None:
        """Mark the statistics as complete; `identity` is what they depend on (`observed`)."""
        own_part(self.folder)
        files = {file.name: digest(file) for file in sorted(self.folder.glob("layer-*.safetensors"))}
        write_json(self._about, {**identity, "files": files})

    def check(self, wanted: dict) -> None:
        """Raise StunError if the statistics are not complete, or their identity (`observed`) is not the `wanted` one."""
        if not self.complete:
            raise StunError(f"{self.folder}: holds no complete statistics; stun observe collects them")
        changes = differences({name: self.about.get(name) for name in wanted}, wanted)
        if changes:
            raise StunError(f"{self.folder}: its statistics were collected on other inputs ({'; '.join(changes)})")


def _check_statistics(file: Path, tensors: dict[str, torch.Tensor], sources: int, experts: int | None) -> None:
    """Raise StunError if a tensor is missing, has another shape or dtype, or has a negative or infinite entry."""
    count = len(tensors["router_distance"]) if experts is None else experts
    by_expert = (sources, count)
    hidden = tensors["outputs"].shape[-1] if "outputs" in tensors else 0
    wanted = {
        "router_distance": ((count, count), torch.float64),
        "coactivation": ((*by_expert, count), torch.int64),
        "powers": ((*by_expert, 3, 3), torch.float64),
        "peak": (by_expert, torch.float64),
        "weights": ((count, 3), torch.float64),
        **({"outputs": ((*by_expert, hidden), torch.float32)} if hidden else {}),
    }
    for name, (shape, dtype) in wanted.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != shape or tensor.dtype is not dtype:
            is_now = "missing" if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise StunError(f"{file}: {name}: must be {shape} of {dtype}, is {is_now}; {_RETAKE}")
        least, most = torch.aminmax(tensor) if tensor.numel() else (0, 0)  # NaN, where there is one
        is_good = (least > -math.inf if name == "outputs" else least >= 0) and most < math.inf
        if not is_good:
            raise StunError(f"{file}: {name}: has negative or infinite entries; {_RETAKE}")
