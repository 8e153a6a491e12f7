"""Quantised checkpoints: the forms that are read, by quantization_config, and the tensors that make up a weight, by name."""

from pathlib import Path

import torch

from stun.checkpoint.codecs.eight_bits import eight_bits, is_block
from stun.checkpoint.codecs.four_bits import four_bits, gpt_oss
from stun.checkpoint.codecs.packed import packed
from stun.checkpoint.codecs.transposed import transposed
from stun.checkpoint.headers import TensorInfo
from stun.checkpoint.other_forms import quantised, quantised_by
from stun.config import StunError

# Formats of compressed-tensors, and algorithms of ModelOpt.
_COMPRESSED = (
    "float-quantized",
    "int-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mixed-precision",
)
_MODELOPT = ("FP8", "NVFP4")
_FAMILIES = {
    "fp8": [eight_bits],
    "mxfp4": [gpt_oss],
    "compressed-tensors": [eight_bits, four_bits, packed],
    "modelopt": [eight_bits, four_bits],
    "gptq": [transposed],
    "awq": [transposed],
}
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)


def settings_of(config: dict) -> object:
    """quantization_config, wherever it lies in config.json; empty if there is none."""
    return config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config") or {}


def with_weights(folder: Path, config: dict, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """`tensors` with those that make up a quantised weight as one, described as what a read of it returns. Raises StunError if
    they are not those of a form that is read."""
    settings, file = settings_of(config), folder / "config.json"
    if not settings:
        if method := quantised_by(tensors):
            raise StunError(f"{file}: weights are quantised ({method}), but there is no quantization_config that says how")
        return tensors
    if not isinstance(settings, dict):
        raise StunError(f"{file}: quantization_config must be an object, is {settings!r}")
    method = settings.get("quant_method")
    if form := _not_read(settings, tensors):
        raise StunError(f"{file}: {quantised(form)}")
    weights: dict[str, TensorInfo] = {}
    for name in tensors:
        for found in filter(None, (family(name, tensors, settings) for family in _FAMILIES[method])):
            weights[found[0]] = found[1]
            break
    rest = _rest(tensors, weights, str(method))
    if not weights and method != "fp8":
        raise StunError(f"{file}: quantization_config says {method}, but no weight is stored so; remove it if all are plain")
    return rest | weights


def _rest(tensors: dict[str, TensorInfo], weights: dict[str, TensorInfo], method: str) -> dict[str, TensorInfo]:
    """Tensors that belong to no quantised weight. Raises StunError if one is of no plain kind, or has a weight's name."""
    used = {part.name for info in weights.values() for part in info.parts}
    rest = {name: info for name, info in tensors.items() if name not in used}
    for name, info in rest.items():
        if name in weights:
            raise StunError(f"{info.file}: {name}: is there both plain and quantised")
        if info.dtype not in _PLAIN:
            raise StunError(f"{info.file}: {name} holds {info.dtype}, and belongs to no weight that is stored by {method}")
    return rest


def _not_read(settings: dict, tensors: dict[str, TensorInfo]) -> str:
    """Form in which the weights are quantised if it is not read, in words; else empty."""
    method, form = settings.get("quant_method"), settings.get("format")
    if method not in _FAMILIES:
        return str(method or quantised_by(tensors) or "by an unnamed method")
    if method == "fp8":
        return "" if is_block(settings.get("weight_block_size")) else "fp8 without weight_block_size"
    if method == "compressed-tensors":
        sparse = (settings.get("sparsity_config") or {}).get("format") or "dense"
        if (settings.get("transform_config") or {}).get("config_groups"):
            return "compressed-tensors with transform_config, which rotates them"
        return "" if form in _COMPRESSED and sparse == "dense" else f"compressed-tensors, {form if sparse == 'dense' else sparse}"
    if method in ("gptq", "awq"):
        own = ("gptq", "gptq_v2") if method == "gptq" else ("gemm",)
        said, bits = settings.get("checkpoint_format" if method == "gptq" else "version") or own[0], settings.get("bits")
        return "" if bits == 4 and str(said).lower() in own else f"{method}, {said}, {bits} bits"
    algorithm = settings.get("quant_algo")
    return "" if method == "mxfp4" or algorithm in _MODELOPT else f"modelopt, {algorithm}"
