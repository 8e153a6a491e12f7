"""Plans from one saved stream of statistics: every method, calibration mixtures, protection, plan files, reconstruction."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TEXT, load_tensors, run_job, same_tensors, settings
from test_families import load_stock
from test_heterogeneous import target_of
from zoo import make_checkpoint

from stun.arch import Architecture
from stun.checkpoint import Checkpoint
from stun.config import (
    Budget,
    CalibrationConfig,
    ExpertsConfig,
    ExpertsMethod,
    ModelConfig,
    ProtectConfig,
    PruneConfig,
    Representative,
    Scope,
    Score,
    SourceConfig,
    SparsifyConfig,
    StunError,
)
from stun.plan import read_layers
from stun.planfile import plan_from_run
from stun.prune import prune, take_statistics
from stun.run import Statistics

CALIBRATION = CalibrationConfig(path=str(TEXT), samples=8, length=40, micro_batch=2)


def config(source, run_dir, target=0.4, experts=None, **changes) -> PruneConfig:
    experts = experts or ExpertsConfig()
    base = PruneConfig(ModelConfig(str(source)), CALIBRATION, experts, target=target, run_dir=str(run_dir))
    return replace(base, **changes)


@pytest.fixture(scope="module")
def observed(tmp_path_factory, ranks):
    """(checkpoint, run folder with its statistics)."""
    folder = tmp_path_factory.mktemp("observed")
    source = make_checkpoint(folder / "source", "mixtral", num_local_experts=12)
    take_statistics(config(source, folder / "run"), ranks)
    return source, folder / "run"


def test_one_stream_serves_every_selection(observed, tmp_path):
    source, run_dir = observed
    before = sorted((f.name, f.stat().st_mtime_ns) for f in (run_dir / "stats").iterdir())
    similarities = [{}, {"lambda2": 1.0}, {"lambda1": 0.0, "lambda3": 1.0}, {"lambda1": 0.5, "lambda2": 0.5, "lambda3": 0.5}]
    seen = {}
    for method, score, budget, representative in itertools.product(ExpertsMethod, Score, Budget, Representative):
        for number, similarity in enumerate(similarities):
            experts = ExpertsConfig(method=method, score=score, budget=budget, representative=representative, **similarity)
            cfg = config(source, run_dir, experts=experts)
            (described,) = plan_from_run(cfg, tmp_path / "plan.json").values()
            plan = described.plan
            assert plan.dropped + plan.zeros == round(0.4 * plan.parameters)
            kept = [len(layer.clusters) for layer in plan.layers]
            assert kept == [9, 9, 9] or (budget is Budget["global"] and sum(kept) < 30)
            seen[method, score, budget, representative, number] = json.dumps([layer.clusters for layer in plan.layers])
    assert sorted((f.name, f.stat().st_mtime_ns) for f in (run_dir / "stats").iterdir()) == before
    assert len(set(seen.values())) > 30, "the methods must differ, or this proves nothing"


@pytest.mark.parametrize(
    "experts",
    [
        ExpertsConfig(),
        ExpertsConfig(method=ExpertsMethod.rank, score=Score.msan),
        ExpertsConfig(representative=Representative.score, lambda3=1.0, budget=Budget["global"]),
        ExpertsConfig(fraction=1.0, kappa=8),
    ],
    ids=["stun", "rank", "cluster_score", "reconstructed"],
)
def test_a_plan_file_gives_what_the_run_itself_does(observed, tmp_path, ranks, experts):
    source, run_dir = observed
    cfg = config(source, run_dir, experts=experts)
    plan_from_run(cfg, tmp_path / "plan.json")
    prune(replace(cfg, run_dir=str(tmp_path / "own")), ranks)
    prune(replace(cfg, run_dir=str(tmp_path / "given"), plan=str(tmp_path / "plan.json")), ranks)
    same_tensors(tmp_path / "own" / "model", tmp_path / "given" / "model")
    assert not list((tmp_path / "given" / "stats").iterdir()), "no first stream for a given plan"
    finished = replace(cfg, run_dir=str(tmp_path / "finished"), plan=str(tmp_path / "own" / "plan.json"))
    prune(finished, ranks)
    same_tensors(tmp_path / "own" / "model", tmp_path / "finished" / "model")


def test_a_plan_edited_by_hand(observed, tmp_path, ranks):
    source, run_dir = observed
    cfg = config(source, run_dir, experts=ExpertsConfig(representative=Representative.score), sparsify=SparsifyConfig(scope=[]))
    cfg = replace(cfg, target=target_of(source, 9), experts=replace(cfg.experts, fraction=1.0))
    plan_from_run(cfg, tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    layer = content["layers"][1]
    pair = next(cluster for cluster in layer["clusters"] if len(cluster) > 1)
    layer["kept"] = sorted(set(layer["kept"]) - {pair[0]} | {pair[1]})
    (tmp_path / "plan.json").write_text(json.dumps(content))
    target = content["dropped"] / content["parameters"]
    prune(replace(cfg, target=target, run_dir=str(tmp_path / "run"), plan=str(tmp_path / "plan.json")), ranks)
    before, after = load_tensors(source), load_tensors(tmp_path / "run" / "model")
    moe = "model.layers.1.block_sparse_moe."
    number = layer["kept"].index(pair[1])
    assert torch.equal(after[f"{moe}experts.{number}.w1.weight"], before[f"{moe}experts.{pair[1]}.w1.weight"])
    assert torch.equal(after[f"{moe}gate.weight"], before[f"{moe}gate.weight"][layer["kept"]])


def edited(content: dict, change) -> dict:
    change(content)
    return content


PLAN_EDITS = {
    "another model": (lambda c: c["layers"].pop(), "2 layers and 0 prediction heads; the model has 3"),
    "another number of experts": (
        lambda c: c["layers"][0].update(experts=11),
        "each in one cluster",
    ),
    "too few stay": (lambda c: c["layers"][0].update(clusters=[[0]], kept=[0]), "keeps 1 experts; at least 2 are needed"),
    "more leave than the target": (
        lambda c: [layer.update(clusters=[[0], [1]], kept=[0, 1]) for layer in c["layers"]],
        "more than target=0.4",
    ),
}


@pytest.mark.parametrize("name", PLAN_EDITS)
def test_plans_that_do_not_fit_are_refused_before_work(observed, tmp_path, ranks, name):
    change, message = PLAN_EDITS[name]
    source, run_dir = observed
    plan_from_run(config(source, run_dir, experts=ExpertsConfig(representative=Representative.score)), tmp_path / "plan.json")
    content = edited(json.loads((tmp_path / "plan.json").read_text()), change)
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(StunError, match=message):
        prune(config(source, tmp_path / "run", plan=str(tmp_path / "plan.json")), ranks)
    assert not (tmp_path / "run").exists()


def test_statistics_of_another_model_are_refused(observed, tmp_path):
    other = make_checkpoint(tmp_path / "other", "mixtral")
    with pytest.raises(StunError, match="belong to another model"):
        plan_from_run(config(other, observed[1]), tmp_path / "plan.json")
    with pytest.raises(StunError, match="no complete statistics"):
        plan_from_run(config(observed[0], tmp_path / "nowhere"), tmp_path / "plan.json")


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
            for key in ("coactivation", "agreement", "powers", "peak"):
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
    "path and mixture": ({"path": str(TEXT)}, "calibration.path=.*give it, or a mixture"),
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


def test_protected_experts_stay(observed, tmp_path, ranks):
    source, run_dir = observed
    stats = [Statistics(run_dir / "stats").load(layer) for layer in range(3)]
    peaks = torch.cat([layer["peak"][0] for layer in stats])
    extreme = max(float(peaks.max()) / 10, float(torch.quantile(peaks, 0.995)))
    shares = [layer["coactivation"][0].diagonal().double() / (8 * 40) for layer in stats]
    rules = {
        "list": (ProtectConfig(experts=["L0E3", "L2E11"]), [{3}, set(), {11}]),
        "super": (ProtectConfig(super_experts=True), [set((s["peak"][0] > extreme).nonzero().flatten().tolist()) for s in stats]),
        "domain": (ProtectConfig(domain_share=0.3), [set((share >= 0.3).nonzero().flatten().tolist()) for share in shares]),
    }
    for method, (name, (protect, expected)) in itertools.product(ExpertsMethod, rules.items()):
        assert any(expected), name
        experts = ExpertsConfig(method=method, score=Score.random, protect=protect, representative=Representative.score)
        plan_from_run(config(source, run_dir, experts=experts), tmp_path / "plan.json")
        for layer, stay in zip(read_layers(tmp_path / "plan.json")[0], expected, strict=True):
            assert stay <= set(layer.kept) and all([expert] in layer.clusters for expert in stay), (method, name)
    for wrong in ("3", "L0E12", "L7E0", "0.1", "L0E²"):
        with pytest.raises(StunError, match=f"{wrong!r} names no expert"):
            experts = ExpertsConfig(protect=ProtectConfig(experts=[wrong]))
            prune(config(source, tmp_path / "run", experts=experts), ranks)
        assert not (tmp_path / "run").exists()


def members_of(layout, tensors, expert: int, part: str) -> torch.Tensor:
    return torch.cat([tensors[name] for name in layout.experts[expert][part]])


LISTED = [f"L0E{expert}" for expert in range(11)]
IMPOSSIBLE = {
    "listed too many": ({"protect": ProtectConfig(experts=LISTED)}, "layer 0: 3 experts are to leave.*allows 0; list fewer"),
    "listed too many of all": (
        {"protect": ProtectConfig(experts=[f"L{i}E{e}" for i in range(3) for e in range(11)]), "budget": Budget["global"]},
        "experts are to leave, but experts.protect.experts allows 0",
    ),
    "infinite lambda": ({"lambda1": float("inf")}, "experts.lambda1=inf"),
    "exponent": ({"b": 500.0}, r"experts\.b=500"),
    "no number": ({"b": float("nan")}, r"experts\.b=nan"),
    "source that is none": ({"source_weights": {"code": 1.0}}, "sources are all"),
    "infinite weight": ({"source_weights": {"all": float("inf")}}, "source_weights.all=inf"),
    "auto for nothing": ({"fraction": "auto", "target": 0.0}, "auto for a target above 0"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_selections_are_refused_before_work(observed, tmp_path, ranks, name):
    change, message = IMPOSSIBLE[name]
    target = change.get("target", 0.4)
    experts = ExpertsConfig(**{key: value for key, value in change.items() if key != "target"})
    with pytest.raises(StunError, match=message):
        prune(config(observed[0], tmp_path / "run", target, experts), ranks)
    assert not (tmp_path / "run").exists()


def test_large_seeds(observed, tmp_path):
    experts = ExpertsConfig(method=ExpertsMethod.rank, score=Score.random, seed=10**15)
    assert plan_from_run(config(*observed, experts=experts), tmp_path / "plan.json")


def test_the_plan_of_the_run_itself_is_not_overwritten(observed, tmp_path):
    source, run_dir = observed
    with pytest.raises(StunError, match="choose another file"):
        plan_from_run(config(source, run_dir), run_dir / "plan.json")
    plan_from_run(config(source, run_dir, 0.6), tmp_path / "more.json")
    with pytest.raises(StunError, match="choose another file"):
        plan_from_run(config(source, run_dir), tmp_path / "more.json", str(tmp_path / "more.json"))
    described = plan_from_run(config(source, run_dir, 0.3), tmp_path / "less.json", str(tmp_path / "more.json"))
    assert [d.plan.target for d in described.values()] == [0.3, 0.6], "each by its own target"
    (tmp_path / "folder").mkdir()
    with pytest.raises(StunError, match="cannot be written"):
        plan_from_run(config(source, run_dir), tmp_path / "folder")


def test_broken_statistics(observed, tmp_path):
    source, run_dir = observed
    shutil.copytree(run_dir, tmp_path / "copy")
    (tmp_path / "copy" / "stats" / "layer-00001.safetensors").write_bytes(b"torn")
    with pytest.raises(StunError, match=r"layer-00001\.safetensors: cannot be read"):
        plan_from_run(config(source, tmp_path / "copy"), tmp_path / "plan.json")
    (tmp_path / "copy" / "stats" / "about.json").write_text("{")
    with pytest.raises(StunError, match=r"about\.json: cannot be read"):
        plan_from_run(config(source, tmp_path / "copy"), tmp_path / "plan.json")


def test_a_run_interrupted_at_its_start_continues(observed, tmp_path, ranks, monkeypatch):
    """Killed while it wrote what it is: nothing else is in its folder yet."""
    cfg = config(observed[0], tmp_path / "run")

    def killed(file, write):
        write(file.with_name(f".{file.name}.tmp"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("stun.run.write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(cfg, ranks)
    assert prune(cfg, ranks)["sparsity"] == pytest.approx(0.4, abs=1e-4)


def test_the_nearest_to_the_mean_stays(observed, tmp_path, ranks):
    """Brute force over all parameters of a cluster's members."""
    source = observed[0]
    experts = ExpertsConfig(fraction=1.0, kappa=0)
    prune(config(source, tmp_path / "run", target_of(source, 18), experts, sparsify=SparsifyConfig(scope=[])), ranks)
    layers, *_ = read_layers(tmp_path / "run" / "plan.json")
    tensors, arch, decided = load_tensors(source), Architecture(Checkpoint.open(source)), 0
    for layout, layer in zip(arch.layers, layers, strict=True):
        for cluster in (members for members in layer.clusters if len(members) > 2):
            flat = {
                e: torch.cat([members_of(layout, tensors, e, p).flatten() for p in sorted(layout.experts[e])]).double()
                for e in cluster
            }
            mean = sum(flat.values()) / len(flat)
            assert min(cluster, key=lambda e: float((flat[e] - mean).norm())) in layer.kept
            decided += 1
    assert decided


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "ernie4_5_moe"])
def test_reconstruction_takes_the_cluster_mean(tmp_path, ranks, family):
    source = make_checkpoint(tmp_path / "source", family)
    target = {"ernie4_5_moe": 0.3}.get(family, 0.45)
    experts = ExpertsConfig(fraction=1.0, kappa=8, representative=Representative.score)
    prune(config(source, tmp_path / "run", target, experts, sparsify=SparsifyConfig(scope=list(Scope))), ranks)
    layers, *_ = read_layers(tmp_path / "run" / "plan.json")
    before, after = load_tensors(source), load_tensors(tmp_path / "run" / "model")
    arch, pruned = Architecture(Checkpoint.open(source)), Architecture(Checkpoint.open(tmp_path / "run" / "model"))
    merged = 0
    for layout, own, layer in zip(arch.layers, pruned.layers, layers, strict=True):
        for number, expert in enumerate(layer.kept):
            cluster = next(members for members in layer.clusters if expert in members)
            merged += len(cluster) > 1
            for part in layout.experts[expert]:
                mean = sum(arch.read_expert(layout, e)[part] for e in cluster) / len(cluster)
                written = pruned.read_expert(own, number)[part]
                same = torch.where(written == 0, written, mean.to(written.dtype))  # some weights may be zeroed besides
                torch.testing.assert_close(written, same, atol=1e-6, rtol=1e-6)
                assert (written == 0).float().mean() < 0.3
            for name, dim in layout.routed.items():
                mean = sum(before[name].select(dim, e) for e in cluster) / len(cluster)
                torch.testing.assert_close(after[name].select(dim, number), mean, atol=1e-6, rtol=1e-6)
    assert merged
    load_stock(tmp_path / "run" / "model")


@pytest.mark.launch
def test_same_statistics_and_bytes_on_1_2_4_ranks(tmp_path):
    """... for a mixture whose parts do not divide into micro-batches, a score, alike outputs, and reconstruction."""
    source = make_checkpoint(tmp_path / "source", "gpt_oss", dtype=torch.bfloat16)
    sources = mixture(tmp_path, numbers=2.0)
    how = {
        "+calibration.mixture": "{" + ",".join(f"{n}:{{path:{s.path},weight:{s.weight}}}" for n, s in sources.items()) + "}",
        "calibration.path": "",
        "calibration.micro_batch": 3,
        "experts.representative": "score",
        "experts.lambda3": 1,
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


@pytest.mark.launch
def test_plan_job(observed, tmp_path):
    """The command line: a plan, its counts and size, beside another plan; and a run that takes it."""
    source, run_dir = observed
    shared = [a for a in settings(source, run_dir) if not a.startswith("calibration")]
    first = run_job("plan", [*shared, f"output={tmp_path}/a.json", "experts=cluster_score"])
    both = run_job("plan", [*shared, f"output={tmp_path}/b.json", "experts=rank", f"compare={tmp_path}/a.json"])
    assert "experts kept" in first.stdout and "size on disk" in first.stdout
    assert "the same)" in both.stdout and f"{tmp_path}/a.json" in both.stdout
    run_job("prune", [*settings(source, tmp_path / "run"), f"plan={tmp_path}/b.json"], 2)
    written = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert written["layers"] == json.loads((tmp_path / "b.json").read_text())["layers"]
