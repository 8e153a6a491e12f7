"""The Python API. In: a model, and settings as keywords. Out: what the jobs of the same names make. `import stun` offers it."""
