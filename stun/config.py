"""What a run may be told: dataclasses, enums, their registration with Hydra."""

import re
from dataclasses import dataclass, field
from enum import Enum

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf


class StunError(Exception):
    """Bad input or an impossible request. The message says what is wrong, where, and what is allowed. `is_shared`: every rank has
    raised this very error."""

    is_shared = False


# Hydra matches an enum by member name, and `global` is a keyword: hence the functional form.
Budget = Enum("Budget", ["uniform", "global"])
Budget.__doc__ = "uniform: every layer keeps the same number of experts; global: one threshold over all layers."


class ExpertsMethod(Enum):
    """How it is decided who leaves: clusters of alike experts by the paper's text or by the algorithm of its published code, or a
    rank by score."""

    stun = "stun"
    stun_official = "stun_official"
    rank = "rank"


class Score(Enum):
    """Worth of an expert; planning/experts/scores.py has the formulas. index: all are worth the same, so ties go to the lower
    number; that needs no forward."""

    reap = "reap"
    man = "man"
    msan = "msan"
    ean = "ean"
    frequency = "frequency"
    weighted_frequency = "weighted_frequency"
    energy = "energy"
    aimer = "aimer"
    random = "random"
    index = "index"


class Representative(Enum):
    """Who stays of a cluster: the member nearest the mean of its parameters, or the one with the best score."""

    nearest = "nearest"
    score = "score"


class SparsifyMethod(Enum):
    """How single weights are chosen: by their size; by Wanda's score; by the same on inputs multiplied by their gate weights
    (MoE-Pruner); or, with the remaining weights updated, by SparseGPT or ALPS."""

    magnitude = "magnitude"
    wanda = "wanda"
    moe_pruner = "moe_pruner"
    sparsegpt = "sparsegpt"
    alps = "alps"


class Scope(Enum):
    """Kinds of matrices whose weights may be removed. Routers, norms, embeddings and the output head never are."""

    experts = "experts"
    shared = "shared"
    mlp = "mlp"
    attention = "attention"


class Precision(Enum):
    """What layers are computed in: the dtype of the checkpoint where the device multiplies it fast, or always float32.
    stun.runtime.cpu says which CPUs multiply bfloat16 fast."""

    auto = "auto"
    float32 = "float32"


class Wandb(Enum):
    """Whether Weights & Biases gets a job's numbers: not at all, as files to be sent later (`wandb sync`), or as they come."""

    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass
class TrackingConfig:
    """Where a job's numbers go beside its log, all below `tracking/` of the run folder; `project` is that of Weights & Biases."""

    wandb: Wandb = Wandb.disabled
    project: str = "stun"
    tensorboard: bool = False


@dataclass
class ModelConfig:
    """`path`: folder of a safetensors checkpoint in the hub's layout."""

    path: str = MISSING


@dataclass
class SourceConfig:
    """One part of a calibration mixture, which gets `weight` of all weights of the samples."""

    path: str = MISSING
    field: str = "text"
    split: str = "train"
    weight: float = 1.0


@dataclass
class CalibrationConfig:
    """Text the model is observed on.

    `path` is a local .jsonl, .json, .parquet or .txt file, or the name of a dataset on the hub; `field` holds either a string
    or a list of chat messages. `mixture` names several such sources instead, each with a path, field and split of its own.
    The text is packed into `samples` sequences of `length` tokens, which are run `micro_batch` at a time; with a `seed` its
    rows are shuffled first. The result depends on the micro-batch (in the last bits) but not on the number of ranks.
    """

    path: str = ""
    mixture: dict[str, SourceConfig] = field(default_factory=dict)
    field: str = "text"
    split: str = "train"
    samples: int = 128
    length: int = 2048
    micro_batch: int = 8
    seed: int | None = None

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """The parts of the mixture by name; a single source is a mixture of one."""
        return self.mixture or {"all": SourceConfig(self.path, self.field, self.split)}


@dataclass
class ProtectConfig:
    """Experts that stay whatever is said of them.

    `experts` lists them by layer and number, counted from 0: L3E10. `super_experts`: those with extreme outputs, of a norm above
    a tenth of the largest of all layers and above all but 0.5 % of the experts (arXiv 2507.23279). `domain_share`: those that
    serve at least this share of some calibration source's routed tokens in their layer, whatever that source weighs; 0 protects
    nobody.
    """

    experts: list[str] = field(default_factory=list)
    super_experts: bool = False
    domain_share: float = 0.0


@dataclass
class ExpertsConfig:
    """Structured half: `fraction` of the parameters to be removed leave as whole experts; `auto` searches for it.

    `method` decides who leaves, with `score` where worth counts: to rank, to represent a cluster, to break ties. `seed` is that
    of the random score. `source_weights` weighs the statistics of calibration sources (1 where a source is not named).

    `lambda1` and `lambda2` weigh router-row distance and co-activation (STUN, section 4.1) in the similarity of two experts.
    Co-activation is off by default: on the reference model, whose tokens use two experts each,
    experts that serve the same tokens complement each other, and merging them costs far more than it saves. Layers left with
    `kappa` clusters or fewer are reconstructed: a cluster's mean takes its representative's place. `keep_at_least` is a floor
    on the experts of a layer, beside the model's own top-k.
    """

    method: ExpertsMethod = ExpertsMethod.stun
    fraction: int | float | str = 0.5
    budget: Budget = Budget.uniform
    representative: Representative = Representative.nearest
    score: Score = Score.reap
    seed: int = 0
    source_weights: dict[str, float] = field(default_factory=dict)
    lambda1: float = 1.0
    lambda2: float = 0.0
    kappa: int = 3
    keep_at_least: int = 1
    protect: ProtectConfig = field(default_factory=ProtectConfig)

    @property
    def reads_statistics(self) -> bool:
        """Whether choosing experts takes more than the routers' rows."""
        special_by_use = self.protect.super_experts or self.protect.domain_share
        return bool(self.score is not Score.index or self.lambda2 or special_by_use)


@dataclass
class SparsifyConfig:
    """Unstructured half: `method` chooses weights in the matrices of `scope`.

    `pattern`, such as 2:4, makes two of every four neighbouring inputs stay; whole experts then make up what it leaves of the
    target. `ratios` says how the removals are spread over the layers: `uniform`, `owl` (layers with more outliers lose less:
    arXiv 2310.05175, with its threshold `outlier` and its bound `spread`), or a JSON file with a number per decoder layer, to
    all of which the same amount is added to meet the target.

    `reconstruct` refits the kept weights to the outputs of the dense layer. It, SparseGPT and ALPS hold a Gram matrix per matrix
    of an expert, of as many experts at once as fit into `gram_gib`; the layer runs once for each such group.
    """

    method: SparsifyMethod = SparsifyMethod.wanda
    scope: list[Scope] = field(default_factory=lambda: list(Scope))
    pattern: str = ""
    ratios: str = "uniform"
    outlier: float = 5.0
    spread: float = 0.08
    reconstruct: bool = False
    gram_gib: float = 16.0

    @property
    def reads_grams(self) -> bool:
        """Whether the Gram matrices of the inputs are needed, not only their norms."""
        return self.method in (SparsifyMethod.sparsegpt, SparsifyMethod.alps) or self.reconstruct

    @property
    def reads_inputs(self) -> bool:
        return self.method is not SparsifyMethod.magnitude or self.reads_grams

    @property
    def ratios_file(self) -> str:
        """The file that `ratios` names, empty where it names a rule."""
        return "" if self.ratios in ("uniform", "owl") else self.ratios

    @property
    def counts_outliers(self) -> bool:
        """Whether the first stream must count outliers."""
        return self.ratios == "owl"


@dataclass
class PruneConfig:
    """One pruning run. `target` is total sparsity over the decoder layers; the checkpoint goes to `run_dir`/model.

    `plan` is a plan file (jobs.plan, or a plan.json) that says which experts stay, in place of `experts`. `statistics` is the
    folder of a run (jobs.observe) whose statistics this one uses instead of taking its own.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    sparsify: SparsifyConfig = field(default_factory=SparsifyConfig)
    target: float = MISSING
    run_dir: str = MISSING
    plan: str = ""
    statistics: str = ""
    precision: Precision = Precision.auto
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class ClusterConfig:
    """A cluster to describe a run on: `nodes` of `gpus` GPUs each, a `gpu` of the table in preflight/hardware.py.

    `host_gib` is a node's memory in GiB; `read_gib_s` what it reads in GiB/s (0: as much as this machine does) and `write_gib_s`
    what it writes (0: as much as it reads). Without `nodes` the launch that is running is described."""

    nodes: int = 0
    gpus: int = 8
    gpu: str = "h100"
    host_gib: float = 1024.0
    read_gib_s: float = 0.0
    write_gib_s: float = 0.0


@dataclass
class PreflightConfig(PruneConfig):
    """Say what a run would need, and whether that is there."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)


@dataclass
class PlanConfig(PruneConfig):
    """A plan from the statistics in the run folder `run_dir`, written to `output`; beside the plan file `compare` where given."""

    output: str = MISSING
    compare: str = ""


@dataclass
class TaskConfig:
    """Generative exact match on questions and answers: what follows the last `marker` of the greedy completion must equal what
    follows the answer's.

    `path` is a local file or a dataset on the hub, of which `config` and `split` name the part; `rows` of its rows, drawn with
    `seed`, are used (0: all). `prompt` is the text in which the question stands at {question}. A completion ends at an end of
    text, at `max_new_tokens` or before one of the texts in `stop`. With `number` both sides are read as numbers: 1,000 and
    $1000. are the same. `group` names the field whose values are scored apart; rows without it count as one group. `batch` rows
    run at once (0: as many as fit).
    """

    path: str = ""
    config: str = ""
    split: str = "train"
    rows: int = 0
    seed: int = 0
    question: str = "question"
    answer: str = "answer"
    group: str = "task"
    prompt: str = "{question}"
    marker: str = "####"
    number: bool = False
    stop: list[str] = field(default_factory=list)
    max_new_tokens: int = 128
    batch: int = 0


@dataclass
class HarnessConfig:
    """`tasks` of the lm-evaluation-harness by name; `include_path` is a folder with task files of one's own."""

    tasks: list[str] = field(default_factory=list)
    include_path: str = ""


@dataclass
class EvaluateConfig:
    """What the checkpoint at `model.path` is worth, written to `output` as JSON.

    Exact match is measured on `task`; perplexity on `text`, or where that names nothing on the questions and answers. `dense` is
    the output of an evaluation of the dense model, which the model is then compared with, token by token.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    text: CalibrationConfig = field(default_factory=CalibrationConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    dense: str = ""
    output: str = MISSING
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class CompareConfig(PruneConfig):
    """Prune one model three ways (STUN, whole experts only, weights only) at one target and evaluate all of them."""

    task: TaskConfig = field(default_factory=TaskConfig)


@dataclass
class StudyConfig(CompareConfig):
    """Compare ways to prune. `methods` maps a name to overrides of the configuration, all of them tried at every one of
    `targets`, on calibration texts in the orders of `seeds`. `measures` (odd, even, perplexity, seconds, GiB) are printed; all
    are in `scores`, the JSON file to write."""

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
    """What is measured: one layer, phase by phase; the methods that remove weights; whole runs as one size grows, on several
    ranks, and as layers are added; whole runs beside other tools."""

    layer = "layer"
    weights = "weights"
    growth = "growth"
    ranks = "ranks"
    depth = "depth"
    peers = "peers"


@dataclass
class PeersConfig:
    """`llmcompressor`: a Python interpreter that has llm-compressor (stun/benchmark/peers says which); empty: it is not run."""

    llmcompressor: str = ""


@dataclass
class BenchmarkConfig(PruneConfig):
    """Measure `case` on checkpoints of random weights of `shape`, which get the tokenizer of `model.path`; `layer` on one of
    `gpu_shape` on a GPU, where that is given. Everything is written below the folder `run_dir`, of which CASE.json stays.

    `layer` says what the phases of one layer come to over `depth` layers; `weights` times `methods`, a name to overrides of the
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


@dataclass
class ReportConfig:
    """Write the page of the run in `folder`, or those of the runs below it and one that compares them."""

    folder: str = MISSING


def register() -> None:
    """Store the schemas under the names that the YAML files of `conf/` build on."""
    store = ConfigStore.instance()
    store.store(name="prune_schema", node=PruneConfig)
    store.store(name="preflight_schema", node=PreflightConfig)
    store.store(name="plan_schema", node=PlanConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    store.store(name="compare_schema", node=CompareConfig)
    store.store(name="study_schema", node=StudyConfig)
    store.store(name="benchmark_schema", node=BenchmarkConfig)
    store.store(name="report_schema", node=ReportConfig)


def with_overrides(cfg: PruneConfig, overrides: list[str]) -> PruneConfig:
    """A copy of a configuration with some entries changed, each written as on the command line. Raises StunError."""
    try:
        # YAML takes 2:4 for a number in base 60.
        quoted = [re.sub(r"=(\d+:\d+)$", r"='\1'", override) for override in overrides]
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cfg), OmegaConf.from_dotlist(quoted)))
    except Exception as error:  # of OmegaConf or of the YAML parser below it
        raise StunError(f"overrides {overrides}: {error}") from error


def experts_from(plain: object, where: str) -> ExpertsConfig:
    """The part of a configuration that chooses experts, from plain values as config.yaml of a run has them. Raises StunError."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ExpertsConfig), plain))
    except Exception as error:  # of OmegaConf
        raise StunError(f"{where}: {error}") from error
