"""Settings of jobs.preflight."""

from dataclasses import dataclass, field

from stun.config import PushConfig


@dataclass
class ClusterConfig:
    """Cluster that preflight calculates for: `nodes` of `gpus` GPUs each; `gpu` is a row of the table in preflight/hardware.py.

    `host_gib` is a node's memory in GiB, `read_gib_s` its read speed in GiB/s (0: as measured here), and `write_gib_s` its write
    speed (0: the read speed). Without `nodes` it is the present launch."""

    nodes: int = 0
    gpus: int = 8
    gpu: str = "h100"
    host_gib: float = 1024.0
    read_gib_s: float = 0.0
    write_gib_s: float = 0.0


@dataclass
class PreflightConfig(PushConfig):
    """Resources that a run needs, and whether the cluster has them."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
