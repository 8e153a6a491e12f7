"""Quantised weights are dequantised, block-scaled fp8 first of all; forms that are not read are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from helpers.forms import fp8, rewrite, run
from helpers.quantised import FORMS
from helpers.stock import load_stock
from helpers.tensors import load_tensors
from helpers.zoo import make_checkpoint
from stun.checkpoint.reader import _BAND, DEQUANTISED, Checkpoint
from stun.config import OutputConfig, OutputFormat, StunError
from stun.preflight.activations import Allocations
from stun.runtime.device_copies import THREADS, HostMemory

BFLOAT16 = OutputConfig(OutputFormat.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("block", [(8, 8), (8, 4), (20, 12)], ids=["square", "flat", "cut at the edges"])
def test_fp8_is_dequantised(tmp_path, ranks, block):
    source = tmp_path / "source"
    exact = fp8(source, "deepseek_v3", *block)
    folder, _, _ = run(source, tmp_path / "same", ranks, target=0.0, output=BFLOAT16)
    written = load_tensors(folder)
    assert written.keys() == exact.keys()
    assert all(torch.equal(written[name], tensor) and written[name].dtype == tensor.dtype for name, tensor in exact.items())
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    ours = load_stock(folder)
    if block == (8, 8):  # transformers dequantises whole blocks only
        theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).float()
        prompt = torch.arange(3, 40)[None]
        torch.testing.assert_close(ours(prompt).logits, theirs(prompt).logits, atol=1e-4, rtol=1e-4)
    pruned, _, summary = run(source, tmp_path / "pruned", ranks, output=BFLOAT16)
    assert abs(summary["sparsity"] - 0.4) < 1e-4
    load_stock(pruned)


@pytest.mark.parametrize("block", [(8, 8), (20, 12), (4096, 4096)])
def test_fp8_is_dequantised_a_few_rows_at_a_time(tmp_path, monkeypatch, block):
    """... and the scales of every block are read once."""
    exact = fp8(tmp_path, "deepseek_v3", *block)
    sizes, empty = [], HostMemory.empty
    source = Checkpoint.open(tmp_path)
    quantised = {name: info for name, info in source.tensors.items() if info.codec}
    monkeypatch.setattr("stun.checkpoint.reader._BAND", 300)
    monkeypatch.setattr(HostMemory, "empty", lambda memory, nbytes: sizes.append(nbytes) or empty(memory, nbytes))
    assert len(quantised) > 10 and all(torch.equal(source.read(name), exact[name]) for name in quantised)
    assert source.bytes_read == sum(info.stored_bytes for info in quantised.values())
    results = sum(info.nbytes for info in quantised.values())
    assert sum(sizes) == results + source.bytes_read, "results, weights and scales are all there is"
    weights = [nbytes for nbytes in sizes if nbytes not in {info.nbytes for info in quantised.values()}]
    assert max(weights) <= max(300, max(min(block[0], info.shape[0]) * info.shape[1] for info in quantised.values()))


def test_what_dequantising_takes(tmp_path):
    """Bytes beside the result, of all threads at once, where they are most."""
    taken = {}
    for form in ("fp8 block", "int4", "gptq"):
        make, settings = FORMS[form]
        folder = tmp_path / form
        folder.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in make("x", 128, 96).items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
        source = Checkpoint.open(folder)
        (info,) = source.tensors.values()
        target_LW = torch.empty(info.lines, dtype=info.dtype)
        source._dequantise(HostMemory(), target_LW, info, range(info.lines[0]))  # tables are made once
        with Allocations() as counted:  # without what is read, which is in pages of its own
            source._dequantise(HostMemory(), target_LW, info, range(info.lines[0]))
        taken[form] = (counted.peak + info.stored_bytes) / info.numel
    assert 0.9 < DEQUANTISED / (THREADS * _BAND) / max(taken.values()) < 1.1, taken


def test_fp8_without_its_scales_is_refused(tmp_path, ranks):
    source = tmp_path / "source"
    fp8(source, "deepseek_v3", 8, 8)
    tensors = load_tensors(source)
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    rewrite(source, {key: tensor for key, tensor in tensors.items() if key != f"{name}_scale_inv"})
    with pytest.raises(StunError, match=rf"{name} is fp8 but has no {name}_scale_inv"):
        run(source, tmp_path / "run", ranks)
    rewrite(source, {**tensors, f"{name}_scale_inv": torch.ones(2, 2)})
    with pytest.raises(StunError, match=rf"{name}_scale_inv has shape \(2, 2\).*\(3, 4\)"):
        run(source, tmp_path / "run", ranks)


@pytest.mark.parametrize("method", [{"quant_method": "gptq", "bits": 3}, {"quant_method": "fp8"}])
def test_other_quantised_forms_are_refused(tmp_path, ranks, method):
    source = make_checkpoint(tmp_path / "source", "mixtral")
    rewrite(source, load_tensors(source), quantization_config=method)
    with pytest.raises(StunError, match=rf"quantised \({method['quant_method']}.*\).*bf16"):
        run(source, tmp_path / "run", ranks)
