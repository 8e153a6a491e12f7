"""Every way to remove single weights, end to end: the same bytes on any number of ranks, the target met, what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.launches import run_job, run_warm, settings
from helpers.method_runs import METHODS
from helpers.tensors import load_tensors, same_tensors
from stun.checkpoint.reader import Checkpoint
from stun.model.architecture import Architecture

pytestmark = pytest.mark.ranks
FEW = ("owl", "sparsegpt", "reconstruct", "everything", "2:4 wanda")  # of the families with biases, fused experts, groups


@pytest.mark.slow
@pytest.mark.parametrize("family, names", [("arctic", METHODS), ("gpt_oss", FEW), ("deepseek_v3", FEW)])
def test_same_bytes_on_any_number_of_ranks(checkpoint, tmp_path, family, names):
    few = {"num_hidden_layers": 2} if family == "arctic" else {}
    source = checkpoint(family, dtype=torch.bfloat16 if family == "gpt_oss" else torch.float32, **few)
    for ranks in (1, 2):
        run_warm(["-m", "helpers.method_runs", source, tmp_path / str(ranks), *names], ranks)
    plans = {}
    for name in names:
        how = METHODS[name]
        same_tensors(tmp_path / "1" / name / "model", tmp_path / "2" / name / "model")
        plans[name] = json.loads((tmp_path / "1" / name / "plan.json").read_text())
        summary = json.loads((tmp_path / "1" / name / "manifest.json").read_text())["summary"]
        if how.pattern:
            check_pattern(how.pattern, tmp_path / "1" / name / "model")
        else:
            assert abs(summary["sparsity"] - 0.5) < 1e-4, name
    if "sparsegpt blocked" in names:
        same_tensors(tmp_path / "1" / "sparsegpt" / "model", tmp_path / "1" / "sparsegpt blocked" / "model")
    uniform, by_layer = plans["reconstruct"], plans["owl"]
    assert {layer["ratio"] for layer in uniform["layers"]} == {None}
    assert len({layer["ratio"] for layer in by_layer["layers"]}) > 1


def check_pattern(pattern: str, folder) -> None:
    """Every group of inputs of every matrix holds as few non-zeros as the pattern allows, and of the whole just as many."""
    keep, of = map(int, pattern.split(":"))
    arch, tensors = Architecture(Checkpoint.open(folder)), load_tensors(folder)
    matrices = [tensors[name] for layout in arch.layers for name in layout.linears]
    for layout in arch.layers:
        for expert in range(layout.num_experts):
            for names in layout.experts[expert].values():
                own = [tensors[name][expert] if layout.fused else tensors[name] for name in names]
                matrices += [t.T if layout.is_transposed else t for t in own if t.dim() > 1]
    for matrix in matrices:
        kept = (matrix.reshape(-1, of) != 0).sum(1)
        assert (kept <= keep).all() and kept.float().mean() > 0.99 * keep


def test_ratios_from_a_file_and_from_a_plan(checkpoint, tmp_path):
    source, file = checkpoint("mixtral"), tmp_path / "ratios.json"
    file.write_text("[0.2, 0.5, 0.35]")
    run_job("prune", settings(source, tmp_path / "file", sparsify__ratios=file), 2)
    plan = json.loads((tmp_path / "file" / "plan.json").read_text())
    ratios = [layer["ratio"] for layer in plan["layers"]]
    assert ratios[1] - ratios[0] == pytest.approx(0.3) and ratios[2] - ratios[0] == pytest.approx(0.15)
    run_job("prune", settings(source, tmp_path / "plan", plan=tmp_path / "file" / "plan.json"), 1)
    same_tensors(tmp_path / "file" / "model", tmp_path / "plan" / "model")
