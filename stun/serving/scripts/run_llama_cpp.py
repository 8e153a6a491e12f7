"""Greedy tokens from llama.cpp's server, in this process through xllamacpp."""

import json
import sys
import urllib.request
from importlib.metadata import version

import xllamacpp

with open(sys.argv[1]) as file:
    request = json.load(file)
params = xllamacpp.CommonParams()
params.model.path = request["model"]
params.n_ctx = max(map(len, request["prompts"])) + request["tokens"]
params.n_parallel = 1
params.warmup = False
# Float32 all through: flash attention and the cache round to float16 by default, which changes a token now and then.
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def continued(prompt: list[int], count: int) -> list[int]:
    """Tokens over HTTP: the calls of xllamacpp give text, which has no token of an unfinished character."""
    tokens = []
    while len(tokens) < count:  # an end of the text, as any token, is followed by more
        how = {"n_predict": count - len(tokens), "temperature": 0, "cache_prompt": False, "return_tokens": True}
        data = json.dumps({"prompt": prompt + tokens, **how}).encode()
        ask = urllib.request.Request(f"{server.listening_address}/completion", data, {"Content-Type": "application/json"})
        with without_proxy.open(ask) as answer:
            tokens += json.load(answer)["tokens"]
    return tokens


tokens = [continued(prompt, request["tokens"]) for prompt in request["prompts"]]
versions = {"llama.cpp": f"of xllamacpp {version('xllamacpp')}"}
with open(sys.argv[2], "w") as file:
    json.dump({"tokens": tokens, "versions": versions}, file)
