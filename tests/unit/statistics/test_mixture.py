"""Calibration sources: kept apart in the statistics, weighed afterwards, shuffled by a seed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from helpers.launches import run_job, settings
from helpers.paths import TEXT
from helpers.selections import CALIBRATION, config
from helpers.tensors import same_tensors
from helpers.zoo import make_checkpoint
from stun.config import (
    CalibrationConfig,
    ExpertsConfig,
    ExpertsMethod,
    Score,
    SourceConfig,
    StunError,
)
from stun.planning.from_statistics import plan_from_run
from stun.planning.plan_file import read_layers
from stun.pruning.job import prune, take_statistics
from stun.statistics.store import Statistics


def mixture(tmp_path, **weights) -> dict[str, SourceConfig]:
    """Calibration sources of very different text, in files of their own."""
    rows = TEXT.read_text().splitlines()
    letters = [json.dumps({"text": "the quick brown fox jumps over the lazy dog " * 3})] * 40
    files = {"numbers": rows[:200], "letters": letters}
    for name, lines in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return {name: SourceConfig(str(tmp_path / f"{name}.jsonl"), weight=weights.get(name, 1.0)) for name in files}


def test_a_mixture_keeps_its_sources_apart(observed, tmp_path, ranks):
    """Each source's statistics are those of a run on it alone, and a plan may weigh sources afterwards."""
    source = observed[0]
    mixed = CalibrationConfig(mixture=mixture(tmp_path, numbers=3.0), samples=8, length=40, micro_batch=4)
    take_statistics(config(source, tmp_path / "mixed", calibration=mixed), ranks)
    together = Statistics(tmp_path / "mixed" / "stats")
    assert together.about["sources"] == {"numbers": 6, "letters": 2}
    for number, (name, samples) in enumerate(together.about["sources"].items()):
        alone = CalibrationConfig(path=mixed.mixture[name].path, samples=samples, length=40, micro_batch=4)
        take_statistics(config(source, tmp_path / name, calibration=alone), ranks)
        single = Statistics(tmp_path / name / "stats")
        for layer in range(3):
            for key in ("coactivation", "powers", "peak"):
                torch.testing.assert_close(together.load(layer)[key][number], single.load(layer)[key][0], msg=f"{name} {key}")
        ranked = ExpertsConfig(method=ExpertsMethod.rank, score=Score.frequency)
        only = replace(ranked, source_weights={other: 0.0 for other in together.sources if other != name})
        plan_from_run(config(source, tmp_path / "mixed", experts=only), tmp_path / "weighed.json")
        plan_from_run(config(source, tmp_path / name, experts=ranked), tmp_path / "alone.json")
        (described,) = plan_from_run(config(source, tmp_path / "mixed", experts=only), tmp_path / "again.json").values()
        assert described.needs[name] == naive_need(single, read_layers(tmp_path / "alone.json")[0])
        assert read_layers(tmp_path / "weighed.json") == read_layers(tmp_path / "alone.json")
    with pytest.raises(StunError, match=r"source_weights.*sources are numbers, letters"):
        unknown = ExpertsConfig(source_weights={"code": 1.0})
        plan_from_run(config(source, tmp_path / "mixed", experts=unknown), tmp_path / "plan.json")


def naive_need(stats: Statistics, layers) -> tuple[int, int]:
    """Experts taken by how often they were chosen until they serve 90 % of the choices, and how many of these are kept."""
    needed = stay = 0
    for number, layer in enumerate(layers):
        counts = stats.load(number)["coactivation"][0].diagonal().tolist()
        order, served = sorted(range(12), key=lambda e: (-counts[e], e)), 0
        for expert in order:
            if served >= 0.9 * sum(counts):
                break
            served, needed, stay = served + counts[expert], needed + 1, stay + (expert in layer.kept)
    return needed, stay


WRONG_CALIBRATION = {
    "path and mixture": ({"path": str(TEXT)}, "calibration.path=.*and not both"),
    "no weight": ({"weight": 0.0}, r"mixture\.numbers\.weight=0\.0: a number above 0"),
    "gets no sample": ({"weight": 1e-6}, r"mixture\.numbers\.weight=1e-06: gets none"),
    "no such file": ({"file": "/no/such.jsonl"}, r"calibration\.mixture\.numbers\.path=/no/such\.jsonl: no such file"),
}


@pytest.mark.parametrize("name", WRONG_CALIBRATION)
def test_wrong_mixtures(observed, tmp_path, ranks, name):
    change, message = WRONG_CALIBRATION[name]
    sources = mixture(tmp_path)
    own = replace(sources["numbers"], weight=change.get("weight", 1.0), path=change.get("file", sources["numbers"].path))
    calibration = CalibrationConfig(path=change.get("path", ""), mixture={**sources, "numbers": own}, samples=8, length=40)
    with pytest.raises(StunError, match=message):
        prune(config(observed[0], tmp_path / "run", calibration=calibration), ranks)
    assert not (tmp_path / "run").exists()


def test_a_seed_shuffles_the_text(observed, tmp_path, ranks):
    digests = set()
    for seed in (None, 0, 1, 1):
        own = replace(CALIBRATION, seed=seed)
        take_statistics(config(observed[0], tmp_path / f"{seed}", calibration=own), ranks)
        digests.add(Statistics(tmp_path / f"{seed}" / "stats").load(0)["powers"].numpy().tobytes())
    assert len(digests) == 3


@pytest.mark.ranks
@pytest.mark.slow
def test_same_statistics_and_bytes_on_1_2_4_ranks(tmp_path):
    """... for a mixture whose parts do not divide into micro-batches, a score, co-activation, and reconstruction."""
    source = make_checkpoint(tmp_path / "source", "gpt_oss", dtype=torch.bfloat16)
    sources = mixture(tmp_path, numbers=2.0)
    how = {
        "+calibration.mixture": "{" + ",".join(f"{n}:{{path:{s.path},weight:{s.weight}}}" for n, s in sources.items()) + "}",
        "calibration.path": "",
        "calibration.micro_batch": 3,
        "experts.representative": "score",
        "experts.lambda2": 1,
        "experts.kappa": 8,
        "experts.fraction": 0.7,
    }
    for ranks in (1, 2, 4):
        arguments = [a for a in settings(source, tmp_path / str(ranks)) if a.partition("=")[0] not in how]
        run_job("prune", [*arguments, *(f"{key}={value}" for key, value in how.items())], ranks)
        if ranks > 1:
            same_tensors(tmp_path / "1" / "model", tmp_path / str(ranks) / "model")
            for file in sorted((tmp_path / "1" / "stats").iterdir()):
                assert file.read_bytes() == (tmp_path / str(ranks) / "stats" / file.name).read_bytes(), file.name
