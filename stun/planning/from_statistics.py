"""Plans made from saved statistics alone, and how many of each calibration source's experts they keep."""

from dataclasses import dataclass, replace
from pathlib import Path

from stun.config import PruneConfig, StunError
from stun.files import write_json
from stun.model.architecture import Architecture
from stun.planning.budget import model_bytes
from stun.planning.job import resolve_model
from stun.planning.make import make_plan
from stun.planning.plan import Plan
from stun.planning.plan_file import PLAN, read_plan
from stun.run.folder import STATISTICS
from stun.run.identity import model_digest
from stun.schema import check_output
from stun.statistics.store import Statistics


@dataclass(frozen=True)
class Described:
    """A plan, the bytes of all tensors of the checkpoint it makes, and by calibration source the number of experts that serve
    most of its tokens and how many of these are kept (None while representatives are still to be chosen by their weights)."""

    plan: Plan
    nbytes: int
    needs: dict[str, tuple[int, int | None]]


def plan_from_run(cfg: PruneConfig, output: Path, compare: str = "") -> dict[str, Described]:
    """Make a plan from the statistics of `cfg.run_dir` and write it to `output`; returns it, and the plan in `compare`, by file.

    Raises StunError if the statistics are missing or belong to another model, or the file cannot be written or is no plan.
    """
    check_output(output, PLAN, f"output={output}")
    stats = Statistics(Path(cfg.run_dir) / STATISTICS)
    if not stats.complete:
        raise StunError(f"run_dir={cfg.run_dir}: holds no complete statistics; a run that removes experts takes them")
    job = resolve_model(replace(cfg, plan=""), stats.sources)
    arch = job.arch
    if stats.about["model"] != model_digest(arch.source):
        raise StunError(f"run_dir={cfg.run_dir}: its statistics belong to another model than {cfg.model.path}")
    if output.resolve() in ((Path(cfg.run_dir) / "plan.json").resolve(), Path(compare).resolve()):
        raise StunError(f"output={output}: is the plan of the run itself, or the one to compare with; choose another file")
    if job.fractions or job.measures:
        setting = "experts.fraction=auto: a search" if job.fractions else "experts.budget=measured: it"
        raise StunError(f"{setting} runs the model; stun prune does that")
    other = read_plan(compare, arch, job.sizes, cfg, None) if compare else None
    plan = make_plan(job, stats)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, plan.to_json())
    except OSError as error:
        raise StunError(f"output={output}: cannot be written: {error}") from error
    plans = {str(output): plan} | ({compare: other} if other else {})
    return {name: Described(plan, model_bytes(arch, plan, job.cfg), _needs(arch, plan, stats)) for name, plan in plans.items()}


def _needs(arch: Architecture, plan: Plan, stats: Statistics, share: float = 0.9) -> dict[str, tuple[int, int | None]]:
    """By source, the fewest experts of all layers that serve `share` of its routed tokens, and how many of them are kept."""
    needs: dict[str, tuple[int, int]] = {name: (0, 0) for name in stats.sources}
    is_open = any(layer.clusters and not layer.kept for layer in plan.layers)
    for layout in (layout for layout in arch.layers if layout.experts):
        served_SE = stats.load(layout.index, layout.num_experts)["coactivation"].diagonal(dim1=1, dim2=2).double()
        kept = set(plan.layers[layout.index].kept)
        for name, served_E in zip(needs, served_SE, strict=True):
            order = served_E.argsort(descending=True, stable=True)
            enough = int((served_E[order].cumsum(0) < share * served_E.sum()).sum()) + 1
            needed, needed_kept = needs[name]
            needs[name] = (needed + enough, needed_kept + len(kept.intersection(order[:enough].tolist())))
    return {name: (needed, None if is_open else needed_kept) for name, (needed, needed_kept) in needs.items()}
