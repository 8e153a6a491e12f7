"""What a run may be told: dataclasses, enums, their registration with Hydra, and the checks that need no model."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


class StunError(Exception):
    """Bad input or an impossible request. The message says what is wrong, where, and what is allowed."""


# Hydra matches an enum by member name, and `global` is a keyword: hence the functional form.
Budget = Enum("Budget", ["uniform", "global"])
Budget.__doc__ = "uniform: every layer keeps the same number of experts; global: one threshold over all layers."


class ExpertsMethod(Enum):
    """How experts are grouped: the paper's text, or the algorithm of the paper's published code."""

    stun = "stun"
    stun_official = "stun_official"


class SparsifyMethod(Enum):
    """How single weights are scored."""

    wanda = "wanda"


class Scope(Enum):
    """Kinds of matrices whose weights may be removed. Routers, norms, embeddings and the output head never are."""

    experts = "experts"
    shared = "shared"
    mlp = "mlp"
    attention = "attention"


@dataclass
class ModelConfig:
    """`path`: folder of a safetensors checkpoint in the hub's layout."""

    path: str = MISSING


@dataclass
class CalibrationConfig:
    """Text the model is observed on.

    `path` is a local .jsonl, .json, .parquet or .txt file, or the name of a dataset on the hub; `field` holds either a
    string or a list of chat messages. The text is packed into `samples` sequences of `length` tokens, which are run
    `micro_batch` at a time. The result depends on the micro-batch (in the last bits) but not on the number of ranks.
    """

    path: str = MISSING
    field: str = "text"
    split: str = "train"
    samples: int = 128
    length: int = 2048
    micro_batch: int = 8


@dataclass
class ExpertsConfig:
    """Structured half: `fraction` of the parameters to be removed leave as whole experts.

    `lambda1` and `lambda2` weigh router-row distance and co-activation in the similarity of two experts (STUN, section 4.1).
    Co-activation is off by default: on the reference model, whose tokens use two experts each, experts that serve the same tokens
    complement each other, and merging them costs far more than it saves. `keep_at_least` is a floor on the experts of a layer,
    beside the model's own top-k.
    """

    method: ExpertsMethod = ExpertsMethod.stun
    fraction: float = 0.5
    budget: Budget = Budget.uniform
    lambda1: float = 1.0
    lambda2: float = 0.0
    keep_at_least: int = 1


@dataclass
class SparsifyConfig:
    """Unstructured half: `method` scores weights in the matrices of `scope`."""

    method: SparsifyMethod = SparsifyMethod.wanda
    scope: list[Scope] = field(default_factory=lambda: list(Scope))


@dataclass
class PruneConfig:
    """One pruning run. `target` is total sparsity over the decoder layers; the checkpoint goes to `run_dir`/model."""

    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    sparsify: SparsifyConfig = field(default_factory=SparsifyConfig)
    target: float = MISSING
    run_dir: str = MISSING


@dataclass
class TaskConfig:
    """Generative exact match on a JSONL file: the text after the last `marker` of the completion must equal the answer's.

    `group` names the field whose values are scored apart; rows without it count in the average alone.
    """

    path: str = MISSING
    question: str = "question"
    answer: str = "answer"
    group: str = "task"
    marker: str = "####"
    max_new_tokens: int = 128
    batch: int = 100


@dataclass
class EvaluateConfig:
    """Exact match and perplexity of the checkpoint at `model.path`, written to `output` as JSON."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    output: str = MISSING


@dataclass
class CompareConfig(PruneConfig):
    """Prune one model three ways (STUN, whole experts only, weights only) at one target and evaluate all of them."""

    task: TaskConfig = field(default_factory=TaskConfig)


@dataclass
class PlotConfig:
    """`comparisons`: the comparison.json files of several targets; `output`: the PNG to draw."""

    comparisons: list[str] = MISSING
    output: str = MISSING


def register() -> None:
    """Store the schemas under the names that the YAML files of `conf/` build on."""
    store = ConfigStore.instance()
    store.store(name="prune_schema", node=PruneConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    store.store(name="compare_schema", node=CompareConfig)
    store.store(name="plot_schema", node=PlotConfig)


def _require(ok: bool, key: str, value: object, allowed: str) -> None:
    if not ok:
        raise StunError(f"{key}={value}: {allowed}")


def validate(cfg: PruneConfig) -> None:
    """Refuse values that no model could be pruned with. Raises StunError."""
    calibration, experts = cfg.calibration, cfg.experts
    _require(0 <= cfg.target < 1, "target", cfg.target, "total sparsity lies in [0, 1)")
    _require(0 <= experts.fraction <= 1, "experts.fraction", experts.fraction, "a share of the removed parameters, 0 to 1")
    _require(experts.keep_at_least >= 1, "experts.keep_at_least", experts.keep_at_least, "at least 1")
    _require(experts.lambda1 >= 0, "experts.lambda1", experts.lambda1, "0 or more")
    _require(experts.lambda2 >= 0, "experts.lambda2", experts.lambda2, "0 or more")
    _require(experts.lambda1 + experts.lambda2 > 0, "experts.lambda1 and lambda2", 0, "one of them must be above 0")
    for key in ("samples", "length", "micro_batch"):
        value = getattr(calibration, key)
        _require(value >= 1, f"calibration.{key}", value, "at least 1")
