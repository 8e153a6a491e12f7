"""What a user asks for: a number of experts, a share of them, or memory to serve in."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stun.checkpoint.reader import Checkpoint
from stun.config import Budget, CalibrationConfig, ExpertsConfig, ModelConfig, PruneConfig, SparsifyConfig, StunError
from stun.model.architecture import Architecture
from stun.planning.budget import model_bytes
from stun.planning.counts import SERVED
from stun.planning.job import resolve_model


def request(model, **changes) -> PruneConfig:
    return replace(PruneConfig(ModelConfig(str(model)), CalibrationConfig("c"), run_dir="r"), **changes)


def stored(model) -> int:
    arch = Architecture(Checkpoint.open(str(model)))
    return sum(info.nbytes for info in arch.source.tensors.values())


@pytest.mark.parametrize("budget", list(Budget))
@pytest.mark.parametrize("experts", [{"keep": 6}, {"drop": 0.25}, {"drop": 0.3}])
def test_counted_experts_leave_every_weight_of_the_rest(checkpoint, budget, experts):
    """Six of eight experts are kept, and the target is the share that the two others were."""
    job = resolve_model(request(checkpoint("mixtral"), experts=ExpertsConfig(budget=budget, **experts)))
    assert job.cfg.experts.keep == 6 and sum(job.drops) == 2 * len(job.arch.layers) and job.plan.zeros == 0
    dropped = 2 * sum(size.expert for size in job.sizes)
    assert job.plan.dropped == dropped and job.cfg.target == dropped / job.plan.parameters


def test_counted_experts_and_a_target_make_up_the_rest_of_single_weights(checkpoint):
    job = resolve_model(request(checkpoint("mixtral"), experts=ExpertsConfig(keep=6), target=0.5))
    assert job.drops == [2] * len(job.arch.layers)
    assert job.plan.dropped + job.plan.zeros == round(0.5 * job.plan.parameters)


def test_a_pattern_beside_counted_experts_sets_the_target(checkpoint):
    cfg = request(checkpoint("mixtral"), experts=ExpertsConfig(keep=6), sparsify=SparsifyConfig(pattern="2:4"))
    job = resolve_model(cfg)
    assert job.cfg.target == (job.plan.dropped + job.plan.zeros) / job.plan.parameters > 0.5
    with pytest.raises(StunError, match=r"target=0\.7: keeping 6 experts a layer removes .*; the pattern sets the target"):
        resolve_model(replace(cfg, target=0.7))


def test_routing_groups_keep_as_many_each(checkpoint):
    """DeepSeek-V3's eight experts in groups: a share is rounded to whole groups."""
    job = resolve_model(request(checkpoint("deepseek_v3"), experts=ExpertsConfig(drop=0.3)))
    assert job.cfg.experts.keep % job.arch.groups == 0 and job.arch.groups > 1
    with pytest.raises(StunError, match="a multiple of"):
        resolve_model(request(checkpoint("deepseek_v3"), experts=ExpertsConfig(keep=job.arch.layers[-1].num_experts - 1)))


def test_fit_keeps_as_many_experts_as_serve_in_that_memory(checkpoint):
    model, whole = checkpoint("mixtral"), SERVED * stored(checkpoint("mixtral"))
    job = resolve_model(request(model, fit=f"{0.8 * whole / 1024:.3f} KiB"))
    keep = job.cfg.experts.keep
    one_more = resolve_model(request(model, experts=ExpertsConfig(keep=keep + 1)))
    served, more = (SERVED * model_bytes(job.arch, each.plan, each.cfg) for each in (job, one_more))
    assert served <= 0.8 * whole < more and job.plan.zeros == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "how much shall be removed"),
        ({"target": 0.5, "fit": "24GiB"}, "leave target out"),
        ({"fit": "24"}, "such as 24GiB"),
        ({"fit": "1.2.3GiB"}, "such as 24GiB"),
        ({"fit": "1 KiB"}, "with the fewest experts a layer may keep, 2 of 8"),
        ({"fit": "24TiB"}, "nothing has to be removed"),
        ({"experts": ExpertsConfig(keep=3, drop=0.5)}, "one of them alone"),
        ({"experts": ExpertsConfig(keep=1)}, r"experts\.keep=1: must be 2 to 8 \(top-k is 2\)"),
        ({"experts": ExpertsConfig(keep=9)}, "must be 2 to 8"),
        ({"experts": ExpertsConfig(drop=1.0)}, "a share of a layer's experts"),
        ({"experts": ExpertsConfig(drop=0.9)}, r"experts\.drop=0\.9: keeps 1 of 8 .* it must keep 2 .* give 0\.125 to 0\.75"),
        ({"experts": ExpertsConfig(drop=0.01)}, r"experts\.drop=0\.01: keeps 8 of 8"),
        ({"experts": ExpertsConfig(keep=8)}, "nothing would be removed"),
        ({"experts": ExpertsConfig(keep=2), "target": 0.2}, r"keeping 2 experts a layer removes 0\.\d+; give more, or none"),
        ({"experts": ExpertsConfig(keep=3, fraction="auto")}, "is for a target"),
        ({"experts": ExpertsConfig(keep=3), "plan": "plan.json"}, "the plan says which"),
    ],
)
def test_requests_that_cannot_be_met(checkpoint, changes, message):
    with pytest.raises(StunError, match=message):
        resolve_model(request(checkpoint("mixtral"), **changes))
