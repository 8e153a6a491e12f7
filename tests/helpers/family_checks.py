"""What holds for every family: the stream against the family's own forward, and what is written against its stock class.

One checkpoint, one stream of it and three runs serve all checks of a family.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from helpers.family_runs import FAMILY, RUNS, run
from helpers.masks import check_masks
from helpers.naive import captured, compare_statistics, naive_statistics
from helpers.stock import load_stock, text_of
from helpers.tensors import load_tensors, same_tensors
from stun.checkpoint.reader import Checkpoint
from stun.config import Scope, SparsifyConfig
from stun.data.samples import calibration_samples
from stun.data.tokenizer import load_tokenizer
from stun.evaluation.generate import Decoding, generate
from stun.evaluation.memory import Capacity
from stun.evaluation.perplexity import score
from stun.model.architecture import Architecture
from stun.model.tensor_names import experts_of
from stun.planning.budget import measure_layers
from stun.run.recorder import Recorder
from stun.statistics.observe import observe
from stun.stream.embeddings import outside
from stun.stream.layer_stream import embed

PROMPTS = ["Hello there, how", "What?", "The quick brown fox jumps over", "a"]
NEW = 5


def tried(kinds: list[str], families: Iterable[str]) -> list[str]:
    """Families that this run tests: all if STUN_ALL_FAMILIES is set, else one of every kind."""
    return list(families) if os.environ.get("STUN_ALL_FAMILIES") else kinds


def cases(kinds: list[str], families: Iterable[str]) -> list:
    """Parameters of a test of each family; those that this run leaves out are skipped with the reason."""
    alike = pytest.mark.skip(reason="STUN_ALL_FAMILIES: not set, and a family of its kind is tested")
    return [pytest.param(name, marks=[] if name in tried(kinds, families) else alike) for name in families]


def check_family(family: str, source, on_two, folder, ranks) -> None:
    """All checks of a checkpoint, whose run on two ranks is in `on_two`, on one thread: the models are too small for more."""
    torch.set_num_threads(1)
    model = load_stock(source)
    tokens = calibration_samples(FAMILY, load_tokenizer(source), 260).tokens_ST
    arch = Architecture(Checkpoint.open(source))
    expected = logits_of(model, tokens)
    check_stream(arch, model, expected, tokens, ranks, folder / "observed", family)
    for name in RUNS:
        run(name, source, folder / name, ranks, FAMILY)
    same_tensors(folder / "both" / "model", on_two / "both" / "model")
    assert (folder / "both" / "plan.json").read_bytes() == (on_two / "both" / "plan.json").read_bytes()
    same_tensors(source, folder / "identity" / "model")
    assert json.loads((source / "config.json").read_text()) == json.loads((folder / "identity/model/config.json").read_text())
    check_both(arch, folder / "both", source, tokens)
    check_evaluation(arch, model, source, expected, tokens, ranks, folder / "scores")
    check_generation(arch, model, source, ranks)
    check_survivors(arch, model, tokens, folder / "experts")


def logits_of(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([text_of(model).model(input_ids=b, use_cache=False).logits for b in tokens.split(FAMILY.micro_batch)])


class _Last(Recorder):
    """Keeps the last states of a stream."""

    def layer(self, index, states, entry, write=None) -> None:
        self.states = states
        super().layer(index, states, entry)


def check_stream(arch, model, expected, tokens, ranks, folder, family) -> None:
    """Statistics of every expert equal a loop over tokens and their experts, and the stream's last hidden states give the model's
    own logits."""
    for part in ("progress", "hidden"):
        (folder / part).mkdir(parents=True)
    batches, collected = tokens.split(FAMILY.micro_batch), {}
    states, recorder = embed(arch, ranks, list(batches), arch.source.read), _Last(folder, "observe", ranks, len(arch.layers))
    observe(arch, states, recorder, collected.__setitem__, [0] * states.total, sums_outputs=True)
    with outside(arch, ranks):
        streamed = torch.cat([arch.leave(hidden.flatten(0, 1)) for hidden in recorder.states.hidden]).view_as(expected)
    assert expected.std() > 0.05, "the logits must vary, or equality proves nothing"
    torch.testing.assert_close(streamed, expected, atol=1e-4, rtol=1e-4)
    decoder = text_of(model).decoder
    experts = {i: found[1] for i, layer in enumerate(decoder.layers) if (found := experts_of(layer))}
    seen = captured(decoder, experts, tokens)
    assert collected.keys() == seen.keys() and seen
    for index, statistics in collected.items():
        compare_statistics(statistics, naive_statistics(experts[index], seen[index]))
        reached = statistics["powers"][0, :, 0, 0].long()
        assert reached.min() > 0, f"{family} layer {index}: random inputs must reach every expert: {reached.tolist()}"


def check_both(arch, folder, source, tokens) -> None:
    """The target is met, the masks are Wanda's on what the pruned model sees, and the stock class loads the result."""
    summary = json.loads((folder / "manifest.json").read_text())["summary"]
    assert abs(summary["sparsity"] - 0.4) < 1e-4 and sum(summary["kept"]) < sum(summary["experts"])
    model, plan = text_of(load_stock(folder / "model")).decoder, json.loads((folder / "plan.json").read_text())
    written, sizes = load_tensors(folder / "model"), measure_layers(arch, list(Scope))
    check_masks(SparsifyConfig(), arch, model, plan, sizes, load_tensors(source), written, tokens)


def check_evaluation(arch, model, source, expected, tokens, ranks, folder) -> None:
    """Perplexity of the stream is that of the model's own logits."""
    for part in ("progress", "hidden"):
        (folder / part).mkdir(parents=True)
    scores = score(arch, None, tokens.tolist(), 2, ranks, folder)
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten())
    assert abs(scores["perplexity"] / float(loss.exp()) - 1) < 1e-4


def check_generation(arch, model, source, ranks) -> None:
    """Greedy completions are those of transformers' generate."""
    tokenizer, config = load_tokenizer(source), arch.generation_config(NEW)
    config.update(eos_token_id=None)
    decoding = Decoding(config, tokenizer, NEW, [])
    prompts = tokenizer(PROMPTS)["input_ids"]
    found = generate(arch, prompts, decoding, Capacity(len(prompts), 1, len(arch.layers), 0), ranks)
    longest = max(map(len, prompts))
    ids = torch.tensor([[decoding.pad] * (longest - len(own)) + own for own in prompts])
    mask = torch.tensor([[0] * (longest - len(own)) + [1] * len(own) for own in prompts])
    text = text_of(model).model
    out = text.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=NEW, min_new_tokens=NEW,
        pad_token_id=decoding.pad, eos_token_id=None,
    )  # fmt: skip
    assert [found[row] for row in range(len(prompts))] == out[:, longest:].tolist()


def check_survivors(arch, model, tokens, folder) -> None:
    """A checkpoint without some experts computes what the full model does when its routers cannot choose them.

    The difference is that of a product with fewer router rows, which a matrix library may sum in another order: in float32 up to
    1.6e-4 for one family on an AMD CPU, so it is computed in float64.
    """
    plan = json.loads((folder / "plan.json").read_text())
    kept = {index: layer["kept"] for index, layer in enumerate(plan["layers"]) if layer["experts"]}
    assert kept and {len(k) for k in kept.values()} == {6}
    pruned = load_stock(folder / "model").double()
    before = logits_of(model, tokens)
    model.double()
    with contextlib.ExitStack() as replaced:
        for index, survivors in kept.items():
            forbid(text_of(model).decoder.layers[index], arch.layers[index], survivors, replaced)
        expected = logits_of(model, tokens)
    torch.testing.assert_close(logits_of(pruned, tokens), expected, atol=1e-4, rtol=1e-4)
    assert (expected - before).abs().max() > 1e-3, "the dropped experts mattered"


def forbid(layer, layout, survivors, replaced) -> None:
    """Give all other experts a logit of minus infinity, a bias that never wins, and no place in a table."""
    gone = torch.tensor([expert not in survivors for expert in range(layout.num_experts)])
    state = dict(layer.named_parameters()) | dict(layer.named_buffers())
    entries = {state[layout.dense[name]]: dim for name, dim in layout.routed.items()}
    routers = [tensor for tensor in entries if tensor.dim() == 2 and tensor.shape[0] == len(gone)]
    original, linear = layer.forward, F.linear

    def without(inputs, weight, bias=None):
        output = linear(inputs, weight, bias)
        is_router = any(weight.shape == own.shape and torch.equal(weight, own.to(weight.dtype)) for own in routers)
        return output.masked_fill(gone, -torch.inf) if is_router else output

    def forward(*arguments, **keywords):
        with mock.patch.object(F, "linear", without):
            return original(*arguments, **keywords)

    replaced.enter_context(mock.patch.object(layer, "forward", forward))
    for name, dim in layout.routed.items():
        tensor = state[layout.dense[name]]
        if "bias" in layout.dense[name].rpartition(".")[2]:
            before = tensor.data.clone()
            tensor.data.movedim(dim, 0)[gone] = -torch.inf
            replaced.callback(tensor.data.copy_, before)
    for name in layout.tables:
        state[layout.dense[name]].copy_(nearest(state[layout.dense[name]], survivors, state[layout.dense[layout.router]]))


def nearest(table_VK, survivors: list[int], router_ED) -> torch.Tensor:
    """A table in which the survivor with the nearest router row that is not in the row yet stands for each other expert."""
    rows = []
    for row in table_VK.tolist():
        found = [expert if expert in survivors else None for expert in row]
        for place, expert in enumerate(row):
            free = [other for other in survivors if other not in found]
            if found[place] is None:
                found[place] = min(free, key=lambda other: float((router_ED[expert] - router_ED[other]).norm()))
        rows.append(found)
    return torch.tensor(rows)
