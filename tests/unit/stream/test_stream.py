"""The stream against the full model in memory: hidden states, statistics, masks."""

from __future__ import annotations

import sys
import threading
import time
import traceback

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.naive import (
    ARCTIC_SEQUENTIAL,
    captured,
    compare_statistics,
    naive_statistics,
    tokens_of,
)
from helpers.stock import observed
from helpers.tensors import load_tensors
from stun.checkpoint.reader import Checkpoint
from stun.config import StunError
from stun.evaluation.perplexity import score
from stun.model.architecture import Architecture
from stun.model.tensor_names import experts_of
from stun.runtime.device_copies import HostMemory
from stun.runtime.threads import Workers
from stun.statistics.input_moments import Moments
from stun.statistics.observe import Watcher
from stun.statistics.router import router_distance
from stun.stream.layer_stream import LayerStream, embed, even_owners

CASES = [("arctic", {}), ("arctic", ARCTIC_SEQUENTIAL), ("mixtral", {}), ("qwen3_moe", {})]


@pytest.mark.parametrize("family, changes", CASES, ids=["arctic", "arctic-sequential", "mixtral", "qwen3_moe"])
def test_hidden_states_and_statistics(checkpoint, ranks, tmp_path, family, changes):
    folder = checkpoint(family, **changes)
    tokens = tokens_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    layers = {f"layer{i}": layer for i, layer in enumerate(model.model.layers)}
    experts = {f"experts{i}": found[1] for i, layer in enumerate(model.model.layers) if (found := experts_of(layer))}
    seen = captured(model, layers | experts, tokens)

    arch = Architecture(Checkpoint.open(folder))
    states = embed(arch, ranks, tokens.split(2), arch.source.read)
    stream = LayerStream(arch, ranks, arch.layers, [even_owners(x, 1) for x in arch.layers])
    for layer in stream:
        stream.build(layer)
        states = stream.run(layer, states)
        for mine, (_, full) in zip(states.hidden, seen[f"layer{layer.layout.index}"], strict=True):
            torch.testing.assert_close(mine, full, atol=2e-5, rtol=1e-5)

    collected = observed(arch, tokens.split(2), ranks, tmp_path)
    assert collected.keys() == {int(name.removeprefix("experts")) for name in experts}
    for index, statistics in collected.items():
        module = experts[f"experts{index}"]
        expected = naive_statistics(module, seen[f"experts{index}"])
        compare_statistics(statistics, expected)
        routed = next(name for name in load_tensors(folder) if f"layers.{index}." in name and name.endswith("gate.weight"))
        assert torch.equal(statistics["router_distance"], router_distance(load_tensors(folder)[routed]))
        assert (statistics["powers"][0, :, 0, 0] > 0).sum() >= 5, "routing must reach most experts, or this proves nothing"


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_does_not_fit_beside_a_layer_waits_for_it(checkpoint, ranks, monkeypatch, share):
    """... and a stream that is left early ends."""
    arch = Architecture(Checkpoint.open(checkpoint("mixtral")))
    nbytes = sum(info.nbytes for name, info in arch.source.tensors.items() if ".layers.1." in name)
    monkeypatch.setattr(HostMemory, "room_ahead", lambda memory, reserved: share * nbytes)
    stream = iter(LayerStream(arch, ranks, arch.layers, [even_owners(layout, 1) for layout in arch.layers]))
    for count, layer in enumerate(stream, 1):
        time.sleep(0.1)  # in which the whole next layer would have been read
        assert count * nbytes <= arch.source.bytes_read <= (count + share) * nbytes
        assert layer.experts[7]["down_proj"].equal(arch.source.read(arch.layers[count - 1].experts[7]["down_proj"][0]))
        arch.source.bytes_read = count * nbytes
        if count == 2:
            stream.close()


def test_a_stream_that_is_left_waits_for_nobody(checkpoint, ranks, monkeypatch):
    """... while somebody holds it: a process that ends waits for its threads."""
    arch = Architecture(Checkpoint.open(checkpoint("mixtral")))
    monkeypatch.setattr(HostMemory, "room_ahead", lambda memory, reserved: 0)
    stream = iter(LayerStream(arch, ranks, arch.layers, [even_owners(layout, 1) for layout in arch.layers]))
    next(stream)
    deadline = time.monotonic() + 2
    while at_work("read") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not at_work("read")
    stream.close()


def at_work(name: str) -> list[str]:
    """Functions of the stream in which threads of that name are."""
    own = {thread.ident for thread in threading.enumerate() if thread.name.startswith(name)}
    stacks = [traceback.extract_stack(frame) for ident, frame in sys._current_frames().items() if ident in own]
    return [frame.name for stack in stacks for frame in stack if frame.filename.endswith("layer_stream.py")]


def test_streams_side_by_side_share_the_room(checkpoint, ranks, monkeypatch, tmp_path):
    """Each layer of a scored model leaves the other one's reading its half."""
    folder, read = checkpoint("mixtral"), []
    own, dense = (Architecture(Checkpoint.open(folder)) for _ in range(2))
    layer = [sum(i.nbytes for n, i in own.source.tensors.items() if f".layers.{number}." in n) for number in (0, 1)]
    monkeypatch.setattr(HostMemory, "room_ahead", lambda memory, reserved: layer[1])
    outside = sum(info.nbytes for name, info in own.source.tensors.items() if name == own.embedding)
    run = LayerStream.run

    def noted(stream, current, states):
        if current.layout.index == 0:
            time.sleep(0.2)  # in which a whole layer would be read
            read.append(stream.arch.source.bytes_read)
        return run(stream, current, states)

    monkeypatch.setattr(LayerStream, "run", noted)
    for part in ("progress", "hidden"):
        (tmp_path / part).mkdir()
    score(own, dense, [[5, 6, 7, 8]], 1, ranks, tmp_path)
    assert len(read) == 2 and all(layer[0] < nbytes - outside <= layer[0] + layer[1] / 2 for nbytes in read)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["arctic", "gpt_oss", "qwen3_next", "jamba"])
def test_the_number_of_threads_does_not_matter(checkpoint, ranks, monkeypatch, family, dtype):
    """Tensors large enough to be cut into a piece a thread, at places that no vector width divides."""
    monkeypatch.setattr("stun.model.precision.multiplies_bfloat16", lambda: True)  # slow where it is not so
    arch = Architecture(Checkpoint.open(checkpoint(family, dtype=dtype)))
    tokens = torch.randint(0, 260, (33, 121), generator=torch.Generator().manual_seed(0))
    found, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        monkeypatch.setattr(ranks, "workers", Workers(ranks.device))
        states = embed(arch, ranks, [tokens], arch.source.read)
        stream = LayerStream(arch, ranks, arch.layers, [even_owners(layout, 1) for layout in arch.layers])
        sums = []
        for layer in stream:
            assert stream.dtype is dtype
            stream.build(layer)
            names = sorted(layer.layout.linears)
            moments = Moments(stream, layer, names, list(range(len(layer.kept))), True, False)
            watchers = [Watcher(len(layer.kept), [0], ranks)] if layer.kept else []
            states = moments.run(states, *watchers)
            sums += [part for watcher in watchers for _, part in sorted(watcher.totals(layer).items())]
            sums += [*states.hidden, *(own["inputs"].clone() for own in moments.dense.values())]
            sums += [part.clone() for _, own in sorted(moments.experts.items()) for part in own.values()]
        found.append(sums)
    torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others, strict=True))


def test_outputs_that_are_not_finite_name_the_first_micro_batch(checkpoint, ranks):
    """Looked for once a layer, in outputs that are all there by then."""
    arch = Architecture(Checkpoint.open(checkpoint("mixtral")))
    states = embed(arch, ranks, list(torch.ones(4, 2, 16, dtype=torch.int64)), arch.source.read)
    stream = LayerStream(arch, ranks, arch.layers, [even_owners(layout, 1) for layout in arch.layers])
    layer = next(iter(stream))
    stream.build(layer)
    for turn in (1, 3):
        states.hidden[turn] = states.hidden[turn].index_fill(1, torch.tensor([5]), torch.inf)
    with pytest.raises(StunError, match=r"layer 0: output of micro-batch 1: not finite"):
        stream.run(layer, states)
