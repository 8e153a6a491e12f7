"""How long a run takes, from what it reads, computes and writes and what the machine does a second."""

from __future__ import annotations

import time

import torch

from stun.arch import Architecture
from stun.config import SparsifyConfig
from stun.footprint import Footprint
from stun.hardware import Launch
from stun.request import Job
from stun.sparsify.matrix import SOLVERS, sparsify

_SAMPLE = 256  # rows and columns of the matrix on which pruning is timed


def minutes(footprint: Footprint, read: dict[str, list[int]], written: int, snapshots: int) -> dict[str, float]:
    """Minutes of every stream: the longest of reading, computing and writing, which run side by side, and the first layer's
    reading, for which all wait. Bytes are written as fast as they are read."""
    job, launch = footprint.job, footprint.launch
    tokens = job.cfg.calibration.samples * job.cfg.calibration.length
    forward = forward_flop(job.arch, tokens, job.cfg.calibration.length) / (launch.world * launch.flops)
    streams, found = job.streams, {}
    for name, ranks in read.items():
        bytes_a_node = max(sum(ranks[start : start + launch.per_node]) for start in range(0, len(ranks), launch.per_node))
        reading = bytes_a_node / launch.read + max(ranks) / launch.link
        computing = forward * _forwards(footprint, name) if streams[name] else 0.0
        masking = _masking(job, launch) * {"observe": 0, "search": job.candidates, "prune": 1}[name]
        writing = ((written if name == "prune" else 0) + snapshots / max(1, len(read))) / launch.nodes / launch.read
        found[name] = (max(reading, computing + masking, writing) + reading / len(job.arch.layers)) / 60
    return found


def forward_flop(arch: Architecture, tokens: int, length: int) -> int:
    """FLOP of all decoder layers on so many tokens in samples of `length`: two for every parameter that a token meets, and for
    every product of its scores with the tokens before it (half of the sample on average) and of these with their values."""
    scores = length * arch.config.hidden_size * len(arch.layers)
    return 2 * (active_parameters(arch) + scores) * tokens


def active_parameters(arch: Architecture) -> int:
    """Parameters of the decoder layers' matrices that a token meets."""
    total = 0
    for layout in arch.layers:
        total += sum(arch.info(name).numel for name in layout.dense if len(arch.info(name).shape) == 2)
        parts = layout.experts[0] if layout.experts else ()
        total += arch.top_k * sum(info.numel for part in parts for info in arch.piece(layout, 0, part))
    return total


def _forwards(footprint: Footprint, stream: str) -> int:
    """How often every layer runs in a stream: to be measured, once for each block of Gram matrices, and to go on."""
    job, how = footprint.job, footprint.job.cfg.sparsify
    blocks = max((footprint.blocks(index) for index in range(len(footprint.layers))), default=1)
    once = blocks * (2 if how.reconstruct else 1) + 1
    return {"observe": 1, "search": 1 + job.candidates * once, "prune": once}[stream]


def _masking(job: Job, launch: Launch) -> float:
    """Seconds of a rank to choose single weights: those of a small matrix here, for as many weights, scaled to another machine as
    products are. Where values are refitted, the cost of a weight grows with the width."""
    if not job.plan.zeros:
        return 0.0
    seconds = time_of_weight(job.cfg.sparsify)
    if job.cfg.sparsify.reconstruct or job.cfg.sparsify.method in SOLVERS:
        seconds *= max(1.0, job.arch.config.hidden_size / _SAMPLE)
    return seconds * job.plan.scope_size / launch.world * (launch.here / launch.flops)


def time_of_weight(how: SparsifyConfig) -> float:
    """Seconds for each weight of a small matrix, on this machine's CPU."""
    generator = torch.Generator().manual_seed(0)
    weight_OD, rows_TD = (
        torch.randn(_SAMPLE, _SAMPLE, generator=generator),
        torch.randn(2 * _SAMPLE, _SAMPLE, generator=generator),
    )
    moment = rows_TD.T @ rows_TD if how.reads_grams else rows_TD.square().sum(0).double()
    spent = []
    for _ in range(2):  # the first one also loads what it calls
        start = time.perf_counter()
        sparsify(how, weight_OD, moment if how.reads_inputs else None, weight_OD.numel() // 2, "a sample")
        spent.append(time.perf_counter() - start)
    return min(spent) / weight_OD.numel()
