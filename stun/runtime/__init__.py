"""This process: ranks, threads, devices, timers. In: the launcher's environment. Out: the same bits whatever there is of each."""
