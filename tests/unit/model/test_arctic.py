"""Native Arctic against outputs of the original modelling code."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import stun  # noqa: F401  (registers Arctic)
from helpers.paths import FIXTURES

GOLDEN = sorted((FIXTURES / "arctic_golden").glob("*/config.json"))


@pytest.mark.parametrize("folder", [c.parent for c in GOLDEN], ids=lambda p: p.name)
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_matches_original_code(folder, experts, tmp_path):
    golden = load_file(folder / "golden.safetensors")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation=experts
    )
    with torch.no_grad():
        out = model(golden["input_ids"], output_hidden_states=True)
        mask = golden["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = model(golden["input_ids"], attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(out.logits, golden["logits"], atol=2e-5, rtol=0)
    hidden = torch.stack(out.hidden_states)
    torch.testing.assert_close(hidden, golden["hidden_states"], atol=2e-5, rtol=0)
    kept = mask.bool()
    torch.testing.assert_close(padded.logits[kept], golden["logits_left_padded"][kept], atol=2e-5, rtol=0)


@pytest.mark.parametrize("folder", [c.parent for c in GOLDEN], ids=lambda p: p.name)
def test_saves_under_original_names(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    original, saved = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    assert AutoConfig.from_pretrained(tmp_path).num_local_experts == model.config.num_local_experts


def test_generates_with_cache():
    folder = GOLDEN[-1].parent
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = load_file(folder / "golden.safetensors")["input_ids"][:1, :6]
    cached = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    plain = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(cached, plain)
