"""Benchmarks and studies. In: configurations of methods, and checkpoints made on the spot. Out: seconds, bytes and quality beside
the hardware's limits and other tools."""
