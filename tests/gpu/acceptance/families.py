"""Small random models: pruned twice in bfloat16, and once with stops, to the same bytes; close to a CPU in float32; evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from gpu.acceptance.rows import Row
from helpers.gpu_runs import evaluate_briefly, prune_with_stops, request
from helpers.tensors import load_tensors, same_tensors
from helpers.zoo import make_checkpoint
from stun.checkpoint.reader import Checkpoint
from stun.config import Device, Precision, PruneConfig
from stun.data.tokenizer import load_tokenizer
from stun.evaluation.generate import Decoding, generate
from stun.evaluation.memory import generation_capacity
from stun.model.architecture import Architecture
from stun.pruning.job import prune
from stun.runtime.ranks import Ranks

_FAMILIES = ("arctic", "gpt_oss", "deepseek_v3", "qwen3_next")
_TOKENS = 6  # of a completion
_MOVED, _RATIO = 0.01, 0.05  # most weights whose mask differs from the CPU's, and most that perplexities differ by


def check(folder: Path, pretend: bool) -> Iterator[Row]:
    gpu, cpu = Ranks(Device.cuda), Ranks(Device.cpu)
    for family in _FAMILIES[: 1 if pretend else None]:
        source = make_checkpoint(folder / family / "source", family, torch.bfloat16)

        def run(name: str, ranks: Ranks, how: Callable[[PruneConfig, Ranks], object] = prune, of=source, **changes) -> Path:
            run_dir = of.parent / name
            how(replace(request(of, run_dir), **changes), ranks)
            return run_dir / "model"

        first = run("first", gpu)
        yield _same(f"{family}, once more", first, run("second", gpu))
        yield _same(f"{family}, stopped twice", first, run("stopped", gpu, prune_with_stops))
        exact = (run(name, ranks, precision=Precision.float32) for name, ranks in (("exact", gpu), ("exact-cpu", cpu)))
        yield _close(f"{family}, masks unlike the CPU's in float32", *exact)
        yield _beside_others(f"{family}, prompts of several lengths at once", source, gpu)
    yield _evaluated(first, folder, gpu, cpu)


def _same(name: str, one: Path, two: Path) -> Row:
    try:
        same_tensors(one, two)
    except AssertionError as error:
        return Row(name, f"other bytes: {str(error).partition(chr(10))[0]}", is_right=False)
    return Row(name, "the same bytes")


def _close(name: str, one: Path, two: Path) -> Row:
    """Share of the weights that one has removed and the other has not."""
    first, second = ({key: weight == 0 for key, weight in load_tensors(path).items()} for path in (one, two))
    if {key: mask.shape for key, mask in first.items()} != {key: mask.shape for key, mask in second.items()}:
        return Row(name, "other experts are kept", is_right=False)
    moved = sum(int((mask ^ second[key]).sum()) for key, mask in first.items())
    share = moved / sum(mask.numel() for mask in first.values())
    return Row(name, 100 * share, "%", 100 * _MOVED, "at most", share <= _MOVED)


def _beside_others(name: str, model: Path, ranks: Ranks) -> Row:
    """Completions are those of each prompt alone: padding on the left, which may see no key at all, reaches no other token."""
    arch = Architecture(Checkpoint.open(model), Precision.float32)
    prompts = [list(range(5, 5 + length)) for length in (3, 20, 7, 12)]
    decoding = Decoding(arch.generation_config(_TOKENS), load_tokenizer(model), _TOKENS, [])
    capacities = (generation_capacity(arch, list(map(len, prompts)), _TOKENS, size, ranks) for size in (1, len(prompts)))
    alone, together = (generate(arch, prompts, decoding, capacity, ranks) for capacity in capacities)
    is_same = alone == together
    return Row(name, "the same completions" if is_same else "other completions", is_right=is_same)


def _evaluated(model: Path, folder: Path, gpu: Ranks, cpu: Ranks) -> Row:
    found = []
    for name, ranks in (("on-gpu", gpu), ("on-cpu", cpu)):
        (folder / name).mkdir()
        found.append(evaluate_briefly(model, folder / name, ranks)["perplexity"])
    one, other = found
    return Row("perplexity", one, "", other, "on the CPU", abs(one / other - 1) <= _RATIO)
