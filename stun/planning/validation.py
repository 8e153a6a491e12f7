"""Checks of a configuration that need no model."""

import math

from stun.config import ExpertsConfig, ExpertsMethod, PruneConfig, Representative, Score, SparsifyConfig, StunError

_TEXT = "give a file or a dataset of text like that which the model will be used for, or calibration.mixture, and not both"


_WEIGHTS = "a number above 0, from 1e-9 to 1e9"
_WEIGHT = 1e9  # largest weight: sums of several stay finite
_LEAST_SHARE = 1e-4  # of a source's tokens: below it every expert that serves any would be protected


def _require(ok: bool, key: str, value: object, allowed: str) -> None:
    if not ok:
        raise StunError(f"{key}={value}: {allowed}")


def validate(cfg: PruneConfig, sources: list[str] | None = None) -> None:
    """Refuse values that are invalid for every model. Raises StunError.

    `sources` names the calibration sources of existing statistics; without it the calibration settings are checked too.
    """
    calibration = cfg.calibration
    _validate_experts(cfg, list(calibration.sources) if sources is None else sources)
    if sources is not None:
        return
    for key in ("samples", "length", "micro_batch"):
        value = getattr(calibration, key)
        _require(value >= 1, f"calibration.{key}", value, "at least 1")
    _require(bool(calibration.path) != bool(calibration.mixture), "calibration.path", calibration.path, _TEXT)
    for name, source in calibration.mixture.items():
        _require(1 / _WEIGHT <= source.weight <= _WEIGHT, f"calibration.mixture.{name}.weight", source.weight, _WEIGHTS)
    _require((calibration.seed or 0) >= 0, "calibration.seed", calibration.seed, "0 or more")


def _validate_request(cfg: PruneConfig) -> None:
    """Refuse a request that does not say how much to remove, or says it twice."""
    experts = cfg.experts
    counted = {"experts.keep": experts.keep, "experts.drop": experts.drop, "fit": cfg.fit or None}
    given = [f"{key}={value}" for key, value in counted.items() if value is not None]
    back = "an experiment's is taken back by experts.keep=null"
    if cfg.target is None and not given and not cfg.plan:
        ways = "target=0.5 (total sparsity), experts.keep=96 or experts.drop=0.25 (whole experts alone), or fit=24GiB"
        raise StunError(f"target: how much shall be removed? Give {ways}")
    _require(cfg.target is None or 0 <= cfg.target < 1, "target", cfg.target, "total sparsity lies in [0, 1)")
    if len(given) > 1:
        raise StunError(f"{' and '.join(given)}: one of them alone says how many experts are kept; {back}")
    if cfg.fit and cfg.target is not None:
        raise StunError(f"fit={cfg.fit}: keeps whole experts; leave target out, or take an experiment's back by target=null")
    if given and experts.fraction == "auto":
        raise StunError(f"{given[0]}: experts.fraction=auto is for a target alone")
    if given and cfg.plan:
        raise StunError(f"{given[0]}: the plan says which experts are kept; {back}")
    _require(experts.drop is None or 0 < experts.drop < 1, "experts.drop", experts.drop, "a share of a layer's experts, 0 to 1")


def _validate_experts(cfg: PruneConfig, sources: list[str]) -> None:
    """Refuse invalid values of target, experts and sparsify; `sources` are the names of the calibration sources."""
    experts = cfg.experts
    _validate_request(cfg)
    share = experts.fraction
    known = (share == "auto" and bool(cfg.target)) or (isinstance(share, (int, float)) and 0 <= share <= 1)
    _require(known, "experts.fraction", share, "a share of the removed parameters, 0 to 1, or auto for a target above 0")
    _require(experts.keep_at_least >= 1, "experts.keep_at_least", experts.keep_at_least, "at least 1")
    for key in ("lambda1", "lambda2", "kappa"):
        value = getattr(experts, key)
        _require(0 <= value <= _WEIGHT, f"experts.{key}", value, "a number from 0 to 1e9")
    _require(experts.lambda1 + experts.lambda2 > 0, "experts.lambda1 and lambda2", 0, "one must be above 0")
    ranked = experts.method is ExpertsMethod.rank or experts.representative is Representative.score
    _require(experts.score is not Score.index or not ranked, "experts.score", "index", "ranking needs a score that differs")
    _validate_sparsify(cfg.sparsify, experts)
    share = experts.protect.domain_share
    _require(not share or _LEAST_SHARE <= share <= 1, "experts.protect.domain_share", share, "0, or a share from 1e-4 to 1")
    unknown = sorted(experts.source_weights.keys() - set(sources))
    _require(not unknown, "experts.source_weights", unknown, f"sources are {', '.join(sources)}")
    for name, weight in experts.source_weights.items():
        _require(0 <= weight <= _WEIGHT, f"experts.source_weights.{name}", weight, "a number from 0 to 1e9")
    total = sum(experts.source_weights.get(name, 1.0) for name in sources)
    _require(total > 0, "experts.source_weights", dict(experts.source_weights), "one must be above 0")


def _validate_sparsify(cfg: SparsifyConfig, experts: ExpertsConfig) -> None:
    """Refuse invalid values of sparsify, and those that conflict with `experts`."""
    numbers = cfg.pattern.split(":")
    fits = len(numbers) == 2 and all(n.isdecimal() for n in numbers) and 0 < int(numbers[0]) < int(numbers[1]) <= 64
    _require(not cfg.pattern or fits, "sparsify.pattern", cfg.pattern, "N:M with N below M, such as 2:4; M up to 64")
    plain = cfg.ratios == "uniform"
    _require(not cfg.pattern or plain, "sparsify.pattern", cfg.pattern, "a pattern fixes every matrix; keep ratios uniform")
    _require(not cfg.pattern or experts.fraction != "auto", "experts.fraction", "auto", "with a pattern the target sets it")
    _require(1 <= cfg.outlier <= _WEIGHT, "sparsify.outlier", cfg.outlier, "a multiple of the mean score, 1 to 1e9")
    _require(0 <= cfg.spread <= 0.5, "sparsify.spread", cfg.spread, "0 to 0.5")
    _require(0 < cfg.gram_gib < math.inf, "sparsify.gram_gib", cfg.gram_gib, "GiB, above 0")
