"""Checkpoints of unusual forms, and a run on one."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from helpers.family_runs import CALIBRATION
from helpers.selections import config
from helpers.tensors import load_tensors
from helpers.zoo import make_checkpoint
from stun.checkpoint.writer import write_index
from stun.config import ExpertsConfig
from stun.pruning.job import prune

UNIFORM = ExpertsConfig(fraction=0.5)


def run(source, run_dir, ranks, target=0.4, experts=UNIFORM, **changes):
    """(folder, plan, summary) of one run."""
    summary = prune(config(source, run_dir, target, experts, calibration=CALIBRATION, **changes), ranks)
    return run_dir / "model", json.loads((run_dir / "plan.json").read_text()), summary


def rewrite(folder, tensors, **config):
    """Replace a checkpoint's tensors, in two files, and change its config.json."""
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    names = sorted(tensors)
    halves = {"model-a.safetensors": names[::2], "model-b.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name].contiguous() for name in own}, folder / file, metadata={"format": "pt"})
    write_index(folder, {file: {name: tensors[name].nbytes for name in own} for file, own in halves.items()})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **config}))


def with_head(folder, family: str, last: str, head: str):
    """Give a checkpoint a prediction head at `head`, a copy of its layer `last` with other weights and a projection."""
    make_checkpoint(folder, family)
    tensors = load_tensors(folder)
    own = {name.replace(last, head): t + 0.05 * torch.randn_like(t) for name, t in tensors.items() if name.startswith(last)}
    (router,) = (tensor for name, tensor in own.items() if tensor.shape == (8, 32) and "gate" in name)
    router[1:4] = router[0] + 0.001 * torch.randn(3, 32)  # without groups, all that leave would leave the first
    numbered = {} if "mtp" in head else {"num_nextn_predict_layers": 1}
    rewrite(folder, {**tensors, **own, f"{head}eh_proj.weight": torch.randn(32, 64)}, **numbered)
    return own


def fp8(folder, family, height: int, width: int):
    """Quantise every matrix of a checkpoint's layers but the routers in blocks, as DeepSeek-V3 was released; the exact values."""
    make_checkpoint(folder, family, dtype=torch.bfloat16)
    tensors, exact = load_tensors(folder), {}
    for name, tensor in list(tensors.items()):
        exact[name] = tensor
        if ".layers." in name and tensor.dim() == 2 and name.endswith("proj.weight"):
            rows, columns = tensor.shape
            scales = torch.empty(-(-rows // height), -(-columns // width))
            quantised = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
            exact[name] = torch.empty_like(tensor)
            for i in range(scales.shape[0]):
                for j in range(scales.shape[1]):
                    part = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                    scales[i, j] = tensor[part].float().abs().max() / 448
                    quantised[part] = (tensor[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
                    exact[name][part] = (quantised[part].float() * scales[i, j]).bfloat16()
            tensors[name], tensors[name + "_scale_inv"] = quantised, scales
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [height, width]}
    rewrite(folder, tensors, quantization_config=config)
    return exact


def damaged(source, folder):
    """The same model with a third of the entries of its matrices gone."""
    torch.manual_seed(5)
    tensors = load_tensors(source)
    for name, tensor in tensors.items():
        if ".layers." in name and tensor.dim() > 1:
            tensor[torch.rand(tensor.shape) < 0.33] = 0
    folder.mkdir(parents=True)
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    rewrite(folder, tensors)
    return folder
