"""The stream against the full model in memory: hidden states, statistics, masks."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import TEXT, load_tensors
from safetensors.torch import save_file
from test_sparsify import naive_mask
from transformers import AutoModelForCausalLM
from zoo import FAMILIES, make_checkpoint

from stun.arch import Architecture
from stun.budget import layer_quotas, measure_layers
from stun.checkpoint import Checkpoint
from stun.config import CalibrationConfig, ExpertsConfig, ModelConfig, PruneConfig, Scope
from stun.data import calibration_samples, load_tokenizer
from stun.experts.distances import router_distance
from stun.layout import renumber
from stun.names import experts_of
from stun.passes import observe
from stun.prune import prune
from stun.sparsify.scores import wanda_scores
from stun.stats import COSINE_UNIT
from stun.stream import LayerStream, embed, even_owners

ARCTIC_SEQUENTIAL = {"moe_layer_frequency": 2, "parallel_attn_mlp_res": False, "num_experts_per_tok": 1}
CASES = [("arctic", {}), ("arctic", ARCTIC_SEQUENTIAL), ("mixtral", {}), ("qwen3_moe", {})]


def tokens_of(folder) -> torch.Tensor:
    cfg = CalibrationConfig(path=str(TEXT), samples=5, length=40, micro_batch=2)
    return calibration_samples(cfg, load_tokenizer(folder), 260).tokens_ST


def small_run(folder, run_dir, samples: int, length: int, fraction: float, target: float) -> PruneConfig:
    calibration = CalibrationConfig(path=str(TEXT), samples=samples, length=length, micro_batch=2)
    experts = ExpertsConfig(fraction=fraction)
    return PruneConfig(ModelConfig(str(folder)), calibration, experts, target=target, run_dir=str(run_dir))


def captured(model, modules: dict, tokens: torch.Tensor) -> dict[str, list]:
    """Inputs and outputs of `modules` while the full model runs the micro-batches of two samples."""
    seen: dict[str, list] = {name: [] for name in modules}
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: seen[name].append((args, out)))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        for batch in tokens.split(2):
            model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family, changes", CASES, ids=["arctic", "arctic-sequential", "mixtral", "qwen3_moe"])
def test_hidden_states_and_statistics(checkpoint, ranks, family, changes):
    folder = checkpoint(family, **changes)
    tokens = tokens_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    layers = {f"layer{i}": layer for i, layer in enumerate(model.model.layers)}
    experts = {f"experts{i}": found[1] for i, layer in enumerate(model.model.layers) if (found := experts_of(layer))}
    seen = captured(model, layers | experts, tokens)

    arch = Architecture(Checkpoint.open(folder))
    states = embed(arch, ranks, tokens.split(2), arch.source.read)
    stream = LayerStream(arch, ranks, arch.layers, [even_owners(x, 1) if x.experts else [] for x in arch.layers])
    for layer in stream:
        stream.build(layer)
        states = stream.run(layer, states)
        for mine, (_, full) in zip(states.hidden, seen[f"layer{layer.layout.index}"], strict=True):
            torch.testing.assert_close(mine, full, atol=2e-5, rtol=1e-5)

    collected: dict[int, dict] = {}
    observe(arch, embed(arch, ranks, tokens.split(2), arch.source.read), ranks, lambda i, s: collected.update({i: s}))
    assert collected.keys() == {int(name.removeprefix("experts")) for name in experts}
    for index, statistics in collected.items():
        module = experts[f"experts{index}"]
        expected = naive_statistics(module, seen[f"experts{index}"])
        compare_statistics(statistics, expected)
        routed = next(name for name in load_tensors(folder) if f"layers.{index}." in name and name.endswith("gate.weight"))
        assert torch.equal(statistics["router_distance"], router_distance(load_tensors(folder)[routed]))
        assert (statistics["powers"][0, :, 0, 0] > 0).sum() >= 5, "routing must reach most experts, or this proves nothing"


def compare_statistics(statistics, expected) -> None:
    """One calibration source's statistics against the naive ones."""
    assert torch.equal(statistics["coactivation"][0], expected["coactivation"])
    cosines = statistics["agreement"][0].double() / COSINE_UNIT
    torch.testing.assert_close(cosines, expected["agreement"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics["powers"][0], expected["powers"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics["peak"][0], expected["peak"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics["weights"], expected["weights"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def naive_statistics(module, calls) -> dict[str, torch.Tensor]:
    """Token by token; an expert's output is what transformers' own loop gives for this token and expert alone, with gate 1."""
    count, one = module.num_experts, torch.ones(1, 1)
    coactivation, agreement = torch.zeros(count, count, dtype=torch.int64), torch.zeros(count, count, dtype=torch.float64)
    powers, peak = torch.zeros(count, 3, 3, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for (hidden, index, weights), _ in calls:
        for x, chosen, gates in zip(hidden.view(len(index), -1), index.tolist(), weights.double().tolist(), strict=True):
            outputs = [module(x[None], torch.tensor([[expert]]), one)[0].double() for expert in chosen]
            for i, f in zip(chosen, outputs, strict=True):
                for j, other in zip(chosen, outputs, strict=True):
                    coactivation[i, j] += 1
                    agreement[i, j] += f @ other / (f.norm() * other.norm())
            for expert, gate, f in zip(chosen, gates, outputs, strict=True):
                norm = float(f.norm())
                powers[expert] += torch.tensor([[gate**a * norm**b for b in range(3)] for a in range(3)], dtype=torch.float64)
                peak[expert] = max(float(peak[expert]), norm)
    parts = [parameter.double().flatten(1) for parameter in module.parameters()]
    sums = [sum(part.abs().sum(1) for part in parts), sum(part.square().sum(1) for part in parts)]
    numbers = torch.full((count,), float(sum(part.shape[1] for part in parts)), dtype=torch.float64)
    weights = torch.stack([*sums, numbers], dim=1)
    return {"coactivation": coactivation, "agreement": agreement, "powers": powers, "peak": peak, "weights": weights}


def naive_inner(module, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What reaches an expert's second matrix."""
    gate_up = oriented(module, module.gate_up_proj[expert]) @ x
    if module.has_bias:
        gate_up = gate_up + module.gate_up_proj_bias[expert]
    return module._apply_gate(gate_up).detach()


def oriented(module, weight: torch.Tensor) -> torch.Tensor:
    """A view of a stored matrix with a row for each output."""
    return weight.T if module.is_transposed else weight


MASKS = [("arctic", ARCTIC_SEQUENTIAL), *((family, {}) for family in FAMILIES)]


@pytest.mark.parametrize("family, changes", MASKS, ids=["arctic-sequential", *FAMILIES])
def test_masks_equal_naive_wanda_in_memory(checkpoint, ranks, tmp_path, family, changes):
    folder = checkpoint(family, **changes)
    cfg = small_run(folder, tmp_path / "run", samples=5, length=40, fraction=0.5, target=0.45)
    prune(cfg, ranks)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    arch = Architecture(Checkpoint.open(folder))
    sizes, kept = measure_layers(arch, list(Scope)), [layer["kept"] for layer in plan["layers"]]
    quotas = layer_quotas(sizes, [len(k) for k in kept], plan["zeros"])
    written, source, tokens = load_tensors(tmp_path / "run" / "model"), load_tensors(folder), tokens_of(folder)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32, experts_implementation="eager")
    copy_dense_weights(model, arch, source, kept)
    for layout, layer, quota in zip(arch.layers, model.base_model.layers, quotas, strict=True):
        found = experts_of(layer)
        modules = {name: layer.get_submodule(layout.dense[name].removesuffix(".weight")) for name in quota.dense}
        seen = captured(model, modules | ({"experts": found[1]} if found else {}), tokens)
        for name, module in modules.items():
            inputs = torch.cat([args[0].flatten(0, -2) for args, _ in seen[name]])
            apply_naive(module.weight.data, inputs, quota.dense[name])
            assert torch.equal(module.weight.data, written[name]), name
        if found:
            check_experts(layout, found[1], quota, seen["experts"], written, kept[layout.index])


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


def apply_naive(weight: torch.Tensor, inputs: torch.Tensor, count: int) -> None:
    squared = sum(x.double() ** 2 for x in inputs)
    weight[naive_mask(wanda_scores(weight, squared), count)] = 0


def check_experts(layout, module, quota, calls, written, kept) -> None:
    for number, expert in enumerate(kept):
        inputs = [
            x
            for (hidden, index, _), _ in calls
            for x, chosen in zip(hidden.view(len(index), -1), index.tolist(), strict=True)
            if number in chosen
        ]
        assert inputs, "every survivor must see a token here"
        inner = [naive_inner(module, number, x) for x in inputs]
        for part, rows in (("gate_up_proj", inputs), ("down_proj", inner)):
            weight = getattr(module, part).data[number]
            apply_naive(oriented(module, weight), torch.stack(rows), quota.experts[number][part])
            assert torch.equal(weight, stored(layout, written, expert, number, part)), (layout.index, expert, part)


def test_expert_without_tokens_falls_back_to_the_pool(checkpoint, ranks, tmp_path):
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
    summary = prune(cfg, ranks)
    if not summary["experts_without_tokens"]:
        pytest.fail("the starved expert was reached; the test proves nothing")
    assert abs(summary["sparsity"] - 0.5) < 1e-4
    down = load_tensors(tmp_path / "run" / "model")["model.layers.0.block_sparse_moe.experts.5.w2.weight"]
    lost = (down == 0).all(0)
    assert lost.any() and not lost[: int(lost.sum())].all(), "columns follow the pooled norms, not their order"
