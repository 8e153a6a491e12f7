"""Identity of a run and of its statistics: everything that their results depend on."""

import hashlib
import json
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path

import torch
import transformers

from stun.checkpoint.reader import Checkpoint
from stun.config import PruneConfig
from stun.data.samples import Samples
from stun.runtime.cpu import cpu_type
from stun.runtime.ranks import Ranks

COMPUTED_IN = "computed_in"  # name of the compute dtype in records
# Settings on which the result does not depend; hardware is checked for itself.
_WITHOUT_EFFECT = ("run_dir", "statistics", "tracking", "device", "allow_other_hardware")


def plain(value: object) -> object:
    """Value in types that YAML can hold: enums by name, dataclasses as mappings."""
    if isinstance(value, Enum):
        return value.name
    if is_dataclass(value):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def model_digest(source: Checkpoint) -> str:
    """SHA-256 of config.json, the headers, and a sample of the weights."""
    shapes = sorted((name, str(info.dtype), info.shape) for name, info in source.tensors.items())
    return hashlib.sha256(json.dumps([source.config, shapes, source.sampled()], sort_keys=True).encode()).hexdigest()


def fingerprint(cfg: PruneConfig, source: Checkpoint, samples: Samples | None) -> dict:
    """Identity of a run. The number of ranks is not part of it, since the result does not depend on it."""
    names = [f.name for f in fields(PruneConfig) if f.name not in _WITHOUT_EFFECT]
    config = {name: plain(getattr(cfg, name)) for name in names}
    # The memory for Gram matrices decides how often a layer runs, not the result.
    config["sparsify"].pop("gram_gib")
    text = None if samples is None else hashlib.sha256(samples.tokens_ST.numpy().tobytes()).hexdigest()
    files = {"plan_content": cfg.plan, "ratios_content": cfg.sparsify.ratios_file}
    contents = {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None for name, file in files.items()}
    return {"config": config, "source": model_digest(source), "calibration_tokens": text, **contents}


def observed(cfg: PruneConfig, source: Checkpoint, samples: Samples, dtype: torch.dtype) -> dict:
    """Identity of the first stream's statistics, computed in `dtype`, except whether they include outliers."""
    identity = fingerprint(cfg, source, samples)
    tokens, size = identity["calibration_tokens"], cfg.calibration.micro_batch
    run_as = {"micro_batch": size, COMPUTED_IN: _name(dtype)}
    return {"model": identity["source"], "sources": samples.sources, "calibration_tokens": tokens, **run_as}


def hardware(ranks: Ranks, dtype: torch.dtype) -> dict[str, str]:
    """What bits depend on beside the request: device, versions, and the `dtype` that is computed in, of all ranks. All ranks call
    this together."""
    if ranks.device.type == "cuda":
        own = {"device": torch.cuda.get_device_name(ranks.device), "cuda": str(torch.version.cuda)}
    else:
        own = {"device": cpu_type()}
    own |= {"torch": torch.__version__, "transformers": transformers.__version__, COMPUTED_IN: _name(dtype)}
    everywhere = ranks.gather_objects(own)
    names = {name: None for each in everywhere for name in each}  # in this order
    return {name: " and ".join(sorted({each[name] for each in everywhere if name in each})) for name in names}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def differences(old: object, new: object, where: str = "") -> list[str]:
    """Differences of two identities, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)]
    return [] if old == new else [f"{where}: {old} there, {new} now"]
