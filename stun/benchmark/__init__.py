"""Benchmarks and studies. In: configurations of checkpoints made on the spot, or of methods. Out: seconds, bytes and quality beside
the hardware's limits and other tools."""
