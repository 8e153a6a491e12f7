"""A checkpoint's model without its weights: transformers' modules on the meta device, for every family.

Router rules, masks and rotary embeddings come from transformers, whose internals only this package uses. Whatever else differs
between families is data in `stun.model.families`.
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from stun.checkpoint.headers import TensorInfo
from stun.checkpoint.reader import Checkpoint
from stun.config import Precision, StunError
from stun.model import heterogeneous
from stun.model.as_configured import as_configured
from stun.model.empty import without_weights
from stun.model.families import COUNT_FIELDS, NOVICES, family_of
from stun.model.form_settings import renumbered
from stun.model.layer_layout import LayerLayout
from stun.model.novices import stock
from stun.model.tensor_names import NameMap, experts_of

EXPERTS_IMPLEMENTATION = "stun"
# Name of the cache among the arguments of a layer and of the model: transformers 5.24 renamed it.
_PREPARES = signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = next(name for name in ("cache", "past_key_values") if name in _PREPARES)


# Flags that change what layers and models return, whatever config.json says.
_RETURNS = {"output_attentions": False, "output_hidden_states": False, "output_router_logits": False, "return_dict": True}


class _Entered(Exception):
    """Ends the model's forward once it has called all layers."""


class Architecture:
    """Modules of a checkpoint's model on the meta device, and the places of its tensors in them.

    `layers` and `mtp` are the layouts of decoder layers and of multi-token-prediction heads with experts. `outer` maps every
    other source name to its parameter ('' where the model has none). `precision` decides the compute dtype. Raises StunError.
    """

    def __init__(self, source: Checkpoint, precision: Precision = Precision.auto):
        self.source, self.precision = source, precision
        folder, self.is_nested = source.folder, isinstance(source.config.get("text_config"), dict)
        self.model_type, self.family = family_of(folder, source.config)
        try:
            whole = stock(AutoConfig.from_pretrained(folder, trust_remote_code=False, output_attentions=False))
            self.config = whole.get_text_config(decoder=True)
            for flag, value in _RETURNS.items():
                setattr(self.config, flag, value)
            self.config.__dict__.pop("quantization_config", None)  # the reader dequantises
            # A named implementation could be code that transformers fetches from the hub.
            self.config._attn_implementation = None
            with without_weights():
                self.model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds, all of them about this file
            raise StunError(f"{folder / 'config.json'}: transformers cannot build this model: {error}") from error
        self.model.eval()
        if EXPERTS_IMPLEMENTATION in ALL_EXPERTS_FUNCTIONS:
            self.model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        self.decoder = self.model.base_model
        with as_configured(folder, "the model"):
            names = NameMap(source, self.model, self.build_layer)
        self.layers, self.mtp, self.outer = names.layers, names.mtp, names.outer
        modules = [module for layer in self.decoder.layers if experts_of(layer) for module in layer.modules()]
        self.top_k = self._top_k([module.top_k for module in modules if hasattr(module, "top_k")])
        self.groups, self.group_floor = self._groups()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of most of the checkpoint's bytes."""
        nbytes: dict[torch.dtype, int] = {}
        for info in self.source.tensors.values():
            nbytes[info.dtype] = nbytes.get(info.dtype, 0) + info.nbytes
        return max(nbytes, key=nbytes.get)

    def info(self, name: str) -> TensorInfo:
        """Place, shape and dtype of a source tensor."""
        return self.source.tensors[name]

    def piece(self, layout: LayerLayout, expert: int, part: str) -> list[TensorInfo]:
        """Source tensors, or entries of them, that make up one part of an expert."""
        infos = [self.info(name) for name in layout.experts[expert][part]]
        return [info.row(expert) for info in infos] if part in layout.fused else infos

    def down_shape(self, layout: LayerLayout) -> tuple[int, int]:
        """Rows and columns of an expert's down projection."""
        rows, columns = self.piece(layout, layout.whole[0], "down_proj")[0].shape
        return (columns, rows) if layout.is_transposed else (rows, columns)

    def read_expert(
        self, layout: LayerLayout, expert: int, read: Callable[..., torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Parts of one expert, from disk, by the function of a `reading` if given; from a tensor that holds all experts only its
        bytes are read."""
        parts, read = layout.experts[expert], read or self.source.read
        return {part: read(*names, row=expert if part in layout.fused else None) for part, names in parts.items()}

    def novice_dtype(self, layout: LayerLayout) -> torch.dtype:
        """Dtype of a layer's constants: that of its down projections."""
        return self.piece(layout, 0, "down_proj")[0].dtype

    def parameters_of(self, layout: LayerLayout) -> int:
        """Number of parameters of a decoder layer in the checkpoint."""
        experts = {name for expert in layout.experts for names in expert.values() for name in names}
        return sum(self.info(name).numel for name in [*layout.copied, *experts])

    def _top_k(self, numbers: list[object]) -> int:
        """Most experts that a token is sent to. Raises StunError unless all layers' are whole numbers."""
        for number in numbers:
            if type(number) is not int:
                raise StunError(f"{self.source.folder / 'config.json'}: a token's number of experts cannot be {str(number)[:80]}")
        return max(numbers, default=0)

    def _groups(self) -> tuple[int, int]:
        """Routing groups (1: none), and the fewest experts a group may keep. Raises StunError."""
        counts = [layout.num_experts for layout in self.layers if layout.experts]
        if counts and not 1 <= self.top_k <= min(counts):
            raise StunError(f"{self.source.folder}: config.json asks for {self.top_k} experts a token, a layer has {min(counts)}")
        if not self.family.group_floor or getattr(self.config, "topk_method", None) == "greedy":
            return 1, max(self.family.floor, self.top_k)
        groups, chosen = getattr(self.config, "n_group", None), getattr(self.config, "topk_group", None)
        if not isinstance(groups, int) or not isinstance(chosen, int) or not 1 <= chosen <= groups:
            raise StunError(f"{self.source.folder}: n_group={groups}, topk_group={chosen}: 1 <= topk_group <= n_group is needed")
        floor = max(self.family.group_floor, -(-self.top_k // chosen))
        for count in counts:
            if count % groups or count // groups < floor:
                needed = f"equal groups of at least {floor} (top-k {self.top_k} from {chosen} of them)"
                raise StunError(f"{self.source.folder}: {count} experts in n_group={groups} groups; routing needs {needed}")
        return groups, floor

    def build_layer(self, index: int, num_experts: int) -> nn.Module:
        """Decoder layer `index` with `num_experts` experts, on the meta device."""
        config = copy.deepcopy(self.config)
        if num_experts:
            setattr(config, self.family.count, num_experts)
        with without_weights():
            layer = type(self.decoder.layers[index])(config, index)
        return layer.eval()

    def install(self, root: nn.Module, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Put tensors into a module by their names in it: parameters in `dtype`, or in float32 where the model demands it;
        buffers in their stored dtype."""
        exceptions = self.model._get_dtype_plan(dtype)
        for inside, tensor in tensors.items():
            path, _, leaf = inside.rpartition(".")
            module = root.get_submodule(path)
            if leaf in module._buffers:
                module._buffers[leaf] = tensor
            else:
                final = next((other for pattern, other in exceptions.items() if re.search(pattern, inside)), dtype)
                module._parameters[leaf] = nn.Parameter(tensor.to(final), requires_grad=False)

    @property
    def embedding(self) -> str:
        """Source name of the input embedding."""
        module = self.decoder.get_input_embeddings()
        path = next(path for path, other in self.model.named_modules() if other is module)
        return next(name for name, target in self.outer.items() if target == f"{path}.weight")

    def install_outer(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Put tensors outside the layers, by source name, into the model as `install` does; a tied head shares the embedding."""
        self.install(self.model, {self.outer[name]: tensor for name, tensor in tensors.items()}, dtype)
        head = self.model.get_output_embeddings()
        if head.weight.is_meta and self.config.tie_word_embeddings:
            head.weight = self.decoder.get_input_embeddings().weight

    @property
    def outer_weights(self) -> list[str]:
        """Source names of the tensors outside the layers that the model uses, in a fixed order."""
        return sorted(name for name, target in self.outer.items() if target)

    @torch.no_grad()
    def enter(
        self, tokens_BT: torch.Tensor, embedding_VD: torch.Tensor | None = None, **inputs
    ) -> tuple[torch.Tensor, list[dict]]:
        """Hidden states [B, T, D] before the first layer, and all layers' keyword arguments (masks, rotary embeddings, ...).

        `inputs` are further inputs of the model: mask, positions, cache. The model's own forward runs with a recorder in place
        of every layer, so no family needs code for this. Without `embedding_VD` the installed embedding is used.
        """
        _move_buffers(self.decoder, tokens_BT.device)
        embedding, recorded = self.decoder.get_input_embeddings(), []

        def recorder(hidden_states, **arguments):
            recorded.append((hidden_states, arguments))
            if len(recorded) == len(self.layers):
                raise _Entered
            return hidden_states

        placeholder = embedding.weight
        if embedding_VD is not None:
            embedding.weight = nn.Parameter(embedding_VD, requires_grad=False)
        try:
            with self._stand_ins(recorder):
                self.decoder(input_ids=tokens_BT, **{"use_cache": False, **inputs})
        except _Entered:
            pass
        finally:
            embedding.weight = placeholder
        return recorded[0][0], [arguments for _, arguments in recorded]

    @torch.no_grad()
    def leave(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of hidden states after the last layer: final norm and output head, which must be installed.

        The model's own forward runs, with layers that return these states whatever their input.
        """
        hidden_N1D = hidden_ND[:, None]  # every token as a sample of length 1
        with self._stand_ins(lambda *_, **__: hidden_N1D):
            return self.model(inputs_embeds=hidden_N1D, use_cache=False, output_router_logits=False).logits[:, 0]

    def next_inputs(self, tokens_BT: torch.Tensor, mask_BT: torch.Tensor, cache: object | None) -> dict:
        """Inputs that transformers' generate gives a model for its next step: the tokens of `tokens_BT` (prompt and output so
        far) that are not in the cache, mask, positions and cache."""
        positions_BT = (mask_BT.cumsum(-1) - 1).masked_fill(mask_BT == 0, 0)
        arguments = {"position_ids": positions_BT, "use_cache": True, CACHE: cache}
        arguments["attention_mask"] = None if bool(mask_BT.all()) else mask_BT
        new = None if cache is None else 1
        inputs = self.model.prepare_inputs_for_generation(
            tokens_BT, next_sequence_length=new, is_first_iteration=new is None, **arguments
        )
        return {name: value for name, value in inputs.items() if name not in ("logits_to_keep", "is_first_iteration")}

    def logits_processors(self, generation: GenerationConfig, mask_BT: torch.Tensor) -> LogitsProcessorList:
        """Changes that transformers' greedy generate makes to logits, such as repetition penalties; `mask_BT` is the prompts'."""
        arguments = {"attention_mask": mask_BT}
        return self.model._get_logits_processor(
            generation, input_ids_seq_length=mask_BT.shape[1], device=str(mask_BT.device), model_kwargs=arguments
        )

    def generation_config(self, max_new_tokens: int) -> GenerationConfig:
        """The checkpoint's generation settings, for greedy decoding. Raises StunError if they cannot be read."""
        file = self.source.folder / "generation_config.json"
        try:
            config = GenerationConfig.from_pretrained(self.source.folder) if file.is_file() else self.model.generation_config
        except Exception as error:  # transformers raises many kinds, all of them about this file
            raise StunError(f"{file}: transformers cannot read it: {error}") from error
        config = copy.deepcopy(config)
        config.update(do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
        return config

    @contextmanager
    def _stand_ins(self, forward: Callable) -> Iterator[None]:
        """Context in which `forward` replaces that of every layer."""
        for layer in self.decoder.layers:
            layer.forward = forward
        try:
            yield
        finally:
            for layer in self.decoder.layers:
                del layer.forward

    @property
    def cannot_differ(self) -> str:
        """Reason why layers must keep equal numbers of experts; empty if they need not."""
        return f"{self.source.config['model_type']} wraps its text model in another" if self.is_nested else ""

    def pruned_config(
        self, counts: list[int], novices: dict[int, list[int]] | None = None, kept: dict[str, list[int]] | None = None
    ) -> dict:
        """config.json for `counts` experts per layer (0: none): the source's with the new number of experts, under one name
        without aliases. With `novices` by layer the number stays, and they are listed.

        Quantisation settings go, unless weights keep their form: `kept` are then the experts kept (`kept_by_block`).
        """
        written = copy.deepcopy(self.source.config)
        text = written["text_config"] if self.is_nested else written
        for config in (written, text) if self.is_nested else (written,):
            settings = config.pop("quantization_config", None)
            if settings and kept is not None:
                config["quantization_config"] = renumbered(settings, kept)
        if novices:
            text[NOVICES] = {str(layer): experts for layer, experts in sorted(novices.items()) if experts}
            return written
        if counts == [layout.num_experts for layout in self.layers]:
            return written
        present = [name for name in COUNT_FIELDS if name in text]
        name = self.family.count if self.family.count in present or not present else present[0]
        for alias in present:
            del text[alias]
        distinct = sorted({count for count in counts if count})
        heterogeneous.describe(text, name, counts) if len(distinct) > 1 else heterogeneous.forget(text, name, distinct[0])
        return written


def _move_buffers(root: nn.Module, device: torch.device) -> None:
    for module in root.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)


def expert_infos(arch: Architecture, layout: LayerLayout) -> list[TensorInfo]:
    """Tensors that make up one expert of a layer."""
    if not layout.experts:
        return []
    some = layout.whole[0]
    return [info for part in layout.experts[some] for info in arch.piece(layout, some, part)]
