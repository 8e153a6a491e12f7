"""STUN and other tools on the same checkpoint and tokens, one after the other, each in a fresh process.

forward       every layer once, nothing pruned: beside transformers' own forward, which is timed with the model loaded
wanda         single weights alone: beside llm-compressor's Wanda, with the tokens that each expert is routed and with all tokens,
              which is its default, and a script that holds the whole model (peers/naive.py)
reap + wanda  a quarter of the experts and then single weights, to the same target: beside llm-compressor's REAP and Wanda, and
              the script with as many experts out of its own clusters

STUN's forward alone runs in this process. Every tool begins without the checkpoint in the system's cache.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from stun.benchmark.checkpoints import forget, qwen3_moe, random_checkpoint, shapes_of
from stun.benchmark.limits import wait_for
from stun.benchmark.peer_runs import run_peer
from stun.benchmark.runs import figures, run_prune
from stun.checkpoint.reader import Checkpoint
from stun.config import (
    BenchmarkConfig,
    CheckpointShape,
    ExpertsConfig,
    ExpertsMethod,
    Precision,
    PruneConfig,
    Score,
    SparsifyConfig,
    StunError,
)
from stun.data import Samples, calibration_samples, load_tokenizer
from stun.model.architecture import Architecture
from stun.model.precision import compute_dtype
from stun.runtime.ranks import Ranks
from stun.stream.layer_stream import LayerStream, embed, even_owners

AS_IT_COMES = "llm-compressor, all experts"  # its default: every expert sees every token
_DROPPED = 0.25  # of the experts, where some leave
_FORWARDS = {"forward": (Precision.auto, "auto"), "forward, float32": (Precision.float32, "float32")}


def pruned(cfg: BenchmarkConfig) -> dict[str, PruneConfig]:
    """What STUN is asked for in the tasks that prune."""
    experts = {
        "wanda": ExpertsConfig(fraction=0),
        "reap + wanda": ExpertsConfig(method=ExpertsMethod.rank, score=Score.reap, fraction=_fraction(cfg.shape, cfg.target)),
    }
    return {task: replace(cfg, experts=own) for task, own in experts.items()}


def _fraction(shape: CheckpointShape, target: float) -> float:
    """The share of what `target` removes that those experts are, each with its row of the router."""
    one = qwen3_moe(replace(shape, layers=1))
    layer = sum(math.prod(dims) for name, dims in shapes_of(one) if name.startswith("model.layers."))
    return _count(shape) * shape.hidden * (3 * shape.expert_width + 1) / (target * layer)


def _count(shape: CheckpointShape) -> int:
    """Experts that leave a layer."""
    return round(_DROPPED * shape.experts)


def check_peers(cfg: BenchmarkConfig) -> None:
    """Raises StunError where the tools cannot be asked for the same."""
    if cfg.sparsify != SparsifyConfig():
        raise StunError("case=peers: all tools prune with Wanda alone; leave sparsify as it is")
    if cfg.target <= 0 or _fraction(cfg.shape, cfg.target) > 1:
        raise StunError(f"target={cfg.target}: {_count(cfg.shape)} of {cfg.shape.experts} experts alone are more; raise it")
    if cfg.shape.experts - _count(cfg.shape) < cfg.shape.top_k:
        raise StunError(f"shape.top_k={cfg.shape.top_k}: {_count(cfg.shape)} of {cfg.shape.experts} experts are to leave")
    if cfg.peers.llmcompressor and not shutil.which(cfg.peers.llmcompressor):
        raise StunError(f"peers.llmcompressor={cfg.peers.llmcompressor}: no such program; a Python interpreter is needed")


def benchmark_peers(cfg: BenchmarkConfig, folder: Path, ranks: Ranks) -> dict:
    """A row for every tool in every task, with its ratios to STUN's; Wanda once more on each of `cfg.depths` layers. Raises
    StunError where STUN fails; where another tool does, its row says so."""
    tasks, asked = {}, pruned(cfg)
    bench = Bench(cfg, cfg.shape, folder, ranks)
    for task, (precision, dtype) in _FORWARDS.items():
        ranks.log(f"peers: {task}")
        tasks[task] = bench.forward(precision, dtype)
    for task, own in asked.items():
        ranks.log(f"peers: {task}")
        tasks[task] = bench.prune(own)
    for layers in cfg.depths:
        task = f"wanda, {layers} layer{'s' if layers > 1 else ''}"
        ranks.log(f"peers: {task}")
        tasks[task] = Bench(cfg, replace(cfg.shape, layers=layers), folder, ranks).prune(asked["wanda"])
    return {"shape": asdict(cfg.shape), "tokens": bench.samples.tokens_ST.numel(), "tasks": tasks}


class Bench:
    """A checkpoint of `shape`, the tokens that STUN calibrates on, and every tool's row on them."""

    def __init__(self, cfg: BenchmarkConfig, shape: CheckpointShape, folder: Path, ranks: Ranks):
        self.cfg, self.shape, self.ranks, self.folder = cfg, shape, ranks, folder.absolute()
        self.model, self.tokens = self.folder / "source", self.folder / "tokens.safetensors"
        shutil.rmtree(self.model, ignore_errors=True)
        random_checkpoint(self.model, shape, Path(cfg.model.path))
        self.samples = calibration_samples(cfg.calibration, load_tokenizer(self.model), shape.vocabulary)
        save_file({"tokens": self.samples.tokens_ST}, self.tokens)

    def forward(self, precision: Precision, dtype: str) -> dict[str, dict]:
        """STUN's stream beside transformers in `dtype`."""
        stun = stream_forward(self.model, precision, self.samples, self.cfg.calibration.micro_batch, self.ranks)
        self.ranks.return_memory()
        return _beside(stun, transformers=self._peer(sys.executable, "forward", self.cfg.calibration.micro_batch, dtype))

    def prune(self, asked: PruneConfig) -> dict[str, dict]:
        """jobs.prune beside llm-compressor, asked for the shares of zeros and experts that STUN has removed, and the script."""
        forget(self.model)
        run, micro_batch = self.folder / "run", asked.calibration.micro_batch
        summary = run_prune(replace(asked, model=replace(asked.model, path=str(self.model)), run_dir=str(run)))
        shutil.rmtree(run)
        dtype = _computes_in(Architecture(Checkpoint.open(str(self.model)), asked.precision), self.ranks)
        stun = {**figures(summary), "dtype": dtype, "sparsity": summary["sparsity"], "experts": summary["kept"]}
        dropped, out = self.shape.experts - summary["kept"][0], self.folder / "out"
        method = ("reap+wanda" if dropped else "wanda", summary["ratio"], dropped / self.shape.experts)
        script = (out, asked.target, asked.experts.fraction, micro_batch)
        peers = {"llm-compressor": self.llmcompressor(out, *method, "--batch-size", micro_batch)}
        if not dropped:
            peers[AS_IT_COMES] = self.llmcompressor(out, *method, "--batch-size", micro_batch, "--all-experts")
        return _beside(stun, **peers, naive=self._peer(sys.executable, "naive", *script))

    def llmcompressor(self, *arguments: object) -> dict:
        """Its row where there is an interpreter for it, given what the script is to get after the model and the tokens."""
        python = self.cfg.peers.llmcompressor
        if not python:
            return {"reason": "not run: peers.llmcompressor names no interpreter"}
        return self._peer(str(Path(shutil.which(python)).absolute()), "llmcompressor_run", *arguments)

    def _peer(self, python: str, script: str, *arguments: object) -> dict:
        """Its row; what it has written goes."""
        forget(self.model)
        row = run_peer(python, script, self.folder, self.model, self.tokens, *arguments)
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        return row


def stream_forward(folder: Path, precision: Precision, samples: Samples, micro_batch: int, ranks: Ranks) -> dict:
    """Seconds and memory of every layer run once on all samples and by nobody watched, from the embedding on, reading included;
    one micro-batch has run before."""
    arch, batches = Architecture(Checkpoint.open(str(folder)), precision), samples.batches(micro_batch)
    _run_layers(arch, batches[:1], ranks)
    forget(folder)
    ranks.reset_peak_memory()
    start = time.perf_counter()
    _run_layers(arch, batches, ranks)
    wait_for(ranks.device)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": ranks.peak_memory(), "dtype": _computes_in(arch, ranks)}


def _run_layers(arch: Architecture, batches: list[torch.Tensor], ranks: Ranks) -> None:
    states = embed(arch, ranks, batches, arch.source.read)
    stream = LayerStream(arch, ranks, arch.layers, [even_owners(layout, ranks.world) for layout in arch.layers])
    for layer in stream:
        stream.build(layer)
        states = stream.run(layer, states)


def _computes_in(arch: Architecture, ranks: Ranks) -> str:
    return str(compute_dtype(arch, ranks.device)).removeprefix("torch.")


def _beside(stun: dict, **peers: dict) -> dict[str, dict]:
    """All rows, each with its ratios to STUN's."""
    rows = {"STUN": stun, **peers}
    for row in rows.values():
        if "reason" not in row:
            row["ratios"] = {name: row[name] / stun[name] for name in ("seconds", "wall_seconds", "peak_bytes") if name in stun}
    return rows
