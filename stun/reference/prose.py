"""Prose beside the tasks: paragraphs of a text file, mixed with samples of tasks token for token."""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from stun.config import StunError
from stun.reference.tasks import Sample

PROSE = "prose"  # task of its samples; their question is empty
_APART = 8  # one paragraph in so many is kept apart from training


def read_prose(path: str, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Paragraphs of a UTF-8 text file, which empty lines part, drawn by `seed`: (those kept apart from training, the others);
    both empty without a path. Raises StunError if there is no such file, or too little in it."""
    if not path:
        return [], []
    if not Path(path).is_file():
        raise StunError(f"prose={path}: no such file; a text whose paragraphs empty lines part")
    texts = dict.fromkeys(text.strip() for text in Path(path).read_text(encoding="utf-8").split("\n\n"))
    samples = [Sample(PROSE, "", text) for text in texts if text]
    if len(samples) < _APART:
        raise StunError(f"prose={path}: {len(samples)} paragraphs; {_APART} or more, parted by empty lines")
    random.Random(seed).shuffle(samples)
    return samples[: len(samples) // _APART], samples[len(samples) // _APART :]


def tokens_of(samples: list[Sample], tokenizer: PreTrainedTokenizerFast) -> int:
    """Number of tokens of samples' texts."""
    texts = [sample.question + sample.answer for sample in samples]
    return sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))


def mixed(tasks: Iterable[Sample], prose: Iterator[Sample], tokenizer: PreTrainedTokenizerFast) -> Iterator[Sample]:
    """Samples of tasks, and after them as much prose as makes the tokens of both equal. Raises StunError if it runs out."""
    ahead = 0  # tokens of tasks less those of prose
    for sample in tasks:
        yield sample
        ahead += tokens_of([sample], tokenizer)
        paragraphs = up_to(prose, ahead, tokenizer)
        yield from paragraphs
        ahead -= tokens_of(paragraphs, tokenizer) if paragraphs else 0


def up_to(samples: Iterator[Sample], tokens: int, tokenizer: PreTrainedTokenizerFast) -> list[Sample]:
    """First samples that hold `tokens` tokens between them. Raises StunError if there are too few."""
    taken: list[Sample] = []
    while tokens > 0:
        sample = next(samples, None)
        if sample is None:
            raise StunError("prose: the text is too short; a longer one, or fewer calibration_samples and heldout_samples")
        taken.append(sample)
        tokens -= tokens_of([sample], tokenizer)
    return taken
