"""Reports on pruning from run folders: pictures, a page per run, a page that compares runs.

`data` reads the numbers of every picture from a run folder, `charts` and `layer_maps` draw them, `png` saves them;
`sections`, `page` and `comparison` write the pages, `html` styles them.
"""
