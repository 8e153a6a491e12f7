"""A quantised checkpoint is written as it is stored: what is kept has the source's bytes, what is removed the code of zero."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch

from helpers.family_runs import CALIBRATION
from helpers.forms import rewrite
from helpers.launches import launch
from helpers.quantised import FORMS, gpt_oss, quantised
from helpers.selections import config
from helpers.stock import load_stock
from helpers.tensors import load_tensors
from helpers.zoo import make_checkpoint
from stun.checkpoint.codecs.grids import GRIDS
from stun.checkpoint.quantised import settings_of
from stun.checkpoint.reader import Checkpoint
from stun.config import (
    ExpertsConfig,
    ExpertsMethod,
    OutputConfig,
    OutputFormat,
    Score,
    SparsifyConfig,
    SparsifyMethod,
    StunError,
    Uneven,
)
from stun.planning.budget import model_bytes
from stun.planning.job import resolve_model
from stun.preflight.traffic import bytes_read
from stun.pruning.job import prune
from stun.pruning.rounding import Rounding
from stun.report.tables import summary_table

RANKED = ExpertsConfig(method=ExpertsMethod.rank, score=Score.reap, keep=6)
SOURCE, BFLOAT16 = OutputConfig(OutputFormat.source), OutputConfig(OutputFormat.bfloat16)
EXPERT = re.compile(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.")


def pruned(source, run_dir, ranks, experts=RANKED, target=None, **changes):
    """(folder, experts kept of every layer, summary) of one run."""
    summary = prune(config(source, run_dir, target, experts, calibration=CALIBRATION, **changes), ranks)
    plan = json.loads((run_dir / "plan.json").read_text())
    return run_dir / "model", [layer["kept"] for layer in plan["layers"]], summary


def with_settings(folder, change):
    """Change the quantisation settings in a checkpoint's config.json."""
    content = json.loads((folder / "config.json").read_text())
    change(content["quantization_config"])
    (folder / "config.json").write_text(json.dumps(content))


def origin(name: str, kept: list[list[int]]) -> str:
    """Name in the source of an expert's tensor."""
    match = EXPERT.search(name)
    return f"{name[: match.start(2)]}{kept[int(match[1])][int(match[2])]}{name[match.end(2) :]}" if match else name


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def check_said(job, summary, folder):
    """Preflight's bytes are those of the run, and its records say the stored form."""
    assert model_bytes(job.arch, job.plan, job.cfg) == summary["bytes_written"]
    estimate = sum(sum(read) for read in bytes_read(job, 1).values())
    assert estimate == pytest.approx(sum(summary["bytes_read"]), rel=0.01)
    source = job.arch.source
    said = f"{' and '.join(source.formats)}, {source.bits:.3g} bits a weight, as in the source" if source.formats else ""
    said = f"{job.cfg.output.format.name}, {job.grid.bits:.3g} bits a weight, from plain weights" if job.grid else said
    assert f"Weights are stored as {said}." in (folder / "README.md").read_text().replace("\\_", "_")
    assert said in summary_table(summary | {"seconds": 1.0}, "run")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp8 block", "int4", "mxfp4", "nvfp4 modelopt"])
def test_experts_kept_have_the_bytes_of_the_source(tmp_path, ranks, form):
    source = quantised(tmp_path / "source", form)
    of_experts = [f"model.layers.0.mlp.experts.{expert}.up_proj" for expert in range(8)]
    with_settings(source, lambda settings: settings.update(ignore=["lm_head", *of_experts], other={of_experts[7]: {"a": 1}}))
    (source / "hf_quant_config.json").write_text(json.dumps({"quantization": {"exclude_modules": of_experts}}))
    folder, kept, summary = pruned(source, tmp_path / "run", ranks)
    check_said(resolve_model(config(source, tmp_path / "other", None, RANKED, calibration=CALIBRATION)), summary, folder)
    before, after = load_tensors(source), load_tensors(folder)
    assert {len(layer) for layer in kept} == {0, 6} and kept[0] != list(range(6))
    names = {name: origin(name, kept) for name in after if "mlp.gate." not in name}
    assert all(same_bytes(after[name], before[name_before]) for name, name_before in names.items())
    removed = [name for name in before if name not in names.values() and "mlp.gate." not in name]
    assert all(EXPERT.search(name) for name in removed) and len(removed) * 3 == sum(bool(EXPERT.search(name)) for name in names)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    other = {f"model.layers.0.mlp.experts.{kept[0].index(7)}.up_proj": {"a": 1}} if 7 in kept[0] else {}
    assert settings == FORMS[form][1] | {"ignore": ["lm_head", *of_experts[:6]], "other": other}
    side = json.loads((folder / "hf_quant_config.json").read_text())
    assert side == {"quantization": {"exclude_modules": of_experts[:6]}}
    assert Checkpoint.open(folder).formats.keys() == Checkpoint.open(source).formats.keys()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp8 block", "int4 with zero points", "nvfp4"])
def test_removed_weights_get_the_code_of_zero(tmp_path, ranks, form):
    """... and nothing else changes; the values are those of a run that writes bfloat16."""
    # Of sixteen codes of NVFP4 two are zero: some rows of 32 would have more of them than weights to lose.
    wide = {"hidden_size": 128, "moe_intermediate_size": 128} if form == "nvfp4" else {}
    source, wanda = quantised(tmp_path / "source", form, **wide), SparsifyConfig(method=SparsifyMethod.wanda)
    asked = {"experts": replace(RANKED, keep=None, fraction=0.5), "target": 0.4, "sparsify": wanda}
    folder, kept, summary = pruned(source, tmp_path / "run", ranks, **asked)
    plain, _, _ = pruned(source, tmp_path / "plain", ranks, **asked, output=BFLOAT16)
    assert abs(summary["sparsity"] - 0.4) < 1e-4
    before, after = load_tensors(source), load_tensors(folder)
    read, exact = Checkpoint.open(folder), load_tensors(plain)
    assert read.tensors.keys() == exact.keys() and all(torch.equal(read.read(name), exact[name]) for name in exact)
    differ = {name for name in after if "gate." not in name and not same_bytes(after[name], before[origin(name, kept)])}
    assert differ and all(re.search(r"\.weight(_packed)?$", name) for name in differ), "no scale has changed"


@pytest.mark.slow
def test_identity_and_masks(tmp_path, ranks):
    """Where nothing is removed, all bytes are the source's; where weights are, codes alone differ, and what is kept is what was.
    Of forms that no other test here runs."""
    wanda = SparsifyConfig(method=SparsifyMethod.wanda)
    for form in ("int8", "mxfp4", "gptq in another order", "awq"):
        source = quantised(tmp_path / form, form, num_hidden_layers=1, hidden_size=64, moe_intermediate_size=64, num_experts=4)
        before, read = load_tensors(source), Checkpoint.open(source)
        for target in (0.0, 0.3):
            run_dir = tmp_path / f"{form} {target}"
            folder, _, _ = pruned(source, run_dir, ranks, ExpertsConfig(fraction=0.0), target, sparsify=wanda)
            after, own = load_tensors(folder), Checkpoint.open(folder)
            assert before.keys() == after.keys() and settings_of(own.config) == FORMS[form][1]
            differ = {name for name in after if not same_bytes(after[name], before[name])}
            assert bool(differ) == bool(target) and all(re.search(r"weight(_packed)?$", name) for name in differ), form
            for name in own.tensors if target else ():
                values, dense = own.read(name), read.read(name)
                assert torch.equal(values, torch.where(values == 0, 0, dense)), (form, name)


@pytest.mark.slow
def test_gpt_oss(tmp_path, ranks):
    """The default method on whole experts alone; nothing removed; weights removed."""
    source = gpt_oss(tmp_path / "source")
    experts = ExpertsConfig(method=ExpertsMethod.rank, score=Score.residual, keep=6, refit=True)
    alps = SparsifyConfig(method=SparsifyMethod.alps, reconstruct=True)
    folder, kept, summary = pruned(source, tmp_path / "run", ranks, experts, sparsify=alps)
    before, after = load_tensors(source), load_tensors(folder)
    assert before.keys() == after.keys() and kept[0] != list(range(6))
    for name, tensor in after.items():
        layer = re.search(r"layers\.(\d+)\.mlp\.(experts|router)", name)
        is_same = same_bytes(tensor, before[name][kept[int(layer[1])]] if layer else before[name])
        assert is_same or name.endswith(("down_proj_blocks", "down_proj_scales")), "only the refit has changed what is kept"
    same, _, _ = pruned(source, tmp_path / "same", ranks, ExpertsConfig(), target=0.0)
    assert all(same_bytes(tensor, before[name]) for name, tensor in load_tensors(same).items())
    wanda = SparsifyConfig(method=SparsifyMethod.wanda)
    masked, _, summary = pruned(source, tmp_path / "masked", ranks, ExpertsConfig(fraction=0.0), 0.3, sparsify=wanda)
    assert abs(summary["sparsity"] - 0.3) < 1e-4
    differ = {name.rpartition("_")[2] for name, tensor in load_tensors(masked).items() if not same_bytes(tensor, before[name])}
    assert "blocks" in differ and "scales" not in differ


CHANGES = {
    "a refit of whole experts": {"experts": replace(RANKED, refit=True)},
    "a solver and a refit": {
        "target": 0.6,
        "experts": ExpertsConfig(fraction=0.3, refit=True),
        "sparsify": SparsifyConfig(method=SparsifyMethod.sparsegpt, reconstruct=True),
    },
    "means of clusters": {"experts": ExpertsConfig(keep=6, kappa=6)},
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_gets_the_nearest_codes(tmp_path, ranks, change):
    """... on scales that stay, but for what the joint refit changes: the files hold what the layers after have seen, as near as
    they can to what bfloat16 holds."""
    source, asked = quantised(tmp_path / "source", "int4"), {"target": None, **CHANGES[change]}
    folder, kept, summary = pruned(source, tmp_path / "run", ranks, **asked, output=SOURCE)
    exact, _, _ = pruned(source, tmp_path / "plain", ranks, **asked, output=BFLOAT16)
    own = sum(summary["kept"]) < sum(summary["experts"]) and not summary["ratio"]  # the source's zeros are beside whole experts
    assert own or abs(summary["sparsity"] - summary["target"]) < 1e-4
    before, after, read, plain = load_tensors(source), load_tensors(folder), Checkpoint.open(folder), load_tensors(exact)
    names = {name for name in after if "gate." not in name and not same_bytes(after[name], before[origin(name, kept)])}
    rescaled = {name for name in names if not name.endswith("weight_packed")}
    assert names and all(name.endswith("down_proj.weight_scale") for name in rescaled)
    assert bool(rescaled) is asked["experts"].refit
    first = [name for name in plain if ".layers.0." in name and "gate." not in name]  # the next sees other inputs
    own = Checkpoint.open(source)
    for name in first:
        place = origin(name, kept)
        near = own.nearest(place, plain[name]) if own.tensors[place].codec else plain[name]
        assert "down_proj" in name or torch.equal(read.read(name), near), name


@pytest.mark.parametrize("expert", [0, 3])
def test_experts_that_are_plain_beside_others(tmp_path, ranks, expert):
    """... are refitted and stay plain, whichever it is."""
    source = quantised(tmp_path / "source", "int4")
    tensors, read, name = load_tensors(source), Checkpoint.open(source), f"model.layers.0.mlp.experts.{expert}.down_proj"
    plain = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{name}.")}
    rewrite(source, plain | {f"{name}.weight": read.read(f"{name}.weight")})
    asked = {"target": 0.3, "sparsify": SparsifyConfig(method=SparsifyMethod.wanda)}
    folder, _, summary = pruned(source, tmp_path / "run", ranks, ExpertsConfig(fraction=0.0, refit=True), **asked)
    assert load_tensors(folder)[f"{name}.weight"].dtype is torch.bfloat16 and abs(summary["sparsity"] - 0.3) < 1e-4


def test_padding_cannot_keep_the_form(tmp_path):
    """... so that it is refused where the form is asked for, and else the form goes."""
    folder = quantised(tmp_path / "source", "int4", "glm4_moe")
    padded = replace(RANKED, uneven=Uneven.padded)
    with pytest.raises(StunError, match=r"output.format=source: experts.uneven=padded: .*or output.format=bfloat16"):
        resolve_model(config(folder, tmp_path, None, padded, output=SOURCE))
    job = resolve_model(config(folder, tmp_path, None, padded))
    assert not job.keeps_form and "written in bfloat16, 2.6 times the bytes, since experts.uneven=padded" in job.form_note


def test_a_pattern_that_picks_experts_by_number(tmp_path):
    """... is refused where its experts get other numbers."""
    folder = quantised(tmp_path / "source", "int4")
    with_settings(folder, lambda settings: settings.update(ignore=[r"re:.*experts\.(0|1)\..*"]))
    with pytest.raises(StunError, match=r"quantization_config: re:.*a pattern that picks experts by number"):
        resolve_model(config(folder, tmp_path, None, RANKED))
    assert not resolve_model(config(folder, tmp_path, None, RANKED, output=BFLOAT16)).keeps_form


def test_a_router_that_is_quantised(tmp_path):
    folder = quantised(tmp_path / "source", "int4")
    tensors, name = load_tensors(folder), "model.layers.0.mlp.gate"
    rows, columns = tensors.pop(f"{name}.weight").shape
    rewrite(folder, tensors | FORMS["int4"][0](name, rows, columns))
    with pytest.raises(StunError, match=rf"{name}.weight: a router that is quantised .*output.format=bfloat16"):
        resolve_model(config(folder, tmp_path, None, RANKED))
    assert not resolve_model(config(folder, tmp_path, None, RANKED, output=BFLOAT16)).keeps_form


def test_a_plain_source_cannot_be_dequantised(tmp_path, checkpoint):
    with pytest.raises(StunError, match=r"output.format=bfloat16: the source is not quantised"):
        resolve_model(config(checkpoint("mixtral"), tmp_path, 0.3, output=BFLOAT16))


WHOLE = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128, "head_dim": 32}  # whole blocks of all forms


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("plain"), "qwen3_moe", dtype=torch.bfloat16, **WHOLE)


def to(form: str) -> OutputConfig:
    return OutputConfig(OutputFormat[form])


@pytest.mark.slow
@pytest.mark.parametrize("form", GRIDS)
def test_plain_weights_are_pruned_then_rounded(tmp_path, ranks, plain, form):
    """... to the bytes that rounding a pruned checkpoint gives; what is removed stays zero, and counts alone."""
    grid, magnitude = GRIDS[form], SparsifyConfig(method=SparsifyMethod.magnitude)
    asked = {"experts": replace(RANKED, keep=None, fraction=0.5), "target": 0.4, "sparsify": magnitude}
    folder, _, summary = pruned(plain, tmp_path / "run", ranks, **asked, output=to(form))
    exact, _, dense = pruned(plain, tmp_path / "plain", ranks, **asked)
    assert summary["sparsity"] == dense["sparsity"] and abs(summary["sparsity"] - 0.4) < 1e-4
    wanted, after = load_tensors(exact), load_tensors(folder)
    job = resolve_model(config(plain, tmp_path / "o", 0.4, asked["experts"], sparsify=magnitude, output=to(form)))
    check_said(job, summary, folder)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    skipped = settings.get("ignore", settings.get("modules_to_not_convert"))
    expected, shared = {}, {name: wanted[name].abs().amax() for name in wanted}
    for name, tensor in wanted.items():
        mates = [pair for pair in (("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj")) if name.split(".")[-2] in pair]
        largest = max(shared[re.sub(r"[a-z]+_proj", mate, name)] for mate in mates[0]) if mates else shared[name]
        is_plain = "proj" not in name or name.removesuffix(".weight") in skipped
        parts = {} if is_plain else grid.parts(tensor, largest)
        expected |= {name: tensor} if is_plain else {name[:-6] + end: parts[role] for role, end in grid.ends.items()}
    assert expected.keys() == after.keys() and all(same_bytes(after[name], expected[name]) for name in expected)
    own = {"lm_head", "model.embed_tokens", "model.layers.0.mlp.gate", "model.layers.2.mlp.gate"}
    narrow = {f"model.layers.{layer}.self_attn.{leaf}" for layer in range(3) for leaf in ("q_proj", "k_proj", "v_proj")}
    assert set(skipped) == own | (narrow if form == "fp8_block" else set()), "64 outputs of k_proj are half a block"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["phimoe", "kimi_k25"])
def test_transformers_finds_all_that_is_rounded(tmp_path, ranks, family):
    """... and takes nothing else for it, where its modules have other names than the source's tensors."""
    pytest.importorskip("compressed_tensors")
    source = make_checkpoint(tmp_path / "source", family, dtype=torch.bfloat16)
    experts = ExpertsConfig(drop=0.25, refit=False)
    folder, _, _ = pruned(source, tmp_path / "run", ranks, experts, output=to("fp8_channel"))
    load_stock(folder)


@pytest.mark.slow
def test_what_was_solved_is_rounded_with_its_inputs_in_view(tmp_path, ranks, plain, monkeypatch):
    """... whatever has changed it last: the first layer is near what the same run writes unrounded, outputs more than weights."""
    solved = SparsifyConfig(method=SparsifyMethod.sparsegpt, reconstruct=True)
    asked = {"experts": ExpertsConfig(fraction=0.0), "target": 0.3, "sparsify": solved}
    exact = load_tensors(pruned(plain, tmp_path / "plain", ranks, **asked)[0])
    folder = pruned(plain, tmp_path / "run", ranks, **asked, output=to("int4"))[0]
    monkeypatch.setattr(Rounding, "fit", lambda *_: None)
    nearest = Checkpoint.open(pruned(plain, tmp_path / "nearest", ranks, **asked, output=to("int4"))[0])
    rounded, differ = Checkpoint.open(folder), set()
    for name in (name for name in exact if ".layers.0." in name and "proj" in name):
        off, least = (
            (own.read(name).float() - exact[name].float()).norm() / exact[name].float().norm() for own in (rounded, nearest)
        )
        assert 0 < off < 0.2, name
        differ |= {name.split(".")[-2]} if off > least else set()
    assert differ == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.slow
def test_the_layers_after_see_rounded_weights(tmp_path, ranks, plain):
    """Masks of the second layer are those of a source whose first layer has the rounded weights from the beginning."""
    asked = {"experts": ExpertsConfig(fraction=0.0), "target": 0.3, "sparsify": SparsifyConfig(method=SparsifyMethod.wanda)}
    folder, _, _ = pruned(plain, tmp_path / "run", ranks, **asked, output=to("mxfp4"))
    read, source, other = Checkpoint.open(folder), load_tensors(plain), shutil.copytree(plain, tmp_path / "other")
    rewrite(other, source | {name: read.read(name) for name in read.tensors if ".layers.0." in name})
    second, dense = {}, {name: tensor for name, tensor in source.items() if ".layers.1." in name and "proj" in name}
    for name, start in (("rounded", other), ("exact", plain)):
        found = load_tensors(pruned(start, tmp_path / name, ranks, **asked)[0])
        second[name] = sum(
            int(((found[key] != 0) & (read.read(key) == 0) & ~small(tensor)).sum()) for key, tensor in dense.items()
        )
    assert second["rounded"] == 0 < second["exact"]


# llm-compressor's scheme of each form; of W4A16 with the groups that are written here.
SCHEMES = {"fp8_block": "FP8_BLOCK", "fp8_channel": "FP8_DYNAMIC", "int4": "W4A16", "nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16"}
PEER = """
import json, sys
from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor import model_free_ptq
for source, folder, name, ignore in json.loads(sys.argv[1]):
    scheme = preset_name_to_scheme(name, ["Linear"])
    if name == "W4A16":
        scheme.weights.group_size = 32
    model_free_ptq(source, folder, scheme, ignore=ignore, device="cpu")
"""


@pytest.mark.slow
@pytest.mark.skipif("LLMCOMPRESSOR_PYTHON" not in os.environ, reason="LLMCOMPRESSOR_PYTHON: an interpreter with llmcompressor")
def test_bytes_are_those_of_llm_compressor(tmp_path, ranks, plain):
    """... of its model_free_ptq, tensor by tensor, where nothing is removed.

    Two things have another form. Scales of FP8 blocks are DeepSeek's: the same numbers in float32, as `weight_scale_inv`. NVFP4
    is compared on Mixtral: of experts whose matrices are named gate_proj and up_proj llm-compressor shares no scale.
    """
    mixtral = make_checkpoint(tmp_path / "mixtral", "mixtral", dtype=torch.bfloat16, shard="5GB", **WHOLE)
    own, theirs, jobs = {}, {}, []
    for form, scheme in SCHEMES.items():
        source = mixtral if form == "nvfp4" else plain
        own[form], _, _ = pruned(source, tmp_path / form, ranks, ExpertsConfig(), target=0.0, output=to(form))
        settings = json.loads((own[form] / "config.json").read_text())["quantization_config"]
        theirs[form] = tmp_path / f"{form} of llm-compressor"
        skipped = settings.get("ignore", settings.get("modules_to_not_convert"))
        jobs.append((str(source), str(theirs[form]), scheme, skipped))
    launch([os.environ["LLMCOMPRESSOR_PYTHON"], "-c", PEER, json.dumps(jobs)])
    for form in SCHEMES:
        ours, wanted = load_tensors(own[form]), load_tensors(theirs[form])
        if form == "fp8_block":
            scales = {name for name in wanted if name.endswith("weight_scale")}
            wanted |= {f"{name}_inv": wanted.pop(name).float() for name in scales}
        assert ours.keys() == wanted.keys()
        assert [name for name in ours if not same_bytes(ours[name], wanted[name])] == [], form


def small(weight_OD: torch.Tensor) -> torch.Tensor:
    """Weights that rounding to MXFP4 may make zero."""
    parts = GRIDS["mxfp4"].parts(weight_OD, weight_OD.abs().amax())
    return GRIDS["mxfp4"].values(parts, weight_OD.dtype) == 0


REFUSED = {
    "fp8_block": (
        {"family": "qwen3_moe"},
        r"output.format=fp8_block: .*down_proj.weight is \(32, 48\), which is not whole blocks of 128 outputs and 128 inputs; "
        r"it can be fp8_channel, nvfp4$",
    ),
    "int4": (
        {"family": "gpt_oss"},
        r"output.format=int4: .*experts.down_proj holds all experts of a layer; .* a tensor for each",
    ),
    "mxfp4": ({"family": "minimax_m2", "dtype": torch.float32, "intermediate_size": 32}, r"holds torch.float32; .*bfloat16"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_cannot_be_rounded(tmp_path, form):
    made, says = REFUSED[form]
    folder = make_checkpoint(tmp_path / "source", **{"dtype": torch.bfloat16, **made})
    with pytest.raises(StunError, match=says):
        resolve_model(config(folder, tmp_path, 0.3, RANKED, output=to(form)))


def test_padding_is_not_rounded(tmp_path):
    folder = make_checkpoint(tmp_path / "source", "glm4_moe", dtype=torch.bfloat16)
    with pytest.raises(StunError, match=r"output.format=nvfp4: experts.uneven=padded: .*give experts.uneven=code"):
        resolve_model(config(folder, tmp_path, None, replace(RANKED, uneven=Uneven.padded), output=to("nvfp4")))
