"""How few experts a layer may keep: top-k, groups that routing is limited to, a family's own floor."""

from __future__ import annotations

import json
import shutil

import pytest

from helpers.forms import run
from helpers.zoo import make_checkpoint
from stun.checkpoint.reader import Checkpoint
from stun.config import Budget, ExpertsConfig, Scope, StunError
from stun.model.architecture import Architecture
from stun.planning.budget import measure_layers


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "exaone_moe"])
def test_groups_keep_equal_numbers(tmp_path, ranks, family):
    source = make_checkpoint(tmp_path / "source", family)
    for budget in Budget:
        _, plan, _ = run(source, tmp_path / budget.name, ranks, experts=ExpertsConfig(fraction=0.8, budget=budget))
        for layer in plan["layers"]:
            groups = [expert // 4 for expert in layer["kept"]]
            assert not layer["kept"] or 2 <= groups.count(0) == groups.count(1)


def test_illegal_counts_are_refused_before_work(tmp_path, ranks):
    source = make_checkpoint(tmp_path / "source", "deepseek_v3")
    with pytest.raises(StunError, match=r"a layer must keep 4 \(top-k 2, in 2 groups of at least 2"):
        run(source, tmp_path / "run", ranks, target=0.6, experts=ExpertsConfig(fraction=1.0))
    odd = tmp_path / "odd"
    shutil.copytree(source, odd)
    content = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**content, "n_group": 3}))
    with pytest.raises(StunError, match=r"8 experts in n_group=3 groups; routing needs equal groups of at least 2"):
        run(odd, tmp_path / "run", ranks)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["jamba", "phimoe"])
def test_the_fewest_experts_a_family_can_route_to(tmp_path, ranks, family):
    source = make_checkpoint(tmp_path / "source", family, num_experts_per_tok=1)
    sizes = measure_layers(Architecture(Checkpoint.open(source)), list(Scope))
    all_but_one = 7 * sum(size.expert for size in sizes) / sum(size.total for size in sizes)
    with pytest.raises(StunError, match=r"a layer must keep 2"):
        run(source, tmp_path / "run", ranks, target=all_but_one, experts=ExpertsConfig(fraction=1.0))


def test_top_k_bounds_what_a_group_keeps(tmp_path, ranks):
    """Four experts a token from one group of two: no group may fall below four."""
    source = make_checkpoint(tmp_path / "source", "deepseek_v3", num_experts_per_tok=4)
    with pytest.raises(StunError, match=r"a layer must keep 8 \(top-k 4, in 2 groups of at least 4"):
        run(source, tmp_path / "run", ranks)


def test_the_largest_top_k_of_all_layers_counts(tmp_path, ranks):
    source = make_checkpoint(tmp_path / "source", "hunyuan_v1_moe", moe_topk=[1, 4, 2])
    assert Architecture(Checkpoint.open(source)).top_k == 4
    with pytest.raises(StunError, match=r"a layer must keep 4 \(top-k 4"):
        run(source, tmp_path / "run", ranks, target=0.6, experts=ExpertsConfig(fraction=1.0))


def test_greedy_routing_knows_no_groups(tmp_path, ranks):
    """DeepSeek-V2-Lite: n_group stands in its config, and means nothing."""
    source = make_checkpoint(tmp_path / "source", "deepseek_v2", topk_method="greedy", n_group=3, topk_group=0)
    assert Architecture(Checkpoint.open(source)).groups == 1
    _, plan, _ = run(source, tmp_path / "run", ranks)
    assert 0 < len(plan["layers"][-1]["kept"]) < 8
