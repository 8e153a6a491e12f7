"""llm-compressor's Wanda, REAP, or REAP and then Wanda, on a whole Mixture-of-Experts model and given tokens.

    python llmcompressor_run.py MODEL TOKENS OUT METHOD SPARSITY EXPERT_SPARSITY --batch-size 8 [--all-experts]

MODEL is a checkpoint's folder with a tokenizer, TOKENS a safetensors file with an int64 tensor `tokens` [samples, length], METHOD
wanda, reap or reap+wanda, SPARSITY the share of every row that Wanda zeroes, EXPERT_SPARSITY the share of a layer's experts that
REAP removes. OUT gets the pruned checkpoint. Experts are given their routed tokens or, with --all-experts, all tokens, which is
llm-compressor's default. Needs an environment with llmcompressor (written for 0.14) and with torchvision, without which
transformers 5.17 cannot load a model in llm-compressor's way, and memory for the whole model.

Legend: S samples, B those of a micro-batch, T length.
"""

import argparse
import os
from pathlib import Path

import torch
from figures import Phases, removed
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import WandaPruningModifier
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def recipe(step: str, sparsity: float, expert_sparsity: float) -> Modifier:
    """Modifier of one step. Routers and the head are not pruned."""
    if step == "reap":
        return REAPPruningModifier(sparsity=expert_sparsity)
    return WandaPruningModifier(sparsity=sparsity, targets=["Linear"], ignore=["re:.*lm_head", "re:.*gate$"])


def loader(tokens_ST: torch.Tensor, batch_size: int, dtype: torch.dtype) -> DataLoader:
    """Micro-batches, each with the causal mask [1, 1, T, T] that attention adds.

    With a mask of ones [B, T], llm-compressor 0.14 calibrates Qwen3-MoE with attention to later tokens too: its traced model asks
    transformers for the mask with a copy of the config that names no kind of attention, and gets none.
    """
    length = tokens_ST.shape[1]
    mask_11TT = torch.full((1, 1, length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)
    batches = [{"input_ids": tokens_BT, "attention_mask": mask_11TT} for tokens_BT in tokens_ST.split(batch_size)]
    return DataLoader(batches, batch_size=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "tokens", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("method", choices=("wanda", "reap", "reap+wanda"))
    for name in ("sparsity", "expert_sparsity"):
        parser.add_argument(name, type=float)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--all-experts", action="store_true")
    args, phases = parser.parse_args(), Phases()
    with phases.phase("load"), load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokens_ST = load_file(args.tokens)["tokens"]
    for step in args.method.split("+"):
        with phases.phase(step):
            oneshot(
                model=model,
                tokenizer=AutoTokenizer.from_pretrained(args.model),
                dataset=loader(tokens_ST, args.batch_size, model.dtype),
                recipe=recipe(step, args.sparsity, args.expert_sparsity),
                moe_calibrate_all_experts=args.all_experts,
            )
    with phases.phase("save"):
        model.save_pretrained(args.out)
    phases.report(tokens=tokens_ST.numel(), dtype=str(model.dtype).removeprefix("torch."), **removed(args.model, args.out))


if __name__ == "__main__":
    main()
