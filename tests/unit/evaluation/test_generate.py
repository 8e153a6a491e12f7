"""Greedy completions from the stream against transformers' own generate."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.uneven import pruned, steep
from stun.checkpoint.reader import Checkpoint
from stun.config import Scope, SparsifyConfig
from stun.data.tokenizer import load_tokenizer
from stun.evaluation.batches import micro_batches, padded
from stun.evaluation.generate import Decoding, generate
from stun.evaluation.memory import Capacity, generation_capacity
from stun.model.architecture import Architecture

FAMILIES = ["arctic", "deepseek_v3", "exaone_moe", "gpt_oss", "jamba", "lfm2_moe", "phimoe", "qwen3_5_moe_text", "qwen3_next"]
QUESTIONS = ["Hello there, how", "What?", "The quick brown fox jumps over", "a", "One two three four five six seven"]
NEW, SIZE = 12, 3


def decoding(arch: Architecture, folder, ends: list[int], stop=()) -> Decoding:
    """With a penalty on repetitions: otherwise random models say the same token for ever."""
    config = arch.generation_config(NEW)
    config.update(repetition_penalty=1.3, eos_token_id=ends)
    return Decoding(config, load_tokenizer(folder), NEW, list(stop))


def wanted(folder, prompts, how: Decoding) -> dict[int, list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {}
    for batch in micro_batches([len(ids) for ids in prompts], SIZE):
        own = [prompts[row] for row in batch.rows]
        ids, mask = padded(own, how.pad, True), padded([[1] * len(p) for p in own], 0, True)
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=NEW, pad_token_id=how.pad,
            repetition_penalty=1.3, eos_token_id=how.config.eos_token_id,
        )  # fmt: skip
        for row, tokens in zip(batch.rows, out[:, ids.shape[1] :].tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(tokens) if token in how.ends), NEW)
            found[row] = tokens[:end]
    return found


def check(folder, ranks) -> None:
    """Whatever stays in memory, however many micro-batches run at once, with rows that end early."""
    arch, tokenizer = Architecture(Checkpoint.open(folder)), load_tokenizer(folder)
    prompts, layers = tokenizer(QUESTIONS)["input_ids"], len(arch.layers)
    free = generate(arch, prompts, decoding(arch, folder, []), Capacity(SIZE, 1, layers, 0), ranks)
    assert {len(tokens) for tokens in free.values()} == {NEW} and len({tuple(tokens) for tokens in free.values()}) > 3
    how = decoding(arch, folder, [free[0][3], free[1][7], free[4][9]])
    full = wanted(folder, prompts, how)
    assert len({len(tokens) for tokens in full.values()}) > 2
    for capacity in (Capacity(SIZE, 1, layers, 0), Capacity(SIZE, 2, 1, 1)):
        before = arch.source.bytes_read
        assert generate(arch, prompts, how, capacity, ranks) == full
        assert arch.source.bytes_read > before
    streamed = arch.source.bytes_read - before
    generate(arch, prompts, how, Capacity(SIZE, 1, layers, 0), ranks)
    assert arch.source.bytes_read - before - streamed < streamed / 5, "layers that stay are read once"


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_are_transformers_own(checkpoint, ranks, family):
    check(checkpoint(family), ranks)


@pytest.mark.slow
def test_heterogeneous_checkpoint(tmp_path, ranks):
    source = steep(tmp_path / "source", "qwen3_next")
    folder, kept = pruned(source, tmp_path / "run", ranks, target=0.199, sparsify=SparsifyConfig(scope=[Scope.experts]))
    assert len({len(survivors) for survivors in kept}) > 1
    check(folder, ranks)


class Interrupted(Exception):
    pass


class Memory:
    """Keeps what is saved, as a disk would; ends the job when it is about to save once more than `most` times."""

    def __init__(self, most: int = 10**6):
        self.states, self.most = {}, most

    def save(self, number: int, state: dict) -> None:
        if not self.most:
            raise Interrupted
        self.most -= 1
        self.states[number] = copy.deepcopy(state)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_next"])
def test_interrupted_generation_goes_on(checkpoint, ranks, family):
    """From the tokens saved at any step; micro-batches that are done are not run again."""
    folder = checkpoint(family)
    arch, tokenizer = Architecture(Checkpoint.open(folder)), load_tokenizer(folder)
    prompts, capacity, ample = tokenizer(QUESTIONS)["input_ids"], Capacity(SIZE, 1, 0, 1), Capacity(SIZE, 1, len(arch.layers), 0)
    free = generate(arch, prompts, decoding(arch, folder, []), ample, ranks)
    how = decoding(arch, folder, [free[0][3], free[1][7]])
    whole = generate(arch, prompts, how, ample, ranks)
    for steps in (1, 6, NEW + 2):
        stopping, lasting = Memory(steps), Memory()
        with pytest.raises(Interrupted):
            generate(arch, prompts, how, capacity, ranks, save=stopping.save)
        lasting.states |= stopping.states
        assert generate(arch, prompts, how, capacity, ranks, stopping.states.get, lasting.save) == whole
    before = arch.source.bytes_read
    outside = sum(arch.info(name).nbytes for name in arch.outer_weights)
    assert generate(arch, prompts, how, capacity, ranks, lasting.states.get) == whole
    assert arch.source.bytes_read - before == outside, "nothing is left to do"


def test_a_stop_ends_a_row(checkpoint, ranks):
    folder = checkpoint("olmoe")
    arch, tokenizer = Architecture(Checkpoint.open(folder)), load_tokenizer(folder)
    prompts, capacity = tokenizer(QUESTIONS)["input_ids"], Capacity(SIZE, 1, 3, 0)
    free = generate(arch, prompts, decoding(arch, folder, []), capacity, ranks)
    stop = next(text for at in range(3, NEW) if (text := tokenizer.decode(free[2][at : at + 1])).isascii() and text.strip())
    found = generate(arch, prompts, decoding(arch, folder, [], [stop]), capacity, ranks)
    for row, tokens in found.items():
        text = tokenizer.decode(free[row])
        assert tokens == free[row][: len(tokens)]
        assert (len(tokens) == NEW) == (stop not in text) or tokenizer.decode(tokens).endswith(stop)
    assert len(found[2]) < NEW


def test_padding_that_has_no_embedding(checkpoint, ranks):
    """As tokenizers have it to which one was added. Nothing looks at it."""
    folder = checkpoint("mixtral")
    arch, tokenizer = Architecture(Checkpoint.open(folder)), load_tokenizer(folder)
    prompts, capacity = tokenizer(QUESTIONS)["input_ids"], Capacity(SIZE, 1, 3, 0)
    how = Decoding(arch.generation_config(NEW), tokenizer, NEW, [])
    wanted = generate(arch, prompts, how, capacity, ranks)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert how.pad >= arch.config.vocab_size and generate(arch, prompts, how, capacity, ranks) == wanted


def test_what_fits_stays(checkpoint, ranks, monkeypatch):
    """The numbers that are chosen fit into what is free."""
    arch = Architecture(Checkpoint.open(checkpoint("qwen3_next")))
    sizes = [
        sum(arch.info(name).nbytes for name in (*layout.dense, *{n for e in layout.experts for p in e.values() for n in p}))
        for layout in arch.layers
    ]
    ample = generation_capacity(arch, [10] * 64, 10, 0, ranks)
    assert ample.held_layers == 4 and ample.step_bytes == 0 and ample.batch == 8 and ample.turns == 1
    assert generation_capacity(arch, [10] * 64, 10, 3, ranks).batch == 3
    monkeypatch.setattr("stun.evaluation.memory.free_memory", lambda ranks: 16 * max(sizes))
    tight = generation_capacity(arch, [10] * 64, 10, 0, ranks)
    assert 0 < tight.held_layers < 4 and tight.step_bytes == sum(sizes[tight.held_layers :]) and 1 <= tight.batch <= 8
    monkeypatch.setattr("stun.evaluation.memory.free_memory", lambda ranks: 5 * max(sizes))
    from stun.config import StunError

    with pytest.raises(StunError, match="out of memory: one row of 20 tokens takes"):
        generation_capacity(arch, [10] * 64, 10, 0, ranks)
