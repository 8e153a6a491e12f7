"""Experts of a Qwen3-MoE model in memory: removal of some, and linear modules for hooks on the remaining ones.

Lee et al., arXiv 2409.06211: complete linkage over the distances of router rows; of each cluster the expert nearest the mean of
its weights is kept.

Legend: N tokens, n tokens of an expert, D hidden size, E experts, K top-k, O outputs and I inputs of a matrix.
"""

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import nn


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
