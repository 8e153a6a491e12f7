"""What the stream collects, computed by loops over the full model in memory."""

from __future__ import annotations

import itertools

import torch

from helpers.paths import TEXT
from stun.config import CalibrationConfig, ExpertsConfig, ModelConfig, PruneConfig
from stun.data.samples import calibration_samples
from stun.data.tokenizer import load_tokenizer

ARCTIC_SEQUENTIAL = {"moe_layer_frequency": 2, "parallel_attn_mlp_res": False, "num_experts_per_tok": 1}


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


def compare_statistics(statistics, expected) -> None:
    """One calibration source's statistics against the naive ones."""
    assert torch.equal(statistics["coactivation"][0], expected["coactivation"])
    torch.testing.assert_close(statistics["powers"][0], expected["powers"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics["peak"][0], expected["peak"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics["weights"], expected["weights"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics["outputs"][0], expected["outputs"].float(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def naive_statistics(module, calls) -> dict[str, torch.Tensor]:
    """Token by token; an expert's output is what transformers' own loop gives for this token and expert alone, with gate 1."""
    count, one = module.num_experts, torch.ones(1, 1)
    coactivation = torch.zeros(count, count, dtype=torch.int64)
    powers, peak = torch.zeros(count, 3, 3, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    squares = torch.zeros(count, calls[0][0][0].shape[-1], dtype=torch.float64)
    for (hidden, index, weights), _ in calls:
        for x, chosen, gates in zip(hidden.view(len(index), -1), index.tolist(), weights.double().tolist(), strict=True):
            outputs = [module(x[None], torch.tensor([[expert]]), one)[0].double() for expert in chosen]
            for i, j in itertools.product(chosen, chosen):
                coactivation[i, j] += 1
            for expert, gate, f in zip(chosen, gates, outputs, strict=True):
                norm = float(f.norm())
                powers[expert] += torch.tensor([[gate**a * norm**b for b in range(3)] for a in range(3)], dtype=torch.float64)
                peak[expert] = max(float(peak[expert]), norm)
                squares[expert] += gate**2 * f
    parts = [parameter.double().flatten(1) for parameter in module.parameters()]
    sums = [sum(part.abs().sum(1) for part in parts), sum(part.square().sum(1) for part in parts)]
    numbers = torch.full((count,), float(sum(part.shape[1] for part in parts)), dtype=torch.float64)
    weights = torch.stack([*sums, numbers], dim=1)
    return {"coactivation": coactivation, "powers": powers, "peak": peak, "weights": weights, "outputs": squares}


def naive_inner(module, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What reaches an expert's second matrix."""
    if not module.has_gate:
        return module.act_fn(oriented(module, module.up_proj[expert]) @ x).detach()
    gate_up = oriented(module, module.gate_up_proj[expert]) @ x
    if module.has_bias:
        gate_up = gate_up + module.gate_up_proj_bias[expert]
    return module._apply_gate(gate_up).detach()


def oriented(module, weight: torch.Tensor) -> torch.Tensor:
    """A view of a stored matrix with a row for each output."""
    return weight.T if module.is_transposed else weight


def small_run(folder, run_dir, samples: int, length: int, fraction: float, target: float) -> PruneConfig:
    calibration = CalibrationConfig(path=str(TEXT), samples=samples, length=length, micro_batch=2)
    experts = ExpertsConfig(fraction=fraction)
    return PruneConfig(ModelConfig(str(folder)), calibration, experts, target=target, run_dir=str(run_dir))


def tokens_of(folder) -> torch.Tensor:
    cfg = CalibrationConfig(path=str(TEXT), samples=5, length=40, micro_batch=2)
    return calibration_samples(cfg, load_tokenizer(folder), 260).tokens_ST


def naive_mask(scores: torch.Tensor, total: int) -> torch.Tensor:
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    rows = len(scores)
    for row in range(rows):
        count = (row + 1) * total // rows - row * total // rows
        order = sorted(range(scores.shape[1]), key=lambda column: (scores[row, column].item(), column))
        mask[row, order[:count]] = True
    return mask
