"""Weights rounded to a new form have the bytes that compressed-tensors makes of them where llm-compressor calls it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from stun.checkpoint.codecs.grids import GRIDS
from stun.checkpoint.reader import Checkpoint
from stun.model.architecture import Architecture
from stun.planning.written_form import plain_modules, rounded_dense
from stun.sparsify.compensated import compensated, inverted

X = "model.layers.0.mlp.experts.3.up_proj."
BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}


def weights() -> torch.Tensor:
    """[256, 384] with removed weights, a block, a row and a group of zeros, and magnitudes of every size."""
    torch.manual_seed(0)
    weight_OD = torch.randn(256, 384) * 0.03 * torch.exp(3 * torch.randn(256, 1))
    weight_OD[torch.rand(weight_OD.shape) < 0.3] = 0
    weight_OD[:128, :128], weight_OD[130], weight_OD[140, 32:64] = 0, 0, 0
    weight_OD[200, :64] *= 1e-8
    weight_OD[210, :64] *= 1e-38  # subnormal
    return weight_OD.bfloat16()


def theirs(form: str, weight_OD: torch.Tensor, largest: torch.Tensor) -> dict[str, torch.Tensor]:
    """By name: compressed-tensors' scales for the largest magnitudes of each block, then its compressor."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    settings = GRIDS[form].settings([])
    arguments = BLOCKS if form == "fp8_block" else settings["config_groups"]["group_0"]["weights"]
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**arguments))
    rows, columns = {"fp8_block": (128, 128), "fp8_channel": (1, 384)}.get(form, (1, scheme.weights.group_size))
    blocks = weight_OD.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    least, most, state = blocks.amin((1, 3)), blocks.amax((1, 3)), {"weight": weight_OD}
    if form == "nvfp4":
        state["weight_global_scale"] = helpers.generate_gparam(-largest, largest)
    state["weight_scale"], _ = helpers.calculate_qparams(least, most, scheme.weights, state.get("weight_global_scale"))
    library = compressors.BaseCompressor.get_value_from_registry("float-quantized" if form == "fp8_block" else settings["format"])
    return library.compress(state, scheme)


@pytest.mark.parametrize("form", GRIDS)
def test_bytes_are_those_of_compressed_tensors(form):
    weight_OD = weights()
    for largest in (weight_OD.abs().amax(), 3 * weight_OD.abs().amax()):  # merged with a matrix of larger weights
        ours, expected = GRIDS[form].parts(weight_OD, largest), theirs(form, weight_OD, largest)
        named = {end: ours[role] for role, end in GRIDS[form].ends.items()}
        if form == "fp8_block":  # in the form of DeepSeek: the same numbers in float32, under another name
            expected["weight_scale_inv"] = expected.pop("weight_scale").float()
        assert named.keys() == expected.keys()
        for name, tensor in named.items():
            assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape, name
            assert torch.equal(*(t.contiguous().view(torch.uint8) for t in (tensor, expected[name]))), name


@pytest.mark.parametrize("form", GRIDS)
def test_what_is_read_again(tmp_path, form):
    """... are the values that the layers after it have seen; zeros are zero; bytes are those that preflight counts."""
    grid, weight_OD = GRIDS[form], weights()
    parts = grid.parts(weight_OD, weight_OD.abs().amax())
    save_file({X + end: parts[role] for role, end in grid.ends.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": grid.settings(["lm_head"])}))
    source = Checkpoint.open(tmp_path)
    values_OD, info = grid.values(parts, torch.bfloat16), source.tensors[f"{X}weight"]
    assert torch.equal(source.read(f"{X}weight"), values_OD) and bool((values_OD[weight_OD == 0] == 0).all())
    assert info.stored_bytes == grid.nbytes(tuple(weight_OD.shape)) and info.codec.name == grid.codec.name
    error = float((values_OD.float() - weight_OD.float()).square().sum() / weight_OD.float().square().sum())
    assert error**0.5 < {"fp8": 0.03, "int4": 0.1, "nvfp4": 0.1, "mxfp4": 0.12}[grid.codec.name]


@pytest.mark.parametrize("form", GRIDS)
def test_rounded_with_inputs_in_view(form):
    """On the scales of nearest rounding: outputs are nearer, zeros stay. Inputs that have nothing in common change next to
    nothing: values halfway between two codes, which nearest rounding finds in bfloat16."""
    grid, weight_OD = GRIDS[form], weights()
    largest, inputs_ND = weight_OD.abs().amax(), torch.randn(600, 384) @ torch.randn(384, 384)
    nearest = grid.parts(weight_OD, largest)

    def rounded(gram_DD: torch.Tensor) -> dict[str, torch.Tensor]:
        upper_DD = inverted(torch.linalg.cholesky(gram_DD))
        return grid.compensated(
            weight_OD,
            largest,
            lambda own_OD, near: compensated(own_OD, upper_DD, lambda n, values_O: near(values_O, (slice(None), n))),
        )

    alone, seen = rounded(torch.eye(384)), rounded(inputs_ND.T @ inputs_ND + torch.eye(384))
    values = [grid.values(parts, torch.float32) for parts in (nearest, alone, seen)]
    assert float((values[0] != values[1]).float().mean()) < 0.02 and bool((values[2][weight_OD == 0] == 0).all())
    errors = [float(((own - weight_OD) @ inputs_ND.T)[128:].square().sum(1).clamp(min=1e-30).log().mean()) for own in values]
    assert errors[2] < errors[0] - 0.1
    assert all(torch.equal(nearest[role], seen[role]) for role in nearest if role != "codes")


@pytest.mark.parametrize("form", GRIDS)
def test_settings_are_those_that_compressed_tensors_reads(form):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    settings = GRIDS[form].settings(["lm_head"])
    if form == "fp8_block":
        assert settings["modules_to_not_convert"] == ["lm_head"]
        return
    read = quantization.QuantizationConfig.model_validate(settings)
    assert read.ignore == ["lm_head"] and read.format == settings["format"]
    presets = {"fp8_channel": "FP8_DYNAMIC", "nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16"}
    if form in presets:
        preset = quantization.preset_name_to_scheme(presets[form], ["Linear"])
        group, open_fields = read.config_groups["group_0"], {"observer", "observer_kwargs", "zp_dtype"}
        for side in ("weights", "input_activations"):
            ours, wanted = getattr(group, side), getattr(preset, side)
            assert (ours is None) == (wanted is None)
            assert ours is None or ours.model_dump(exclude=open_fields) == wanted.model_dump(exclude=open_fields)


def test_what_runtimes_merge_or_hold_plain(checkpoint):
    """Matrices that they merge have one global scale; what they never hold quantised is listed as ignored."""
    arch = Architecture(Checkpoint.open(checkpoint("qwen3_5_moe_text", dtype=torch.bfloat16)))
    groups = [[name.split(".")[-2] for name in names] for names in rounded_dense(arch, arch.layers[0], GRIDS["nvfp4"])]
    assert ["in_proj_qkv", "in_proj_z"] in groups
    arch = Architecture(Checkpoint.open(checkpoint("deepseek_v32", dtype=torch.bfloat16)))
    plain = plain_modules(arch, GRIDS["fp8_channel"])
    assert {f"model.layers.0.self_attn.indexer.{part}" for part in ("wk", "weights_proj")} <= set(plain)
    assert not any("q_a_proj" in name or "experts" in name.split(".") for name in plain)
