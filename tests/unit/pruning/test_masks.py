"""The masks of the job against the same formulas on what the full model in memory sees."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from helpers.masks import check_masks
from helpers.naive import ARCTIC_SEQUENTIAL, small_run, tokens_of
from helpers.tensors import load_tensors
from helpers.zoo import FAMILIES, make_checkpoint
from stun.checkpoint.reader import Checkpoint
from stun.config import Scope, SparsifyConfig, SparsifyMethod, StunError
from stun.model.architecture import Architecture
from stun.model.tensor_names import experts_of
from stun.planning.budget import measure_layers
from stun.pruning.job import prune

WAYS = {
    "wanda": SparsifyConfig(),
    "moe_pruner": SparsifyConfig(method=SparsifyMethod.moe_pruner),
    "sparsegpt": SparsifyConfig(method=SparsifyMethod.sparsegpt),
    "2:4 alps": SparsifyConfig(method=SparsifyMethod.alps, pattern="2:4"),
}
CASES = [
    ("wanda", "arctic", ARCTIC_SEQUENTIAL),  # by Wanda, other families in runs/test_families.py
    *((way, family, {}) for way in WAYS if way != "wanda" for family in ("arctic", "gpt_oss")),
]


@pytest.mark.parametrize("way, family, changes", CASES, ids=[f"{w}-{f}{'-sequential' if c else ''}" for w, f, c in CASES])
def test_masks_equal_those_in_memory(checkpoint, ranks, tmp_path, way, family, changes):
    folder, how = checkpoint(family, **changes), WAYS[way]
    cfg = small_run(folder, tmp_path / "run", samples=5, length=40, fraction=0.5, target=0.6 if how.pattern else 0.45)
    cfg.sparsify = how
    prune(cfg, ranks)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    arch = Architecture(Checkpoint.open(folder))
    written = load_tensors(tmp_path / "run" / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32, experts_implementation="eager")
    sizes, source = measure_layers(arch, list(Scope)), load_tensors(folder)
    check_masks(how, arch, model.base_model, plan, sizes, source, written, tokens_of(folder))


STARVED = {
    "wanda": SparsifyConfig(),
    "sparsegpt": SparsifyConfig(method=SparsifyMethod.sparsegpt, reconstruct=True),
    "owl": SparsifyConfig(ratios="owl"),
}


def starved(folder, expert: int):
    """A checkpoint of one layer in which a router row can never win."""
    make_checkpoint(folder, "mixtral", num_hidden_layers=1, tie_word_embeddings=False, shard="1GB")
    tensors = load_tensors(folder)
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    direction = tensors[gate][0].clone()
    tensors[gate][[0, 1]], tensors[gate][[2, 3]] = 9 * direction, -9 * direction  # for any token, two of these beat a small row
    tensors[gate][expert] *= 1e-6
    tensors[f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"].fill_(0.5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("way", ["wanda", "sparsegpt"])
def test_an_expert_without_tokens_loses_the_only_weight(ranks, tmp_path, way):
    """No other expert's inputs are measured, which could stand in for its own."""
    folder = starved(tmp_path / "model", 7)
    arch = Architecture(Checkpoint.open(folder))
    target = 1.2 / sum(arch.parameters_of(layout) for layout in arch.layers)
    cfg = small_run(folder, tmp_path / "run", samples=4, length=32, fraction=0.0, target=target)
    cfg.sparsify = replace(STARVED[way], scope=[Scope.experts])
    summary = prune(cfg, ranks)
    assert summary["experts_without_tokens"] == 1 and 0 < summary["sparsity"] <= target


@pytest.mark.parametrize("way", STARVED)
def test_expert_without_tokens_falls_back_to_the_pool(ranks, tmp_path, way):
    """A router row that can never win: the expert is pruned to the same sparsity, by the layer's pooled input norms."""
    folder = starved(tmp_path / "model", 5)
    cfg = small_run(folder, tmp_path / "run", samples=4, length=32, fraction=0.0, target=0.5)
    cfg.sparsify = STARVED[way]
    summary = prune(cfg, ranks)
    if not summary["experts_without_tokens"]:
        pytest.fail("the starved expert was reached; the test proves nothing")
    assert abs(summary["sparsity"] - 0.5) < 1e-4
    down = load_tensors(tmp_path / "run" / "model")["model.layers.0.block_sparse_moe.experts.5.w2.weight"]
    lost = (down == 0).all(0)
    assert lost.any() and not lost[: int(lost.sum())].all(), "columns follow the pooled norms, not their order"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["arctic", "qwen2_moe", "gpt_oss", "jamba"])
def test_reconstruction_lowers_the_error_of_blocks(checkpoint, ranks, tmp_path, family):
    """Attention and experts of the first layer against the unpruned layer on the same inputs: at no place worse, in sum
    better."""
    folder, errors = checkpoint(family), {}
    dense = blocks_of(folder, folder)
    for way in (False, True):
        cfg = small_run(folder, tmp_path / str(way), samples=5, length=40, fraction=0.0, target=0.6)
        cfg.sparsify = SparsifyConfig(reconstruct=way)
        prune(cfg, ranks)
        found = blocks_of(tmp_path / str(way) / "model", folder)
        errors[way] = {name: float((found[name] - dense[name]).norm()) for name in dense}
    assert len(dense) >= 2
    assert all(errors[True][name] <= errors[False][name] for name in dense), errors
    assert sum(errors[True].values()) < 0.97 * sum(errors[False].values()), errors


def blocks_of(folder, source) -> dict[str, torch.Tensor]:
    """What the token mixer and every MLP of the first layer that has experts give on the calibration text. Every block gets the
    inputs of the unpruned model."""
    models = [
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32, experts_implementation="eager") for f in (source, folder)
    ]
    number = next(i for i, layer in enumerate(models[0].base_model.layers) if experts_of(layer))
    names = [n for n, m in models[0].base_model.layers[number].named_children() if any(p.dim() > 1 for p in m.parameters())]
    found: dict[str, torch.Tensor] = {}

    def swapped(name):
        def hook(module, arguments, keywords, output):
            other = models[1].base_model.layers[number].get_submodule(name)
            again = other(*arguments, **keywords)
            found[name] = again[0] if isinstance(again, tuple) else again

        return hook

    for name in names:
        models[0].base_model.layers[number].get_submodule(name).register_forward_hook(swapped(name), with_kwargs=True)
    with torch.no_grad():
        models[0](tokens_of(source), use_cache=False)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_has_a_matrix_that_closes_it(checkpoint, family):
    """The output of every token mixer, MLP and shared expert comes out of a matrix that reconstruction refits."""
    arch = Architecture(Checkpoint.open(checkpoint(family)))
    for layout in arch.layers:
        blocks = {layout.dense[name].rsplit(".", 2)[0] for name in layout.linears}
        assert blocks == {layout.dense[name].rsplit(".", 2)[0] for name in layout.linears if layout.closes(name)}


def test_ratios_of_a_plan_move_with_its_target(checkpoint, ranks, tmp_path):
    """A plan whose layers have ratios, used for another target: all of them move, and nothing is removed whole."""
    first = small_run(checkpoint("mixtral"), tmp_path / "first", samples=4, length=32, fraction=0.3, target=0.3)
    first.sparsify = SparsifyConfig(ratios="owl")
    prune(first, ranks)
    again = small_run(checkpoint("mixtral"), tmp_path / "again", samples=4, length=32, fraction=0.3, target=0.6)
    again.plan = str(tmp_path / "first" / "plan.json")
    assert prune(again, ranks)["sparsity"] == pytest.approx(0.6, abs=1e-4)
    before, after = (
        [layer["ratio"] for layer in json.loads((tmp_path / name / "plan.json").read_text())["layers"]]
        for name in ("first", "again")
    )
    assert len(set(before)) == 3
    assert all(new - old == pytest.approx(after[0] - before[0]) for old, new in zip(before, after, strict=True))
    for name, tensor in load_tensors(tmp_path / "again" / "model").items():
        assert "proj" not in name or 0.3 < (tensor == 0).float().mean() < 0.8, name
    again.sparsify, again.run_dir = SparsifyConfig(pattern="2:4"), str(tmp_path / "no")
    with pytest.raises(StunError, match="has ratios"):
        prune(again, ranks)


@pytest.mark.parametrize("reconstruct", [False, True])
def test_a_sparse_source_meets_its_target(checkpoint, ranks, tmp_path, reconstruct):
    """Weights that are zero already are among those removed, and experts outside the scope stay as they are."""
    first = small_run(checkpoint("mixtral"), tmp_path / "first", samples=4, length=32, fraction=0.0, target=0.3)
    prune(first, ranks)
    second = small_run(tmp_path / "first" / "model", tmp_path / "second", samples=4, length=32, fraction=0.0, target=0.5)
    second.sparsify = SparsifyConfig(reconstruct=reconstruct)
    assert prune(second, ranks)["sparsity"] == pytest.approx(0.5, abs=1e-4)
    third = small_run(checkpoint("mixtral"), tmp_path / "third", samples=4, length=32, fraction=0.0, target=0.01)
    third.sparsify = SparsifyConfig(reconstruct=reconstruct, scope=[Scope.attention])
    prune(third, ranks)
    source, written = load_tensors(checkpoint("mixtral")), load_tensors(tmp_path / "third" / "model")
    assert all(torch.equal(source[name], written[name]) for name in source if ".experts." in name)
