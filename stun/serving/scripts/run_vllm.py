"""Greedy tokens from vLLM's engine, in this process."""

import json
import os
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # a container may not show all of its cores
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
import transformers
import vllm


def main() -> None:
    with open(sys.argv[1]) as file:
        request = json.load(file)
    longest = max(map(len, request["prompts"])) + request["tokens"]
    engine = vllm.LLM(
        model=request["model"],
        dtype="float32",
        trust_remote_code=request["trust"],
        max_model_len=longest,
        max_num_seqs=4,
        enforce_eager=True,
        enable_prefix_caching=False,
        seed=0,
    )
    # Without the checkpoint's own settings: no end before `tokens`, no penalties.
    greedy = vllm.SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    answers = engine.generate(prompts, greedy, use_tqdm=False)
    versions = {"vllm": vllm.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    with open(sys.argv[2], "w") as file:
        json.dump({"tokens": [list(a.outputs[0].token_ids) for a in answers], "versions": versions}, file)


if __name__ == "__main__":  # vLLM may start processes that import this file
    main()
