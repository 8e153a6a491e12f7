"""Small checkpoints on disk, in the hub's layout, and launches of the real jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from stun.models.arctic import ArcticConfig, ArcticForCausalLM

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "stun" / "reference" / "calibration.jsonl"

SHAPE = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "arctic": (
        ArcticForCausalLM,
        ArcticConfig,
        {
            "intermediate_size": 48,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "moe_layer_frequency": 1,
            "parallel_attn_mlp_res": True,
        },
    ),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            "intermediate_size": 64,
            "moe_intermediate_size": 48,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "head_dim": 8,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, ids 3 to 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_checkpoint(folder: Path, family: str, dtype=torch.float32, shard: str = "60KB", **changes) -> Path:
    """A random model of `family`, saved by transformers itself; weights are large enough that routing varies."""
    model_class, config_class, own = FAMILIES[family]
    torch.manual_seed(7)
    model = model_class(config_class(**{**SHAPE, **own, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            else:
                parameter.uniform_(0.8, 1.2)
    model.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(family, **how)`: the folder of such a checkpoint, made once a test run."""
    made: dict[str, Path] = {}

    def get(family: str, **how) -> Path:
        key = f"{family} {sorted((k, str(v)) for k, v in how.items())}"
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(family) / "model", family, **how)
        return made[key]

    return get


def settings(model: Path, run_dir: Path, **overrides) -> list[str]:
    """Command-line overrides for a small run; dots in keys are written as two underscores."""
    base = {
        "model.path": model,
        "calibration.path": TEXT,
        "calibration.samples": 10,
        "calibration.length": 48,
        "calibration.micro_batch": 2,
        "target": 0.4,
        "run_dir": run_dir,
    }
    return [f"{key}={value}" for key, value in {**base, **{k.replace("__", "."): v for k, v in overrides.items()}}.items()]


def run_job(job: str, arguments: list[str], ranks: int = 0, check: bool = True) -> subprocess.CompletedProcess:
    """Run `jobs.<job>`: plain python for 0 ranks, torchrun otherwise."""
    launcher = [sys.executable]
    if ranks:
        launcher += [
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={ranks}",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0",
        ]
    command = [*launcher, "-m", f"jobs.{job}", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by name."""
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    return {name: tensor for file in sorted(files) for name, tensor in load_file(folder / file).items()}


def same_tensors(one: Path, two: Path) -> None:
    """Assert that two checkpoints hold the same names and bytes."""
    first, second = load_tensors(one), load_tensors(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(
            tensor.contiguous().view(torch.uint8), second[name].contiguous().view(torch.uint8)
        ), name
