"""Preflight. In: a job and a launch; nothing runs. Out: the bytes, memory, disk space and least time that it needs."""
