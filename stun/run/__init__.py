"""The run folder. In: what a run was asked and has finished. Out: where an interrupted one goes on; what its layers measured."""
