"""The masks of the job against the same formulas on what the full model in memory sees."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from helpers.naive import ARCTIC_SEQUENTIAL, captured, naive_inner, oriented, small_run, tokens_of
from helpers.tensors import load_tensors
from helpers.zoo import FAMILIES, make_checkpoint
from stun.checkpoint.reader import Checkpoint
from stun.config import Scope, SparsifyConfig, SparsifyMethod, StunError
from stun.model.architecture import Architecture
from stun.model.layer_layout import renumber
from stun.model.tensor_names import experts_of
from stun.planning.budget import LayerQuota, layer_quotas, measure_layers
from stun.planning.plan import LayerPlan, Plan
from stun.pruning.job import prune
from stun.sparsify.matrix import sparsify

WAYS = {
    "wanda": SparsifyConfig(),
    "moe_pruner": SparsifyConfig(method=SparsifyMethod.moe_pruner),
    "sparsegpt": SparsifyConfig(method=SparsifyMethod.sparsegpt),
    "2:4 alps": SparsifyConfig(method=SparsifyMethod.alps, pattern="2:4"),
}
CASES = [
    *(("wanda", family, {}) for family in FAMILIES),
    ("wanda", "arctic", ARCTIC_SEQUENTIAL),
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
    sizes, kept = measure_layers(arch, list(Scope)), [layer["kept"] for layer in plan["layers"]]
    written, source, tokens = load_tensors(tmp_path / "run" / "model"), load_tensors(folder), tokens_of(folder)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32, experts_implementation="eager")
    copy_dense_weights(model, arch, source, kept)
    for layout, layer, quota in zip(arch.layers, model.base_model.layers, quotas_of(plan, sizes), strict=True):
        found = experts_of(layer)
        modules = {name: layer.get_submodule(layout.dense[name].removesuffix(".weight")) for name in quota.dense}
        seen = captured(model, modules | ({"experts": found[1]} if found else {}), tokens)
        for name, module in modules.items():
            inputs = torch.cat([args[0].flatten(0, -2) for args, _ in seen[name]])
            check_matrix(how, module.weight.data, inputs, quota.dense[name], written[name])
        if found:
            check_experts(how, layout, found[1], quota, seen["experts"], written, kept[layout.index])


def quotas_of(plan: dict, sizes) -> list[LayerQuota]:
    """What the job was to remove, from its plan.json."""
    layers = [LayerPlan(**entry) for entry in plan["layers"]]
    return layer_quotas(
        sizes, Plan(plan["target"], plan["parameters"], plan["dropped"], plan["zeros"], plan["scope_size"], layers)
    )


def check_matrix(how: SparsifyConfig, weight, inputs, count: int, written) -> None:
    """Prune `weight` in place by all its inputs at once, find it as written, and go on with what was written."""
    moment = inputs.T @ inputs if how.reads_grams else inputs.double().square().sum(0)
    weight.copy_(sparsify(how, weight, moment, count, "matrix"))
    if how.reads_grams:  # the sums differ in their last bits, which can decide between two weights
        assert ((weight == 0) == (written == 0)).float().mean() > 0.99 and int((written == 0).sum()) == int((weight == 0).sum())
        assert (weight - written).norm() < 0.1 * written.norm()
        weight.copy_(written)
    assert torch.equal(weight, written)


def copy_dense_weights(model, arch, source, kept) -> None:
    """Undo the masks: every surviving weight back to its source value."""
    for layout, layer in zip(arch.layers, model.base_model.layers, strict=True):
        inside_layer = layer.state_dict()
        for name, inside in layout.dense.items():
            survivors = torch.tensor(kept[layout.index])
            value = source[name].index_select(layout.routed[name], survivors) if name in layout.routed else source[name]
            inside_layer[inside].copy_(value)
        if layout.experts:
            module = experts_of(layer)[1]
            for number, expert in enumerate(kept[layout.index]):
                for part in layout.experts[expert]:
                    getattr(module, part).data[number] = stored(layout, source, expert, expert, part)


def stored(layout, tensors, expert: int, number: int, part: str) -> torch.Tensor:
    """A part of what was expert `expert` of the source, from a checkpoint in which it is number `number`."""
    names = layout.experts[expert][part]
    if part in layout.fused:
        return tensors[names[0]][number]
    return torch.cat([tensors[renumber(name, number)] for name in names])


def check_experts(how: SparsifyConfig, layout, module, quota, calls, written, kept) -> None:
    for number, expert in enumerate(kept):
        inputs = [
            (x, gates[chosen.index(number)])
            for (hidden, index, weights), _ in calls
            for x, chosen, gates in zip(hidden.view(len(index), -1), index.tolist(), weights.float(), strict=True)
            if number in chosen
        ]
        assert inputs, "every survivor must see a token here"
        inner = [(naive_inner(module, number, x), gate) for x, gate in inputs]
        gated = how.method is SparsifyMethod.moe_pruner
        for part, rows in (("gate_up_proj", inputs), ("down_proj", inner)):
            weight = oriented(module, getattr(module, part).data[number])
            seen = torch.stack([x * gate if gated else x for x, gate in rows])
            own = stored(layout, written, expert, number, part)
            check_matrix(how, weight, seen, quota.experts[number][part], oriented(module, own))


STARVED = {
    "wanda": SparsifyConfig(),
    "sparsegpt": SparsifyConfig(method=SparsifyMethod.sparsegpt, reconstruct=True),
    "owl": SparsifyConfig(ratios="owl"),
}


@pytest.mark.parametrize("way", STARVED)
def test_expert_without_tokens_falls_back_to_the_pool(ranks, tmp_path, way):
    """A router row that can never win: the expert is pruned to the same sparsity, by the layer's pooled input norms."""
    folder = tmp_path / "model"
    make_checkpoint(folder, "mixtral", num_hidden_layers=1, tie_word_embeddings=False, shard="1GB")
    tensors = load_tensors(folder)
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    direction = tensors[gate][0].clone()
    tensors[gate][[0, 1]], tensors[gate][[2, 3]] = 9 * direction, -9 * direction  # for any token, two of these beat a small row
    tensors[gate][5] *= 1e-6
    tensors["model.layers.0.block_sparse_moe.experts.5.w2.weight"].fill_(0.5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
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
