"""Preflight: memory, disk space, bytes and least time of a job on a launch, estimated without running it."""
