"""Configuration of every job: dataclasses, enums, and their registration with Hydra."""

import re
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING, OmegaConf


class StunError(Exception):
    """Bad input or an impossible request. The message says what is wrong, where, and what is allowed. `is_shared`: every rank
    raised this same error."""

    is_shared = False

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """Text as one line: names and values from elsewhere may hold line ends and other control characters."""
    line = re.sub(r"\s*[\n\r\v\f\x85\u2028\u2029]\s*", " ", text)
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], line)


def one_line(error: BaseException) -> str:
    """An error's message in one line of at most 300 characters, or the error's type if it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


# Hydra matches an enum by member name, and `global` is a keyword: hence the functional form.
Budget = Enum("Budget", ["uniform", "global", "measured"])
Budget.__doc__ = "uniform: every layer keeps the same number of experts; global: one threshold; measured: as their losses say."


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
    residual = "residual"
    aimer = "aimer"
    random = "random"
    index = "index"


class Dropped(Enum):
    """What becomes of an expert that is not kept. reroute: its row of the router goes too, and its tokens go to their next best
    experts; novice: the router stays whole, and a constant vector is its output (MoNE, arXiv 2507.00390)."""

    reroute = "reroute"
    novice = "novice"


class Uneven(Enum):
    """Form of a checkpoint whose layers keep different numbers of experts. code: `modeling_stun.py` beside it, which transformers
    and vLLM run with trust_remote_code; padded: experts of zeros, which the router's bias keeps from being chosen, fill every
    layer up to one number."""

    code = "code"
    padded = "padded"


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


class OutputFormat(Enum):
    """Forms in which weights are written: as the source stores them (auto: where that can be), dequantised, or rounded to a new
    form (stun.checkpoint.codecs.grids)."""

    auto = "auto"
    source = "source"
    bfloat16 = "bfloat16"
    fp8_block = "fp8_block"
    fp8_channel = "fp8_channel"
    int4 = "int4"
    nvfp4 = "nvfp4"
    mxfp4 = "mxfp4"


class Device(Enum):
    """Device that ranks compute on: GPUs where there are any, GPUs or an error, or CPUs."""

    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


class Wandb(Enum):
    """Mode of Weights & Biases: off, files to be sent later (`wandb sync`), or sent at once."""

    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass
class TrackingConfig:
    """Trackers of a job's metrics; their files are in `tracking/` of the run folder."""

    wandb: Wandb = Wandb.disabled
    """Weights & Biases: off, files to be sent later by `wandb sync`, or sent at once."""
    project: str = "stun"
    """Project there."""
    tensorboard: bool = False
    """Event files for TensorBoard too."""


@dataclass
class ModelConfig:
    """Model to work on."""

    path: str = MISSING
    """Folder of a safetensors checkpoint in the hub's layout, or the name of one on the hub, such as Qwen/Qwen3-30B-A3B, with a
    branch, tag or commit after an @. Code in it is neither fetched nor run."""


@dataclass
class SourceConfig:
    """One source of a calibration mixture. Its share of the samples is `weight` over the sum of all weights."""

    path: str = MISSING
    field: str = "text"
    split: str = "train"
    weight: float = 1.0


@dataclass
class CalibrationConfig:
    """Calibration text, packed into sequences. The result depends on the micro-batch (in the last bits) but not on the number of
    ranks."""

    path: str = ""
    """Local .jsonl, .json, .csv, .tsv or .txt file (also .gz or .zst), .parquet file, folder of files of one type, or the name of
    a dataset on the hub."""
    mixture: dict[str, SourceConfig] = field(default_factory=dict)
    """Several sources by name in place of `path`, each with its own `path`, `field`, `split` and `weight`."""
    field: str = "text"
    """Field that holds a text or a list of chat messages."""
    split: str = "train"
    """Split of a dataset on the hub."""
    samples: int = 128
    """Packed sequences."""
    length: int = 2048
    """Tokens of a sequence."""
    micro_batch: int = 8
    """Sequences that run at once."""
    seed: int | None = None
    """Shuffles the rows first."""

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """The parts of the mixture by name; a single source is a mixture of one."""
        return self.mixture or {"all": SourceConfig(self.path, self.field, self.split)}


@dataclass
class ProtectConfig:
    """Experts that are kept whatever the method chooses."""

    experts: list[str] = field(default_factory=list)
    """Experts by layer and number, counted from 0: `[L0E3,L1E2]`."""
    super_experts: bool = False
    """Those with extreme outputs: of a norm above a tenth of the largest of all layers and above all but 0.5 % of the experts
    (arXiv 2507.23279)."""
    domain_share: float = 0.0
    """Those that serve at least this share of some calibration source's routed tokens in their layer, whatever that source
    weighs; 0: none."""


@dataclass
class ExpertsConfig:
    """Structured part: whole experts are removed."""

    method: ExpertsMethod = ExpertsMethod.stun
    """How the experts to remove are chosen. stun: clusters by complete linkage, the paper's text; stun_official: the algorithm of
    its code; rank: by score."""
    keep: int | None = None
    """Experts that every layer keeps; on average, where the budget lets layers differ. Without `target` no single weight is
    removed."""
    drop: float | None = None
    """The same as a share of each layer's experts to remove."""
    fraction: int | float | str = 0.5
    """Share of the parameters removed for `target` that is removed as whole experts, if neither `keep` nor `drop` says it; 0 is
    weights alone, `auto` searches for it."""
    budget: Budget = Budget.uniform
    """uniform: every layer keeps the same number; global: one threshold over all layers; measured: the numbers that lose least of
    all layers' outputs, from trials on a part of the calibration text, refit included."""
    representative: Representative = Representative.nearest
    """Expert kept of a cluster: `nearest` to its mean, or the best by `score`."""
    score: Score = Score.reap
    """Score of an expert; index: none, ties go to the lower index, and no forward is needed."""
    seed: int = 0
    """Seed of the random score."""
    source_weights: dict[str, float] = field(default_factory=dict)
    """Weights of calibration sources in the statistics; 1 where a source is not named."""
    lambda1: float = 1.0
    """Weight of router-row distance in the similarity of two experts (STUN, section 4.1)."""
    lambda2: float = 0.0
    """Weight of co-activation in that similarity. Off: on the reference model, whose tokens use two experts each, experts that
    serve the same tokens complement each other, and merging them costs far more than it saves."""
    kappa: int = 3
    """Layers with so many clusters or fewer keep their clusters' means instead of representatives."""
    keep_at_least: int = 1
    """Fewest experts of a layer; never fewer than the model's top-k."""
    protect: ProtectConfig = field(default_factory=ProtectConfig)
    dropped: Dropped = Dropped.reroute
    """What becomes of the others. reroute: the router loses their rows; novice: it stays whole, and each of them gives a constant
    vector, so that layers may keep any number of experts and vLLM still loads the result."""
    refit: bool = False
    """At last, fit the down projections of the experts kept together to the output of the dense layer: they take over what was
    removed. Reads all experts in the second stream too."""
    uneven: Uneven = Uneven.code
    """Form of the result where layers keep different numbers. code: with a file of code, run with trust_remote_code; padded:
    experts of zeros fill the layers up, so that what loads the original loads it too, llama.cpp among them; the files are as
    large as if every layer kept the most, and the router must have a bias."""

    @property
    def may_differ(self) -> bool:
        """Whether layers may keep different numbers of experts."""
        return self.budget is not Budget.uniform

    @property
    def is_counted(self) -> bool:
        """Whether the number of experts to keep is given, and not found from the target."""
        return self.keep is not None or self.drop is not None

    @property
    def sums_outputs(self) -> bool:
        """Whether the first stream must add up the experts' outputs."""
        return self.score is Score.residual

    @property
    def reads_statistics(self) -> bool:
        """Whether the choice of experts needs statistics and not only the routers' rows."""
        special_by_use = self.protect.super_experts or self.protect.domain_share
        return bool(self.score is not Score.index or self.lambda2 or special_by_use)


@dataclass
class SparsifyConfig:
    """Unstructured part: single weights are removed."""

    method: SparsifyMethod = SparsifyMethod.wanda
    """How the weights are chosen. moe_pruner: Wanda on inputs times their gate weights; sparsegpt and alps update the kept
    weights too."""
    scope: list[Scope] = field(default_factory=lambda: list(Scope))
    """Matrices whose weights may be removed. Never routers, norms, embeddings, head."""
    pattern: str = ""
    """N:M, such as 2:4: N of M neighbouring inputs are kept. The rest of the target is removed as whole experts."""
    ratios: str = "uniform"
    """Share of removed weights by layer: `uniform`; `owl`: fewer from layers with more outliers (arXiv 2310.05175); or a JSON
    file with a number per decoder layer, to all of which the same amount is added to meet the target."""
    outlier: float = 5.0
    """Multiple of the mean score above which `owl` counts an outlier."""
    spread: float = 0.08
    """Half of the difference between the largest and the smallest ratio of a layer by `owl`."""
    reconstruct: bool = False
    """After the mask, refit the kept weights to the outputs of the dense layer."""
    gram_gib: float = 16.0
    """Most GiB of Gram matrices a rank holds for sparsegpt, alps and `reconstruct`; less where memory is short. With less, the
    layer runs more often; the result is the same."""

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
class OutputConfig:
    """Form of the pruned checkpoint."""

    format: OutputFormat = OutputFormat.auto
    """Form in which weights are written. source: as the source stores them; of a quantised one, what is kept is copied as stored,
    a removed weight gets the code of zero, what a solver changes the nearest code on the scale that it has, and what
    experts.refit changes a scale of its new size. bfloat16: a quantised source dequantised. fp8_block, fp8_channel, int4 (groups
    of 32), nvfp4, mxfp4: bfloat16 weights are rounded, layer by layer, so that the layers after see the rounded ones; with their
    inputs in view (GPTQ) where a solver or experts.refit has measured these, else to nearest. auto: source, but bfloat16 with
    experts.uneven=padded."""


@dataclass
class PruneConfig:
    """One pruning run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    sparsify: SparsifyConfig = field(default_factory=SparsifyConfig)
    target: float | None = None
    """Total sparsity of the decoder layers: 1 - nonzero after / parameters before. Removed experts count in full."""
    run_dir: str = MISSING
    """Folder of the run; the checkpoint goes to `model` in it."""
    plan: str = ""
    """Plan file (`stun plan`, or a run's plan.json) that says which experts are kept, in place of `experts`."""
    statistics: str = ""
    """Folder of a run (`stun observe`) whose statistics this run uses instead of collecting its own."""
    precision: Precision = Precision.auto
    """Dtype that layers are computed in: the checkpoint's where the device multiplies it fast, or float32."""
    device: Device = Device.auto
    """Device that ranks compute on: auto is a GPU each, or CPUs where there is none. A GPU that is there and cannot be used is an
    error."""
    allow_other_hardware: bool = False
    """Whether an interrupted run goes on where the GPU's or CPU's type, torch, transformers or CUDA differ from those it began
    with; its layers may then differ in last bits, and must be computed in the same dtype. config.yaml in the run folder records
    them."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    fit: str = ""
    """Memory that the result shall serve in, such as 24GiB: as many whole experts are kept as fit, and no single weight is
    removed, since zeros save no memory. Weights and a tenth more, for cache and activations, are counted."""

    @property
    def may_differ(self) -> bool:
        """Whether layers may keep different numbers of experts."""
        return self.budget is not Budget.uniform

    @property
    def is_counted(self) -> bool:
        """Whether `experts` or `fit` say how many experts are kept, and not the target."""
        return self.experts.is_counted or bool(self.fit)


@dataclass
class PushConfig(PruneConfig):
    """A pruning run whose checkpoint may be uploaded at its end."""

    push_to: str = ""
    """Repository on the hub, such as your-name/your-model, that gets the checkpoint at the end; made as a private one if it does
    not exist. The same command on a finished run uploads it."""


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
