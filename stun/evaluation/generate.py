"""Greedy completions from the layer stream, as transformers' generate makes them.

All micro-batches of a wave take a step together, so that one pass over the layers serves all of their rows. Layers that fit stay
in memory; the others are read from disk for every token.

Shapes: B rows of a micro-batch that are not done, T tokens of prompt and completion so far, padded on the left; D hidden, V
vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from stun.evaluation.batches import MicroBatch, micro_batches, padded
from stun.evaluation.memory import Room
from stun.model.architecture import CACHE, Architecture
from stun.runtime.ranks import Ranks
from stun.runtime.units import duration, size
from stun.stream.embeddings import outside
from stun.stream.layer_stream import LayerStream, States, even_owners

_SAVE = 60.0  # seconds between two savings of what is generated, and between two lines of the log
_TAIL = 32  # last tokens in which a stop is looked for
Saved = dict[str, list]  # of one micro-batch: `tokens` generated for each row, whether it is `done`


@dataclass(frozen=True)
class Decoding:
    """When a completion ends: after `limit` tokens, at one of the tokens `ends`, or at a text of `stop`."""

    config: GenerationConfig
    tokenizer: PreTrainedTokenizerBase
    limit: int
    stop: list[str]

    @property
    def ends(self) -> set[int]:
        found = self.config.eos_token_id
        return set() if found is None else {found} if isinstance(found, int) else set(found)

    @property
    def pad(self) -> int:
        own = self.tokenizer.pad_token_id
        return own if own is not None else self.tokenizer.eos_token_id or 0

    def is_done(self, tokens: list[int]) -> bool:
        """Whether nothing follows these."""
        if len(tokens) >= self.limit or (tokens and tokens[-1] in self.ends):
            return True
        return bool(self.stop) and any(stop in self.tokenizer.decode(tokens[-_TAIL:]) for stop in self.stop)


class _Batch:
    """A micro-batch on its way. Rows that are done leave it once they are half of it."""

    def __init__(
        self, number: int, batch: MicroBatch, prompts: list[list[int]], saved: Saved | None, arch: Architecture, how, device
    ):
        self.number, self.rows, self.arch, self.how, self.device = number, batch.rows, arch, how, device
        count = len(batch.rows)
        self.tokens: list[list[int]] = saved["tokens"] if saved else [[] for _ in range(count)]
        self.done: list[bool] = saved["done"] if saved else [False] * count
        self.places = [place for place in range(count) if not self.done[place]]  # of the rows in the tensors
        self.saved = time.monotonic()
        if self.places:
            self._start(prompts)

    def _start(self, prompts: list[list[int]]) -> None:
        """From the prompts and what was generated of them already: equally much for all rows that are not done."""
        own = [prompts[self.rows[place]] for place in self.places]
        mask_BT = padded([[1] * len(ids) for ids in own], 0, on_left=True).to(self.device)
        self.length = mask_BT.shape[1]
        self.processors = self.arch.logits_processors(self.how.config, mask_BT)
        more_BT = torch.tensor([self.tokens[place] for place in self.places], device=self.device, dtype=torch.int64)
        pad = min(self.how.pad, self.arch.config.vocab_size - 1)  # some tokenizers' own has no embedding
        self.ids_BT = torch.cat([padded(own, pad, on_left=True).to(self.device), more_BT], 1)
        self.mask_BT = torch.cat([mask_BT, torch.ones_like(more_BT)], 1)
        self.cache = None

    def enter(self) -> tuple[torch.Tensor, list[dict]]:
        """What reaches the first layer at the next step."""
        inputs = self.arch.next_inputs(self.ids_BT, self.mask_BT, self.cache)
        hidden_BTD, arguments = self.arch.enter(inputs.pop("input_ids"), **inputs)
        self.cache = arguments[0][CACHE]
        return hidden_BTD, arguments

    def advance(self, hidden_BTD: torch.Tensor) -> None:
        """Take the most likely next token of every row."""
        logits_BV = self.arch.leave(hidden_BTD[:, -1]).float()
        next_B = self.processors(self.ids_BT, logits_BV).argmax(-1)
        self.ids_BT = torch.cat([self.ids_BT, next_B[:, None]], 1)
        self.mask_BT = torch.cat([self.mask_BT, torch.ones_like(next_B)[:, None]], 1)
        for place, token in zip(self.places, next_B.tolist(), strict=True):
            if not self.done[place]:
                self.tokens[place].append(token)
                self.done[place] = self.how.is_done(self.tokens[place])
        left = [i for i, place in enumerate(self.places) if not self.done[place]]
        if 2 * len(left) <= len(self.places):
            self._keep(left)

    def _keep(self, left: list[int]) -> None:
        self.places = [self.places[i] for i in left]
        if left:
            index = torch.tensor(left, device=self.device)
            self.ids_BT, self.mask_BT = self.ids_BT[index], self.mask_BT[index]
            self.processors = self.arch.logits_processors(self.how.config, self.mask_BT[:, : self.length])
            self.cache.reorder_cache(index)
        else:
            self.cache = None

    def state(self) -> Saved:
        return {"tokens": self.tokens, "done": self.done}


@torch.no_grad()
def generate(
    arch: Architecture,
    prompts: list[list[int]],
    how: Decoding,
    room: Room,
    ranks: Ranks,
    saved: Callable[[int], Saved | None] = lambda number: None,
    save: Callable[[int, Saved], None] = lambda number, state: None,
) -> dict[int, list[int]]:
    """The tokens that follow each of this rank's prompts, by its number.

    All ranks call this together. `saved(m)` is what an earlier call has saved of micro-batch m with `save`.
    """
    batches = micro_batches([len(ids) for ids in prompts], room.batch)
    owners = [even_owners(layout, ranks.world) if layout.experts else [] for layout in arch.layers]
    stream = LayerStream(arch, ranks, arch.layers, owners)
    stream.stays, stream.steady = room.stays, nullcontext
    wave, found = room.turns * ranks.world, {}
    with outside(arch, ranks):
        for start in range(0, len(batches), wave):
            numbers = range(start + ranks.rank, min(start + wave, len(batches)), ranks.world)
            mine = [_Batch(m, batches[m], prompts, saved(m), arch, how, ranks.device) for m in numbers]
            _complete(mine, stream, ranks, room, save)
            found |= {row: tokens for batch in mine for row, tokens in zip(batch.rows, batch.tokens, strict=True)}
    for layer in stream.held:
        layer.release()
    return found


def _complete(mine: list[_Batch], stream: LayerStream, ranks: Ranks, room: Room, save: Callable[[int, Saved], None]) -> None:
    """Take steps until no rank has a row left."""
    said, step = time.monotonic(), 0
    while True:
        going = [batch for batch in mine if batch.places]
        rounds = int(ranks.all_gather(torch.tensor([len(going)], device=ranks.device)).max())
        if not rounds:
            return
        step += 1
        ranks.doing = f"generate token {step}"
        _step(going, stream, rounds, ranks)
        for batch in going:
            if not batch.places or room.step_bytes or time.monotonic() - batch.saved > _SAVE:
                save(batch.number, batch.state())
                batch.saved = time.monotonic()
        if time.monotonic() - said > _SAVE:
            said = time.monotonic()
            ranks.log(f"generate: token {step}, {sum(len(batch.places) for batch in mine)} rows of this rank's not done")


def _step(going: list[_Batch], stream: LayerStream, rounds: int, ranks: Ranks) -> None:
    entered = [batch.enter() for batch in going]
    states = States([hidden for hidden, _ in entered], [arguments for _, arguments in entered], rounds * ranks.world)
    del entered
    for layer in stream:
        if layer.module is None:
            stream.build(layer)
        states = stream.run(layer, states)
    for batch, hidden_BTD in zip(going, states.hidden, strict=True):
        batch.advance(hidden_BTD)


def describe(room: Room, arch: Architecture, read: float) -> str:
    """In words how a generation will go, at `read` bytes a second."""
    layers = len(arch.layers)
    if not room.step_bytes:
        return f"{room.batch} at once, all {layers} layers stay in memory"
    held = f"{room.stays} of {layers} layers stay in memory" if room.stays else "no layer stays in memory"
    step = f"{size(room.step_bytes)} are read for every token, about {duration(room.step_bytes / read)}"
    return f"{room.turns} times {room.batch} at once on a rank; {held}: {step}"
