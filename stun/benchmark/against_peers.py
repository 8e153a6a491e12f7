"""STUN beside other tools on the same checkpoint and tokens, one after the other, each in a fresh process.

forward       every layer once, without pruning, beside transformers' own forward, timed with the model loaded
wanda         single weights only, beside llm-compressor's Wanda (experts given their routed tokens or, its default, all tokens),
              and a script that holds the whole model (peers/naive.py)
reap + wanda  a quarter of the experts and then single weights, to the same target, beside llm-compressor's REAP and Wanda, and
              the script, which removes as many experts by its own clusters

Only STUN's forward runs in this process. Every tool starts without the checkpoint in the system's cache.
"""

import math
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from stun.benchmark.checkpoints import forget, qwen3_moe, random_checkpoint, shapes_of
from stun.benchmark.config import BenchmarkConfig, CheckpointShape
from stun.benchmark.processes import figures, run_peer, run_prune
from stun.checkpoint.reader import Checkpoint
from stun.config import ExpertsConfig, ExpertsMethod, Precision, PruneConfig, Score, SparsifyConfig, StunError
from stun.data.samples import Samples, calibration_samples
from stun.data.tokenizer import load_tokenizer
from stun.model.architecture import Architecture
from stun.model.precision import compute_dtype
from stun.preflight.hardware import wait_for
from stun.runtime.ranks import Ranks
from stun.runtime.units import count
from stun.stream.layer_stream import LayerStream, embed, even_owners

AS_IT_COMES = "llm-compressor, all experts"  # its default: every expert sees every token
_DROPPED = 0.25  # share of the experts removed by tasks that remove experts
_FORWARDS = {"forward": Precision.auto, "forward, float32": Precision.float32}


def prune_configs(cfg: BenchmarkConfig) -> dict[str, PruneConfig]:
    """STUN's configuration by task, for the tasks that prune."""
    experts = {
        "wanda": ExpertsConfig(fraction=0),
        "reap + wanda": ExpertsConfig(method=ExpertsMethod.rank, score=Score.reap, fraction=_fraction(cfg.shape, cfg.target)),
    }
    return {task: replace(cfg, experts=config) for task, config in experts.items()}


def _fraction(shape: CheckpointShape, target: float) -> float:
    """Share of the removed parameters in whole experts, each with its row of the router."""
    one = qwen3_moe(replace(shape, layers=1))
    layer = sum(math.prod(dims) for name, dims in shapes_of(one) if name.startswith("model.layers."))
    return _count(shape) * shape.hidden * (3 * shape.expert_width + 1) / (target * layer)


def _count(shape: CheckpointShape) -> int:
    """Experts removed from a layer."""
    return round(_DROPPED * shape.experts)


def check_peers(cfg: BenchmarkConfig) -> None:
    """Check that all tools can do the same task. Raises StunError."""
    if cfg.sparsify != SparsifyConfig():
        raise StunError("case=peers: all tools prune with Wanda alone; keep the defaults of sparsify")
    if cfg.target <= 0 or _fraction(cfg.shape, cfg.target) > 1:
        raise StunError(f"target={cfg.target}: {_count(cfg.shape)} of {cfg.shape.experts} experts alone are more; raise it")
    if cfg.shape.experts - _count(cfg.shape) < cfg.shape.top_k:
        raise StunError(f"shape.top_k={cfg.shape.top_k}: {_count(cfg.shape)} of {cfg.shape.experts} experts are to be removed")
    if cfg.peers.llmcompressor and not shutil.which(cfg.peers.llmcompressor):
        raise StunError(f"peers.llmcompressor={cfg.peers.llmcompressor}: no such program; a Python interpreter is needed")


def benchmark_peers(cfg: BenchmarkConfig, folder: Path, ranks: Ranks) -> dict:
    """Rows by task and tool, each with its ratios to STUN's; Wanda again for each number of layers in `cfg.depths`. Raises
    StunError if STUN fails. If another tool fails, its row has the reason."""
    configs, bench = prune_configs(cfg), Bench(cfg, cfg.shape, folder, ranks)
    tasks = {task: bench.forward(task, precision) for task, precision in _FORWARDS.items()}
    tasks |= {task: bench.prune(task, config) for task, config in configs.items()}
    for layers in cfg.depths:
        task = f"wanda, {count(layers, 'layer')}"
        tasks[task] = Bench(cfg, replace(cfg.shape, layers=layers), folder, ranks).prune(task, configs["wanda"])
    return {"shape": asdict(cfg.shape), "tokens": bench.samples.tokens_ST.numel(), "tasks": tasks}


class Bench:
    """Checkpoint of `shape` and calibration tokens, on which every tool's row is measured."""

    def __init__(self, cfg: BenchmarkConfig, shape: CheckpointShape, folder: Path, ranks: Ranks):
        self.cfg, self.shape, self.ranks, self.folder = cfg, shape, ranks, folder.absolute()
        self.model, self.tokens = self.folder / "source", self.folder / "tokens.safetensors"
        shutil.rmtree(self.model, ignore_errors=True)
        random_checkpoint(self.model, shape, Path(cfg.model.path))
        self.samples = calibration_samples(cfg.calibration, load_tokenizer(self.model), shape.vocabulary)
        save_file({"tokens": self.samples.tokens_ST}, self.tokens)

    def forward(self, task: str, precision: Precision) -> dict[str, dict]:
        """Rows of STUN's layer stream and of transformers."""
        self.ranks.log(f"peers: {task}")
        stun = stream_forward(self.model, precision, self.samples, self.cfg.calibration.micro_batch, self.ranks)
        self.ranks.return_memory()
        return _beside(stun, transformers=self._peer(sys.executable, "forward", self.cfg.calibration.micro_batch, precision.name))

    def prune(self, task: str, config: PruneConfig) -> dict[str, dict]:
        """Rows of jobs.prune, llm-compressor (with the shares of zeros and experts that STUN removed) and the script."""
        self.ranks.log(f"peers: {task}")
        run, micro_batch = self.folder / "run", config.calibration.micro_batch
        summary = run_prune(config, self.model, run)
        shutil.rmtree(run)
        dtype = _computes_in(Architecture(Checkpoint.open(str(self.model)), config.precision), self.ranks)
        stun = {**figures(summary), "dtype": dtype, "sparsity": summary["sparsity"], "experts": summary["kept"]}
        dropped, out = self.shape.experts - summary["kept"][0], self.folder / "out"
        method = ("reap+wanda" if dropped else "wanda", summary["ratio"], dropped / self.shape.experts)
        script = (out, config.target, config.experts.fraction, micro_batch)
        peers = {"llm-compressor": self.llmcompressor(out, *method, "--batch-size", micro_batch)}
        if not dropped:
            peers[AS_IT_COMES] = self.llmcompressor(out, *method, "--batch-size", micro_batch, "--all-experts")
        return _beside(stun, **peers, naive=self._peer(sys.executable, "naive", *script))

    def llmcompressor(self, *arguments: object) -> dict:
        """Row of llm-compressor, if an interpreter is configured; `arguments` follow the model and the tokens."""
        python = self.cfg.peers.llmcompressor
        if not python:
            return {"reason": "not run: peers.llmcompressor names no interpreter"}
        return self._peer(str(Path(shutil.which(python)).absolute()), "llmcompressor_run", *arguments)

    def _peer(self, python: str, script: str, *arguments: object) -> dict:
        """Row of a script; its output is deleted."""
        forget(self.model)
        row = run_peer(python, script, self.folder, self.ranks.device, self.model, self.tokens, *arguments)
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        return row


def stream_forward(folder: Path, precision: Precision, samples: Samples, micro_batch: int, ranks: Ranks) -> dict:
    """Seconds and memory of a forward through embedding and layers on all samples, without observers, reading included. One
    micro-batch runs before, as a warm-up."""
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
    """Rows by tool, each with its ratios to STUN's."""
    rows = {"STUN": stun, **peers}
    for row in rows.values():
        if "reason" not in row:
            row["ratios"] = {name: row[name] / stun[name] for name in ("seconds", "wall_seconds", "peak_bytes") if name in stun}
    return rows
