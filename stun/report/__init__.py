"""What pruning did, from run folders alone: pictures, a page for each run, a page that compares runs.

`data` takes the numbers of every picture out of a run folder, `draw` and `tiles` draw them, `sections`, `page` and `comparison`
write about them, `html` is how a page looks.
"""
