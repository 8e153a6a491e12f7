"""Snowflake Arctic for transformers 5, with fused experts.

Arctic is absent from transformers. This module adds `ArcticConfig` and `ArcticForCausalLM`, registers them with the Auto
classes, and maps the names of the released checkpoint (`block_sparse_moe.experts.N.w1.weight`) to the fused runtime
parameters, so that `AutoModelForCausalLM.from_pretrained` loads the original files and `save_pretrained` writes them back.

With h = x + attention(input_layernorm(x)), a layer computes

    dense + MoE hybrid:  h + residual_mlp(residual_layernorm(h)) + moe(post_attention_layernorm(x))
    otherwise:           h + moe_or_mlp(post_attention_layernorm(h))

The hybrid form feeds its experts the hidden states from BEFORE attention, so both branches can run at once.
"""

import copy
from collections import OrderedDict

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.utils.output_capturing import OutputRecorder


@strict
class ArcticConfig(MixtralConfig):
    """Configuration of a Snowflake Arctic model; field names and defaults are those of the released `config.json`, which are
    Mixtral's but for those below.

    `num_local_experts` is one count for all layers, or a list with one count per decoder layer, as in the models that the
    STUN authors saved.
    """

    model_type = "arctic"
    base_model_tp_plan = base_model_ep_plan = None  # Mixtral's name modules that Arctic lacks

    num_key_value_heads: int | None = None
    max_position_embeddings: int = 4096
    num_experts_per_tok: int = 1
    num_local_experts: int | list[int] = 8
    moe_layer_frequency: int = 2
    parallel_attn_mlp_res: bool = False

    def experts_of_layer(self, layer_idx: int) -> int:
        """Number of experts of decoder layer `layer_idx`; 0 where the layer has a dense MLP."""
        if (layer_idx + 1) % self.moe_layer_frequency:
            return 0
        counts = self.num_local_experts
        return counts if isinstance(counts, int) else counts[layer_idx]


class ArcticMLP(nn.Module):
    """w2(act(w1 x) * w3 x), without biases."""

    def __init__(self, config: ArcticConfig, intermediate_size: int):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.w2 = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.w2(self.act_fn(self.w1(hidden_states)) * self.w3(hidden_states))


class ArcticTopKRouter(mixtral.MixtralTopKRouter):
    """Top-k of a float32 softmax; the k weights are renormalised only if k > 1."""

    def forward(self, hidden_states: torch.Tensor):
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        router_logits = F.linear(hidden_states, self.weight)
        router_probs = F.softmax(router_logits.float(), dim=-1)
        router_scores, router_indices = torch.topk(router_probs, self.top_k, dim=-1)
        if self.top_k > 1:
            router_scores = router_scores / router_scores.sum(dim=-1, keepdim=True)
        return router_logits, router_scores, router_indices


class ArcticSparseMoeBlock(nn.Module):
    """Router and experts: [B, T, D] -> [B, T, D]."""

    def __init__(self, config: ArcticConfig, layer_idx: int):
        super().__init__()
        layer_config = copy.copy(config)
        layer_config.num_local_experts = config.experts_of_layer(layer_idx)
        self.gate = ArcticTopKRouter(layer_config)
        self.experts = mixtral.MixtralExperts(layer_config)
        # The choice of the experts implementation must follow later changes of the model's configuration.
        self.experts.config = config

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(flat)
        return self.experts(flat, top_k_index, top_k_weights).view_as(hidden_states)


class ArcticDecoderLayer(GradientCheckpointingLayer):
    """Decoder layer in one of the two forms that the module's docstring gives."""

    def __init__(self, config: ArcticConfig, layer_idx: int):
        super().__init__()
        is_moe = config.experts_of_layer(layer_idx) > 0
        self.is_hybrid = is_moe and config.parallel_attn_mlp_res
        self.self_attn = mixtral.MixtralAttention(config, layer_idx)
        if is_moe:
            self.block_sparse_moe = ArcticSparseMoeBlock(config, layer_idx)
        else:  # under the checkpoint's name for it, `block_sparse_moe.mlp`
            self.block_sparse_moe = nn.Sequential(OrderedDict(mlp=ArcticMLP(config, config.intermediate_size)))
        self.input_layernorm = mixtral.MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = mixtral.MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.is_hybrid:
            self.residual_layernorm = mixtral.MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.residual_mlp = ArcticMLP(config, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        before_attention = hidden_states
        attention, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = before_attention + attention
        if self.is_hybrid:
            residual = self.residual_mlp(self.residual_layernorm(hidden_states))
            experts = self.block_sparse_moe(self.post_attention_layernorm(before_attention))
            return hidden_states + residual + experts
        return hidden_states + self.block_sparse_moe(self.post_attention_layernorm(hidden_states))


class ArcticPreTrainedModel(mixtral.MixtralPreTrainedModel):
    config: ArcticConfig
    config_class = ArcticConfig
    _no_split_modules = ["ArcticDecoderLayer"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(ArcticTopKRouter, index=0),
        "hidden_states": ArcticDecoderLayer,
        "attentions": mixtral.MixtralAttention,
    }

    # transformers decides both by searching this file for its usual code, which is inherited here.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True


class ArcticModel(ArcticPreTrainedModel, mixtral.MixtralModel):
    """Decoder without the output head."""

    def __init__(self, config: ArcticConfig):
        mixtral.MixtralPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(ArcticDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = mixtral.MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = mixtral.MixtralRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class ArcticForCausalLM(ArcticPreTrainedModel, mixtral.MixtralForCausalLM):
    """Decoder with the output head."""

    def __init__(self, config: ArcticConfig):
        mixtral.MixtralPreTrainedModel.__init__(self, config)
        self.model = ArcticModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_local_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()


# With Mixtral's map of expert names, without the renaming block_sparse_moe -> mlp. stun.model.registration registers the name.
AutoModelForCausalLM.register(ArcticConfig, ArcticForCausalLM)
register_checkpoint_conversion_mapping("arctic", get_checkpoint_conversion_mapping("mixtral")[1:])
