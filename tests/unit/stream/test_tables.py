"""Tables of experts after some are removed, against a loop over their rows."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.family_checks import nearest
from helpers.family_runs import CALIBRATION, FAMILY, run
from helpers.tensors import load_tensors
from stun.config import ExpertsConfig, ModelConfig, PruneConfig
from stun.pruning.job import prune
from stun.stream import tables


@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 4, 6, 7], [0, 3, 5], [2, 3]])
def test_nearest_survivors(monkeypatch, kept):
    monkeypatch.setattr(tables, "_ROWS", 16)
    torch.manual_seed(0)
    table_VK = torch.stack([torch.randperm(8)[:2] for _ in range(50)]).to(torch.int32)
    router_ED = torch.randn(8, 6)
    found = tables.renumbered(table_VK, kept, router_ED)
    assert found.dtype is torch.int32 and torch.equal(torch.tensor(kept)[found.long()], nearest(table_VK, kept, router_ED))
    assert (found[:, 0] != found[:, 1]).all(), "no expert twice in a row"


def test_ties_go_to_the_lower_number():
    router_ED = torch.tensor([[0.0], [1.0], [-1.0], [5.0]])
    assert tables.renumbered(torch.tensor([[0, 3]]), [1, 2, 3], router_ED).tolist() == [[0, 2]]


def test_of_averaged_routers_the_plan_says_nothing(checkpoint, tmp_path, ranks):
    """Whose rows are nearest then is not in the source."""
    averaged = ExpertsConfig(keep=5, kappa=8)
    cfg = PruneConfig(ModelConfig(str(checkpoint("deepseek_v4"))), CALIBRATION, averaged, run_dir=str(tmp_path / "run"))
    prune(cfg, ranks)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    averaged = {str(number) for number, layer in enumerate(plan["layers"]) if layer["mean"]}
    assert "0" in averaged and "successors" not in plan


def test_the_plan_says_who_takes_whose_tokens(checkpoint, tmp_path, ranks):
    """... as the written table has it, where a row does not name the survivor already."""
    source = checkpoint("deepseek_v4")
    run("both", source, tmp_path / "run", ranks, FAMILY)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    before, after = load_tensors(source), load_tensors(tmp_path / "run" / "model")
    assert plan["successors"]
    for layer, takes in plan["successors"].items():
        (name,) = (name for name in before if name.startswith(f"layers.{layer}.") and name.endswith("tid2eid"))
        kept = plan["layers"][int(layer)]["kept"]
        assert sorted([*map(int, takes), *kept]) == list(range(8)) and set(takes.values()) <= set(kept)
        for old, new in zip(before[name].tolist(), after[name].tolist(), strict=True):
            now = [kept[place] for place in new]
            assert now[0] == (old[0] if old[0] in kept else now[0])
            if old[0] not in kept and takes[str(old[0])] not in old:
                assert now[0] == takes[str(old[0])]
