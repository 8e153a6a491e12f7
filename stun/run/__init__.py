"""The run folder. In: a run's configuration and finished layers. Out: the point to resume from, and measurements by layer."""
