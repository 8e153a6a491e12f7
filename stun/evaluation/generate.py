"""Completions from the layer stream: greedy ones, the same as from transformers' generate, or sampled ones.

All micro-batches of a wave take a step together, so that one pass over the layers serves all of their rows. As many layers as fit
are held in memory; the remaining ones are read from disk for every token.

Shapes: B unfinished rows of a micro-batch, T tokens of prompt and completion so far, padded on the left; D hidden, V vocabulary.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from stun.config import StunError
from stun.evaluation.batches import MicroBatch, micro_batches, padded
from stun.evaluation.memory import Capacity
from stun.model.architecture import Architecture
from stun.model.forward import CACHE
from stun.preflight.hardware import read_speed
from stun.runtime.ranks import Ranks
from stun.runtime.units import count, duration, size
from stun.stream.embeddings import outside
from stun.stream.layer_stream import LayerStream, States, even_owners

_LOG = 60.0  # seconds between lines of the log
_TAIL = 32  # last tokens that are searched for a stop text
Saved = dict[str, list]  # of one micro-batch: generated `tokens` by row, and whether the row is `done`


@dataclass(frozen=True)
class Decoding:
    """End of a completion: after `limit` tokens, at one of the tokens `ends`, or at a text of `stop`.

    With `draws_RT`, numbers in [0, 1) by prompt R and token T, tokens are sampled; otherwise they are the most likely ones.
    """

    config: GenerationConfig
    tokenizer: PreTrainedTokenizerBase
    limit: int
    stop: list[str]
    draws_RT: torch.Tensor | None = None

    @property
    def ends(self) -> set[int]:
        ids = self.config.eos_token_id
        return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)

    @property
    def pad(self) -> int:
        token = self.tokenizer.pad_token_id
        return token if token is not None else self.tokenizer.eos_token_id or 0

    def is_done(self, tokens: list[int]) -> bool:
        """Whether the completion ends with these tokens."""
        if len(tokens) >= self.limit or (tokens and tokens[-1] in self.ends):
            return True
        return bool(self.stop) and any(stop in self.tokenizer.decode(tokens[-_TAIL:]) for stop in self.stop)

    def next_tokens(self, logits_BV: torch.Tensor, rows: list[int], step: int) -> torch.Tensor:
        """Token [B] number `step` of the prompts `rows`."""
        if self.draws_RT is None:
            return logits_BV.argmax(-1)
        logits_BV = logits_BV[:, : len(self.tokenizer)]
        next_B = sampled(logits_BV, self.draws_RT[rows, step].to(logits_BV.device))
        if next_B.max() >= logits_BV.shape[1]:
            raise StunError(f"the model's logits of token {step + 1} are not finite")
        return next_B


def sampled(logits_BV: torch.Tensor, draw_B: torch.Tensor) -> torch.Tensor:
    """Tokens [B] at which the cumulative probability passes `draw_B`, numbers in [0, 1). In float64, or 150,000 tokens' rounding
    errors would add up."""
    total_BV = logits_BV.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(total_BV, draw_B[:, None] * total_BV[:, -1:], right=True)[:, 0]


class _Batch:
    """Micro-batch in generation. Finished rows are removed once they are half of it. Seven parameters: all that it is
    made of, each known to the caller alone."""

    def __init__(
        self, number: int, batch: MicroBatch, prompts: list[list[int]], saved: Saved | None, arch: Architecture, decoding, device
    ):
        self.number, self.rows, self.arch, self.decoding, self.device = number, batch.rows, arch, decoding, device
        count = len(batch.rows)
        self.tokens: list[list[int]] = saved["tokens"] if saved else [[] for _ in range(count)]
        self.done: list[bool] = saved["done"] if saved else [False] * count
        self.places = [place for place in range(count) if not self.done[place]]  # rows that the tensors hold
        if self.places:
            self._start(prompts)

    def _start(self, prompts: list[list[int]]) -> None:
        """Build the tensors from the prompts and the tokens generated so far, equally many in every unfinished row."""
        batch_prompts = [prompts[self.rows[place]] for place in self.places]
        mask_BT = padded([[1] * len(ids) for ids in batch_prompts], 0, on_left=True).to(self.device)
        self.length = mask_BT.shape[1]
        self.processors = self.arch.logits_processors(self.decoding.config, mask_BT)
        generated_BT = torch.tensor([self.tokens[place] for place in self.places], device=self.device, dtype=torch.int64)
        pad = min(self.decoding.pad, self.arch.config.vocab_size - 1)  # the pad token of some tokenizers has no embedding
        self.ids_BT = torch.cat([padded(batch_prompts, pad, on_left=True).to(self.device), generated_BT], 1)
        self.mask_BT = torch.cat([mask_BT, torch.ones_like(generated_BT)], 1)
        self.cache = None

    def enter(self) -> tuple[torch.Tensor, list[dict]]:
        """Hidden states and keyword arguments for the first layer at the next step."""
        inputs = self.arch.next_inputs(self.ids_BT, self.mask_BT, self.cache)
        hidden_BTD, arguments = self.arch.enter(inputs.pop("input_ids"), **inputs)
        self.cache = arguments[0][CACHE]
        return hidden_BTD, arguments

    def advance(self, hidden_BTD: torch.Tensor) -> None:
        """Take the next token of every row."""
        logits_BV = self.processors(self.ids_BT, self.arch.leave(hidden_BTD[:, -1]).float())
        rows, step = [self.rows[place] for place in self.places], self.ids_BT.shape[1] - self.length
        next_B = self.decoding.next_tokens(logits_BV, rows, step)
        self.ids_BT = torch.cat([self.ids_BT, next_B[:, None]], 1)
        self.mask_BT = torch.cat([self.mask_BT, torch.ones_like(next_B)[:, None]], 1)
        for place, token in zip(self.places, next_B.tolist(), strict=True):
            if not self.done[place]:
                self.tokens[place].append(token)
                self.done[place] = self.decoding.is_done(self.tokens[place])
        unfinished = [i for i, place in enumerate(self.places) if not self.done[place]]
        if 2 * len(unfinished) <= len(self.places):
            self._keep(unfinished)

    def _keep(self, rows: list[int]) -> None:
        self.places = [self.places[i] for i in rows]
        if rows:
            index = torch.tensor(rows, device=self.device)
            self.ids_BT, self.mask_BT = self.ids_BT[index], self.mask_BT[index]
            self.processors = self.arch.logits_processors(self.decoding.config, self.mask_BT[:, : self.length])
            self.cache.reorder_cache(index)
        else:
            self.cache = None


@torch.no_grad()
def generate(
    arch: Architecture,
    prompts: list[list[int]],
    decoding: Decoding,
    capacity: Capacity,
    ranks: Ranks,
    saved: Callable[[int], Saved | None] = lambda number: None,
    save: Callable[[int, Saved], None] = lambda number, state: None,
) -> dict[int, list[int]]:
    """Generated tokens of this rank's prompts, by number of the prompt.

    All ranks call this together. `saved(m)` returns what an earlier call passed to `save` for micro-batch m. Seven parameters:
    where tokens are saved is not this module's concern.
    """
    batches = micro_batches([len(ids) for ids in prompts], capacity.batch)
    owners = [even_owners(layout, ranks.world) for layout in arch.layers]
    stream = LayerStream(arch, ranks, arch.layers, owners)
    stream.stays = capacity.held_layers
    wave, completions = capacity.turns * ranks.world, {}
    with outside(arch, ranks):
        for start in range(0, len(batches), wave):
            numbers = range(start + ranks.rank, min(start + wave, len(batches)), ranks.world)
            local = [_Batch(m, batches[m], prompts, saved(m), arch, decoding, ranks.device) for m in numbers]
            _complete(local, stream, ranks, capacity, save)
            completions |= {row: tokens for batch in local for row, tokens in zip(batch.rows, batch.tokens, strict=True)}
    for layer in stream.held:
        layer.release()
    return completions


def _complete(
    batches: list[_Batch], stream: LayerStream, ranks: Ranks, capacity: Capacity, save: Callable[[int, Saved], None]
) -> None:
    """Generate until the rows of all ranks are done."""
    logged, step = time.monotonic(), 0
    while True:
        unfinished = [batch for batch in batches if batch.places]
        rounds = int(ranks.all_gather(torch.tensor([len(unfinished)], device=ranks.device)).max())
        if not rounds:
            return
        step += 1
        ranks.doing = f"generate token {step}"
        _step(unfinished, stream, rounds, ranks)
        for batch in unfinished:
            # From tokens alone a micro-batch goes on with other last bits, so it does only where a step takes long.
            if not batch.places or capacity.step_bytes:
                save(batch.number, {"tokens": batch.tokens, "done": batch.done})
        if time.monotonic() - logged > _LOG:
            logged, rows = time.monotonic(), sum(len(batch.places) for batch in batches)
            ranks.log(f"generate: token {step}, {count(rows, 'unfinished row')} on this rank")


def _step(batches: list[_Batch], stream: LayerStream, rounds: int, ranks: Ranks) -> None:
    with stream.steady():
        entered = [batch.enter() for batch in batches]
    states = States([hidden for hidden, _ in entered], [arguments for _, arguments in entered], rounds * ranks.world)
    del entered
    for layer in stream:
        if layer.module is None:
            stream.build(layer)
        states = stream.run(layer, states)
    with stream.steady():
        for batch, hidden_BTD in zip(batches, states.hidden, strict=True):
            batch.advance(hidden_BTD)


def describe(capacity: Capacity, arch: Architecture, ranks: Ranks) -> str:
    """Description of a generation for the log. All ranks call this together; the first measures the disk, if it is read."""
    layers = count(len(arch.layers), "layer")
    if not capacity.step_bytes:
        return f"{capacity.batch} at once, all of {layers} in memory"
    held = f"{capacity.held_layers or 'none'} of {layers} in memory"
    read = ranks.on_first(lambda: read_speed(arch.source)) * max(1, ranks.world // ranks.local_world)
    step = f"{size(capacity.step_bytes)} are read for every token, about {duration(capacity.step_bytes / read)}"
    return f"{capacity.turns} times {capacity.batch} at once on a rank; {held}: {step}"
