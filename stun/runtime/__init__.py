"""Ranks, threads, devices, timers. In: the launcher's environment. Out: results that depend on none of these."""
