"""Cost of each method of removing single weights, beside reading and writing the same bytes."""

import shutil
from dataclasses import replace
from pathlib import Path

from stun.benchmark.checkpoints import bytes_of, qwen3_moe, random_checkpoint
from stun.benchmark.config import BenchmarkConfig
from stun.checkpoint.reader import Checkpoint
from stun.config import PruneConfig, with_overrides
from stun.preflight.speeds import read_speed, write_speed
from stun.pruning.job import prune
from stun.runtime.ranks import Ranks


def method_configs(cfg: BenchmarkConfig, model: Path) -> dict[str, PruneConfig]:
    """Configuration of every method for the checkpoint `model`. Raises StunError for invalid overrides."""
    return {m: with_overrides(replace(cfg, model=replace(cfg.model, path=str(model))), o) for m, o in cfg.methods.items()}


def benchmark_weights(cfg: BenchmarkConfig, folder: Path, ranks: Ranks) -> dict:
    """Seconds and peak memory of every method of `cfg.methods` on one checkpoint, and seconds to read and write its bytes.

    No expert is removed, so that one stream does all the work. All ranks call this together.
    """
    model = folder / "source"
    ranks.on_first(lambda: random_checkpoint(model, cfg.shape, Path(cfg.model.path)))
    nbytes, rows = bytes_of(qwen3_moe(cfg.shape)), {}
    disk = ranks.on_first(lambda: nbytes / read_speed(Checkpoint.open(model)) + nbytes / write_speed(folder))
    for method, config in method_configs(cfg, model).items():
        summary = prune(replace(config, run_dir=str(folder / "run")), ranks)
        rows[method] = {"seconds": summary["seconds"], "peak_bytes": summary["peak_bytes"], "sparsity": summary["sparsity"]}
        ranks.on_first(lambda: shutil.rmtree(folder / "run"))
    return {"bytes": nbytes, "disk_seconds": disk, "methods": rows}
