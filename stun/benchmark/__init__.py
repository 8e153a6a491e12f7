"""Benchmarks: cost of pruning beside the limits of the hardware, on generated checkpoints.

`cases` lists the measurements: `layer` (whose `phases` drive the library), `weights`, those of `scaling`, for which `runs` starts
jobs.prune, and `against_peers`, for which `peer_runs` starts the scripts in `peers`, which import nothing from this package.
`checkpoints` writes the models, `limits` measures the hardware, `table` prints the results.
"""
