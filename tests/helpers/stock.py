"""Checkpoints in transformers' own classes, and what they compute."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.family_runs import CALIBRATION
from helpers.naive import captured, compare_statistics, naive_statistics
from stun.model.tensor_names import experts_of
from stun.model.text_part import TextPart, auto_of, text_part
from stun.run.recorder import Recorder
from stun.statistics.observe import observe
from stun.stream.layer_stream import embed


def observed(arch, batches, ranks, folder) -> dict[int, dict]:
    """Statistics of every layer with experts, by an unbroken first stream in `folder`."""
    for part in ("progress", "hidden"):
        (folder / part).mkdir(parents=True)
    collected: dict[int, dict] = {}
    states, recorder = embed(arch, ranks, batches, arch.source.read), Recorder(folder, "observe", ranks, len(arch.layers))
    observe(arch, states, recorder, collected.__setitem__, [0] * states.total, sums_outputs=True)
    return collected


def check_statistics(arch, model, tokens, ranks, folder, family):
    """Co-activation and output norms of every expert equal a loop over tokens and their experts."""
    experts = {i: found[1] for i, layer in enumerate(model.base_model.layers) if (found := experts_of(layer))}
    seen = captured(model, experts, tokens)
    collected = observed(arch, tokens.split(CALIBRATION.micro_batch), ranks, folder)
    assert collected.keys() == seen.keys() and seen
    for index, statistics in collected.items():
        expected = naive_statistics(experts[index], seen[index])
        compare_statistics(statistics, expected)
        reached = statistics["powers"][0, :, 0, 0].long()
        print(f"{family} layer {index}: tokens of its experts {reached.tolist()}")
        assert reached.min() > 0, "random inputs must reach every expert"


def forbid(layer, survivors, replaced):
    """Make a layer's router give all others a logit of minus infinity, and a bias that never wins."""
    count = experts_of(layer)[1].num_experts
    gone = torch.tensor([expert not in survivors for expert in range(count)])
    router = next(m for m in layer.modules() if hasattr(m, "top_k") and any(p.shape[0] == count for p in m.parameters()))
    original, linear = router.forward, F.linear

    def without(*args, **kwargs):
        output = linear(*args, **kwargs)
        return output.masked_fill(gone, -torch.inf) if output.shape[-1] == count else output

    def forward(*args, **kwargs):
        with mock.patch.object(F, "linear", without):
            return original(*args, **kwargs)

    replaced.enter_context(mock.patch.object(router, "forward", forward))
    for name, tensor in layer.state_dict().items():
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            before = tensor.clone()
            tensor.masked_fill_(gone, -torch.inf)
            replaced.callback(tensor.copy_, before)


def text_of(model) -> TextPart:
    """The text part of a stock model."""
    return text_part(Path(), model)


def load_stock(folder):
    """The checkpoint in transformers' own class for it, with nothing missing, left over or of another shape."""
    auto = auto_of(type(AutoConfig.from_pretrained(folder)))[0]
    model, info = auto.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def logits_of(model, tokens):
    with torch.no_grad():
        return torch.cat([model(batch, use_cache=False).logits for batch in tokens.split(CALIBRATION.micro_batch)])


@torch.no_grad()
def full(folder, ids: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probabilities [T, V] of one sequence, and what leaves each decoder layer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    outputs = []
    for layer in model.base_model.layers:
        layer.register_forward_hook(lambda m, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), -1), outputs
