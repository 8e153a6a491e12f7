"""Steps of accept.py, a module each: `check(folder, pretend)` yields a Row for all that it finds, as soon as it is found.

`folder` is empty, and removed after the step; with `pretend` sizes are small.
"""
