"""What pruning costs beside what the machine allows, on checkpoints made on the spot.

`cases` says which measurements there are: `layer` (whose `phases` drive the library), `weights`, those of `scaling`, for which
`runs` starts jobs.prune, and `against_peers`, for which `peer_runs` starts the scripts in the folder `peers`, which need nothing
of this package. `checkpoints` makes what they run on, `limits` measures the machine, `table` prints.
"""
