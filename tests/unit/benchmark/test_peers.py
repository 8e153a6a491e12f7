"""The peers that pruning is compared with, each a process of its own on a tiny Qwen3-MoE."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from helpers.launches import environment
from helpers.paths import ROOT
from helpers.tensors import load_tensors
from stun.planning.experts.clusters import clusters_of, complete_linkage

pytestmark = pytest.mark.slow
EXPERTS, TARGET, MICRO_BATCH = 8, 0.4, 2


@pytest.fixture(scope="module")
def model(checkpoint) -> Path:
    return checkpoint("qwen3_moe")


@pytest.fixture(scope="module")
def tokens_BT() -> torch.Tensor:
    return torch.randint(3, 259, (5, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokens_file(tokens_BT, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"tokens": tokens_BT}, file)
    return file


def run_peer(script: str, *arguments: object, python: str = sys.executable) -> dict:
    """What a peer reports in its last line."""
    command = [python, ROOT / "stun" / "benchmark" / "peers" / f"{script}.py", *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def zeros_of_rows(tensors: dict[str, torch.Tensor]) -> dict[tuple[int, int], set[int]]:
    """The numbers of zeros found in rows of so many columns of a layer, by (columns, layer)."""
    found: dict[tuple[int, int], set[int]] = {}
    for name, matrix in tensors.items():
        if name.endswith("_proj.weight"):
            counts = (matrix == 0).sum(1).tolist()
            found.setdefault((matrix.shape[1], int(name.split(".")[2])), set()).update(counts)
    return found


def test_forward_runs_all_tokens(model, tokens_file, tokens_BT):
    report = run_peer("forward", model, tokens_file, MICRO_BATCH, "float32")
    assert report["tokens"] == tokens_BT.numel() and report["dtype"] == "float32"
    assert (
        report["experts"] == min(report["tried"], key=report["tried"].get) and {"eager", "grouped_mm"} <= report["tried"].keys()
    )
    assert report["seconds"]["forward"] > 0
    assert report["peak_bytes"] > sum(tensor.nbytes for tensor in load_tensors(model).values())


@pytest.fixture(scope="module")
def naive(model, tokens_file, tmp_path_factory) -> tuple[dict, dict[str, torch.Tensor]]:
    """The report of a run, and what it has saved."""
    out = tmp_path_factory.mktemp("naive") / "model"
    return run_peer("naive", model, tokens_file, out, TARGET, 0.5, MICRO_BATCH), load_tensors(out)


def test_naive_meets_the_target(naive):
    report, tensors = naive
    assert report["dropped"] > 0 and report["experts"] == [EXPERTS - report["dropped"]] * 2
    for (columns, layer), counts in zeros_of_rows(tensors).items():
        assert counts == {int(columns * report["row_sparsity"])}, f"layer {layer}"
    rows = sum(matrix.shape[0] for name, matrix in tensors.items() if name.endswith("_proj.weight"))
    layers = {name: tensor for name, tensor in tensors.items() if ".layers." in name}
    assert report["zeros"] == sum(int((tensor == 0).sum()) for tensor in layers.values())
    before = sum(tensor.numel() for tensor in layers.values()) + report["dropped"] * 2 * (3 * 48 * 32 + 32)
    assert TARGET - rows / before < report["sparsity"] <= TARGET


def test_naive_keeps_one_expert_of_every_cluster(naive, model):
    report, tensors = naive
    source = load_tensors(model)
    for layer in (0, 2):
        router_ED = source[f"model.layers.{layer}.mlp.gate.weight"]
        kept_ED = tensors[f"model.layers.{layer}.mlp.gate.weight"]
        stays = [int((router_ED == row).all(1).nonzero()) for row in kept_ED]
        merges = complete_linkage(torch.cdist(router_ED.double(), router_ED.double()).numpy())
        for cluster in clusters_of(EXPERTS, merges[: report["dropped"]]):
            assert len(set(cluster) & set(stays)) == 1
        for new, old in enumerate(stays):
            for part in ("gate_proj", "up_proj", "down_proj"):
                name = f"model.layers.{layer}.mlp.experts.{{}}.{part}.weight"
                own, dense = tensors[name.format(new)], source[name.format(old)]
                assert torch.equal(own, torch.where(own == 0, 0, dense))


def wrongly_zeroed(tensors: dict[str, torch.Tensor], model: Path, tokens_BT: torch.Tensor, part: str, share: float) -> float:
    """Share of a matrix of the first layer's attention, whose inputs no pruning has changed, that Wanda would treat otherwise."""
    dense, squares = AutoModelForCausalLM.from_pretrained(model), []
    module = dense.get_submodule(f"model.layers.0.self_attn.{part}")
    module.register_forward_hook(lambda _, inputs, __: squares.append(inputs[0].square().sum((0, 1))))
    with torch.no_grad():
        dense.model(input_ids=tokens_BT)
        score_OI = module.weight.abs() * squares[0].sqrt()
    lowest = score_OI.argsort(1)[:, : int(score_OI.shape[1] * share)]
    zero_OI = torch.zeros_like(score_OI).scatter_(1, lowest, 1).bool()
    pruned_OI = tensors[f"model.layers.0.self_attn.{part}.weight"]
    return float(((pruned_OI == 0) != zero_OI).float().mean())


@pytest.mark.parametrize("part", ["q_proj", "o_proj"])
def test_naive_zeroes_the_lowest_scores(part, naive, model, tokens_BT):
    report, tensors = naive
    assert wrongly_zeroed(tensors, model, tokens_BT, part, report["row_sparsity"]) == 0


def test_naive_refuses_more_experts_than_routing_can_spare(model, tokens_file, tmp_path):
    with pytest.raises(AssertionError, match=r"cannot remove .* experts of a layer"):
        run_peer("naive", model, tokens_file, tmp_path, 0.8, 1, MICRO_BATCH)


@pytest.mark.skipif("LLMCOMPRESSOR_PYTHON" not in os.environ, reason="LLMCOMPRESSOR_PYTHON: an interpreter with llmcompressor")
def test_llmcompressor_prunes_experts_and_weights(model, tokens_file, tokens_BT, tmp_path):
    out, python = tmp_path / "model", os.environ["LLMCOMPRESSOR_PYTHON"]
    settings = ["reap+wanda", 0.5, 0.25, "--batch-size", MICRO_BATCH]
    report = run_peer("llmcompressor_run", model, tokens_file, out, *settings, python=python)
    assert report["experts"] == [6, 6] and report["seconds"].keys() == {"load", "reap", "wanda", "save"}
    tensors = load_tensors(out)
    for (columns, _), counts in zeros_of_rows(tensors).items():
        assert counts == {columns // 2}
    for part in ("q_proj", "o_proj"):
        assert wrongly_zeroed(tensors, model, tokens_BT, part, 0.5) < 0.01, "another kind of attention sums in another order"
