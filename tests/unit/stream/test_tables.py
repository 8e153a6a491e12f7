"""Tables of experts after some are removed, against a loop over their rows."""

from __future__ import annotations

import pytest
import torch

from helpers.family_checks import nearest
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
