"""Masks of a run against the same formula on what the pruned model sees in memory, with its dense weights."""

from __future__ import annotations

import torch

from helpers.naive import captured, naive_inner
from stun.config import SparsifyConfig, SparsifyMethod
from stun.model.architecture import joined
from stun.model.layer_layout import renumber
from stun.model.tensor_names import experts_of
from stun.planning.budget import LayerQuota, layer_quotas
from stun.planning.plan import LayerPlan, Plan
from stun.sparsify.matrix import sparsify


def check_masks(how: SparsifyConfig, arch, model, plan: dict, sizes, source, written, tokens) -> None:
    """`model` is the stock text model of the pruned checkpoint; its weights become those that were written, layer by layer."""
    kept = [layer["kept"] for layer in plan["layers"]]
    decoder_layers = model.layers
    copy_dense_weights(decoder_layers, arch, source, kept)
    for layout, layer, quota in zip(arch.layers, decoder_layers, quotas_of(plan, sizes), strict=True):
        found = experts_of(layer)
        modules = {name: layer.get_submodule(layout.dense[name].removesuffix(".weight")) for name in quota.dense}
        seen = captured(model, modules | ({"experts": found[1]} if found else {}), tokens)
        for name, module in modules.items():
            inputs = torch.cat([args[0].flatten(0, -2) for args, _ in seen[name]])
            check_matrix(how, rows_of(layout, module.weight.data, name, source), inputs, quota.dense[name], written[name])
        if found:
            check_experts(how, layout, found[1], quota, seen["experts"], written, kept[layout.index])


def rows_of(layout, weight, name: str, source):
    """The rows of a module's weight that a source tensor holds; several may be joined in it."""
    start = 0
    for other in (other for other, inside in layout.dense.items() if inside == layout.dense[name]):
        if other == name:
            return weight[start : start + len(source[name])]
        start += len(source[other])
    raise KeyError(name)


def quotas_of(plan: dict, sizes) -> list[LayerQuota]:
    """What the job was to remove, from its plan.json."""
    layers = [LayerPlan(**entry) for entry in plan["layers"]]
    return layer_quotas(
        sizes, Plan(plan["target"], plan["parameters"], plan["dropped"], plan["zeros"], plan["scope_size"], layers)
    )


def check_matrix(how: SparsifyConfig, weight, inputs, count: int, written) -> None:
    """Prune `weight` in place by all its inputs at once, find it as written, and go on with what was written."""
    moment = inputs.T @ inputs if how.reads_grams else inputs.double().square().sum(0)
    weight.copy_(sparsify(how, weight, moment, count, "matrix"))
    if how.reads_grams:  # the sums differ in their last bits, which can decide between two weights
        assert ((weight == 0) == (written == 0)).float().mean() > 0.99 and int((written == 0).sum()) == int((weight == 0).sum())
        assert (weight - written).norm() < 0.1 * written.norm()
        weight.copy_(written)
    assert torch.equal(weight, written)


def copy_dense_weights(layers, arch, source, kept) -> None:
    """Undo the masks: every surviving weight back to its source value. Tables of experts stay as written."""
    for layout, layer in zip(arch.layers, layers, strict=True):
        inside_layer, survivors = layer.state_dict(), torch.tensor(kept[layout.index])
        dense = {name: source[name] for name in layout.dense if name not in layout.tables}
        dense |= {name: source[name].index_select(dim, survivors) for name, dim in layout.routed.items()}
        for inside, value in joined(layout.dense, dense).items():
            inside_layer[inside].copy_(value)
        if layout.experts:
            module = experts_of(layer)[1]
            for number, expert in enumerate(kept[layout.index]):
                for part in layout.experts[expert]:
                    value = stored(layout, source, expert, expert, part)
                    own = getattr(module, part).data[number]
                    own.copy_(value if value.shape == own.shape else value.T)


def stored(layout, tensors, expert: int, number: int, part: str) -> torch.Tensor:
    """A part of what was expert `expert` of the source, from a checkpoint in which it is number `number`."""
    names = layout.experts[expert][part]
    if part in layout.fused:
        return tensors[names[0]][number]
    return torch.cat([tensors[renumber(name, number)] for name in names])


def check_experts(how: SparsifyConfig, layout, module, quota, calls, written, kept) -> None:
    for number, expert in enumerate(kept):
        inputs = [
            (x, gates[chosen.index(number)])
            for (hidden, index, weights), _ in calls
            for x, chosen, gates in zip(hidden.view(len(index), -1), index.tolist(), weights.float(), strict=True)
            if number in chosen
        ]
        assert inputs, "every survivor must see a token here"
        inner = [(naive_inner(module, number, x), gate) for x, gate in inputs]
        gated = how.method is SparsifyMethod.moe_pruner
        for part, rows in (("gate_up_proj" if module.has_gate else "up_proj", inputs), ("down_proj", inner)):
            own = getattr(module, part).data[number]
            weight = own.T if module.is_transposed else own
            seen = torch.stack([x * gate if gated else x for x, gate in rows])
            found = layout.oriented(stored(layout, written, expert, number, part))
            check_matrix(how, weight, seen, quota.experts[number][part], found)
