"""Configuration of every job: dataclasses, enums, and their registration with Hydra."""

import re
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING, OmegaConf


class StunError(Exception):
    """Bad input or an impossible request. The message says what is wrong, where, and what is allowed. `is_shared`: every rank
    raised this same error."""

    is_shared = False


# Hydra matches an enum by member name, and `global` is a keyword: hence the functional form.
Budget = Enum("Budget", ["uniform", "global"])
Budget.__doc__ = "uniform: every layer keeps the same number of experts; global: one threshold over all layers."


class ExpertsMethod(Enum):
    """Methods that choose the experts to remove: clusters of similar experts, by the paper's text or by the algorithm of its
    published code; or ranking by score."""

    stun = "stun"
    stun_official = "stun_official"
    rank = "rank"


class Score(Enum):
    """Scores of an expert; planning/experts/scores.py has the formulas. index: no score and no forward; ties go to the lower
    index."""

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
    """Expert kept of a cluster: the member nearest to the mean of its parameters, or the one with the best score."""

    nearest = "nearest"
    score = "score"


class SparsifyMethod(Enum):
    """Methods that choose single weights: magnitude; Wanda's score; the same on inputs multiplied by their gate weights
    (MoE-Pruner); SparseGPT or ALPS, which also update the kept weights."""

    magnitude = "magnitude"
    wanda = "wanda"
    moe_pruner = "moe_pruner"
    sparsegpt = "sparsegpt"
    alps = "alps"


class Scope(Enum):
    """Kinds of matrices whose weights may be removed. Routers, norms, embeddings and the output head are always kept whole."""

    experts = "experts"
    shared = "shared"
    mlp = "mlp"
    attention = "attention"


class Precision(Enum):
    """Dtype that layers are computed in: the checkpoint's where the device multiplies it fast, or always float32.
    stun.runtime.cpu says which CPUs multiply bfloat16 fast."""

    auto = "auto"
    float32 = "float32"


class Wandb(Enum):
    """Mode of Weights & Biases: off, files to be sent later (`wandb sync`), or sent at once."""

    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass
class TrackingConfig:
    """Trackers of a job's metrics; their files are in `tracking/` of the run folder. `project`: that of Weights & Biases."""

    wandb: Wandb = Wandb.disabled
    project: str = "stun"
    tensorboard: bool = False


@dataclass
class ModelConfig:
    """Model to prune. `path`: folder of a safetensors checkpoint in the hub's layout, or the name of one on the hub, such as
    Qwen/Qwen3-30B-A3B, with a branch, tag or commit after an @. Code in it is neither fetched nor run."""

    path: str = MISSING


@dataclass
class SourceConfig:
    """One source of a calibration mixture. Its share of the samples is `weight` over the sum of all weights."""

    path: str = MISSING
    field: str = "text"
    split: str = "train"
    weight: float = 1.0


@dataclass
class CalibrationConfig:
    """Calibration text.

    `path` is a local .jsonl, .json, .parquet or .txt file, or the name of a dataset on the hub; `field` holds either a string
    or a list of chat messages. `mixture` names several such sources instead, each with its own path, field and split.
    The text is packed into `samples` sequences of `length` tokens, and a micro-batch has `micro_batch` of them. With a `seed` the
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
    """Experts that are kept whatever the method chooses.

    `experts` lists them by layer and number, counted from 0: L3E10. `super_experts`: those with extreme outputs, of a norm above
    a tenth of the largest of all layers and above all but 0.5 % of the experts (arXiv 2507.23279). `domain_share`: those that
    serve at least this share of some calibration source's routed tokens in their layer, whatever that source weighs; 0: none.
    """

    experts: list[str] = field(default_factory=list)
    super_experts: bool = False
    domain_share: float = 0.0


@dataclass
class ExpertsConfig:
    """Structured part: `fraction` of the removed parameters is removed as whole experts; `auto` searches for it.

    `method` chooses the experts to remove. `score` ranks experts, chooses a cluster's representative and breaks ties. `seed` is
    that of the random score. `source_weights` weighs the statistics of calibration sources (1 where a source is not named).

    `lambda1` and `lambda2` weigh router-row distance and co-activation (STUN, section 4.1) in the similarity of two experts.
    Co-activation is off by default: on the reference model, whose tokens use two experts each,
    experts that serve the same tokens complement each other, and merging them costs far more than it saves. Layers with
    `kappa` clusters or fewer are reconstructed: a cluster's mean replaces its representative. Every layer keeps at least
    `keep_at_least` experts, and at least the model's top-k.
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
        """Whether the choice of experts needs statistics and not only the routers' rows."""
        special_by_use = self.protect.super_experts or self.protect.domain_share
        return bool(self.score is not Score.index or self.lambda2 or special_by_use)


@dataclass
class SparsifyConfig:
    """Unstructured part: `method` chooses the weights to remove in the matrices of `scope`.

    `pattern`, such as 2:4, keeps two of every four neighbouring inputs; the rest of the target is removed as whole experts.
    `ratios` spreads the removed weights over the layers: `uniform`, `owl` (fewer from layers with more outliers:
    arXiv 2310.05175, with its threshold `outlier` and its bound `spread`), or a JSON file with a number per decoder layer, to
    all of which the same amount is added to meet the target.

    `reconstruct` refits the kept weights to the outputs of the dense layer. With it, SparseGPT or ALPS, every matrix of an
    expert needs a Gram matrix. The experts are grouped so that a group's fit into `gram_gib`; the layer runs once per group.
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
        """The file that `ratios` names; empty if it names a rule."""
        return "" if self.ratios in ("uniform", "owl") else self.ratios

    @property
    def counts_outliers(self) -> bool:
        """Whether the first stream must count outliers."""
        return self.ratios == "owl"


@dataclass
class PruneConfig:
    """One pruning run. `target` is total sparsity over the decoder layers; the checkpoint goes to `run_dir`/model.

    `plan` is a plan file (jobs.plan, or a plan.json) that says which experts are kept, in place of `experts`. `statistics` is
    the folder of a run (jobs.observe) whose statistics this run uses instead of collecting its own.
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
class PushConfig(PruneConfig):
    """A pruning run whose checkpoint is uploaded at the end to `push_to`, a repository on the hub such as your-name/your-model,
    which is created as a private one if it does not exist. The same command on a finished run uploads it."""

    push_to: str = ""


def with_overrides(cfg: PruneConfig, overrides: list[str]) -> PruneConfig:
    """Copy of a configuration with overrides in the form of the command line. Raises StunError for a bad key or value."""
    try:
        # Quoted because YAML reads 2:4 as a number in base 60.
        quoted = [re.sub(r"=(\d+:\d+)$", r"='\1'", override) for override in overrides]
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cfg), OmegaConf.from_dotlist(quoted)))
    except Exception as error:  # of OmegaConf or of the YAML parser below it
        raise StunError(f"overrides {overrides}: {error}") from error


def experts_from(plain: object, where: str) -> ExpertsConfig:
    """ExpertsConfig from plain values, as in a run's config.yaml. Raises StunError, which names `where`."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ExpertsConfig), plain))
    except Exception as error:  # of OmegaConf
        raise StunError(f"{where}: {error}") from error
