"""Settings of jobs.evaluate, and of the evaluation in jobs.prune."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from stun.config import CalibrationConfig, Device, ModelConfig, PushConfig, TrackingConfig
from stun.preflight.config import ClusterConfig


@dataclass
class TaskConfig:
    """Generative exact match on questions and answers: the text after the last marker must be the same in the greedy completion
    and in the answer."""

    path: str = ""
    """Local file, or a dataset on the hub. `task=gsm8k` is GSM8K with four worked examples before each question."""
    config: str = ""
    """Configuration of a dataset on the hub."""
    split: str = "train"
    """Split of a dataset on the hub."""
    rows: int = 0
    """Rows to use, drawn with `seed`; 0: all."""
    seed: int = 0
    """Seed of the draw."""
    question: str = "question"
    """Field of a row with the question."""
    answer: str = "answer"
    """Field of a row with the answer."""
    group: str = "task"
    """Field whose values are scored apart, then averaged; rows without it count as one group."""
    prompt: str = "{question}"
    """Prompt, with {question} for the question."""
    marker: str = "####"
    """The result is what follows the last marker."""
    number: bool = False
    """Reads both sides as numbers: 1,000 and $1000. are the same."""
    stop: list[str] = field(default_factory=list)
    """Texts at which a completion ends."""
    max_new_tokens: int = 128
    """Tokens after which a completion ends."""
    batch: int = 0
    """Rows that run at once; 0: as many as fit into free memory, halved where a GPU runs out of it."""


@dataclass
class HarnessConfig:
    """Tasks of the lm-evaluation-harness, with the whole model on the first rank."""

    tasks: list[str] = field(default_factory=list)
    """Tasks by name."""
    include_path: str = ""
    """Folder with task files of your own."""


@dataclass
class EvaluateConfig:
    """Evaluation of a checkpoint."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    text: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Text whose perplexity is measured; without it, that of the questions and answers."""
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    dense: str = ""
    """Result of an evaluation of the dense model, with which the model is compared token by token."""
    output: str = MISSING
    """JSON file of the result."""
    device: Device = Device.auto
    """Device that ranks compute on: auto is a GPU each, or CPUs where there is none. A GPU that is there and cannot be used is an
    error."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class GenerateConfig:
    """Calibration text that the model itself writes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    output: str = MISSING
    """File for the texts, .jsonl, with a field `text`."""
    texts: int = 1280
    """Texts to write: by default a quarter more than a run takes by default, for a text may give fewer tokens when it is read."""
    tokens: int = 256
    """Tokens of each text."""
    start: str = ""
    """What the model goes on from, and the texts begin with. By default the end-of-text token, after which a model begins a text
    of any kind that it was trained on; for a chat model, the head of a user's turn."""
    seed: int = 0
    """Seed of the numbers that tokens are drawn with."""
    batch: int = 256
    """Texts that are written at once; the result depends on it in last bits, but not on the number of ranks."""
    device: Device = Device.auto
    """Device that ranks compute on: auto is a GPU each, or CPUs where there is none. A GPU that is there and cannot be used is an
    error."""


@dataclass
class PruneAndEvaluateConfig(PushConfig):
    """Pruning run whose checkpoint is evaluated on `task`, if one is given, into `run_dir`/result.json."""

    task: TaskConfig = field(default_factory=TaskConfig)
    dense: str = ""
    """File of the dense model's result, made once where it does not exist; by default dense.json in `run_dir`, of a sweep in its
    folder."""


@dataclass
class PreflightConfig(PruneAndEvaluateConfig):
    """Resources that such a run needs, and whether the cluster has them."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
