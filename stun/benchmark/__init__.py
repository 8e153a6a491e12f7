"""What pruning costs beside what the machine allows, on checkpoints made on the spot.

`cases` says which measurements there are; `checkpoints` makes what they run on, `limits` measures the machine, `runs` starts
whole runs of jobs.prune, `table` prints.
"""
