"""Checkpoints in forms that are not read: what each one is, and the way to one that is."""

from collections.abc import Iterable
from pathlib import Path

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_RELEASE = "use the release in the hub's form: config.json, *.safetensors and a tokenizer"
_SAVE = ".save_pretrained(new), and copy the tokenizer's files"
_PICKLED = "pickled weights, which can run code when loaded and are refused"
# The first pattern that any file matches: what these files are, and the way out.
_FORMS = {
    "adapter_config.json": "a LoRA adapter without its model; merge them once: "
    f"PeftModel.from_pretrained(base, folder).merge_and_unload(){_SAVE}",
    "*.gguf": "GGUF weights, for llama.cpp; use the safetensors that they were made from, or convert them once: "
    f"AutoModelForCausalLM.from_pretrained(folder, gguf_file=...){_SAVE}",
    "consolidated*": f"weights in their developer's own form; {_RELEASE}, or convert them by transformers' script of that family "
    "(convert_*_weights_to_hf.py)",
    "pytorch_model*.bin": f"{_PICKLED}. If you trust them, convert them once: "
    f"AutoModelForCausalLM.from_pretrained(folder, dtype='auto'){_SAVE}",
    **{f"*{end}": f"{_PICKLED}; {_RELEASE}" for end in PICKLED},
}
_ARE = (
    "read are fp8 with weight_block_size, mxfp4 (gpt-oss), compressed-tensors (float-, int-, pack-quantized, nvfp4, mxfp4), "
    "modelopt (FP8, NVFP4), gptq and awq of 4 bits"
)
# End of a tensor's name: the method by which its weights are quantised.
_QUANTISED = {
    ".qweight": "gptq or awq",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
}


def other_form(path: Path) -> str:
    """What the file or the folder at `path` holds in place of a safetensors checkpoint, and the way out; empty if not known."""
    for pattern, text in _FORMS.items():
        files = sorted(path.glob(pattern)) if path.is_dir() else [path] if path.is_file() and path.match(pattern) else []
        if files:
            return f"{files[0].name}: {text}"
    return ""


def quantised_by(names: Iterable[str]) -> str:
    """Method of quantisation that the names of tensors tell; empty if none does."""
    return next((method for name in names for end, method in _QUANTISED.items() if name.endswith(end)), "")


def quantised(method: str) -> str:
    """What is wrong with weights quantised by `method`, and the way out."""
    once = f", or dequantise them once: AutoModelForCausalLM.from_pretrained(folder).dequantize(){_SAVE}"
    undo = once if method == "bitsandbytes" else ""  # which transformers can
    return (
        f"weights are quantised ({method}), a form that is not read; {_ARE}; use the bf16 release that they were made from{undo}"
    )
