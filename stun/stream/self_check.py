"""Self-check of a family whose tests are not among this package's: the stream against the family's own forward.

A model of the family, with random weights and its shape made small, is saved by transformers and streamed. What leaves each
layer, and the logits, must be what the model itself computes, on tokens that reach every expert; then the stream must run without
some of them.
"""

import copy
import re
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from stun.checkpoint.reader import Checkpoint
from stun.config import StunError
from stun.model.architecture import Architecture
from stun.model.empty import without_weights
from stun.model.families import HETEROGENEOUS, TESTED
from stun.model.text_part import class_of, text_part
from stun.runtime.ranks import Alone, Ranks
from stun.stream.embeddings import outside
from stun.stream.expert_parallel import Observer
from stun.stream.layer_stream import LayerStream, embed, even_owners
from stun.stream.output_path import PathFinder

_MOST = 2**26  # weights of the small model
_LAYERS = 6
_SEED, _SAMPLES, _LENGTH = 11, 12, 32
_TOLERANCE = 1e-3  # of the largest hidden state of a layer: sums in another order differ by 1e-5
_WIDTH = re.compile(r"(size|dim|rank|width)s?$")
_NO_WIDTH = re.compile(r"vocab|window|patch|chunk|block|kernel|group|conv|image|temporal|merge|conv_size")
_DEPTH = ("num_hidden_layers", "depth", "num_layers", "encoder_layers")


def check_unknown(arch: Architecture, ranks: Ranks, is_refitted: bool = False) -> None:
    """Check a family that is not one of `TESTED`, also for the joint refit if it is to be refitted. All ranks call this together;
    the first one checks. Raises StunError, with what differs."""
    is_own_form = arch.source.config["model_type"].startswith(HETEROGENEOUS)  # a result, of a model that was checked
    if arch.model_type not in TESTED and not is_own_form:
        ranks.on_first(lambda: self_check(arch, is_refitted))
        ranks.log(f"{arch.model_type} has no tests here; a small model of it passes the self-check")


def self_check(arch: Architecture, is_refitted: bool = False) -> None:
    """The check. Raises StunError, with what differs."""
    refused = f"{arch.source.folder}: model_type {arch.model_type!r} has no tests here and fails the self-check"
    try:
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]), torch.no_grad():
            model = _small_model(arch)
            model.save_pretrained(folder)
            _compare(model, Architecture(Checkpoint.open(Path(folder))), is_refitted)
    except StunError as error:
        raise StunError(f"{refused}: {error}") from error
    except Exception as error:  # whatever the family's code raises
        raise StunError(f"{refused}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error


def _small_model(arch: Architecture) -> PreTrainedModel:
    """Model of the family with random weights that make routing vary. Raises StunError if its shape cannot be made small."""
    reason = f"none has at most {_MOST:,} weights"
    for config in _small_configs(arch):
        try:
            with without_weights():
                empty = class_of(type(config))._from_config(copy.deepcopy(config))
            if sum(parameter.numel() for parameter in empty.parameters()) > _MOST:
                continue
            model = class_of(type(config))._from_config(config).eval()
            model.set_experts_implementation("eager")
            _randomise(model)
            text_part(arch.source.folder, model).model(input_ids=_tokens(arch)[:1], use_cache=False)
        except Exception as error:  # of many kinds, for a shape that is impossible for the family
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        return model
    raise StunError(f"no small shape of it was found that its code runs ({reason})")


def _small_configs(arch: Architecture) -> Iterator[PreTrainedConfig]:
    """The model's configuration in smaller shapes, the smallest first, and at last as it is."""
    for factor in (64, 32, 16, 8, 4, 2, 1):
        for layers in (_LAYERS, 0):
            config = copy.deepcopy(arch.whole.config)
            config.dtype = torch.float32
            _shrink(config, factor, layers)
            text = config
            for name in arch.text_path:
                text = getattr(text, name)
            count = arch.groups * max(arch.group_floor + 1, -(-8 // arch.groups))
            setattr(text, arch.count, min(getattr(text, arch.count), count))
            yield config


def _shrink(config: PreTrainedConfig, factor: int, layers: int) -> None:
    """Divide the widths of a configuration, and of those in it, by a factor; keep the first `layers` layers (0: all)."""
    depth = next((getattr(config, name) for name in _DEPTH if isinstance(getattr(config, name, None), int)), 0)
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _shrink(value, factor, layers)
        elif layers and name in _DEPTH and isinstance(value, int):
            setattr(config, name, min(value, layers))
        elif layers and isinstance(value, list) and len(value) == depth > layers:
            setattr(config, name, value[:layers])
        elif type(value) is int and _WIDTH.search(name) and not _NO_WIDTH.search(name):
            setattr(config, name, value // factor if value % factor == 0 and value // factor >= 4 else value)


def _randomise(model: PreTrainedModel) -> None:
    torch.manual_seed(_SEED)
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_floating_point() and tensor.dim() > 1:
            tensor.normal_(0, 1.2 * tensor.shape[-1] ** -0.5)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.02) if "bias" in name else tensor.uniform_(0.8, 1.2)


def _tokens(arch: Architecture) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(3, min(1000, arch.config.vocab_size), (_SAMPLES, _LENGTH), generator=generator)


class _Reached(Observer):
    """Experts of a layer that tokens reach."""

    def __init__(self) -> None:
        self.experts: set[int] = set()

    def routed(self, micro_batch, index_TK, weights_TK) -> None:
        self.experts |= set(index_TK.unique().tolist())


def _compare(model: PreTrainedModel, arch: Architecture, is_refitted: bool) -> None:
    """Raise StunError where the stream differs from the model, or, if layers are to be refitted, has no path for that."""
    tokens_ST, ranks = _tokens(arch), Alone()
    text = text_part(arch.source.folder, model)
    leaves: list[torch.Tensor] = []
    for layer in text.decoder.layers:
        layer.register_forward_hook(lambda _, __, output: leaves.append(output[0] if isinstance(output, tuple) else output))
    logits = text.model(input_ids=tokens_ST, use_cache=False).logits
    states = embed(arch, ranks, [tokens_ST], arch.source.read)
    stream = LayerStream(arch, ranks, arch.layers, [even_owners(layout, 1) for layout in arch.layers])
    for layer in stream:
        before, reached = states, _Reached()
        stream.build(layer)
        finder = PathFinder(stream, layer) if is_refitted and layer.kept else None
        with finder.watching() if finder else nullcontext():
            states = stream.run(layer, before, reached)
        if finder:
            finder.path(before, states.hidden)
        _require_equal(f"layer {layer.layout.index}", states.hidden[0], leaves[layer.layout.index])
        missed = sorted(set(range(layer.layout.num_experts)) - reached.experts)
        if missed:
            raise StunError(f"layer {layer.layout.index}: no token reaches experts {missed}, which proves nothing of them")
        if layer.kept and len(layer.kept) > arch.groups * arch.group_floor:
            size = layer.layout.num_experts // arch.groups
            stream.keep(layer, [number for number in layer.kept if number % size])
            stream.build(layer)
            stream.run(layer, before)
    with outside(arch, ranks):
        streamed = arch.leave(states.hidden[0].flatten(0, 1)).view_as(logits)
    _require_equal("the logits", streamed, logits)


def _require_equal(what: str, streamed: torch.Tensor, full: torch.Tensor) -> None:
    if streamed.shape != full.shape:
        raise StunError(f"{what}: the stream gives the shape {tuple(streamed.shape)}, the model {tuple(full.shape)}")
    error = float((streamed - full).abs().max() / full.abs().max().clamp_min(1e-6))
    if not error <= _TOLERANCE:
        raise StunError(f"{what}: the stream differs from the model by {error:.2g} of the largest value")
