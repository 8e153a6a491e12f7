"""Settings of jobs.benchmark, jobs.compare and jobs.study."""

from dataclasses import dataclass, field
from enum import Enum

from stun.config import PruneConfig
from stun.evaluation.config import TaskConfig


@dataclass
class CompareConfig(PruneConfig):
    """Comparison of STUN, whole experts only and weights only on one model at one target."""

    task: TaskConfig = field(default_factory=TaskConfig)


@dataclass
class StudyConfig(CompareConfig):
    """Comparison of pruning methods. `methods` maps a name to overrides of the configuration. Each runs at every target, with the
    calibration text shuffled by every seed. `measures` (odd, even, perplexity, seconds, GiB) are printed; the JSON file `scores`
    gets all."""

    methods: dict[str, list[str]] = field(default_factory=dict)
    targets: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    measures: list[str] = field(default_factory=lambda: ["odd", "even"])
    scores: str = ""


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
    """Benchmarks: one layer, phase by phase; the methods that remove weights; whole runs of growing size, on several ranks, and
    with more layers; whole runs beside other tools."""

    layer = "layer"
    weights = "weights"
    growth = "growth"
    ranks = "ranks"
    depth = "depth"
    peers = "peers"


@dataclass
class PeersConfig:
    """Other tools. `llmcompressor`: Python interpreter that has llm-compressor (see stun/benchmark/peers); empty: not run."""

    llmcompressor: str = ""


@dataclass
class BenchmarkConfig(PruneConfig):
    """Measure `case` on checkpoints of random weights of `shape`, which get the tokenizer of `model.path`; `layer` on one of
    `gpu_shape` on a GPU, if that is given. Everything is written below the folder `run_dir`, where only CASE.json is kept.

    `layer` adds the phases of one layer up to `depth` layers; `weights` times `methods`, which map a name to overrides of the
    configuration; `growth` multiplies layers, experts and tokens by each of `factors`; `ranks` runs on each of `worlds` ranks;
    `depth` on checkpoints of each of `depths` layers. `peers` runs STUN and other tools on the same tokens, and once more on
    each of `depths` layers.
    """

    case: BenchmarkCase = BenchmarkCase.layer
    shape: CheckpointShape = field(default_factory=CheckpointShape)
    gpu_shape: CheckpointShape | None = None
    depth: int = 35
    methods: dict[str, list[str]] = field(default_factory=dict)
    factors: list[int] = field(default_factory=list)
    worlds: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    peers: PeersConfig = field(default_factory=PeersConfig)
