"""Compare STUN with experts only and weights only: torchrun --nproc-per-node 2 -m jobs.compare experiment=demo"""

from dataclasses import replace
from pathlib import Path

from jobs import launch
from stun.config import StunError
from stun.evaluation.config import EvaluateConfig
from stun.files import write_json
from stun.schema import TEXT, check_output


def work(cfg, ranks) -> None:
    if cfg.target is None or cfg.is_counted or cfg.plan:
        raise StunError("stun compare: splits a target; give target, and leave out experts.keep, experts.drop, fit and plan")
    if cfg.sparsify.pattern:
        raise StunError(f"sparsify.pattern={cfg.sparsify.pattern}: fixes the number of experts removed; nothing to compare")
    from stun.benchmark.study import prune_and_evaluate
    from stun.checkpoint.hub import fetched
    from stun.evaluation.job import evaluate
    from stun.planning.job import resolve_model
    from stun.report.tables import results_table
    from stun.report.write import write_reports

    file = Path(cfg.run_dir) / "comparison.json"
    ranks.on_first(lambda: check_output(file, {TEXT: {"request": {}}}, str(file)))
    cfg = fetched(cfg, ranks)
    shares = {"STUN": cfg.experts.fraction, "experts only": 1.0, "weights only": 0.0}
    runs = {}
    for name, fraction in shares.items():
        run_dir = f"{cfg.run_dir}/{name.lower().replace(' ', '-')}"
        runs[name] = replace(cfg, run_dir=run_dir, experts=replace(cfg.experts, fraction=fraction))
        resolve_model(runs[name])  # refused before anything is evaluated
    dense = f"{cfg.run_dir}/dense.json"
    results = {"dense": evaluate(EvaluateConfig(cfg.model, cfg.task, output=dense), ranks)}
    for name, run in runs.items():
        results[name] = prune_and_evaluate(run, ranks, dense)

    def report() -> None:
        write_json(file, results)
        print(results_table(results))
        print(write_reports(Path(cfg.run_dir))[-1])

    ranks.on_first(report)


if __name__ == "__main__":
    launch("compare", work, __doc__)
