"""Checkpoints whose matrices are stored quantised, of random codes and scales."""

from __future__ import annotations

import torch

from helpers.forms import rewrite
from helpers.tensors import load_tensors
from helpers.zoo import make_checkpoint

Stored = dict[str, torch.Tensor]


def _bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _codes(rows: int, columns: int) -> torch.Tensor:
    """E4M3 without its NaNs."""
    codes = _bytes(rows, columns)
    return torch.where(codes & 127 == 127, 0, codes).view(torch.float8_e4m3fn)


def _scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape) * 0.002 + 0.001


def fp8(stem: str, rows: int, columns: int) -> Stored:
    return {f"{stem}.weight": _codes(rows, columns), f"{stem}.weight_scale_inv": _scales(-(-rows // 16), -(-columns // 12))}


def fp8_e8m0(stem: str, rows: int, columns: int) -> Stored:
    made = fp8(stem, rows, columns)
    scale = torch.randint(115, 120, made[f"{stem}.weight_scale_inv"].shape, dtype=torch.uint8)
    return made | {f"{stem}.weight_scale_inv": scale.view(torch.float8_e8m0fnu)}


def fp8_channel(stem: str, rows: int, columns: int) -> Stored:
    return {f"{stem}.weight": _codes(rows, columns), f"{stem}.weight_scale": _scales(rows, 1).bfloat16()}


def fp8_tensor(stem: str, rows: int, columns: int) -> Stored:
    return {f"{stem}.weight": _codes(rows, columns), f"{stem}.weight_scale": _scales(1).bfloat16()}


def fp8_modelopt(stem: str, rows: int, columns: int) -> Stored:
    return {f"{stem}.weight": _codes(rows, columns), f"{stem}.weight_scale": _scales(), f"{stem}.input_scale": _scales()}


def int8(stem: str, rows: int, columns: int) -> Stored:
    return {f"{stem}.weight": _bytes(rows, columns).view(torch.int8), f"{stem}.weight_scale": _scales(rows, 1).bfloat16()}


def _packed(stem: str, rows: int, columns: int, bits: int, group: int) -> Stored:
    words = torch.randint(-(2**31), 2**31 - 1, (rows, columns * bits // 32), dtype=torch.int32)
    scale = _scales(rows, columns // group).bfloat16() * 16
    return {
        f"{stem}.weight_packed": words,
        f"{stem}.weight_scale": scale,
        f"{stem}.weight_shape": torch.tensor([rows, columns]),
    }


def int4(stem: str, rows: int, columns: int) -> Stored:
    return _packed(stem, rows, columns, 4, 8)


def int4_zeros(stem: str, rows: int, columns: int) -> Stored:
    words = torch.randint(-(2**31), 2**31 - 1, (rows // 8, columns // 8), dtype=torch.int32)
    return _packed(stem, rows, columns, 4, 8) | {f"{stem}.weight_zero_point": words}


def int8_packed(stem: str, rows: int, columns: int) -> Stored:
    return _packed(stem, rows, columns, 8, 8)


def mxfp4(stem: str, rows: int, columns: int) -> Stored:
    scale = torch.randint(118, 124, (rows, columns // 32), dtype=torch.uint8)
    return {f"{stem}.weight_packed": _bytes(rows, columns // 2), f"{stem}.weight_scale": scale}


def nvfp4(stem: str, rows: int, columns: int) -> Stored:
    scale = (torch.rand(rows, columns // 16) * 400).to(torch.float8_e4m3fn)
    whole = torch.tensor([5000.0])
    return {
        f"{stem}.weight_packed": _bytes(rows, columns // 2),
        f"{stem}.weight_scale": scale,
        f"{stem}.weight_global_scale": whole,
    }


def nvfp4_modelopt(stem: str, rows: int, columns: int) -> Stored:
    made = nvfp4(stem, rows, columns)
    return {
        f"{stem}.weight": made[f"{stem}.weight_packed"],
        f"{stem}.weight_scale": made[f"{stem}.weight_scale"],
        f"{stem}.weight_scale_2": torch.tensor(0.0003),
        f"{stem}.input_scale": torch.tensor(0.02),
    }


def _words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def awq(stem: str, rows: int, columns: int) -> Stored:
    groups = columns // 16
    zeros = _words(groups, rows // 8)
    return {
        f"{stem}.qweight": _words(columns, rows // 8),
        f"{stem}.qzeros": zeros,
        f"{stem}.scales": _scales(groups, rows).half(),
    }


def gptq(stem: str, rows: int, columns: int) -> Stored:
    return awq(stem, rows, columns) | {f"{stem}.qweight": _words(columns // 8, rows)}


def gptq_ordered(stem: str, rows: int, columns: int) -> Stored:
    return gptq(stem, rows, columns) | {f"{stem}.g_idx": (torch.randperm(columns) // 16).int()}


def _compressed(form: str, **weights) -> dict:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel", **weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 12]}
# Form: how a matrix is stored, and what config.json says of it.
FORMS = {
    "fp8 block": (fp8, BLOCKS),
    "fp8 block, E8M0": (fp8_e8m0, BLOCKS),
    "fp8 channel": (fp8_channel, _compressed("float-quantized")),
    "fp8 tensor": (fp8_tensor, _compressed("float-quantized", strategy="tensor")),
    "fp8 modelopt": (fp8_modelopt, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "int8": (int8, _compressed("int-quantized", type="int")),
    "int4": (int4, _compressed("pack-quantized", type="int", num_bits=4, strategy="group", group_size=8)),
    "int4 with zero points": (
        int4_zeros,
        _compressed("pack-quantized", type="int", num_bits=4, strategy="group", group_size=8, symmetric=False),
    ),
    "int8 packed": (int8_packed, _compressed("pack-quantized", type="int", strategy="group", group_size=8)),
    "mxfp4": (mxfp4, _compressed("mxfp4-pack-quantized", num_bits=4, strategy="group", group_size=32, scale_dtype="torch.uint8")),
    "nvfp4": (
        nvfp4,
        _compressed(
            "nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"
        ),
    ),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 16}),
    "gptq in another order": (gptq_ordered, {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}),
    "nvfp4 modelopt": (nvfp4_modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
}


def quantised(folder, form: str, family: str = "qwen3_moe", **changes):
    """A checkpoint of a family whose matrices in the layers, but the routers, are stored in one of FORMS; in bfloat16 else."""
    make_checkpoint(folder, family, dtype=torch.bfloat16, **{"moe_intermediate_size": 32, **changes})
    stored, settings = FORMS[form]
    torch.manual_seed(3)
    tensors: Stored = {}
    for name, tensor in load_tensors(folder).items():
        is_matrix = ".layers." in name and name.endswith("proj.weight")
        tensors |= stored(name.removesuffix(".weight"), *tensor.shape) if is_matrix else {name: tensor}
    rewrite(folder, tensors, quantization_config=settings)
    return folder


def gpt_oss(folder, **changes):
    """A checkpoint of gpt-oss in its own form: blocks and scales of all experts of a layer."""
    make_checkpoint(folder, "gpt_oss", dtype=torch.bfloat16, intermediate_size=32, **changes)
    torch.manual_seed(3)
    tensors: Stored = {}
    for name, tensor in load_tensors(folder).items():
        if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
            experts, inputs, outputs = tensor.shape
            tensors[f"{name}_blocks"] = _bytes(experts, outputs, inputs // 32, 16)
            tensors[f"{name}_scales"] = torch.randint(118, 123, (experts, outputs, inputs // 32), dtype=torch.uint8)
        else:
            tensors[name] = tensor
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    rewrite(folder, tensors, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": skipped})
    return folder
