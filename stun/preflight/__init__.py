"""Preflight. In: a job and a launch, nothing computed. Out: bytes, memory and time that it needs, and whether they are there."""
