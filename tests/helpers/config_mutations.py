"""What config.json and the tokenizer's files may be turned into; see tests/helpers/mutations.py."""

from __future__ import annotations

from helpers.mutations import BROKEN, CODE, DEEP, HUGE, Mutation, edit, text_of


def having(**changes) -> Mutation:
    """Change fields of config.json."""
    return edit("config.json", lambda content: content.update(changes))


COUNTS = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "num_local_experts",
    "num_experts_per_tok",
    "vocab_size",
]
WRONG_COUNTS = {
    "negative": -1,
    "zero": 0,
    "huge": HUGE,
    "of a million": 10**6,
    "of 40 digits": 10**39,
    "bool": True,
    "float": 1.5,
    "text": "8",
    "code": CODE,
    "list": [8],
    "object": {"value": 8},
}
IMPLAUSIBLE = {
    "layers one a byte": having(num_hidden_layers=10**5),
    "text_config list": having(text_config=[1]),
    "text_config of huge layers": having(text_config={"model_type": "mixtral", "num_hidden_layers": HUGE}),
    "kernel of the hub": having(attn_implementation="evil/kernel"),
    "kernel of the hub inside": having(_attn_implementation={"": "evil/kernel"}),
    "experts of the hub": having(_experts_implementation="evil/kernel:forward"),
    "huge number of no name": having(anything=[[{"deep": HUGE}]]),
}
UNBUILDABLE = {
    "activation code": having(hidden_act=CODE),
    "activation number": having(hidden_act=1),
    "eps text": having(rms_norm_eps="small"),
    "eps list": having(rms_norm_eps=[1e-5]),
    "eps object": having(rms_norm_eps={"__float__": "NaN"}),
    "rope list": having(rope_parameters=[1]),
    "rope type": having(rope_parameters={"rope_type": "evil", "rope_theta": 1e6}),
    "rope theta text": having(rope_parameters={"rope_type": "default", "rope_theta": CODE}),
    "rope without theta": having(rope_parameters={"rope_type": "yarn"}),
    "head of 3": having(head_dim=3),
    "head of a million": having(head_dim=10**6),
    "dtype code": having(dtype="os"),
    "dtype of torch": having(dtype="save"),
    "padding beyond the vocabulary": having(pad_token_id=10**5),
    "experts list": having(num_local_experts=[8, 8]),
    "tied text": having(tie_word_embeddings=CODE),
    "window text": having(sliding_window="wide"),
}
FOREIGN = {
    "null": None,
    "number": 7,
    "list": ["mixtral"],
    "empty": "",
    "code": CODE,
    "path": "../../mixtral",
    "unknown": "mixtral2",
    "dense": "llama",
    "our own prefix": "stun_",
}
QUANTISED = {
    "text": "fp8",
    "list": ["fp8"],
    "unknown": {"quant_method": "evil"},
    "no block": {"quant_method": "fp8"},
    "block zero": {"quant_method": "fp8", "weight_block_size": [0, 8]},
    "block negative": {"quant_method": "fp8", "weight_block_size": [-8, 8]},
    "block bool": {"quant_method": "fp8", "weight_block_size": [True, True]},
    "block float": {"quant_method": "fp8", "weight_block_size": [8.0, 8]},
    "block of three": {"quant_method": "fp8", "weight_block_size": [8, 8, 8]},
    "block huge": {"quant_method": "fp8", "weight_block_size": [HUGE, HUGE]},
}
CONFIGS: dict[str, tuple[Mutation, str]] = {
    **{f"config {name}": (text_of("config.json", text), "config.json") for name, text in BROKEN.items()},
    **{
        f"{field} {name}": (having(**{field: value}), f"config.json.*|safetensors.*config.json asks|{field}")
        for field in COUNTS
        for name, value in WRONG_COUNTS.items()
    },
    **{name: (change, "config.json: ") for name, change in IMPLAUSIBLE.items()},
    **{name: (change, "config.json") for name, change in UNBUILDABLE.items()},
    **{f"model_type {name}": (having(model_type=value), "model_type .* is not supported") for name, value in FOREIGN.items()},
    **{f"quantised {name}": (having(quantization_config=value), "config.json: ") for name, value in QUANTISED.items()},
    "own code for an unknown type": (
        having(model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
        "model_type 'evil' is not supported",
    ),
    "layers that differ, too few": (having(model_type="stun_mixtral", experts_per_layer=[8]), "config.json"),
    "layers that differ, huge": (
        having(model_type="stun_mixtral", experts_per_layer=[HUGE, HUGE]),
        "config.json: experts_per_layer",
    ),
    "layers that differ, text": (having(model_type="stun_mixtral", experts_per_layer=["8", "8"]), "config.json"),
    "layers that differ, none": (having(model_type="stun_mixtral"), "config.json"),
}
# Of families that build more from their configuration than Mixtral does.
OF_FAMILIES: dict[str, dict[str, object]] = {
    "deepseek_v3": {
        "first_k_dense_replace": HUGE,
        "n_group": 3,
        "topk_group": 0,
        "n_routed_experts": 10**6,
        "n_shared_experts": HUGE,
        "kv_lora_rank": HUGE,
        "qk_rope_head_dim": 10**6,
        "num_nextn_predict_layers": HUGE,
        "moe_intermediate_size": 10**6,
    },
    "gpt_oss": {"num_local_experts": 10**6, "layer_types": ["evil"] * 3, "head_dim": 10**6},
    "jamba": {
        "mamba_d_state": 10**4,
        "mamba_expand": 10**4,
        "mamba_d_conv": 10**6,
        "mamba_dt_rank": HUGE,
        "expert_layer_period": 0,
    },
}

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"


def model(**changes) -> Mutation:
    """Change the model inside tokenizer.json."""
    return edit(TOKENIZER, lambda content: content["model"].update(changes))


def token(**changes) -> Mutation:
    return edit(TOKENIZER, lambda content: content["added_tokens"][0].update(changes))


PARTS = {"number": 1, "text": "ByteLevel", "unknown": {"type": "Evil"}, "list": [1], "without a type": {}}
TOKENIZERS: dict[str, Mutation] = {
    **{f"{TOKENIZER} {name}": text_of(TOKENIZER, text) for name, text in BROKEN.items()},
    **{
        f"{SETTINGS} {name}": text_of(SETTINGS, text)
        for name, text in BROKEN.items()
        if name not in ("same name twice", "NaN", "infinite", "overflows")
    },
    **{
        f"pre_tokenizer {name}": edit(TOKENIZER, lambda content, value=value: content.update(pre_tokenizer=value))
        for name, value in PARTS.items()
    },
    **{
        f"normalizer {name}": edit(TOKENIZER, lambda content, value=value: content.update(normalizer=value))
        for name, value in PARTS.items()
    },
    "no model": edit(TOKENIZER, lambda content: content.pop("model") and None),
    "model null": edit(TOKENIZER, lambda content: content.update(model=None)),
    "model unknown": model(type="Evil"),
    "vocabulary list": model(vocab=["a"]),
    "vocabulary null": model(vocab=None),
    "id text": edit(TOKENIZER, lambda content: content["model"]["vocab"].update(a=CODE)),
    "id negative": edit(TOKENIZER, lambda content: content["model"]["vocab"].update(a=-1)),
    "id float": edit(TOKENIZER, lambda content: content["model"]["vocab"].update(a=1.5)),
    "id of 2^40": edit(TOKENIZER, lambda content: content["model"]["vocab"].update(a=2**40)),
    "id beyond the vocabulary": edit(TOKENIZER, lambda content: content["model"]["vocab"].update(a=5000, e=5001)),
    "merges of nothing": model(merges=[["zz", "yy"]]),
    "merges numbers": model(merges=[1, 2]),
    "merges text": model(merges="a b"),
    "added token id text": token(id="0"),
    "added token number": token(content=7),
    "added tokens object": edit(TOKENIZER, lambda content: content.update(added_tokens={"a": 1})),
    "pattern that is none": edit(
        TOKENIZER,
        lambda content: content.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
        ),
    ),
    "token number": edit(SETTINGS, lambda content: content.update(eos_token=7)),
    "token list": edit(SETTINGS, lambda content: content.update(eos_token=["</s>"])),
    "class number": edit(SETTINGS, lambda content: content.update(tokenizer_class=7)),
    "deep settings": text_of(SETTINGS, f'{{"a": {DEEP}}}'),
}
TEMPLATES = {
    "torn": "{% for message in messages %}",
    "of the interpreter": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "of globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "of a missing name": "{{ messages[0].a.b.c }}",
    "that raises": "{{ raise_exception('no') }}",
    "of a huge loop": "{% for a in range(10000000000) %}{{ a }}{% endfor %}",
    "that calls itself": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "of a number": "{{ 1 / 0 }}",
    "of a file": "{% include '/etc/passwd' %}",
}
