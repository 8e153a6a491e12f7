"""The job end to end: the same bytes on any number of ranks, every byte read once, the target met, launchers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import stun  # noqa: F401
from helpers.launches import run_job, settings
from helpers.paths import ROOT
from helpers.tensors import load_tensors, same_tensors

pytestmark = pytest.mark.ranks
HETEROGENEOUS = {"experts__budget": "global", "experts__fraction": 0.7}


@pytest.mark.parametrize(
    "family, overrides",
    [
        ("arctic", {}),
        ("arctic", HETEROGENEOUS),
        ("mixtral", {"experts__method": "stun_official"}),
        ("qwen3_moe", {}),
    ],
    ids=["arctic", "arctic-global", "mixtral-official", "qwen3_moe"],
)
def test_same_bytes_on_1_2_4_ranks(checkpoint, tmp_path, family, overrides):
    source = checkpoint(family)
    plans, read = [], []
    for ranks in (1, 2, 4):
        run_job("prune", settings(source, tmp_path / str(ranks), **overrides), ranks)
        plans.append(json.loads((tmp_path / str(ranks) / "plan.json").read_text()))
        read.append(json.loads((tmp_path / str(ranks) / "manifest.json").read_text())["summary"]["bytes_read"])
        if ranks > 1:
            same_tensors(tmp_path / "1" / "model", tmp_path / str(ranks) / "model")
    assert plans[0] == plans[1] == plans[2]
    assert [len(r) for r in read] == [1, 2, 4] and sum(read[0]) == sum(read[1]) == sum(read[2])
    _check_written(tmp_path / "1", read[2], source)


def _check_written(run, read, source):
    """The target is met in the written files, the config holds one right count, and the checkpoint loads and runs."""
    plan = json.loads((run / "plan.json").read_text())
    tensors, dense = load_tensors(run / "model"), load_tensors(source)
    inside = [t for name, t in dense.items() if ".layers." in name]
    total = sum(t.numel() for t in inside)
    nonzero = sum(int(t.count_nonzero()) for name, t in tensors.items() if ".layers." in name)
    assert total == plan["parameters"]
    assert abs((1 - nonzero / total) - 0.4) < 1e-4
    assert any(len(layer["kept"]) < layer["experts"] for layer in plan["layers"])
    config = AutoConfig.from_pretrained(run / "model")
    keys = {"num_experts", "num_local_experts"} & json.loads((run / "model" / "config.json").read_text()).keys()
    assert len(keys) == 1
    counts = [len(layer["kept"]) for layer in plan["layers"]]
    saved = getattr(config, keys.pop())
    assert saved == counts if isinstance(saved, list) else {saved} == set(counts) - {0}
    model, info = AutoModelForCausalLM.from_pretrained(run / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.isfinite(model(torch.arange(3, 40)[None]).logits).all()
    size = sum(t.nbytes for t in dense.values())
    outside = sum(t.nbytes for name, t in dense.items() if ".layers." not in name and "embed_tokens" not in name)
    # One reading a stream; the first does not need the head, nor the second the experts that have left by then.
    assert sum(read) == 2 * size - outside - sum(dense[name].nbytes for name in _left_by_plan(plan, dense))
    assert max(read) < 0.6 * sum(read)


def _left_by_plan(plan, dense) -> list[str]:
    """Tensors of the experts whose weights decided nothing in the second stream: it was known before who stays."""
    left = []
    for number, layer in enumerate(plan["layers"]):
        gone = set() if layer["nearest"] or layer["mean"] else set(range(layer["experts"])) - set(layer["kept"])
        left += [name for name in dense for e in gone if f".layers.{number}." in name and f".experts.{e}." in name]
    return left


@pytest.mark.parametrize("family", ["arctic", "gpt_oss", "qwen3_moe"])
def test_nothing_to_prune_writes_the_source(checkpoint, tmp_path, family):
    source = checkpoint(family, dtype=torch.bfloat16)
    run_job("prune", settings(source, tmp_path / "run", target=0), 2)
    same_tensors(source, tmp_path / "run" / "model")
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "run/model/config.json").read_text())
    for extra in ("tokenizer.json", "generation_config.json"):
        assert (source / extra).read_bytes() == (tmp_path / "run/model" / extra).read_bytes()


def test_more_ranks_than_experts_bf16_tied_single_file(checkpoint, tmp_path):
    source = checkpoint("mixtral", dtype=torch.bfloat16, shard="1GB", tie_word_embeddings=True, num_local_experts=3)
    assert (source / "model.safetensors").is_file() and "lm_head.weight" not in load_tensors(source)
    for ranks in (1, 4):
        run_job("prune", settings(source, tmp_path / str(ranks), calibration__samples=3, calibration__micro_batch=2), ranks)
    same_tensors(tmp_path / "1" / "model", tmp_path / "4" / "model")
    assert {len(layer["kept"]) for layer in json.loads((tmp_path / "1" / "plan.json").read_text())["layers"]} == {2}


@pytest.mark.slow
def test_every_launcher_and_repeat(checkpoint, tmp_path):
    source = checkpoint("mixtral")
    script = [sys.executable, "-m"]
    arguments = lambda name: ["jobs.prune", *settings(source, tmp_path / name)]  # noqa: E731
    commands = {
        "torchrun": [*script, "torch.distributed.run", "--nproc-per-node=2", "-m", *arguments("torchrun")],
        "accelerate": [
            *script, "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
            "--dynamo_backend=no", "-m", *arguments("accelerate"),
        ],
        "deepspeed": [
            *script, "deepspeed.launcher.runner", "--num_gpus=2", "--master_port=29731", "--module", *arguments("deepspeed"),
        ],
    }  # fmt: skip
    run_job("prune", settings(source, tmp_path / "plain"))
    for name, command in commands.items():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (name, done.stdout, done.stderr)
        same_tensors(tmp_path / "plain" / "model", tmp_path / name / "model")
    before = (tmp_path / "plain" / "manifest.json").read_bytes()
    again = run_job("prune", settings(source, tmp_path / "plain"))
    assert "complete already\n" in again.stdout and (tmp_path / "plain" / "manifest.json").read_bytes() == before
    shutil.rmtree(tmp_path / "plain" / "model")
    assert "complete already, but its checkpoint is no longer in" in run_job("prune", settings(source, tmp_path / "plain")).stdout
