"""Checkpoints with novices: their form, what they compute, loading, saving, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.selections import CALIBRATION, config
from helpers.stock import load_stock, logits_of
from helpers.tensors import load_tensors, same_tensors
from helpers.uneven import steep
from helpers.zoo import make_checkpoint
from stun.checkpoint.reader import Checkpoint
from stun.config import Budget, Dropped, ExpertsConfig, ExpertsMethod, Score, StunError
from stun.data.samples import calibration_samples
from stun.data.tokenizer import load_tokenizer
from stun.model.architecture import Architecture
from stun.model.tensor_names import experts_of
from stun.planning.job import resolve_model
from stun.pruning.job import prune
from stun.stream.layer_stream import LayerStream, embed, even_owners

FAMILIES = ["arctic", "deepseek_v2", "mixtral", "qwen3_moe"]
NOVICE = ExpertsConfig(
    method=ExpertsMethod.rank, score=Score.residual, budget=Budget["global"], keep=5, dropped=Dropped.novice, refit=True
)


@pytest.fixture(scope="module")
def made(tmp_path_factory, ranks):
    """Source and result by family, with layers that keep different numbers."""
    results = {}

    def make(family: str):
        if family not in results:
            folder = tmp_path_factory.mktemp(family)
            source = steep(folder / "source", family)
            summary = prune(config(source, folder / "run", target=None, experts=NOVICE), ranks)
            assert len({count for count in summary["kept"] if count}) > 1
            assert summary["sparsity"] == pytest.approx(summary["target"], abs=1e-5)  # constants are counted
            results[family] = source, folder / "run" / "model", summary
        return results[family]

    return make


def tokens_of(folder) -> torch.Tensor:
    return calibration_samples(CALIBRATION, load_tokenizer(folder), 260).tokens_ST


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_form_is_what_vllm_reads(made, family):
    """vLLM 0.33, design/expert_substitution.md: the architecture and number of experts stay, `approximate_experts` maps layers to
    experts, these have one tensor `experts.N.approx_value` [hidden_size] each, and the others keep their names."""
    source, folder, summary = made(family)
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, folder))
    listed = after.pop("approximate_experts")
    assert after == before
    assert {int(layer): len(experts) for layer, experts in listed.items()} == {
        layer: whole - kept
        for layer, (whole, kept) in enumerate(zip(summary["experts"], summary["kept"], strict=True))
        if whole > kept
    }
    prefix = {"arctic": "block_sparse_moe.experts", "mixtral": "block_sparse_moe.experts"}.get(family, "mlp.experts")
    novices = {f"model.layers.{layer}.{prefix}.{expert}" for layer, experts in listed.items() for expert in experts}
    tensors, dense = load_tensors(folder), load_tensors(source)
    wanted = {name for name in dense if name.rpartition(".")[0].rpartition(".")[0] not in novices}
    assert tensors.keys() == wanted | {f"{novice}.approx_value" for novice in novices}
    assert all(tensors[f"{novice}.approx_value"].shape == (before["hidden_size"],) for novice in novices)
    changed = {name for name in wanted if not torch.equal(tensors[name], dense[name])}
    assert changed and all("down_proj" in name or ".w2." in name for name in changed)


def constant_experts(module, weights: dict[int, torch.Tensor]):
    """Forward of a whole experts module in which the experts of `weights` give constants, token by token."""

    def forward(hidden, index_TK, gates_TK):
        rows, one = hidden.view(-1, hidden.shape[-1]), torch.ones(1, 1)
        output = torch.zeros_like(rows)
        for token, (chosen, gates) in enumerate(zip(index_TK.tolist(), gates_TK, strict=True)):
            for expert, gate in zip(chosen, gates, strict=True):
                own = (
                    module(rows[token : token + 1], torch.tensor([[expert]]), one)[0]
                    if expert not in weights
                    else weights[expert]
                )
                output[token] += gate * own
        return output.view_as(hidden)

    return forward


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_computes_what_the_whole_model_with_constants_does(made, ranks, family):
    source, folder, _ = made(family)
    model, reference, tensors = load_stock(folder), load_stock(source), load_tensors(folder)
    arch, tokens = Architecture(Checkpoint.open(folder)), tokens_of(source)[:2]
    whole = Architecture(Checkpoint.open(source))
    for layout, dense, layer in zip(arch.layers, whole.layers, reference.base_model.layers, strict=True):
        if not layout.experts:
            continue
        _, module = experts_of(layer)
        for expert in layout.whole:  # the refitted matrices
            (name,) = dense.experts[expert]["down_proj"]
            module.down_proj.data[expert] = tensors[name]
        for name in layout.shared_outputs:
            layer.get_parameter(layout.dense[name]).data.copy_(tensors[name])
        constants = {expert: tensors[name] for expert, name in layout.novices.items()}
        copy = type(module).forward.__get__(module)
        layer.get_submodule(experts_of(layer)[0]).forward = constant_experts(copy, constants)
    torch.testing.assert_close(logits_of(model, tokens), logits_of(reference, tokens), rtol=1e-4, atol=1e-4)
    states = embed(arch, ranks, [tokens], arch.source.read)
    for layer in LayerStream(
        arch, ranks, arch.layers, [even_owners(layout, 1) if layout.experts else [] for layout in arch.layers]
    ):
        stream_layer = layer
        stream = LayerStream(arch, ranks, arch.layers, [])
        stream.build(stream_layer)
        states = stream.run(stream_layer, states)
    arch.install_outer({name: arch.source.read(name) for name in arch.outer_weights}, torch.float32)
    logits = arch.leave(states.hidden[0].flatten(0, 1)).view(*tokens.shape, -1)
    torch.testing.assert_close(logits, logits_of(model, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_names_outside_the_layers_that_transformers_converts(tmp_path, ranks):
    """Ling's embedding has another name in the file than in the model: nothing is missing, and all is saved under its name."""
    source = make_checkpoint(tmp_path / "source", "bailing_hybrid")
    experts = ExpertsConfig(method=ExpertsMethod.rank, keep=6, dropped=Dropped.novice)
    prune(config(source, tmp_path / "run", target=None, experts=experts), ranks)
    folder = tmp_path / "run" / "model"
    load_stock(folder).save_pretrained(tmp_path / "again", max_shard_size="60KB")
    same_tensors(folder, tmp_path / "again")


@pytest.mark.slow
def test_names_without_the_prefix_of_the_model(tmp_path, ranks):
    """DeepSeek-V4's on the hub, `layers.0.ffn.experts.3.approx_value`: what is written is read again, and the same in both."""
    source = make_checkpoint(tmp_path / "source", "deepseek_v4")
    experts = ExpertsConfig(method=ExpertsMethod.rank, keep=5, dropped=Dropped.novice)
    prune(config(source, tmp_path / "run", target=None, experts=experts), ranks)
    arch = Architecture(Checkpoint.open(tmp_path / "run" / "model"))
    names = load_stock(arch.source.folder).state_dict()
    listed = {(layout.index, expert): name for layout in arch.layers for expert, name in layout.novices.items()}
    assert len(listed) == 3 * len(arch.layers) and all(name.startswith("layers.") for name in listed.values())
    for (layer, expert), name in listed.items():
        assert torch.equal(arch.source.read(name), names[f"model.layers.{layer}.mlp.experts.{expert}.approx_value"])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_saves_what_it_loaded(made, tmp_path, family):
    _, folder, _ = made(family)
    model = load_stock(folder)
    model.save_pretrained(tmp_path / "again", max_shard_size="60KB")
    same_tensors(folder, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["approximate_experts"] == model.config.approximate_experts
    tokens = torch.arange(3, 20)[None]
    assert torch.equal(load_stock(tmp_path / "again")(tokens).logits, model(tokens).logits)


@pytest.mark.slow
def test_refused(made, checkpoint, tmp_path):
    _, folder, _ = made("mixtral")
    with pytest.raises(
        StunError, match=r"has experts that are constants already \(approximate_experts\); prune what it was made from"
    ):
        resolve_model(config(folder, tmp_path / "run"))
    with pytest.raises(StunError, match="one tensor, a form that holds no constants"):
        resolve_model(config(checkpoint("gpt_oss"), tmp_path / "run", experts=NOVICE))
    text = (folder / "config.json").read_text()
    for change, message in [
        ({"approximate_experts": {"0": [1, 0]}}, "approximate_experts.0: must be whole numbers, ascending"),
        ({"approximate_experts": [3]}, "approximate_experts: must be an object"),
        ({"approximate_experts": {"0": list(range(8))}}, "has constants of experts"),
        ({"approximate_experts": {"0": []}}, "belongs to an expert, but the model has no such parameter|no such parameter"),
    ]:
        (folder / "config.json").write_text(json.dumps(json.loads(text) | change))
        try:
            with pytest.raises(StunError, match=message):
                Architecture(Checkpoint.open(folder))
        finally:
            (folder / "config.json").write_text(text)
