"""Measure time and memory of pruning: python -m jobs.benchmark case=layer run_dir=runs/benchmark [shape.hidden=2048 ...]"""

from jobs import launch


def work(cfg, ranks) -> None:
    from stun.benchmark.cases import benchmark
    from stun.benchmark.table import benchmark_table

    result = benchmark(cfg, ranks)
    ranks.on_first(lambda: print(benchmark_table(result)))


if __name__ == "__main__":
    launch("benchmark", work, __doc__)
