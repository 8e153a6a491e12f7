"""A quantised checkpoint is written as it is stored: what is kept has the source's bytes, what is removed the code of zero."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from helpers.family_runs import CALIBRATION
from helpers.quantised import FORMS, gpt_oss, quantised
from helpers.selections import config
from helpers.tensors import load_tensors
from stun.checkpoint.reader import Checkpoint
from stun.config import ExpertsConfig, ExpertsMethod, OutputConfig, OutputFormat, Score, SparsifyConfig, SparsifyMethod, StunError
from stun.planning.budget import model_bytes
from stun.planning.job import resolve_model
from stun.preflight.traffic import bytes_read
from stun.pruning.job import prune
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
    assert model_bytes(job.arch, job.plan, job.cfg.experts) == summary["bytes_written"]
    estimate = sum(sum(read) for read in bytes_read(job, 1).values())
    assert estimate == pytest.approx(sum(summary["bytes_read"]), rel=0.01)
    (form,) = job.arch.source.formats
    said = f"{form}, {job.arch.source.bits:.3g} bits a weight, as in the source"
    assert f"Weights are stored as {said}." in (folder / "README.md").read_text()
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
    source, wanda = quantised(tmp_path / "source", form), SparsifyConfig(method=SparsifyMethod.wanda)
    asked = {"experts": replace(RANKED, keep=None, fraction=0.5), "target": 0.4, "sparsify": wanda}
    folder, kept, summary = pruned(source, tmp_path / "run", ranks, **asked)
    plain, _, _ = pruned(source, tmp_path / "plain", ranks, **asked, output=BFLOAT16)
    own = 1e-3 if form == "nvfp4" else 1e-4  # one of its sixteen codes is zero, also in matrices that lose no weight
    assert -1e-4 < summary["sparsity"] - 0.4 < own
    before, after = load_tensors(source), load_tensors(folder)
    read, exact = Checkpoint.open(folder), load_tensors(plain)
    assert read.tensors.keys() == exact.keys() and all(torch.equal(read.read(name), exact[name]) for name in exact)
    differ = {name for name in after if "gate." not in name and not same_bytes(after[name], before[origin(name, kept)])}
    assert differ and all(re.search(r"\.weight(_packed)?$", name) for name in differ), "no scale has changed"


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
        assert same_bytes(tensor, before[name][kept[int(layer[1])]] if layer else before[name]), name
    same, _, _ = pruned(source, tmp_path / "same", ranks, ExpertsConfig(), target=0.0)
    assert all(same_bytes(tensor, before[name]) for name, tensor in load_tensors(same).items())
    wanda = SparsifyConfig(method=SparsifyMethod.wanda)
    masked, _, summary = pruned(source, tmp_path / "masked", ranks, ExpertsConfig(fraction=0.0), 0.3, sparsify=wanda)
    assert abs(summary["sparsity"] - 0.3) < 1e-4
    differ = {name.rpartition("_")[2] for name, tensor in load_tensors(masked).items() if not same_bytes(tensor, before[name])}
    assert "blocks" in differ and "scales" not in differ


CHANGES = {
    "experts.refit=true": {"experts": replace(RANKED, refit=True)},
    "sparsify.method=alps": {"target": 0.6, "sparsify": SparsifyConfig(method=SparsifyMethod.alps)},
    "sparsify.method=sparsegpt": {"target": 0.6, "sparsify": SparsifyConfig(method=SparsifyMethod.sparsegpt)},
    "sparsify.reconstruct=true": {"target": 0.6, "sparsify": SparsifyConfig(reconstruct=True)},
    "experts.kappa=6": {"experts": ExpertsConfig(keep=6, kappa=6)},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return quantised(tmp_path_factory.mktemp("int4"), "int4")


@pytest.mark.parametrize("setting", CHANGES)
def test_what_changes_weights_cannot_keep_the_form(tmp_path, source, setting):
    """... so that it is refused where the form is asked for, and else the form goes, or a refit that is not needed."""
    changes = {"experts": RANKED, "target": None, **CHANGES[setting]}
    target, experts = changes.pop("target"), changes.pop("experts")
    with pytest.raises(StunError, match=rf"output.format=source: {setting}: .*or output.format=bfloat16"):
        resolve_model(config(source, tmp_path, target, experts, output=SOURCE, **changes))
    job = resolve_model(config(source, tmp_path, target, experts, **changes))
    if setting == "experts.refit=true":
        assert job.keeps_form and not job.refits and "copied as stored; experts.refit is off" in job.form_note
    else:
        assert not job.keeps_form and f"written in bfloat16, 2.6 times the bytes, since {setting}" in job.form_note
    assert resolve_model(config(source, tmp_path, target, experts, output=BFLOAT16, **changes)).cfg.output == BFLOAT16


def test_a_pattern_that_picks_experts_by_number(tmp_path):
    """... is refused where its experts get other numbers."""
    folder = quantised(tmp_path / "source", "int4")
    with_settings(folder, lambda settings: settings.update(ignore=[r"re:.*experts\.(0|1)\..*"]))
    with pytest.raises(StunError, match=r"quantization_config: re:.*a pattern that picks experts by number"):
        resolve_model(config(folder, tmp_path, None, RANKED))
    assert not resolve_model(config(folder, tmp_path, None, RANKED, output=BFLOAT16)).keeps_form


def test_a_plain_source_cannot_be_dequantised(tmp_path, checkpoint):
    with pytest.raises(StunError, match=r"output.format=bfloat16: the source is not quantised"):
        resolve_model(config(checkpoint("mixtral"), tmp_path, 0.3, output=BFLOAT16))
