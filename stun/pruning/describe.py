"""Log lines about a job: what it will do, unusual properties of the result, experts that the calibration text rarely reaches."""

import torch

from stun.model.architecture import Architecture
from stun.planning.job import Job
from stun.runtime.units import count
from stun.sparsify.select_kernel import cannot_compile
from stun.statistics.store import Statistics

_HIGH = 0.9  # target above which a run begins with a warning
# From docs/quality.md: the highest sparsity, and the reference model's exact match there: dense, by default, and by Wanda.
_MEASURED, _DENSE, _DEFAULT, _WANDA = 0.8, 0.975, 0.820, 0.013
_RARE = 0.1  # of an even share of a layer's routed tokens; who gets less is rarely seen
_MANY = 0.1  # share of all experts: more of them rarely seen begin a run with a warning


def describe(job: Job) -> str:
    """One line: the model, the target, and the experts and share of weights removed to meet it."""
    arch, plan = job.arch, job.plan
    experts = sum(layout.num_experts for layout in arch.layers)
    planned = (plan.dropped + plan.zeros) / plan.parameters
    reached = "" if abs(planned - plan.target) < 5e-5 else f" ({planned:.4f} with the pattern)"
    return (
        f"{arch.config.model_type}, {count(len(arch.layers), 'layer')}, {plan.parameters / 1e6:.1f}M parameters in them | target "
        f"{plan.target:g}{reached}: {sum(job.drops)} of {experts} experts are removed, then {plan.ratio:.3f} of the weights in "
        "scope"
    )


def notices(job: Job, device: torch.device) -> list[str]:
    """Lines about unusual properties of the result, and of the GPU's image."""
    arch, may_differ = job.arch, not job.is_given and job.cfg.experts.may_differ
    lines = []
    if job.plan.target > _HIGH:
        kept = f"{_DEFAULT:.3f} by default and {_WANDA} by Wanda, of {_DENSE}"
        unknown = f"nothing above {_MEASURED} was measured; there the reference model's exact match is {kept} (docs/quality.md)"
        lines.append(f"warning: target={job.plan.target:g}: {unknown}")
    takes_rows = job.plan.zeros and not job.cfg.sparsify.pattern  # what the kernel selects from
    without_compiler = cannot_compile(device) if device.type == "cuda" and takes_rows else ""
    if without_compiler:
        lines.append(f"Triton cannot compile here ({without_compiler}): masks are found by sorting, which is slower")
    if arch.mtp and any(job.drops):
        differ = "the most where layers differ" if job.is_padded else "all where layers differ"
        keep = f"as many experts as every layer, {differ}" if may_differ else "as many experts as every layer"
        keep = "all experts" if job.has_novices else keep
        heads = count(len(arch.mtp), "multi-token-prediction head")
        lines.append(f"{heads}: {keep} are kept; no single weights are removed")
    return lines


def usage_warning(arch: Architecture, stats: Statistics) -> str:
    """Line about experts that the calibration text rarely reaches, and which of its sources would; empty if they are few: a
    choice by what they do on it is as good as the text is like the model's use."""
    sources, experts, unseen, rare = stats.sources, 0, 0, 0
    reached = dict.fromkeys(sources, 0)
    for layout in (layout for layout in arch.layers if layout.experts):
        served_SE = stats.load(layout.index, layout.num_experts)["coactivation"].diagonal(dim1=1, dim2=2).double()
        rare_E = _is_rare(served_SE.sum(0))
        experts, unseen, rare = experts + len(rare_E), unseen + int((served_SE.sum(0) == 0).sum()), rare + int(rare_E.sum())
        for name, served_E in zip(sources, served_SE, strict=True):
            reached[name] += int((rare_E & ~_is_rare(served_E)).sum())
    if rare <= _MANY * experts:
        return ""
    helps = [f"{name} reaches {number} of them" for name, number in reached.items() if number]
    others = "add text of other kinds, such as the model's own (stun generate)"
    more = f"raise the weight of its sources ({', '.join(helps)})" if helps else others
    counts = f"{rare} of {experts} experts, {unseen} of them never"
    return (
        f"warning: the calibration text rarely reaches {counts}: what they do elsewhere is not judged. If the model is for "
        f"more than this text, {more}, or choose by the routers' rows alone (experts=stun)"
    )


def _is_rare(served_E: torch.Tensor) -> torch.Tensor:
    """Whether each expert got less than `_RARE` of an even share of the tokens of a layer."""
    return (served_E < _RARE * served_E.mean()) | (served_E == 0)
