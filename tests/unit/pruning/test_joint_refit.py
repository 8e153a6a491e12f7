"""The joint refit against the exact solution in float64, and what it promises."""

from __future__ import annotations

import gc
import re
import weakref
from functools import partial

import pytest
import torch

from helpers.naive import captured, naive_statistics, tokens_of
from helpers.selections import config
from helpers.stock import load_stock
from helpers.zoo import FAMILIES
from stun.checkpoint.reader import Checkpoint
from stun.config import ExpertsConfig, ExpertsMethod, Score, StunError
from stun.model.architecture import Architecture
from stun.model.tensor_names import experts_of
from stun.pruning import joint_refit
from stun.pruning.job import prune
from stun.pruning.joint_refit import refit_jointly
from stun.pruning.rounding import Rounding, Target
from stun.report import data
from stun.report.folder import RunFolder
from stun.report.write import write_reports
from stun.sparsify.joint_refit import DAMPING, descend
from stun.statistics.output_sums import OutputSums
from stun.stream.layer_stream import LayerStream, States, embed, even_owners
from stun.stream.output_path import PathFinder

KEPT = [0, 2, 3, 5, 6]


def pruned_layer(
    folder, ranks, batch: int, removes_weights: bool = False, tokens: torch.Tensor | None = None, has_novices: bool = False
):
    """A stream, its first layer with experts, of which five are kept, the states before it, and the dense layer's outputs."""
    arch = Architecture(Checkpoint.open(folder))
    tokens = tokens_of(folder) if tokens is None else tokens
    states = embed(arch, ranks, tokens.split(batch), arch.source.read)
    stream = LayerStream(arch, ranks, arch.layers, [even_owners(layout, 1) for layout in arch.layers])
    layer = next(layer for layer in stream if layer.kept)
    stream.build(layer)
    sums = OutputSums(stream, layer, [0] * states.total)
    dense = stream.run(layer, states, sums).hidden
    stream.keep(layer, KEPT, sums.constants() if has_novices else None)
    for expert in layer.experts.values() if removes_weights else ():
        weight_DI = layer.layout.oriented(expert["down_proj"])
        weight_DI[torch.rand(weight_DI.shape, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    stream.build(layer)
    return stream, layer, states, dense


def matrices(layer) -> list[torch.Tensor]:
    """Down projections of the experts kept, then of shared ones."""
    routed = [layer.layout.oriented(layer.experts[number]["down_proj"]) for number in layer.kept]
    return routed + [layer.dense[name] for name in layer.layout.shared_outputs]


def outputs(stream, layer, states: States) -> torch.Tensor:
    """[T, D], with residual streams a row for each of a token's."""
    return rows(stream.run(layer, states).hidden)


def rows(hidden: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([own.flatten(0, -2) for own in hidden]).double()


def features(run, weights: list[torch.Tensor]) -> torch.Tensor:
    """Gated inner states [T, all inputs], seen through the layer alone: with columns of an identity for a down projection, its
    output, which `run` returns, shows them."""
    columns, saved = [], [weight.clone() for weight in weights]
    for weight in weights:
        weight.zero_()
    base_TD = run()
    for weight in weights:
        height, width = weight.shape
        for start in range(0, width, height):
            part = slice(start, min(start + height, width))
            weight[:, part] = torch.eye(height, dtype=weight.dtype)[:, : part.stop - part.start]
            columns.append((run() - base_TD)[:, : part.stop - part.start])
            weight.zero_()
    for weight, before in zip(weights, saved, strict=True):
        weight.copy_(before)
    return torch.cat(columns, 1)


def novice_gates(run, layer) -> torch.Tensor:
    """Gate weights [T, novices], seen likewise: what the output gains if a novice gives ones in place of zeros."""
    saved, columns = dict(layer.novices), []
    layer.novices.update({number: torch.zeros_like(constant) for number, constant in saved.items()})
    base_TD = run()
    for number, constant in saved.items():
        layer.novices[number] = torch.ones_like(constant)
        columns.append((run() - base_TD)[:, 0])
        layer.novices[number] = torch.zeros_like(constant)
    layer.novices.update(saved)
    return torch.stack(columns, 1)


@pytest.mark.parametrize("removes_weights", [False, True])
@pytest.mark.parametrize(
    "family", ["arctic", "deepseek_v3", "deepseek_v4", "gpt_oss", "granitemoe", "hy_v4", "qwen2_moe", "qwen3_moe"]
)
def test_the_exact_solution(checkpoint, ranks, monkeypatch, family, removes_weights):
    """... row by row, over the weights that are not zero, with groups, shared experts, biases, scaled outputs, and residual
    streams."""
    monkeypatch.setattr("stun.pruning.joint_refit.HELD_OUT", 1000)
    stream, layer, states, dense = pruned_layer(checkpoint(family), ranks, 4, removes_weights)
    problem = joint_refit._Refit(stream, layer, states, dense, Rounding(stream, Target()))
    scale = 0.5 if family == "granitemoe" else 1
    feature_TX = features(partial(outputs, stream, layer, states), matrices(layer)) / scale
    missing_TD = (rows(dense) - outputs(stream, layer, states)) / scale
    squared = problem._squared(problem.missing.__getitem__, None) + problem.unreachable
    assert squared == pytest.approx(float(missing_TD.square().sum()), rel=1e-4)
    if len(problem.missing[0]) == len(missing_TD):
        torch.testing.assert_close(torch.cat(problem.missing).double(), missing_TD, atol=1e-4, rtol=1e-4)
    gram_XX, damping_X = feature_TX.T @ feature_TX, damping_of(problem, feature_TX)
    support_DX = torch.cat([weight != 0 for weight in matrices(layer)], 1)
    wanted_XD, exact_DX = feature_TX.T @ missing_TD, torch.zeros(support_DX.shape, dtype=torch.float64)
    for row, free in enumerate(support_DX):
        exact_DX[row, free] = torch.linalg.solve(gram_XX[free][:, free] + damping_X[free].diag(), wanted_XD[free, row])
    descend(problem, 400)
    found_DX = found(problem)
    assert (found_DX[~support_DX] == 0).all()
    check_near(found_DX, exact_DX, feature_TX, missing_TD, damping_X)


def damping_of(problem, feature_TX: torch.Tensor) -> torch.Tensor:
    """Damping of every input: a share of the mean square, over the experts' inputs and over those of each replicated matrix."""
    widths = [sum(change.shape[1] for change in problem.change.values()), *(own.change.shape[1] for own in problem.replicated)]
    parts = feature_TX.square().sum(0).split(widths)
    return torch.cat([torch.full((len(part),), DAMPING * float(part.mean()), dtype=torch.float64) for part in parts])


def found(problem) -> torch.Tensor:
    changes = [problem.change[number] for number in range(len(KEPT))] + [own.change for own in problem.replicated]
    return torch.cat(changes, 1).double()


def check_near(found_DX, exact_DX, feature_TX, missing_TD, damping_X) -> None:
    """The cost of the solution found is that of the exact one."""

    def cost(change_DX: torch.Tensor) -> float:
        return float((missing_TD - feature_TX @ change_DX.T).square().sum() + (damping_X * change_DX.square()).sum())

    least, start = cost(exact_DX), cost(torch.zeros_like(exact_DX))
    assert least < 0.9 * start and cost(found_DX) - least < 1e-3 * (start - least)


@pytest.mark.parametrize("family", ["arctic", "deepseek_v3", "deepseek_v4", "granitemoe", "mixtral", "qwen3_moe"])
def test_the_exact_solution_with_novices(checkpoint, ranks, monkeypatch, family):
    """... whose constants are columns of the same least squares; they start at the best constant of each alone."""
    monkeypatch.setattr("stun.pruning.joint_refit.HELD_OUT", 1000)
    stream, layer, states, dense = pruned_layer(checkpoint(family), ranks, 4, has_novices=True)
    problem = joint_refit._Refit(stream, layer, states, dense, Rounding(stream, Target()))
    scale = 0.5 if family == "granitemoe" else 1
    gates_TX = novice_gates(partial(outputs, stream, layer, states), layer) / scale
    assert (gates_TX > 0).any(0).all(), "every novice is chosen by some token"
    own_TX = features(partial(outputs, stream, layer, states), matrices(layer)) / scale
    routed = sum(change.shape[1] for change in problem.change.values())
    feature_TX = torch.cat([own_TX[:, :routed], gates_TX, own_TX[:, routed:]], 1)
    missing_TD = (rows(dense) - outputs(stream, layer, states)) / scale
    gram_XX, damping_X = feature_TX.T @ feature_TX, damping_of(problem, feature_TX)
    exact_XD = torch.linalg.solve(gram_XX + damping_X.diag(), feature_TX.T @ missing_TD)
    descend(problem, 400)
    check_near(found(problem), exact_XD.T, feature_TX, missing_TD, damping_X)


@pytest.mark.parametrize("family", ["afmoe", "flex_olmo", "gemma4"])
def test_the_exact_solution_before_norms(checkpoint, ranks, monkeypatch, family):
    """... that divide every token by what they divide it by now. What is found is the change times the norms' gain."""
    monkeypatch.setattr("stun.pruning.joint_refit.HELD_OUT", 1000)
    stream, layer, states, dense = pruned_layer(checkpoint(family), ranks, 4)
    finder = PathFinder(stream, layer)
    with finder.watching():
        stream.run(layer, states)

    def run() -> torch.Tensor:
        with finder.steady_norms():
            return outputs(stream, layer, states) / torch.stack([norm.weight for norm in finder.norms.values()]).prod(0)

    problem = joint_refit._Refit(stream, layer, states, dense, Rounding(stream, Target()))
    feature_TX, missing_TD = features(run, matrices(layer)), rows(dense) - outputs(stream, layer, states)
    damping_X = damping_of(problem, feature_TX)
    exact_XD = torch.linalg.solve(feature_TX.T @ feature_TX + damping_X.diag(), feature_TX.T @ missing_TD)
    descend(problem, 400)
    check_near(found(problem), exact_XD.T, feature_TX, missing_TD, damping_X)


@pytest.mark.parametrize("removes_weights", [False, True])
def test_the_exact_solution_in_a_latent_space(checkpoint, ranks, monkeypatch, removes_weights):
    """... of all matrices at once: a matrix W behind the experts and the novices mixes their rows; the shared expert's are beside
    it."""
    monkeypatch.setattr("stun.pruning.joint_refit.HELD_OUT", 1000)
    has_novices = not removes_weights
    folder, tokens = checkpoint("nemotron_h"), torch.randint(0, 260, (8, 50), generator=torch.Generator().manual_seed(0))
    stream, layer, states, dense = pruned_layer(folder, ranks, 4, removes_weights, tokens, has_novices)
    problem, run = joint_refit._Refit(stream, layer, states, dense, Rounding(stream, Target())), partial(outputs, stream, layer)
    weights, matrix_DL = matrices(layer), layer.dense[layer.layout.output_matrix].double()
    inverse_DL = torch.linalg.pinv(matrix_DL).T
    routed_TX = features(lambda: run(states) @ inverse_DL, weights[: len(KEPT)])
    if has_novices:
        routed_TX = torch.cat([routed_TX, novice_gates(lambda: run(states) @ inverse_DL, layer)], 1)
    shared_TX, missing_TD = features(lambda: run(states), weights[len(KEPT) :]), rows(dense) - run(states)
    columns = [torch.einsum("tx,dl->tdlx", routed_TX, matrix_DL).flatten(2).flatten(0, 1)]
    columns += [torch.einsum("tx,de->tdex", shared_TX, torch.eye(len(matrix_DL), dtype=torch.float64)).flatten(2).flatten(0, 1)]
    size = float(matrix_DL.square().sum(0).mean())
    parts = damping_of(problem, torch.cat([routed_TX, shared_TX], 1)).split([routed_TX.shape[1], shared_TX.shape[1]])
    damping_Z = torch.cat([(size * parts[0]).repeat(matrix_DL.shape[1]), parts[1].repeat(len(matrix_DL))])
    feature_NZ, missing_N = torch.cat(columns, 1), missing_TD.flatten()
    descend(problem, 1000)
    changes = [problem.change[number] for number in range(len(KEPT))] + [own.change for own in problem.constants]
    found_Z = torch.cat([torch.cat(own, 1).flatten() for own in (changes, [own.change for own in problem.shared])]).double()
    supports = [torch.cat(own, 1).flatten() != 0 for own in (weights[: len(KEPT)], weights[len(KEPT) :])]
    free_Z = torch.ones_like(found_Z, dtype=torch.bool) if has_novices else torch.cat(supports)
    free_NZ, exact_Z = feature_NZ[:, free_Z], torch.zeros_like(found_Z)
    exact_Z[free_Z] = torch.linalg.solve(free_NZ.T @ free_NZ + damping_Z[free_Z].diag(), free_NZ.T @ missing_N)
    assert (found_Z[~free_Z] == 0).all()
    check_near(found_Z[None], exact_Z[None], feature_NZ, missing_N[:, None], damping_Z)


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_a_constant_stands_best_for_its_expert(checkpoint, ranks, family):
    """The constants before any refit: sum g^2 f over sum g^2, by transformers' own experts, token by token."""
    folder = checkpoint(family)
    _, layer, *_ = pruned_layer(folder, ranks, 4, has_novices=True)
    model = load_stock(folder)
    index = layer.layout.index
    module = experts_of(model.base_model.layers[index])[1]
    calls = captured(model, {"experts": module}, tokens_of(folder))["experts"]
    expected = naive_statistics(module, calls)
    for number, constant_D in layer.novices.items():
        best_D = expected["outputs"][number] / expected["powers"][number, 2, 0]
        torch.testing.assert_close(constant_D, best_D.to(constant_D.dtype), rtol=1e-3, atol=1e-4)


OTHER_PATHS = ("afmoe", "deepseek_v4", "flex_olmo", "gemma4", "glm5_next", "hy_v4", "hy_v4_vl", "nemotron_h")


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_PATHS])
def test_every_family(checkpoint, ranks, family):
    """The layer's own outputs come nearer to the dense ones, by what is reported."""
    stream, layer, states, dense = pruned_layer(checkpoint(family), ranks, 2)
    wanted = rows(dense)
    before = float((wanted - outputs(stream, layer, states)).square().sum())
    told = refit_jointly(stream, layer, states, dense, Rounding(stream, Target()))
    stream.build(layer)
    after = float((wanted - outputs(stream, layer, states)).square().sum())
    assert told["steps"] and after < before
    assert after / before == pytest.approx(told["error"][1] / told["error"][0], rel=1e-3)


def test_a_run_says_what_it_leaves_of_the_error(checkpoint, ranks, tmp_path, capsys):
    """In its log, its records, its report and its card."""
    experts = ExpertsConfig(method=ExpertsMethod.rank, score=Score.energy, keep=5, refit=True)
    prune(config(checkpoint("mixtral"), tmp_path / "run", target=None, experts=experts), ranks)
    shares = re.findall(r"prune 0./3 \| experts 8->5 \| refit leaves (\S+) of the error \|", capsys.readouterr().out)
    assert len(shares) == 3 and all(0 < float(share) <= 1 for share in shares) and float(shares[0]) < 1
    run = RunFolder.open(tmp_path / "run")
    told = [layer["refit"] for layer in run.layers["prune"]]
    assert all(layer.keys() == {"steps", "error"} and layer["steps"] > 0 for layer in told)
    assert [f"{after / before:.3f}" for before, after in (layer["error"] for layer in told)] == shares
    assert [f"{share:.3f}" for share in data.refit(run)] == shares
    card, page = (run.path / "model" / "README.md").read_text(), write_reports(run.path)[0].read_text()
    least, most = (f"{float(share):.0%}" for share in (min(shares), max(shares)))
    assert f"then refitted together; {least} to {most} of a layer's error remains." in card
    assert "Error after the joint refit" in page and "Experts were not refitted" not in page


def test_held_out_text_stops_it(checkpoint, ranks):
    """Each step lowers the error of the micro-batches that are not fitted, and one step more would raise it."""
    tokens = torch.randint(0, 260, (16, 120), generator=torch.Generator().manual_seed(0))
    stream, layer, states, dense = pruned_layer(checkpoint("mixtral"), ranks, 1, tokens=tokens)
    problem, errors = joint_refit._Refit(stream, layer, states, dense, Rounding(stream, Target())), []
    own = problem.held_out
    problem.held_out = lambda size=0.0: errors.append(own(size)) or errors[-1]
    taken = descend(problem, 100)
    assert 0 < taken < 100 and len(errors) == taken + 2
    assert errors[: taken + 1] == sorted(errors[: taken + 1], reverse=True) and errors[taken + 1] >= errors[taken]
    assert problem.held_out() == pytest.approx(errors[taken], rel=1e-4)


def test_nothing_to_make_up_for(checkpoint, ranks):
    stream, layer, states, _ = pruned_layer(checkpoint("mixtral"), ranks, 2)
    saved = [weight.clone() for weight in matrices(layer)]
    assert refit_jointly(stream, layer, states, stream.run(layer, states).hidden, Rounding(stream, Target()))["steps"] == 0
    assert all(map(torch.equal, saved, matrices(layer)))


def test_a_layer_that_changes_what_its_experts_add(checkpoint, ranks):
    stream, layer, states, dense = pruned_layer(checkpoint("mixtral"), ranks, 2)
    path = experts_of(layer.module)[0].rpartition(".")[0]
    layer.module.get_submodule(path).register_forward_hook(lambda module, arguments, output: output.tanh())
    with pytest.raises(
        StunError, match=r"layer 0 does more with the output of its experts than to add it; use experts.refit=false"
    ):
        refit_jointly(stream, layer, states, dense, Rounding(stream, Target()))


def test_inputs_of_each_layer_are_refused_beforehand(checkpoint):
    arch = Architecture(Checkpoint.open(checkpoint("gemma4")))
    assert not arch.cannot_refit
    arch.config.hidden_size_per_layer_input = 4
    assert "hidden_size_per_layer_input" in arch.cannot_refit


def test_a_token_that_rounding_hides_does_not_count(checkpoint, ranks):
    """One whose hidden state is so large that what experts add to it is lost in its last bits."""
    stream, layer, states, _ = pruned_layer(checkpoint("deepseek_v4"), ranks, 4)
    finder = PathFinder(stream, layer)
    with finder.watching():
        outputs = stream.run(layer, states).hidden
    louder = finder.louder
    finder.louder = lambda *arguments: [_rounded(hidden) for hidden in louder(*arguments)]
    path = finder.path(states, [_rounded(hidden) for hidden in outputs])
    assert path.weights[0][0] == 0 and (path.shares[0][0] == 0).all() and (path.weights[0][1:] > 0).all()


def _rounded(hidden: torch.Tensor) -> torch.Tensor:
    """The first token's last bits are lost."""
    hidden = hidden.clone()
    hidden[0, 0] = (hidden[0, 0] + 2.0**32) - 2.0**32
    return hidden


def test_nothing_of_it_outlives_it(checkpoint, ranks, monkeypatch):
    """The inner states of all tokens go with it, not when garbage is collected."""
    stream, layer, states, dense = pruned_layer(checkpoint("deepseek_v3"), ranks, 2, has_novices=True)
    made, init = [], joint_refit._Refit.__init__

    def watched(problem, *arguments) -> None:
        init(problem, *arguments)
        made.append(weakref.ref(problem))

    monkeypatch.setattr(joint_refit._Refit, "__init__", watched)
    gc.collect()
    gc.disable()
    try:
        refit_jointly(stream, layer, states, dense, Rounding(stream, Target()))
        assert made and made[0]() is None
    finally:
        gc.enable()
