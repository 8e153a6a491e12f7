"""Settings of jobs.benchmark, jobs.compare and jobs.study."""

from dataclasses import dataclass, field
from enum import Enum

from stun.config import CalibrationConfig, PruneConfig
from stun.evaluation.config import TaskConfig


@dataclass
class CompareConfig(PruneConfig):
    """Comparison of STUN, whole experts only and weights only on one model at one target."""

    task: TaskConfig = field(default_factory=TaskConfig)


@dataclass
class StudyConfig(CompareConfig):
    """Comparison of pruning methods. Each runs at every target or drop, with the calibration text shuffled by every seed."""

    methods: dict[str, list[str]] = field(default_factory=dict)
    """Names of methods, each with overrides of the configuration."""
    targets: list[float] = field(default_factory=list)
    """Total sparsities."""
    drops: list[float] = field(default_factory=list)
    """Shares of every layer's experts to remove, and no single weight, in place of `targets`."""
    text: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Text whose perplexity is measured; without it, that of the task's questions and answers."""
    seeds: list[int] = field(default_factory=list)
    """Seeds of the calibration text."""
    measures: list[str] = field(default_factory=lambda: ["odd", "even"])
    """Measures to print: odd, even, perplexity, seconds, GiB."""
    scores: str = ""
    """JSON file that gets all measures."""


@dataclass
class CheckpointShape:
    """A checkpoint of random weights."""

    hidden: int = 512
    expert_width: int = 512
    experts: int = 16
    top_k: int = 2
    layers: int = 4
    vocabulary: int = 512


class BenchmarkCase(Enum):
    """Benchmarks, as the setting `case` describes them."""

    layer = "layer"
    io = "io"
    weights = "weights"
    growth = "growth"
    ranks = "ranks"
    depth = "depth"
    peers = "peers"


@dataclass
class PeersConfig:
    """Other tools."""

    llmcompressor: str = ""
    """Python interpreter that has llm-compressor (see stun/benchmark/peers); empty: not run."""


@dataclass
class BenchmarkConfig(PruneConfig):
    """Measurement of a case on checkpoints of random weights, which get the tokenizer of `model.path`. Everything is written
    below the folder `run_dir`, where only CASE.json is kept."""

    case: BenchmarkCase = BenchmarkCase.layer
    """layer: the phases of one layer; io: reading and writing; weights: the methods that remove weights; growth, ranks, depth:
    whole runs of growing size, on several ranks, with more layers; peers: whole runs beside other tools."""
    shape: CheckpointShape = field(default_factory=CheckpointShape)
    gpu_shape: CheckpointShape | None = None
    """Shape of the layer on a GPU."""
    depth: int = 35
    """Layers that `layer` adds its phases up to."""
    threads: list[int] = field(default_factory=list)
    """Numbers of threads with which `io` reads and writes."""
    methods: dict[str, list[str]] = field(default_factory=dict)
    """Names of methods that `weights` times, each with overrides of the configuration."""
    factors: list[int] = field(default_factory=list)
    """Factors by which `growth` multiplies layers, experts and tokens."""
    worlds: list[int] = field(default_factory=list)
    """Numbers of ranks of `ranks`."""
    depths: list[int] = field(default_factory=list)
    """Layers of the checkpoints of `depth` and `peers`."""
    peers: PeersConfig = field(default_factory=PeersConfig)
