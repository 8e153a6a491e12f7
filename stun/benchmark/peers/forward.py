"""Time and memory of transformers' own forward of a whole model, without its head: the least cost of a pass over the tokens.

    python forward.py MODEL TOKENS MICRO_BATCH DTYPE

MODEL is a checkpoint's folder, TOKENS a safetensors file with an int64 tensor `tokens` [samples, length], DTYPE a name such as
float32 or bfloat16, or auto for the stored one. Every experts implementation of transformers that needs no further packages runs
one micro-batch twice and is timed on the second; the fastest then runs all tokens. Needs torch and transformers, and memory for
the whole model (on the first GPU where there is one).

Legend: B samples of a micro-batch, T length.
"""

import argparse

import torch
from figures import Phases
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def batched_copies(model: PreTrainedModel, tokens: int) -> int:
    """Bytes that batched_mm copies at once in a layer: per token, the larger matrix of each of its experts."""
    fused = [parameter for name, parameter in model.named_parameters() if ".experts." in name and parameter.dim() == 3]
    largest = max(parameter[0].numel() * parameter.element_size() for parameter in fused)
    return tokens * model.config.get_text_config().num_experts_per_tok * largest


def trial(model: PreTrainedModel, tokens_BT: torch.Tensor) -> dict[str, float]:
    """Seconds of one micro-batch by implementation; batched_mm only if its copies are smaller than the model."""
    model_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    phases = Phases()
    for name in IMPLEMENTATIONS:
        if name == "batched_mm" and batched_copies(model, tokens_BT.numel()) > model_bytes:
            continue
        model.set_experts_implementation(name)
        model.base_model(input_ids=tokens_BT, use_cache=False)
        with phases.phase(name):
            model.base_model(input_ids=tokens_BT, use_cache=False)
    return phases.seconds


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, kind in (("model", str), ("tokens", str), ("micro_batch", int), ("dtype", str)):
        parser.add_argument(name, type=kind)
    args, phases = parser.parse_args(), Phases()
    with phases.phase("load"):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval().to(phases.device)
    batches = load_file(args.tokens)["tokens"].to(phases.device).split(args.micro_batch)
    with phases.phase("trial"):
        tried = trial(model, batches[0])
    fastest = min(tried, key=tried.get)
    model.set_experts_implementation(fastest)
    with phases.phase("forward"):
        for tokens_BT in batches:
            model.base_model(input_ids=tokens_BT, use_cache=False)
    ran = sum(tokens_BT.numel() for tokens_BT in batches)
    phases.report(tokens=ran, dtype=str(model.dtype).removeprefix("torch."), experts=fastest, tried=tried)


if __name__ == "__main__":
    main()
