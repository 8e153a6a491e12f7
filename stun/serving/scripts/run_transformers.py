"""Greedy tokens from transformers' own generate."""

import json
import sys

import torch
import transformers

with open(sys.argv[1]) as file:
    request = json.load(file)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = transformers.AutoModelForCausalLM.from_pretrained(
    request["model"], dtype=torch.float32, trust_remote_code=request["trust"], use_safetensors=True
).to(device)
# Without the checkpoint's own settings: no end before `tokens`, no penalties.
model.generation_config = transformers.GenerationConfig(do_sample=False, max_new_tokens=request["tokens"], pad_token_id=0)
tokens = []
for prompt in request["prompts"]:
    ids = model.generate(torch.tensor([prompt], device=device), attention_mask=torch.ones(1, len(prompt), device=device))
    tokens.append(ids[0, len(prompt) :].tolist())
versions = {"transformers": transformers.__version__, "torch": torch.__version__}
with open(sys.argv[2], "w") as file:
    json.dump({"tokens": tokens, "versions": versions}, file)
