"""Make a plan from saved statistics: python -m jobs.plan run_dir=runs/x model.path=... target=0.4 output=plan.json
[compare=other.json]"""

from pathlib import Path

from jobs import launch


def work(cfg, ranks) -> None:
    from stun.checkpoint.hub import fetched
    from stun.planning.config import request
    from stun.planning.from_statistics import plan_from_run
    from stun.report.tables import plan_table

    cfg = fetched(cfg, ranks)
    ranks.on_first(lambda: print(plan_table(plan_from_run(request(cfg), Path(cfg.output), cfg.compare))))


if __name__ == "__main__":
    launch("plan", work, __doc__)
