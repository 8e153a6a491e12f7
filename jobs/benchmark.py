"""Measure what removing single weights costs: python -m jobs.benchmark run_dir=runs/benchmark [shape.hidden=1024 ...]"""

from jobs import launch
from stun.benchmark import benchmark_weights
from stun.table import benchmark_table


def work(cfg, ranks) -> None:
    result = benchmark_weights(cfg, ranks)
    ranks.on_first(lambda: print(benchmark_table(result)))


if __name__ == "__main__":
    launch("benchmark", work)
