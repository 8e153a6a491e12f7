"""Settings of jobs.evaluate, and of the evaluation in jobs.prune."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from stun.config import CalibrationConfig, ModelConfig, PruneConfig, TrackingConfig


@dataclass
class TaskConfig:
    """Generative exact match on questions and answers: the text after the last `marker` must be the same in the greedy completion
    and in the answer.

    `path` is a local file or a dataset on the hub, with its `config` and `split`; `rows` of its rows, drawn with `seed`, are used
    (0: all). `prompt` is the prompt, with {question} for the question. A completion ends at an end-of-text token, after
    `max_new_tokens`, or before one of the texts in `stop`. With `number` both sides are read as numbers: 1,000 and
    $1000. are the same. `group` names the field whose values are scored separately; rows without it count as one group. `batch`
    rows run at once (0: as many as fit).
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
    """`tasks` of the lm-evaluation-harness by name; `include_path` is a folder with further task files."""

    tasks: list[str] = field(default_factory=list)
    include_path: str = ""


@dataclass
class EvaluateConfig:
    """Evaluation of the checkpoint at `model.path`, written to `output` as JSON.

    Exact match is measured on `task`; perplexity on `text` or, if that is not given, on the questions and answers. `dense` is
    the output of an evaluation of the dense model, with which the model is then compared token by token.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    text: CalibrationConfig = field(default_factory=CalibrationConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    dense: str = ""
    output: str = MISSING
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class PruneAndEvaluateConfig(PruneConfig):
    """Pruning run whose checkpoint is evaluated on `task`, if one is given, into `run_dir`/result.json. `dense` is the file with
    the dense model's result, which is made once if it does not exist; by default it is in `run_dir`, of a sweep in its folder."""

    task: TaskConfig = field(default_factory=TaskConfig)
    dense: str = ""
