"""What pruning costs beside what the machine allows, on checkpoints made on the spot.

`cases` says which measurements there are: `layer` (whose `phases` drive the library), `weights`, and those of `scaling`, for
which `runs` starts jobs.prune. `checkpoints` makes what they run on, `limits` measures the machine, `table` prints.
"""
