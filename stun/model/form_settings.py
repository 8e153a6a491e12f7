"""Quantisation settings of a checkpoint that keeps its stored form: names that lead to an expert get the expert's new number."""

import re

from stun.config import StunError
from stun.model.layer_layout import EXPERT_NUMBER, LayerLayout

SIDE_FILES = ("hf_quant_config.json", "quantize_config.json")  # beside config.json, with the same settings
_EXPERT = re.compile(r"(.*?)\.experts\.(\d+)(\..*)?")
_PATTERN = re.compile(r"re:|[+-]:|.*[*\\]")
_BY_NUMBER = re.compile(r"experts\\?\.\\?[\[(?]*\d")


def kept_by_block(layouts: list[LayerLayout], kept: list[list[int]]) -> dict[str, list[int]]:
    """Experts kept of each layer whose experts have tensors of their own, by the path of the block that holds them."""
    found = {}
    for layout, own in zip(layouts, kept, strict=True):
        names = (name for expert in layout.whole for names in layout.experts[expert].values() for name in names)
        match = next(filter(None, map(EXPERT_NUMBER.search, names)), None)
        if match:
            found[match.string[: match.start()]] = own
    return found


def renumbered(settings: object, kept: dict[str, list[int]]) -> object:
    """Settings in which names of experts, as values or keys at any depth, have the numbers of `kept_by_block`; those of experts
    that are removed are left out. Raises StunError for a pattern that picks experts by number."""
    if isinstance(settings, dict):
        named = {_renamed(str(key), kept): renumbered(value, kept) for key, value in settings.items()}
        return {key: value for key, value in named.items() if key is not None}
    if isinstance(settings, list):
        named = [_renamed(entry, kept) if isinstance(entry, str) else renumbered(entry, kept) for entry in settings]
        return [entry for entry in named if entry is not None]
    return settings


def _renamed(text: str, kept: dict[str, list[int]]) -> str | None:
    if _PATTERN.match(text):
        if kept and _BY_NUMBER.search(text):
            raise StunError(f"quantization_config: {text}: a pattern that picks experts by number; name each of them")
        return text
    match = _EXPERT.fullmatch(text)
    own = _of_block(match[1], kept) if match else None
    if own is None:
        return text
    return f"{match[1]}.experts.{own.index(int(match[2]))}{match[3] or ''}" if int(match[2]) in own else None


def _of_block(path: str, kept: dict[str, list[int]]) -> list[int] | None:
    """Experts kept of a block; settings may name it by a longer or shorter path."""
    alike = [block for block in kept if block.endswith(f".{path}") or path.endswith(f".{block}")]
    return kept[path] if path in kept else kept[alike[0]] if alike else None
