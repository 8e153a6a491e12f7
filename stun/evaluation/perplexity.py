"""Perplexity of a checkpoint and its distance from the dense model, from the layer stream.

Micro-batches hold sequences of similar length, padded on the right, where causal attention cannot see the padding; only real
tokens are counted. All sums are exact (math.fsum), so they do not depend on the number of ranks.

Shapes: B sequences, T tokens of the longest, N predicted tokens, D hidden, V vocabulary.
"""

import math
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from stun.config import StunError
from stun.evaluation.batches import MicroBatch, micro_batches, padded
from stun.model.architecture import Architecture
from stun.run.recorder import Recorder
from stun.runtime.determinism import steady
from stun.runtime.ranks import Ranks
from stun.stream.embeddings import outside
from stun.stream.expert_parallel import Layer
from stun.stream.layer_stream import LayerStream, States, embed, even_owners
from stun.stream.progress import Progress

_LOGITS = 2**26  # logits computed at once
_MOST = 700.0  # nats a token, of which the exponential is a number


def score(
    arch: Architecture, dense: Architecture | None, sequences: list[list[int]], size: int, ranks: Ranks, folder: Path
) -> dict:
    """Scores of the model over `sequences`, `size` of them at once: `perplexity` over the predicted `tokens`.

    A dense model is streamed in lock-step. Beside it also `agreement`, with `kl`, the mean of KL(dense || model) in nats per
    token, and `top1`, the share of tokens with the same most likely token, and `layer_error`, ||H' - H||^2 / ||H||^2 of the
    hidden states after each layer. Resumes an interrupted call with the same arguments from `folder`.
    """
    batches = micro_batches([len(ids) for ids in sequences], size)
    tokens = [padded([sequences[row] for row in batch.rows], 0) for batch in batches]
    models = {"score": arch} | ({"dense": dense} if dense else {})
    recorders = {name: Recorder(folder, name, ranks, len(arch.layers) + 1) for name in models}
    finished = {name: recorder.finished() for name, recorder in recorders.items()}
    first = min(map(len, finished.values()))
    states, streams = {}, {}
    for name, model in models.items():
        states[name] = embed(model, ranks, tokens, model.source.read)
        states[name] = recorders[name].restore(finished[name][:first], states[name])
        owners = [even_owners(layout, ranks.world) for layout in model.layers]
        streams[name] = LayerStream(model, ranks, model.layers, owners, first)
        streams[name].beside = len(models)
    progress = Progress("score", len(arch.layers), ranks, first)
    for layers in zip(*streams.values(), strict=True):
        ranks.doing = f"score layer {layers[0].layout.index}"
        ranks.meter.enter("score")
        _run_layer(layers, streams, states, recorders, batches, ranks)
        progress.layer(layers[0], f"experts {len(layers[0].kept)}")
    for recorder in recorders.values():
        recorder.close()
    progress.close()
    totals = _token_sums(list(models.values()), list(states.values()), batches, tokens, ranks)
    return _scores(totals, recorders["score"].finished() if dense else [])


def _run_layer(
    layers: tuple[Layer, ...],
    streams: dict[str, LayerStream],
    states: dict[str, States],
    recorders: dict[str, Recorder],
    batches: list[MicroBatch],
    ranks: Ranks,
) -> None:
    """Run one layer of every model and replace `states`; errors are recorded in the entry of the scored model."""
    start, index = time.perf_counter(), layers[0].layout.index
    for layer, (name, stream) in zip(layers, streams.items(), strict=True):
        stream.build(layer)
        states[name] = stream.run(layer, states[name])
    error = _squared_errors(states["score"], states["dense"], batches, ranks) if "dense" in states else []
    layers[0].seconds["compute"] = time.perf_counter() - start
    layers[0].seconds["write"] = sum(recorder.wait() for recorder in recorders.values())
    for name, recorder in recorders.items():
        recorder.layer(index, states[name], {"error": error} if name == "score" else {})


def _squared_errors(model: States, dense: States, batches: list[MicroBatch], ranks: Ranks) -> list[list[float]]:
    """[||H' - H||^2, ||H||^2] for each micro-batch of this rank."""
    errors = []
    for hidden_BTD, dense_BTD, batch in zip(model.hidden, dense.hidden, batches[ranks.rank :: ranks.world], strict=True):
        real_BT = batch.real_BT(ranks.device)
        parts = (hidden_BTD.float() - dense_BTD.float(), dense_BTD.float())
        errors.append([math.fsum(part.square().flatten(2).sum(-1)[real_BT].tolist()) for part in parts])
    return errors


@torch.no_grad()
def _token_sums(
    models: list[Architecture], states: list[States], batches: list[MicroBatch], tokens: list[torch.Tensor], ranks: Ranks
) -> list[float]:
    """Sums over all predicted tokens: their number, negative log-likelihood, and for two models KL and top-1 agreement."""
    local: list[list[float]] = []
    with ExitStack() as stack, steady(ranks.device, ranks.workers):
        for model in models:
            stack.enter_context(outside(model, ranks))
        for turn, batch in enumerate(batches[ranks.rank :: ranks.world]):
            predicts_BT = batch.real_BT(ranks.device)[:, 1:]
            target_N = tokens[turn * ranks.world + ranks.rank].to(ranks.device)[:, 1:][predicts_BT]
            hidden = [model_states.hidden[turn][:, :-1][predicts_BT] for model_states in states]
            local.append([float(len(target_N)), *_sums_of(models, hidden, target_N)])
    sums = [row for rows in ranks.gather_objects(local) for row in rows]
    return [math.fsum(column) for column in zip(*sums, strict=True)]


def _sums_of(models: list[Architecture], hidden: list[torch.Tensor], target_N: torch.Tensor) -> list[float]:
    """Sums over N tokens; `hidden` has the hidden states [N, D] of every model."""
    size = max(1, _LOGITS // models[0].config.vocab_size)
    sums: list[list[float]] = [[], [], []]
    for part_N, *parts in zip(target_N.split(size), *(hidden_ND.split(size) for hidden_ND in hidden), strict=True):
        log_NV, *dense = (torch.log_softmax(model.leave(part).float(), -1) for model, part in zip(models, parts, strict=True))
        sums[0] += (-log_NV.gather(1, part_N[:, None])[:, 0]).tolist()
        for dense_NV in dense:
            sums[1] += (dense_NV.exp() * (dense_NV - log_NV)).sum(-1).tolist()
            sums[2] += (dense_NV.argmax(-1) == log_NV.argmax(-1)).float().tolist()
    return [math.fsum(values) for values in sums[: 1 if len(models) == 1 else 3]]


def _scores(totals: list[float], finished: list[list[dict]]) -> dict:
    tokens, nll, *agreement = totals
    if not all(map(math.isfinite, totals)) or nll / tokens > _MOST:
        raise StunError("the model's predictions are not finite, or so far from the text that there is no perplexity")
    scores = {"perplexity": math.exp(nll / tokens), "tokens": int(tokens)}
    if not agreement:
        return scores
    kl, top1 = (total / tokens for total in agreement)
    layer_error = []
    for entries in finished:
        error, norm = (math.fsum(values) for values in zip(*(pair for entry in entries for pair in entry["error"]), strict=True))
        layer_error.append(error / norm if norm else 0.0)
    return {**scores, "agreement": {"kl": kl, "top1": top1, "tokens": int(tokens)}, "layer_error": layer_error}
