"""Log lines about a job, printed before it starts."""

from stun.planning.job import Job
from stun.runtime.units import count

_HIGH = 0.9  # target above which a run begins with a warning
# From docs/quality.md: the highest sparsity, and the reference model's exact match there: dense, by default, and by Wanda.
_MEASURED, _DENSE, _DEFAULT, _WANDA = 0.8, 0.975, 0.820, 0.013


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


def notices(job: Job) -> list[str]:
    """Lines about unusual properties of the result."""
    arch, may_differ = job.arch, not job.is_given and job.cfg.experts.may_differ
    lines = []
    if job.plan.target > _HIGH:
        kept = f"{_DEFAULT:.3f} by default and {_WANDA} by Wanda, of {_DENSE}"
        unknown = f"nothing above {_MEASURED} was measured; there the reference model's exact match is {kept} (docs/quality.md)"
        lines.append(f"warning: target={job.plan.target:g}: {unknown}")
    if arch.mtp and any(job.drops):
        differ = "the most where layers differ" if job.is_padded else "all where layers differ"
        keep = f"as many experts as every layer, {differ}" if may_differ else "as many experts as every layer"
        keep = "all experts" if job.has_novices else keep
        heads = count(len(arch.mtp), "multi-token-prediction head")
        lines.append(f"{heads}: {keep} are kept; no single weights are removed")
    return lines
