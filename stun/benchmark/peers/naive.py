"""STUN in the way of published scripts: a whole Qwen3-MoE model in memory, experts removed, then the loop of Wanda's prune.py.

    python naive.py MODEL TOKENS OUT TARGET EXPERT_FRACTION MICRO_BATCH

MODEL is a qwen3_moe checkpoint's folder, TOKENS a safetensors file with an int64 tensor `tokens` [samples, length]. TARGET is the
share of the decoder layers' parameters to remove, EXPERT_FRACTION the share of these in whole experts. OUT gets the
pruned checkpoint. Needs torch, transformers and scipy, and memory for the whole model and the inputs and outputs of a layer for
all tokens (on the first GPU where there is one). The model computes in the dtype it is stored in.

Experts (Lee et al., arXiv 2409.06211): complete linkage over the distances of router rows; of each cluster the expert nearest the
mean of its weights is kept.

Weights (Sun et al., arXiv 2306.11695): every layer runs once with hooks on its linear modules; in every row, the weights with
the lowest |weight| * norm of the input are removed; then the layer runs again for the next layer's inputs.

Legend: B samples of a micro-batch, T length, N tokens, n tokens of an expert, D hidden size, E experts, K top-k, O outputs and I
inputs of a matrix.
"""

import argparse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from figures import Phases, removed
from safetensors.torch import load_file
from scipy.cluster.hierarchy import fcluster, linkage
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM


class LinearExperts(nn.Module):
    """transformers' experts of a layer as linear modules for hooks, on views of the same weights."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.act_fn, width = experts.act_fn, experts.intermediate_dim
        self.gate = nn.ModuleList(_linear(weight[:width]) for weight in experts.gate_up_proj)
        self.up = nn.ModuleList(_linear(weight[width:]) for weight in experts.gate_up_proj)
        self.down = nn.ModuleList(_linear(weight) for weight in experts.down_proj)

    def forward(self, hidden_ND: torch.Tensor, index_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        output_ND = torch.zeros_like(hidden_ND)
        for expert in index_NK.unique().tolist():
            token, place = torch.where(index_NK == expert)
            input_nD = hidden_ND[token]
            inner_nI = self.act_fn(self.gate[expert](input_nD)) * self.up[expert](input_nD)
            output_ND.index_add_(0, token, self.down[expert](inner_nI) * weights_NK[token, place, None])
        return output_ND


def _linear(weight_OI: torch.Tensor) -> nn.Linear:
    module = nn.Linear(1, 1, bias=False, device="meta")
    module.weight = nn.Parameter(weight_OI, requires_grad=False)
    return module


def representatives(block: nn.Module, clusters: int) -> list[int]:
    """Kept experts: of each cluster with similar router rows, the one nearest the mean of the cluster's weights."""
    number_E = torch.tensor(fcluster(linkage(block.gate.weight.float().cpu().numpy(), "complete"), clusters, "maxclust"))
    kept = []
    for cluster in number_E.unique():
        members = torch.where(number_E == cluster)[0].tolist()
        weights = [torch.cat([block.experts.gate_up_proj[e].flatten(), block.experts.down_proj[e].flatten()]) for e in members]
        mean = sum(weight.float() for weight in weights) / len(weights)
        kept.append(members[int(torch.stack([(weight.float() - mean).norm() for weight in weights]).argmin())])
    return sorted(kept)


def drop_experts(model: nn.Module, blocks: list[nn.Module], drop: int) -> None:
    """Remove `drop` experts from every layer."""
    for block in blocks if drop else ():
        kept = representatives(block, block.gate.num_experts - drop)
        block.experts.gate_up_proj = nn.Parameter(block.experts.gate_up_proj[kept], requires_grad=False)
        block.experts.down_proj = nn.Parameter(block.experts.down_proj[kept], requires_grad=False)
        block.gate.weight = nn.Parameter(block.gate.weight[kept], requires_grad=False)
        block.gate.num_experts = block.experts.num_experts = model.config.num_experts = len(kept)


class _Caught(Exception):
    """Raised when the first layer is called."""


def inputs_of_layers(model: nn.Module, batches: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[dict]]:
    """Inputs [B, T, D] and keyword arguments of the first layer, by micro-batch."""
    hidden, arguments, first = [], [], model.model.layers[0]

    def catch(_, positional: tuple, keywords: dict) -> None:
        hidden.append(positional[0])
        arguments.append(keywords)
        raise _Caught

    hook = first.register_forward_pre_hook(catch, with_kwargs=True)
    for tokens_BT in batches:
        with suppress(_Caught):
            model.model(input_ids=tokens_BT, use_cache=False)
    hook.remove()
    return hidden, arguments


def prune_layer(layer: nn.Module, run: Callable[[], list[torch.Tensor]], sparsity: float) -> None:
    """Zero the share `sparsity` of every row of a layer's linear modules, rounded down to whole weights."""
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    sums = {module: torch.zeros(module.weight.shape[1], device=module.weight.device) for module in linears}

    def add(module: nn.Linear, positional: tuple, _) -> None:
        sums[module] += positional[0].flatten(0, -2).float().square().sum(0)

    hooks = [module.register_forward_hook(add) for module in linears]
    run()
    for hook in hooks:
        hook.remove()
    for module in linears:
        score_OI = module.weight.abs().float() * sums[module].sqrt()
        order_OI = torch.sort(score_OI, dim=-1, stable=True)[1]
        module.weight.scatter_(1, order_OI[:, : int(score_OI.shape[1] * sparsity)], 0)


def prune_weights(model: nn.Module, batches: list[torch.Tensor], sparsity: float) -> None:
    """Prune layer by layer, each on the outputs of the pruned layers before it."""
    hidden, arguments = inputs_of_layers(model, batches)
    for layer in model.model.layers:
        fused = getattr(layer.mlp, "experts", None)
        if fused is not None:
            layer.mlp.experts = LinearExperts(fused)

        def run(layer=layer, hidden=hidden) -> list[torch.Tensor]:
            return [layer(states, **keywords) for states, keywords in zip(hidden, arguments, strict=True)]

        prune_layer(layer, run, sparsity)
        hidden = run()
        if fused is not None:
            layer.mlp.experts = fused


def split(model: nn.Module, blocks: list[nn.Module], target: float, fraction: float) -> tuple[int, float]:
    """(Experts to remove per layer with experts, rounded; share of the remaining weights of the matrices to remove)."""
    total = sum(parameter.numel() for parameter in model.model.layers.parameters())
    linear = sum(module.weight.numel() for module in model.model.layers.modules() if isinstance(module, nn.Linear))
    matrices = [block.experts.gate_up_proj[0].numel() + block.experts.down_proj[0].numel() for block in blocks]
    expert_numel = sum(matrix + block.gate.weight.shape[1] for matrix, block in zip(matrices, blocks, strict=True))
    drop = round(fraction * target * total / expert_numel)
    remaining = linear + sum(matrix * (block.gate.num_experts - drop) for matrix, block in zip(matrices, blocks, strict=True))
    return drop, (target * total - drop * expert_numel) / remaining


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ("model", Path), ("tokens", Path), ("out", Path), ("target", float), ("expert_fraction", float), ("micro_batch", int)
    for name, kind in names:
        parser.add_argument(name, type=kind)
    args, phases = parser.parse_args(), Phases()
    with phases.phase("load"):
        if AutoConfig.from_pretrained(args.model).model_type != "qwen3_moe":
            raise SystemExit(f"{args.model}: not a qwen3_moe checkpoint")
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval().to(phases.device).requires_grad_(False)
    batches = load_file(args.tokens)["tokens"].to(phases.device).split(args.micro_batch)
    blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    drop, sparsity = split(model, blocks, args.target, args.expert_fraction)
    if not 0 <= sparsity < 1 or model.config.num_experts - drop < model.config.num_experts_per_tok:
        raise SystemExit(f"target {args.target}, expert_fraction {args.expert_fraction}: cannot remove {drop} experts of a layer")
    with phases.phase("experts"):
        drop_experts(model, blocks, drop)
    with phases.phase("weights"):
        prune_weights(model, batches, sparsity)
    with phases.phase("save"):
        model.save_pretrained(args.out)
    tokens = sum(tokens_BT.numel() for tokens_BT in batches)
    figures = {"dtype": str(model.dtype).removeprefix("torch."), "dropped": drop, "row_sparsity": sparsity}
    phases.report(tokens=tokens, **figures, **removed(args.model, args.out))


if __name__ == "__main__":
    main()
