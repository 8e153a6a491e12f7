"""Weights of every stored form have the values that the form's own library gives them, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

from helpers.quantised import FORMS
from stun.checkpoint.reader import Checkpoint
from stun.config import StunError

X = "model.layers.0.mlp.experts.3.up_proj"
ROWS, COLUMNS = 40, 96  # of fp8's blocks the last ones are cut off


def written(folder, tensors, settings) -> Checkpoint:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return Checkpoint.open(folder)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def of_compressed_tensors(tensors, settings) -> torch.Tensor:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = quantization.QuantizationScheme(**settings["config_groups"]["group_0"])
    library = compressors.BaseCompressor.get_value_from_registry(settings["format"])
    return library.decompress({name.removeprefix(f"{X}."): tensor.clone() for name, tensor in tensors.items()}, scheme)["weight"]


def of_modelopt(tensors, settings) -> torch.Tensor:
    """NVFP4QTensor.dequantize and FP8QTensor.dequantize of nvidia-modelopt (modelopt/torch/quantization/qtensor), restated."""
    codes, scale = tensors[f"{X}.weight"], tensors[f"{X}.weight_scale"].float()
    if settings["quant_algo"] == "FP8":
        return (codes.float() * scale).bfloat16()
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    unpacked = torch.empty(ROWS, COLUMNS)
    unpacked[:, ::2], unpacked[:, 1::2] = e2m1[(codes & 15).long()], e2m1[(codes >> 4).long()]
    per_block = scale * tensors[f"{X}.weight_scale_2"].float()
    return (unpacked.view(ROWS, -1, 16) * per_block[..., None]).view(ROWS, COLUMNS).bfloat16()


def of_blocks(tensors, settings) -> torch.Tensor:
    """transformers' Fp8Dequantize, which takes whole blocks: the matrix is made larger first."""
    codes, scale = tensors[f"{X}.weight"], tensors[f"{X}.weight_scale_inv"]
    height, width = settings["weight_block_size"]
    whole = torch.zeros(scale.shape[0] * height, scale.shape[1] * width, dtype=torch.uint8)
    whole[:ROWS, :COLUMNS] = codes.view(torch.uint8)
    return Fp8Dequantize(None)._dequantize_one(whole.view(torch.float8_e4m3fn), scale, torch.bfloat16)[:ROWS, :COLUMNS]


def of_gptq(tensors, settings) -> torch.Tensor:
    """forward of auto_gptq/nn_modules/qlinear/qlinear_cuda.py, restated."""
    scale, shifts = tensors[f"{X}.scales"], torch.arange(0, 32, 4, dtype=torch.int32)
    zeros = (tensors[f"{X}.qzeros"][:, :, None] >> shifts & 15).flatten(1) + 1 & 15
    codes = (tensors[f"{X}.qweight"][:, None] >> shifts[:, None] & 15).flatten(0, 1)
    order = tensors.get(f"{X}.g_idx", torch.arange(COLUMNS) // settings["group_size"]).long()
    return (scale[order] * (codes - zeros[order])).T


def of_awq(tensors, settings) -> torch.Tensor:
    """dequantize_gemm of awq/utils/packing_utils.py, restated."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes, zeros = ((tensors[f"{X}.{end}"][:, :, None] >> shifts).flatten(1) for end in ("qweight", "qzeros"))
    order = torch.arange(ROWS).view(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].flatten()
    codes, zeros = codes[:, order] & 15, zeros[:, order] & 15
    scale, zeros = (part.repeat_interleave(settings["group_size"], 0) for part in (tensors[f"{X}.scales"], zeros))
    return ((codes - zeros) * scale).T


LIBRARIES = {
    "gptq": of_gptq,
    "awq": of_awq,
    "fp8": of_blocks,
    "compressed-tensors": of_compressed_tensors,
    "modelopt": of_modelopt,
}


AT_ONCE = {"_BAND": 2**22, "_BLOCK": 2**22}


@pytest.mark.parametrize("sizes", [{}, {"_BAND": 500}, {"_BLOCK": 500}], ids=["at once", "in bands", "in blocks"])
@pytest.mark.parametrize("form", FORMS)
def test_values_are_those_of_the_forms_own_library(tmp_path, monkeypatch, form, sizes):
    make, settings = FORMS[form]
    torch.manual_seed(0)
    tensors = make(X, ROWS, COLUMNS)
    for name, size in (AT_ONCE | sizes).items():
        monkeypatch.setattr(f"stun.checkpoint.reader.{name}", size)
    source = written(tmp_path, tensors, settings)
    assert list(source.tensors) == [f"{X}.weight"]
    ours, theirs = source.read(f"{X}.weight"), LIBRARIES[settings["quant_method"]](tensors, settings)
    assert ours.dtype == theirs.dtype and ours.shape == (ROWS, COLUMNS)
    # But for the sign of zero, which ModelOpt's table lacks.
    assert torch.equal(ours, theirs) and int((ours != 0).sum()) > ROWS * COLUMNS // 2


@pytest.mark.parametrize("columns", [16, 1], ids=["pairs", "odd"])
def test_every_code_of_e4m3(tmp_path, columns):
    """... has the value that torch gives it, NaN among them."""
    codes = torch.arange(256, dtype=torch.uint8).view(-1, columns).view(torch.float8_e4m3fn)
    tensors = {f"{X}.weight": codes, f"{X}.weight_scale": torch.ones(len(codes), 1)}
    read = written(tmp_path, tensors, FORMS["fp8 channel"][1]).read(f"{X}.weight")
    assert int(read.isnan().sum()) == 2
    torch.testing.assert_close(read, codes.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
def test_removed_weights_get_the_code_of_zero(tmp_path, form):
    """... and nothing else of what is stored changes; where nothing is removed, nothing does."""
    make, settings = FORMS[form]
    torch.manual_seed(0)
    tensors, name, later = make(X, ROWS, COLUMNS), f"{X}.weight", tmp_path / "later"
    source = written(tmp_path, tensors, settings)
    values = source.read(name)
    for pruned in (values, torch.where(torch.rand(values.shape) < 0.5, 0, values)):
        stored = source.stored(name, pruned=pruned)
        changed = [key for key, tensor in tensors.items() if raw(tensor) != raw(stored[key])]
        assert stored.keys() == tensors.keys() and changed == ([] if pruned is values else [next(iter(tensors))])
    later.mkdir()
    assert torch.equal(written(later, stored, settings).read(name), pruned)
    with pytest.raises(StunError, match="kept weights have changed"):
        source.stored(name, pruned=2 * values)


@pytest.mark.parametrize("form", FORMS)
def test_other_values_get_the_nearest_codes(tmp_path, form):
    """... of all that there are, on the scales that are there; the codes of other weights stay."""
    make, settings = FORMS[form]
    torch.manual_seed(0)
    tensors, name, later = make(X, ROWS, COLUMNS), f"{X}.weight", tmp_path / "later"
    source = written(tmp_path, tensors, settings)
    before = source.read(name)
    wanted = torch.where(torch.rand(before.shape) < 0.5, before, before.float().std() * torch.randn(before.shape)).to(
        before.dtype
    )
    wanted[torch.rand(wanted.shape) < 0.2] = 0
    fitted, stored = source.nearest(name, wanted), source.stored(name, pruned=source.nearest(name, wanted))
    assert torch.equal(fitted[wanted == before], before[wanted == before]) and bool((fitted[wanted == 0] == 0).all())
    assert [key for key, tensor in tensors.items() if raw(tensor) != raw(stored[key])] == [next(iter(tensors))]
    later.mkdir()
    assert torch.equal(written(later, stored, settings).read(name), fitted)
    info, least = source.tensors[name], torch.full(wanted.shape, torch.inf)
    parts = {part.role: tensors[part.name] for part in info.parts}
    for code in range(2**info.codec.bits):
        byte = code * 17 if info.codec.bits == 4 else code
        if parts["codes"].dtype is not torch.float8_e4m3fn or byte & 127 != 127:
            alike = torch.full_like(parts["codes"].view(torch.uint8), byte).view(parts["codes"].dtype)
            every = info.codec.dequantise({**parts, "codes": alike})
            every = every.T if info.codec.is_transposed else every
            least = torch.minimum(least, (every - wanted.float()).abs())
    assert bool(((fitted.float() - wanted.float()).abs() <= least * (1 + 2**-6) + 2**-8 * wanted.float().abs()).all())


@pytest.mark.parametrize("sizes", [{}, {"_BAND": 500}, {"_BLOCK": 500}], ids=["at once", "in bands", "in blocks"])
def test_experts_of_gpt_oss(tmp_path, monkeypatch, sizes):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (4, 24, 3, 16), dtype=torch.uint8)
    scales = torch.randint(0, 200, (4, 24, 3), dtype=torch.uint8)
    for size, weights in (AT_ONCE | sizes).items():
        monkeypatch.setattr(f"stun.checkpoint.reader.{size}", weights)
    source = written(tmp_path, {f"{name}_blocks": blocks, f"{name}_scales": scales}, {"quant_method": "mxfp4"})
    theirs = _convert_moe_packed_tensors(blocks.clone(), scales.clone())
    assert source.tensors[name].shape == theirs.shape == (4, 96, 24)
    assert torch.equal(source.read(name), theirs)
    source.bytes_read = 0
    assert torch.equal(source.read(name, row=2), theirs[2])
    assert source.bytes_read == 24 * 3 * 17, "of one expert its bytes alone"
    assert source.tensors[name].stored_bytes == blocks.nbytes + scales.nbytes


@pytest.mark.parametrize(
    "scales, says",
    [
        (None, "blocks has no .*_scales"),
        (torch.zeros(4, 24, 2, dtype=torch.uint8), r"holds .*\(4, 24, 2\); bytes"),
        (torch.full((4, 24, 3), 255, dtype=torch.uint8), "scales holds a scale that is no number .*E8M0 of 255"),
    ],
)
def test_experts_of_gpt_oss_that_cannot_be_read(tmp_path, scales, says):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": torch.zeros(4, 24, 3, 16, dtype=torch.uint8)}
    tensors |= {} if scales is None else {f"{name}_scales": scales}
    with pytest.raises(StunError, match=rf"model.safetensors: .*{says}"):
        written(tmp_path, tensors, {"quant_method": "mxfp4"}).read(name)


def change(end, value):
    def changed(tensors):
        (name,) = [name for name in tensors if name.endswith(end)]
        tensors[name] = value(tensors[name])

    return changed


def nan(scale):
    scale = scale.clone()
    scale.view(torch.uint8 if scale.dtype.itemsize == 1 else scale.dtype).flatten()[-1] = (
        255 if scale.dtype.itemsize == 1 else torch.nan
    )
    return scale


HOSTILE = {
    "no scale": ("fp8 channel", lambda tensors: tensors.pop(f"{X}.weight_scale"), "is fp8 but has no .*weight_scale"),
    "int4 without a scale": ("int4", lambda tensors: tensors.pop(f"{X}.weight_scale"), "weight_packed has no .*weight_scale"),
    "nvfp4 without a global scale": (
        "nvfp4",
        lambda tensors: tensors.pop(f"{X}.weight_global_scale"),
        "needs one number as .*weight_global_scale",
    ),
    "scale of another shape": (
        "fp8 channel",
        change("_scale", lambda t: t[:-1]),
        r"has shape \(39, 1\); \(40, 96\) needs another",
    ),
    "groups of another shape": ("int4", change("_scale", lambda t: t[:, :5]), r"weight_scale is .*\(40, 5\)"),
    "zero points of another shape": (
        "int4 with zero points",
        change("_point", lambda t: t[:-1]),
        r"weight_zero_point is .*\(4, 12\)",
    ),
    "mxfp4 of another group": ("mxfp4", change("_scale", lambda t: t[:, :2]), "are neither MXFP4 .* nor NVFP4"),
    "shape that lies": ("int4", change("_shape", lambda t: t + 1), r"weight_shape says \(41, 97\), the codes hold \(40, 96\)"),
    "NaN": ("fp8 block", change("_scale_inv", nan), "weight_scale_inv holds a scale that is no number"),
    "NaN in E4M3": ("nvfp4", change("weight_scale", nan), "weight_scale holds a scale that is no number"),
    "E8M0 of 255": ("mxfp4", change("_scale", nan), "weight_scale holds a scale that is no number .*E8M0 of 255"),
    "E8M0 of 255 in fp8": ("fp8 block, E8M0", change("_scale_inv", nan), "weight_scale_inv holds a scale that is no number"),
    "a group that is not there": ("gptq in another order", change("g_idx", lambda t: t + 1), "g_idx names groups .* there are 6"),
    "zero points without a scale": ("awq", lambda tensors: tensors.pop(f"{X}.scales"), "qweight has no .*scales"),
    "gptq without zero points": ("gptq", lambda tensors: tensors.pop(f"{X}.qzeros"), "qweight has no .*qzeros"),
    "gptq, scales of another shape": ("gptq", change(".scales", lambda t: t[:, :5]), r"scales is .*\(6, 5\); numbers"),
    "awq, zero points of another shape": ("awq", change(".qzeros", lambda t: t[:1]), r"qzeros is .*\(1, 5\); words"),
    "NaN in gptq": ("gptq", change(".scales", nan), "scales holds a scale that is no number"),
    "NaN in int8": ("int8", change("weight_scale", nan), "weight_scale holds a scale that is no number"),
    "modelopt without a global scale": (
        "nvfp4 modelopt",
        lambda tensors: tensors.pop(f"{X}.weight_scale_2"),
        "needs one number as .*weight_scale_2",
    ),
    "infinity": ("int4", change("_scale", lambda t: t / 0), "weight_scale holds a scale that is no number"),
    "global scale of 0": ("nvfp4", change("_global_scale", lambda t: 0 * t), "weight_global_scale is 0"),
    "order of inputs": (
        "int4",
        lambda tensors: tensors.update({f"{X}.weight_g_idx": torch.zeros(96)}),
        "weight_g_idx: .*actorder",
    ),
    "plain and quantised": (
        "int4",
        lambda tensors: tensors.update({f"{X}.weight": torch.zeros(40, 96)}),
        "both plain and quantised",
    ),
    "left over": (
        "fp8 channel",
        lambda tensors: tensors.update({"other": torch.zeros(4, 4, dtype=torch.uint8)}),
        "other holds torch.uint8",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, case):
    form, damage, says = HOSTILE[case]
    make, settings = FORMS[form]
    tensors = make(X, ROWS, COLUMNS)
    damage(tensors)
    with pytest.raises(StunError, match=rf"model.safetensors: .*{says}") as error:
        written(tmp_path, tensors, settings).read(f"{X}.weight")
    assert "\n" not in str(error.value)


SCHEMES = {
    "compressed-tensors, marlin-24": {"quant_method": "compressed-tensors", "format": "marlin-24"},
    "compressed-tensors, sparse-24-bitmask": {
        **FORMS["int4"][1],
        "sparsity_config": {"format": "sparse-24-bitmask"},
    },
    "compressed-tensors with transform_config": {**FORMS["int4"][1], "transform_config": {"config_groups": {"u": {}}}},
    "modelopt, W4A8_AWQ": {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
    "gptq, gptq, 8 bits": {"quant_method": "gptq", "bits": 8},
    "awq, gemv, 4 bits": {"quant_method": "awq", "bits": 4, "version": "gemv"},
    "quark": {"quant_method": "quark"},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_other_schemes_are_refused_by_name(tmp_path, scheme):
    with pytest.raises(StunError, match=rf"config.json: weights are quantised \({scheme}.*bf16 release"):
        written(tmp_path, FORMS["int4"][0](X, ROWS, COLUMNS), SCHEMES[scheme])


def test_integers_of_unknown_width(tmp_path):
    make, settings = FORMS["int4"]
    group = {"weights": {"type": "int", "num_bits": 3}}
    with pytest.raises(StunError, match=r"config.json says integers of \['3'\] bits"):
        written(tmp_path, make(X, ROWS, COLUMNS), {**settings, "config_groups": {"a": group}})


def test_a_form_that_no_weight_has(tmp_path):
    with pytest.raises(StunError, match=r"config.json: quantization_config says mxfp4, but no weight is stored so"):
        written(tmp_path, {"a": torch.zeros(3)}, {"quant_method": "mxfp4"})


@pytest.mark.parametrize("form", FORMS)
def test_scales_follow_values_of_another_size(tmp_path, form):
    """Rounded on scales that follow them, larger and smaller values lose no more than the weight's own size would; settings, zero
    points and passengers stay, and what is stored is read as those values."""
    make, settings = FORMS[form]
    torch.manual_seed(0)
    tensors, name, later = make(X, ROWS, COLUMNS), f"{X}.weight", tmp_path / "later"
    source = written(tmp_path, tensors, settings)
    before = source.read(name).float()
    # As many times as large, and a little more: every row of a scale for rows, the whole for others.
    factor = 2 ** torch.tensor([-3.0, 2.0]).repeat(ROWS // 2)[:, None] if "channel" in form or form == "int8" else 3.7
    wanted = (before * factor + 0.3 * before.std() * factor * torch.randn(before.shape)).to(source.tensors[name].dtype)
    wanted[torch.rand(wanted.shape) < 0.2] = 0

    def plain(weight, near):
        return near(weight, (slice(None), slice(None))) * (weight != 0)

    stored = source.rescaled(name, wanted, None, plain)
    values = source.worth(name, None, stored, torch.device("cpu"))
    old = source.nearest(name, wanted)
    errors = [float((own.float() - wanted.float()).square().mean() / wanted.float().square().mean()) for own in (values, old)]
    assert errors[0] < 0.12**2
    assert errors[0] < 0.5 * errors[1] and bool((values[wanted == 0] == 0).all())
    changed = {key for key, tensor in tensors.items() if raw(tensor) != raw(stored[key])}
    scales = {part.name for part in source.tensors[name].parts if part.role in ("scale", "global")}
    assert stored.keys() == tensors.keys() and changed == {next(iter(tensors)), *scales}
    later.mkdir()
    assert torch.equal(written(later, stored, settings).read(name), values)


@pytest.mark.parametrize("form", FORMS)
def test_what_has_not_changed_keeps_scales_and_codes(tmp_path, form):
    """... but for removed weights, which get the code of zero; and a group that has not changed keeps its scale beside others."""
    make, settings = FORMS[form]
    torch.manual_seed(0)
    tensors, name = make(X, ROWS, COLUMNS), f"{X}.weight"
    source = written(tmp_path, tensors, settings)
    before = source.read(name)
    masked = torch.where(torch.rand(before.shape) < 0.3, 0, before)
    for weight in (before, masked):
        stored, wanted = source.rescaled(name, weight, None, lambda *_: pytest.fail("nothing is to be rounded")), source.stored
        assert {key: raw(tensor) for key, tensor in stored.items()} == {k: raw(t) for k, t in wanted(name, pruned=weight).items()}
    grown = before.clone()
    grown[: ROWS // 2] *= 4
    stored = source.rescaled(name, grown, None, lambda weight, near: near(weight, (slice(None), slice(None))))
    if "tensor" not in form and "modelopt" not in form and form != "nvfp4":  # these have a scale for the whole
        kept = source.worth(name, None, stored, torch.device("cpu"))[-8:]
        assert torch.equal(kept, before[-8:])
