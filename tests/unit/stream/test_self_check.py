"""The self-check accepts what the stream runs as the family does, and refuses what it does not, with what differs."""

from __future__ import annotations

import pytest

from helpers.more_families import UNLISTED
from stun.checkpoint.reader import Checkpoint
from stun.config import StunError
from stun.model import families
from stun.model.architecture import Architecture
from stun.stream import layer_stream, self_check


@pytest.mark.parametrize("family", UNLISTED)
def test_families_in_no_list_are_accepted(checkpoint, family):
    self_check.self_check(Architecture(Checkpoint.open(checkpoint(family))), is_refitted=True)


def test_layers_that_the_joint_refit_does_not_know_are_refused(checkpoint, monkeypatch):
    arch = Architecture(Checkpoint.open(checkpoint("flex_olmo")))
    monkeypatch.delitem(families.NORMS_BEHIND, "flex_olmo")
    self_check.self_check(arch)
    with pytest.raises(
        StunError, match=r"layer 0 does more with the output of its experts than to add it; use experts.refit=false"
    ):
        self_check.self_check(arch, is_refitted=True)


def test_a_stream_that_loses_a_value_is_refused(checkpoint, monkeypatch):
    arch = Architecture(Checkpoint.open(checkpoint("glm_moe_dsa")))
    self_check.self_check(arch)
    monkeypatch.setattr(layer_stream, "handed_on", lambda *_: {})
    with pytest.raises(StunError, match="model_type 'glm_moe_dsa' has no tests here and fails the self-check: "):
        self_check.self_check(arch)


def test_a_stream_that_computes_otherwise_is_refused(checkpoint, monkeypatch):
    arch, run = Architecture(Checkpoint.open(checkpoint("flex_olmo"))), layer_stream.LayerStream.run

    def doubled(stream, layer, states, *observers):
        after = run(stream, layer, states, *observers)
        after.hidden = [hidden * 1.01 for hidden in after.hidden]
        return after

    monkeypatch.setattr(layer_stream.LayerStream, "run", doubled)
    with pytest.raises(StunError, match=r"layer 0: the stream differs from the model by 0\.01 of the largest value"):
        self_check.self_check(arch)


def test_experts_that_no_token_reaches_prove_nothing(checkpoint, monkeypatch):
    monkeypatch.setattr(self_check, "_SAMPLES", 1)
    monkeypatch.setattr(self_check, "_LENGTH", 2)
    with pytest.raises(StunError, match="no token reaches experts"):
        self_check.self_check(Architecture(Checkpoint.open(checkpoint("flex_olmo"))))
