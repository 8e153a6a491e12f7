"""Settings of jobs.preflight."""

from dataclasses import dataclass, field

from stun.config import PushConfig


@dataclass
class ClusterConfig:
    """Cluster that preflight calculates for; without `nodes` it is the present launch."""

    nodes: int = 0
    """Number of nodes."""
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


@dataclass
class PreflightConfig(PushConfig):
    """Resources that a run needs, and whether the cluster has them."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
