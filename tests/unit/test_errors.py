"""Bad input ends in one clear error before any work starts and before anything is written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from helpers.launches import run_job, run_warm, settings
from helpers.paths import TEXT
from helpers.tensors import load_tensors
from stun.config import CalibrationConfig, ExpertsConfig, ModelConfig, PruneConfig, Scope, SparsifyConfig, StunError
from stun.pruning.job import prune


def no_safetensors(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def pickled(folder):
    no_safetensors(folder)
    torch.save({"weight": torch.ones(2)}, folder / "pytorch_model.bin")


def missing_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def truncated_shard(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def truncated_header(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:20])


def empty_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].write_bytes(b"")


def edit_json(name, edit):
    def change(folder):
        content = json.loads((folder / name).read_text())
        edit(content)
        (folder / name).write_text(json.dumps(content))

    return change


def outside(index):
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"


def phantom(index):
    index["weight_map"]["model.phantom"] = next(iter(index["weight_map"].values()))


def index_without_expert(index):
    for name in [n for n in index["weight_map"] if ".layers.1." in n and ".experts.3.w2" in n]:
        del index["weight_map"][name]


def index_without_norm(index):
    for name in [n for n in index["weight_map"] if "layers.0.input_layernorm" in n]:
        del index["weight_map"][name]


CHECKPOINTS = {
    "no safetensors": (no_safetensors, "holds neither"),
    "pickle": (pickled, r"pytorch_model\.bin.*save_pretrained"),
    "missing shard": (missing_shard, r"model-00002-of-\d+\.safetensors: missing"),
    "truncated shard": (truncated_shard, r"model-00002-of-\d+\.safetensors: truncated"),
    "truncated header": (truncated_header, "truncated"),
    "empty shard": (empty_shard, "truncated"),
    "index outside": (edit_json("model.safetensors.index.json", outside), r"\.\./elsewhere"),
    "index names a phantom": (edit_json("model.safetensors.index.json", phantom), "model.phantom; it does not"),
    "expert tensor missing": (edit_json("model.safetensors.index.json", index_without_expert), "layer 1, expert 3.*down_proj"),
    "norm missing": (edit_json("model.safetensors.index.json", index_without_norm), "layer 0: no tensor for input_layernorm"),
    "unknown architecture": (
        edit_json("config.json", lambda c: c.update(model_type="gpt2")),
        "gpt2.*is not supported.*no decoder layers",
    ),
    "family whose experts cannot be seen": (edit_json("config.json", lambda c: c.update(model_type="dbrx")), "dbrx.*observed"),
    "family whose gate scales inputs": (edit_json("config.json", lambda c: c.update(model_type="llama4")), "llama4.*input"),
    "quantised": (edit_json("config.json", lambda c: c.update(quantization_config={"bits": 4})), "quantised"),
    "wrong expert count": (edit_json("config.json", lambda c: c.update(num_local_experts=9)), "holds 8 experts.*9"),
    "wrong width": (edit_json("config.json", lambda c: c.update(hidden_size=64)), "config.json asks for|must be"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "JSON object"),
    "index is not JSON": (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "cannot be read as JSON"),
}


def config(folder, tmp_path, **changes) -> PruneConfig:
    calibration = CalibrationConfig(path=str(TEXT), samples=4, length=32, micro_batch=2)
    base = {"model": ModelConfig(str(folder)), "calibration": calibration, "target": 0.4, "run_dir": str(tmp_path / "run")}
    return PruneConfig(**{**base, **changes})


def refused(cfg, ranks, tmp_path, message):
    with pytest.raises(StunError, match=message) as caught:
        prune(cfg, ranks)
    assert "\n" not in str(caught.value).split("transformers cannot")[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_hostile_checkpoint(checkpoint, ranks, tmp_path, name):
    damage, message = CHECKPOINTS[name]
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("mixtral"), folder)
    damage(folder)
    refused(config(folder, tmp_path), ranks, tmp_path, message)


def text_file(tmp_path, content: str, name="text.jsonl") -> str:
    (tmp_path / name).write_text(content)
    return str(tmp_path / name)


REQUESTS = {
    "target above 1": ({"target": 1.2}, r"target=1\.2.*\[0, 1\)"),
    "fraction above 1": ({"experts": ExpertsConfig(fraction=1.5)}, r"experts\.fraction=1\.5"),
    "no samples": ({"calibration": CalibrationConfig(path=str(TEXT), samples=0)}, r"calibration\.samples=0"),
    "unreachable": ({"target": 0.9, "sparsify": SparsifyConfig(scope=[Scope.attention])}, r"at most 0\.\d+"),
    "fewer than top-k": ({"target": 0.9, "experts": ExpertsConfig(fraction=1.0)}, r"top-k 2.*Lower experts\.fraction to 0\.\d+"),
    "model is no folder": ({"model": ModelConfig("/nowhere/at/all")}, "not a folder"),
    "calibration missing": ({"calibration": CalibrationConfig(path="/no/such.jsonl")}, "no such file"),
    "calibration of unknown kind": ({"calibration": CalibrationConfig(path=__file__)}, "unknown file type"),
    "unknown field": ({"calibration": CalibrationConfig(path=str(TEXT), field="body")}, "body.*fields.*text"),
    "field is a number": ({"calibration": ('{"text": 3}\n', {})}, "row 0.*int"),
    "empty file": ({"calibration": ("", {})}, "empty"),
    "empty text": ({"calibration": ('{"text": ""}\n{"text": "  "}\n', {})}, "no text"),
    "too little text": ({"calibration": ('{"text": "few words"}\n', {})}, "10 tokens.*need 128"),
    "not JSON": ({"calibration": ('{"text\n', {})}, "datasets cannot load"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_impossible_request(checkpoint, ranks, tmp_path, name):
    changes, message = REQUESTS[name]
    content = changes.get("calibration")
    if isinstance(content, tuple):
        path = text_file(tmp_path, content[0])
        changes = {"calibration": CalibrationConfig(path=path, samples=4, length=32)}
    refused(config(checkpoint("mixtral"), tmp_path, **changes), ranks, tmp_path, message)


def test_folder_that_holds_something_else(checkpoint, ranks, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(StunError, match="holds something else"):
        prune(config(checkpoint("mixtral"), tmp_path), ranks)
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StunError, match="is a file"):
        prune(config(checkpoint("mixtral"), tmp_path, run_dir=str(tmp_path / "file")), ranks)


def test_another_run_is_not_overwritten(checkpoint, ranks, tmp_path):
    prune(config(checkpoint("mixtral"), tmp_path), ranks)
    before = load_tensors(tmp_path / "run" / "model")
    with pytest.raises(StunError, match=r"config\.target: 0\.4 there, 0\.3 now"):
        prune(config(checkpoint("mixtral"), tmp_path, target=0.3), ranks)
    after = load_tensors(tmp_path / "run" / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_non_finite_weights_stop_the_run(checkpoint, ranks, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("mixtral", shard="1GB"), folder)
    tensors = load_tensors(folder)
    tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StunError, match="layer 1"):
        prune(config(folder, tmp_path), ranks)
    assert not (tmp_path / "run" / "manifest.json").exists()
    assert not (tmp_path / "run" / "model" / "model.safetensors.index.json").exists()


@pytest.mark.ranks
def test_on_the_command_line(checkpoint, tmp_path):
    """Errors of the configuration and of the library, on one and on several ranks: one line, status 2, nothing written."""
    whole = settings(checkpoint("mixtral"), tmp_path / "run")
    cases = [
        (whole[:-1], "run_dir: is needed", 0),
        ([word for word in whole if not word.startswith("target=")], "target: how much shall be removed?", 0),
        ([*whole, "target=0.999"], "target=0.999: ", 2),
        ([*whole, "target=2"], "target=2.0: total sparsity", 4),
        ([*whole, "experts.fractoin=0.2"], "experts.fractoin: no such setting; did you mean experts.fraction?", 2),
        ([*whole, "calibration.samples=few"], "calibration.samples: Value 'few' of type", 2),
        ([*whole, "model.path=/nowhere"], "model.path=/nowhere: not a folder", 2),
        ([*whole, "calibration.path=/nowhere.jsonl"], "calibration.path=/nowhere.jsonl: no such file", 2),
        ([*whole, "calibration=none"], "calibration=none: must be one of reference", 0),
    ]
    for arguments, says, ranks in cases:
        done = run_job("prune", arguments, ranks, check=False)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and line.startswith("error: ") and says in line, line
    assert not (tmp_path / "run").exists()


@pytest.mark.ranks
def test_on_one_rank_alone(checkpoint, tmp_path):
    """Before the first layer, where the first rank waits for the others: that rank says so, once nobody has ended it."""
    script, arguments = tmp_path / "script.py", settings(checkpoint("mixtral"), tmp_path / "run")
    lines = [
        "import os, runpy, sys, jobs",
        "jobs.ALIKE = 1.0",
        "if os.environ['RANK'] == '1': sys.argv.append('model.path=/nowhere')",
    ]
    script.write_text("\n".join([*lines, "runpy.run_module('jobs.prune', run_name='__main__', alter_sys=True)"]))
    done = run_warm([script, *arguments], 2, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    (line,) = errors
    assert line.startswith("error: rank 1, before the first layer: model.path=/nowhere: not a folder")


@pytest.mark.slow
def test_an_error_has_no_place_in_the_run_before(checkpoint, tmp_path):
    done = run_job("prune", ["-m", *settings(checkpoint("mixtral"), tmp_path / "sweep", target="0.4,0.999")], check=False)
    assert "prune 03/3" in done.stdout and done.stderr.startswith("error: target=0.999: ")


@pytest.mark.parametrize(
    "how, target, says",
    [
        ({"ratios": "RATIOS"}, 0.4, "a list of 3 numbers"),
        ({"ratios": "nowhere.json"}, 0.4, r"sparsify\.ratios=nowhere\.json"),
        ({"pattern": "2:4"}, 0.3, "alone removes"),
        ({"pattern": "2:5"}, 0.7, "not a multiple of 5"),
        ({"pattern": "2:4"}, 0.98, "Lower target"),
        ({"pattern": "4:2"}, 0.6, r"sparsify\.pattern=4:2"),
        ({"pattern": "half"}, 0.6, r"sparsify\.pattern=half"),
        ({"pattern": "2:4", "ratios": "owl"}, 0.6, "keep ratios uniform"),
        ({"spread": 0.7}, 0.4, r"sparsify\.spread"),
        ({"outlier": 0.0}, 0.4, r"sparsify\.outlier"),
        ({"gram_gib": 0.0}, 0.4, r"sparsify\.gram_gib"),
    ],
)
def test_impossible_weights(checkpoint, ranks, tmp_path, how, target, says):
    (tmp_path / "ratios.json").write_text("[0.2, 0.5]")
    how = {key: str(tmp_path / "ratios.json") if value == "RATIOS" else value for key, value in how.items()}
    model, text = ModelConfig(str(checkpoint("mixtral"))), CalibrationConfig(path=str(TEXT), samples=4, length=32)
    cfg = PruneConfig(model, text, sparsify=SparsifyConfig(**how), target=target, run_dir=str(tmp_path / "run"))
    with pytest.raises(StunError, match=says):
        prune(cfg, ranks)
    assert not (tmp_path / "run").exists()
