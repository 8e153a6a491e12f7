"""Settings of jobs.preflight."""

from dataclasses import dataclass


@dataclass
class ClusterConfig:
    """Cluster that preflight calculates for."""

    nodes: int = 0
    """Number of nodes; 0: the launch that asks, on its own machine, and the other settings of the cluster are not read."""
    gpus: int = 8
    """GPUs of a node."""
    gpu: str = "h100"
    """a100-40, a100, h100, h200 or b200."""
    host_gib: float = 1024.0
    """Memory of a node in GiB."""
    read_gib_s: float = 0.0
    """Read speed of a node in GiB/s; 0: as measured here."""
    write_gib_s: float = 0.0
    """Its write speed; 0: the read speed."""
