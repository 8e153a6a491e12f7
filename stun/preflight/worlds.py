"""One job on several numbers of GPUs, side by side."""

from __future__ import annotations

from dataclasses import replace

from rich.table import Table

from stun.config import ClusterConfig, StunError
from stun.planning.job import Job
from stun.preflight.hardware import GIB, Launch, described, resident
from stun.preflight.job import SURE, Estimate, digits, estimate, shortages, size
from stun.preflight.time import Duration
from stun.runtime.console import printed
from stun.runtime.ranks import Ranks


def worlds(job: Job, ranks: Ranks, cluster: ClusterConfig) -> None:
    """Print what `job` needs on each of `cluster.worlds` GPUs, `cluster.gpus` a node. All ranks call this together; raises
    StunError, on all of them, where that is no number of whole nodes."""

    def look() -> None:
        one = described(replace(cluster, nodes=1), job.arch, resident())
        launches = [_launch(one, world) for world in cluster.worlds]
        found = [estimate(job, launch) for launch in launches]
        speeds = f"{one.read / GIB:.3g} GiB/s read and {one.write / GIB:.3g} GiB/s written a node, {found[0].tokens:,} tokens"
        ranks.log(f"{one.name}, up to {one.per_node} a node; {speeds}; speeds of GPUs are assumed\n{worlds_table(found)}")

    ranks.on_first(look)


def _launch(one: Launch, world: int) -> Launch:
    """So many GPUs of one node or of several whole ones. Raises StunError."""
    per_node = min(world, one.per_node)
    if world < 1 or world % per_node:
        raise StunError(f"cluster.worlds: {world} must be up to cluster.gpus={one.per_node} or several times as many")
    return replace(one, nodes=world // per_node, per_node=per_node)


def worlds_table(found: list[Estimate]) -> str:
    """A column per launch, a line per need; minutes with what bounds them."""
    table = Table(box=None, pad_edge=False)
    for title in ("GPUs", *(str(own.launch.world) for own in found)):
        table.add_column(title, justify="right" if title != "GPUs" else "left")

    def line(title: str, value) -> None:
        table.add_row(title, *(value(own) for own in found))

    line("nodes", lambda own: str(own.launch.nodes))
    line("GPU memory a rank", lambda own: f"{size(own.memory.gpu)} of {size(own.launch.gpu_memory)}")
    line("host memory a rank", lambda own: size(own.memory.host))
    line("host memory a node", lambda own: f"{size(own.host_needed)} of {size(own.launch.host_memory)}")
    line("read a rank, all streams", lambda own: size(own.most_read))
    for stream in found[0].durations:
        line(f"{stream}, minutes", lambda own, stream=stream: _minutes(own.durations[stream]))
        for side in ("read", "compute", "write"):
            line(f"  to {side}", lambda own, stream=stream, side=side: digits(getattr(own.durations[stream], side) / 60))
    line("all, minutes", lambda own: digits(sum(own.minutes.values())))
    line("memory fits", _fits)
    line("disk", lambda own: size(own.disk.needed))
    return printed(table)


def _minutes(duration: Duration) -> str:
    return f"{digits(duration.minutes)} ({duration.bound})"


def _fits(own: Estimate) -> str:
    """Whether it does, beyond what estimates are sure of."""
    short = [row for row in shortages(own) if row[0] != "disk"]
    refused = [what.split()[0] for what, needed, there in short if SURE * needed > there]
    return f"no: {', '.join(refused)}" if refused else "perhaps" if short else "yes"
