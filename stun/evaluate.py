"""Quality of a checkpoint that fits in memory: generative exact match and perplexity, spread over the ranks."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from stun.checkpoint import Checkpoint
from stun.compressed import is_compressed, load_model
from stun.config import StunError, TaskConfig
from stun.data import in_order, load_rows, load_tokenizer
from stun.ranks import Ranks


def extract(text: str, marker: str) -> str | None:
    """What follows the last `marker`, up to the end of its line, without surrounding spaces; None where there is no marker."""
    _, found, tail = text.rpartition(marker)
    return tail.strip().partition("\n")[0].strip() if found else None


def _batches(lengths: list[int], size: int, ranks: Ranks) -> list[list[int]]:
    """This rank's batches of row numbers, rows of similar length together. A batch does not depend on the number of ranks."""
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    return [order[i : i + size] for i in range(0, len(order), size)][ranks.rank :: ranks.world]


def _pad(sequences: list[list[int]], pad: int, left: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) [B, T]."""
    longest = max(map(len, sequences))
    ids = [[pad] * (longest - len(s)) + s if left else s + [pad] * (longest - len(s)) for s in sequences]
    masks = [[0] * (longest - len(s)) + [1] * len(s) if left else [1] * len(s) + [0] * (longest - len(s)) for s in sequences]
    return torch.tensor(ids, device=device), torch.tensor(masks, device=device)


def _exact_matches(model, tokenizer, rows: list[dict], cfg: TaskConfig, ranks: Ranks) -> dict[int, bool]:
    """Row number -> whether the greedy completion has the right result, for this rank's rows."""
    prompts = tokenizer([row[cfg.question] for row in rows])["input_ids"]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    right = {}
    for batch in _batches([len(p) for p in prompts], cfg.batch, ranks):
        ids, mask = _pad([prompts[row] for row in batch], pad, True, ranks.device)
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=cfg.max_new_tokens, pad_token_id=pad
        )
        for row, text in zip(batch, tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True), strict=True):
            right[row] = extract(text, cfg.marker) == extract(rows[row][cfg.answer], cfg.marker)
    return right


@torch.no_grad()
def _losses(model, tokenizer, rows: list[dict], cfg: TaskConfig, ranks: Ranks) -> dict[int, tuple[float, int]]:
    """Row number -> (summed negative log-likelihood of question and answer, tokens predicted), for this rank's rows."""
    texts = tokenizer([row[cfg.question] + row[cfg.answer] for row in rows])["input_ids"]
    losses = {}
    for batch in _batches([len(t) for t in texts], cfg.batch, ranks):
        ids, mask = _pad([texts[row] for row in batch], 0, False, ranks.device)
        logits = model(ids, attention_mask=mask, use_cache=False).logits.float()
        nll_BT = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none") * mask[:, 1:]
        for row, total in zip(batch, nll_BT.double().sum(1).tolist(), strict=True):
            losses[row] = (total, len(texts[row]) - 1)
    return losses


def _from_all(ranks: Ranks, own: dict) -> dict:
    """The row-numbered results of every rank in one mapping."""
    return {row: result for part in ranks.gather_objects(own) for row, result in part.items()}


def _load_checked(path: str, **keywords) -> PreTrainedModel:
    Checkpoint.open(path)
    return AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, **keywords)


def evaluate(path: str, cfg: TaskConfig, ranks: Ranks) -> dict:
    """Exact match by group and on average (of the groups), and perplexity per token, of the checkpoint at `path`.

    All ranks call this together; each holds the whole model. Raises StunError on unreadable rows or an unloadable model.
    """
    started = time.perf_counter()
    rows = ranks.on_first(lambda: list(in_order(load_rows(cfg.path, "task.path"), cfg.path, "task.path")))
    for number, row in enumerate(rows):
        if not all(isinstance(row.get(key), str) for key in (cfg.question, cfg.answer)):
            raise StunError(f"task.path={cfg.path}: row {number} needs the text fields {cfg.question!r} and {cfg.answer!r}")
        if extract(row[cfg.answer], cfg.marker) is None:
            raise StunError(f"task.path={cfg.path}: row {number}: no {cfg.marker!r} in its answer; see task.marker")
    tokenizer = load_tokenizer(Path(path))
    dtype = torch.float32 if ranks.device.type == "cpu" else "auto"
    load = load_model if is_compressed(path) else _load_checked
    try:
        model = load(path, dtype=dtype, trust_remote_code=False).to(ranks.device).eval()
    except (OSError, ValueError) as error:
        raise StunError(f"{path}: cannot be loaded for evaluation: {error}") from error
    right = _from_all(ranks, _exact_matches(model, tokenizer, rows, cfg, ranks))
    losses = _from_all(ranks, _losses(model, tokenizer, rows, cfg, ranks))
    groups: dict[str, list[bool]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(str(row.get(cfg.group, "all")), []).append(right[number])
    by_group = {name: sum(hits) / len(hits) for name, hits in groups.items()}
    nll, tokens = (sum(losses[row][i] for row in sorted(losses)) for i in (0, 1))
    return {
        "exact_match": by_group,
        "average": sum(by_group.values()) / len(by_group),
        "perplexity": math.exp(nll / tokens),
        "rows": len(rows),
        "right": [right[row] for row in range(len(rows))],
        "groups": [str(row.get(cfg.group, "all")) for row in rows],
        "seconds": time.perf_counter() - started,
    }
