"""The stream against the full model in memory: hidden states, statistics, masks."""

from __future__ import annotations

import pytest
import torch
from conftest import TEXT, load_tensors
from transformers import AutoModelForCausalLM

from stun.checkpoint.reader import Checkpoint
from stun.config import CalibrationConfig, ExpertsConfig, ModelConfig, PruneConfig
from stun.data import calibration_samples, load_tokenizer
from stun.model.architecture import Architecture
from stun.model.tensor_names import experts_of
from stun.runtime.threads import Workers
from stun.statistics.accumulators import COSINE_UNIT
from stun.statistics.input_moments import Moments
from stun.statistics.observe import Watcher, observe
from stun.statistics.router import router_distance
from stun.stream.layer_stream import LayerStream, embed, even_owners

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["arctic", "gpt_oss", "qwen3_next", "jamba"])
def test_the_number_of_threads_does_not_matter(checkpoint, ranks, monkeypatch, family, dtype):
    """Tensors large enough to be cut into a piece a thread, at places that no vector width divides."""
    monkeypatch.setattr("stun.model.precision.multiplies_bfloat16", lambda: True)  # slow where it is not so
    arch = Architecture(Checkpoint.open(checkpoint(family, dtype=dtype)))
    tokens = torch.randint(0, 260, (33, 121), generator=torch.Generator().manual_seed(0))
    found, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        monkeypatch.setattr(ranks, "workers", Workers(ranks.device))
        states = embed(arch, ranks, [tokens], arch.source.read)
        stream = LayerStream(arch, ranks, arch.layers, [even_owners(layout, 1) for layout in arch.layers])
        sums = []
        for layer in stream:
            assert stream.dtype is dtype
            stream.build(layer)
            names = sorted(layer.layout.linears)
            moments = Moments(stream, layer, names, list(range(len(layer.kept))), True, False)
            watchers = [Watcher(len(layer.kept), [0], ranks)] if layer.kept else []
            states = moments.run(states, *watchers)
            sums += [part for watcher in watchers for _, part in sorted(watcher.totals(layer).items())]
            sums += [*states.hidden, *(own["inputs"].clone() for own in moments.dense.values())]
            sums += [part.clone() for _, own in sorted(moments.experts.items()) for part in own.values()]
        found.append(sums)
    torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others, strict=True))


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
