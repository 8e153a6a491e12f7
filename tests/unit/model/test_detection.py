"""What is found of a family by building its layers, against a table written by hand."""

from __future__ import annotations

import pytest

from helpers.models_table import table
from helpers.more_families import REFUSED, SUPPORTED, UNLISTED
from helpers.paths import ROOT
from stun.checkpoint.reader import Checkpoint
from stun.config import StunError
from stun.model.architecture import Architecture
from stun.model.families import ALIASES, TESTED

# family -> field for the number of experts, fewest experts of a group (0: routers without groups), fewest of a layer
BY_HAND = {
    "arctic": ("num_local_experts", 0, 1),
    "deepseek_v2": ("n_routed_experts", 1, 1),  # the router ranks groups by their best expert
    "deepseek_v3": ("n_routed_experts", 2, 1),  # ... by their two best
    "dots1": ("n_routed_experts", 2, 1),
    "ernie4_5_moe": ("moe_num_experts", 0, 1),
    "exaone_moe": ("num_experts", 2, 1),
    "glm4_moe": ("n_routed_experts", 2, 1),
    "gpt_oss": ("num_local_experts", 0, 1),
    "granitemoe": ("num_local_experts", 0, 1),
    "hunyuan_v1_moe": ("num_experts", 0, 1),
    "jamba": ("num_experts", 0, 2),  # with one expert it builds a dense layer
    "lfm2_moe": ("num_experts", 0, 1),
    "minimax_m2": ("num_local_experts", 0, 1),
    "mixtral": ("num_local_experts", 0, 1),
    "olmoe": ("num_experts", 0, 1),
    "phimoe": ("num_local_experts", 0, 2),  # its router always picks two
    "qwen2_moe": ("num_experts", 0, 1),
    "qwen3_5_moe_text": ("num_experts", 0, 1),
    "qwen3_moe": ("num_experts", 0, 1),
    "qwen3_next": ("num_experts", 0, 1),
}
TOP_K = {"hunyuan_v1_moe": "moe_topk", "ernie4_5_moe": "moe_k"}


def floor_by_hand(arch: Architecture, group_floor: int, floor: int) -> tuple[int, int]:
    if not group_floor:
        return 1, max(floor, arch.top_k)
    groups, chosen = arch.config.n_group, arch.config.topk_group
    return groups, max(group_floor, -(-arch.top_k // chosen))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("family", BY_HAND)
def test_detection_is_the_table(checkpoint, family, top_k):
    changes = {} if top_k == 2 else {TOP_K.get(family, "num_experts_per_tok"): 1}
    arch = Architecture(Checkpoint.open(checkpoint(family, **changes)))
    field, group_floor, floor = BY_HAND[family]
    assert arch.count == field and arch.top_k == (3 if family == "qwen3_moe" and top_k == 2 else top_k)
    assert (arch.groups, arch.group_floor) == floor_by_hand(arch, group_floor, floor)
    assert arch.is_grouped == bool(group_floor)


def test_lists_of_families():
    assert not set(UNLISTED) & {*TESTED, *ALIASES}, "the self-check alone accepts these"
    assert set(TESTED) == {*BY_HAND, *SUPPORTED} - set(UNLISTED)


@pytest.mark.parametrize("family", sorted(set(REFUSED) - {"openai_privacy_filter", "llama4_text"}))
def test_refused_by_name_with_a_reason(checkpoint, family):
    """What is not understood of a family is refused before any work."""
    folder = checkpoint(family)
    with pytest.raises(StunError, match=REFUSED[family]) as refused:
        Architecture(Checkpoint.open(folder))
    assert str(folder) in str(refused.value)


def test_the_page_on_models_is_made_from_these_lists():
    assert table() in (ROOT / "docs" / "models.md").read_text()
