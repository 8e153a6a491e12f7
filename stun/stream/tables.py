"""Tables of experts, such as the one from a token's number to its experts: what becomes of them when experts are removed.

Shapes: V rows, K experts of a row, E experts, S survivors.
"""

import torch

_ROWS = 2**14  # of a table that are changed at once


def renumbered(table_VK: torch.Tensor, kept: list[int], router_ED: torch.Tensor) -> torch.Tensor:
    """The table with the numbers that experts have once only `kept` are left. Where an expert is removed, the survivor whose
    router row is nearest takes its place, of those that the row does not name yet; ties go to the lower number."""
    place_ES = _nearness(kept, router_ED).argsort(dim=1)
    new_E = torch.full((len(router_ED),), -1)
    new_E[kept] = torch.arange(len(kept))
    blocks = [_renumbered(block, new_E, place_ES) for block in table_VK.cpu().long().split(_ROWS)]
    return torch.cat(blocks).to(table_VK)


def successors(kept: list[int], router_ED: torch.Tensor) -> dict[int, int]:
    """Removed expert -> the survivor that takes its tokens, but for those whose row of the table names that one already."""
    nearest_E = _nearness(kept, router_ED)[:, 0].tolist()
    return {expert: kept[place] for expert, place in enumerate(nearest_E) if expert not in kept}


def _nearness(kept: list[int], router_ED: torch.Tensor) -> torch.Tensor:
    """Places [E, S] of the survivors in `kept`, those with the nearest router row first."""
    router_ED = router_ED.detach().cpu().double()
    distance_ES = (router_ED[:, None] - router_ED[kept][None]).square().sum(-1)
    return distance_ES.argsort(dim=1, stable=True)


def _renumbered(table_VK: torch.Tensor, new_E: torch.Tensor, place_ES: torch.Tensor) -> torch.Tensor:
    result_VK, survivors = new_E[table_VK], place_ES.shape[1]
    taken_VS = torch.zeros(len(table_VK), survivors + 1, dtype=torch.bool).scatter_(1, result_VK % (survivors + 1), True)
    for column in range(table_VK.shape[1]):
        lost_V = result_VK[:, column] < 0
        places_VS = place_ES[table_VK[lost_V, column]].masked_fill(taken_VS[lost_V, :survivors], survivors)
        nearest_V = places_VS.argmin(1)
        result_VK[lost_V, column] = nearest_V
        taken_VS[lost_V, nearest_V] = True
    return result_VK
