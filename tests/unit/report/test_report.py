"""What streams measure, and every number on a report's pages, recomputed from the run folder and the source by other means."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image
from safetensors.torch import load_file
from scipy import stats as scipy_stats

from helpers.large_runs import make_run, summary
from helpers.launches import run_job, settings
from helpers.paths import TEXT
from helpers.results import RESULT
from helpers.selections import CALIBRATION, config
from helpers.stops import stopped_after
from helpers.tensors import load_tensors
from helpers.zoo import make_checkpoint
from stun.config import (
    Budget,
    ExpertsConfig,
    ExpertsMethod,
    Representative,
    SourceConfig,
    SparsifyConfig,
    SparsifyMethod,
    StunError,
)
from stun.pruning.job import prune, take_statistics
from stun.report import charts, data
from stun.report.folder import RunFolder
from stun.report.layer_maps import branches, cut, near, tiles
from stun.report.tables import results_table
from stun.report.theme import LIGHT, THEMES
from stun.report.wording import job_command
from stun.report.write import report as reported
from stun.report.write import write_reports
from stun.run.kurtosis import kurtosis, power_sums, together
from stun.run.layer_records import KINDS

MIXTURE = {"math": SourceConfig(path=str(TEXT), weight=2.0), "code": SourceConfig(path=str(TEXT))}


def report(folder: Path) -> str:
    """What jobs.report prints."""
    return reported(folder)[1]


@pytest.fixture(scope="module")
def measured(tmp_path_factory, ranks):
    """(source, run folder): shared experts, a layer without experts, two calibration sources, global budget, an evaluation."""
    folder = tmp_path_factory.mktemp("measured")
    source = make_checkpoint(folder / "source", "qwen2_moe")
    calibration = replace(CALIBRATION, path="", mixture=MIXTURE)
    experts = ExpertsConfig(budget=Budget["global"], lambda2=0.5, source_weights={"code": 0.5})
    prune(config(source, folder / "run", experts=experts, calibration=calibration), ranks)
    (folder / "run" / "result.json").write_text(json.dumps(RESULT))
    return source, folder / "run"


@pytest.fixture(scope="module")
def run(measured):
    return RunFolder.open(measured[1])


def kind_of(name: str) -> str:
    """By the names of Qwen2-MoE."""
    kinds = {
        r"mlp\.experts\.\d+\.": "experts",
        r"mlp\.shared_expert\.\w+_proj\.weight": "shared",
        r"mlp\.(gate|up|down)_proj\.weight": "mlp",
        r"self_attn\.\w+_proj\.weight": "attention",
    }
    return next((kind for pattern, kind in kinds.items() if re.search(pattern, name)), "other")


def by_layer(tensors: dict[str, torch.Tensor]) -> list[dict[str, list[tuple[str, torch.Tensor]]]]:
    """Tensors of each decoder layer by kind."""
    layers = [defaultdict(list) for _ in range(3)]
    for name, tensor in tensors.items():
        match = re.match(r"model\.layers\.(\d+)\.", name)
        if match:
            layers[int(match[1])][kind_of(name)].append((name, tensor))
    return layers


def values(named: list[tuple[str, torch.Tensor]]) -> np.ndarray:
    return np.concatenate([tensor.double().numpy().ravel() for _, tensor in named]) if named else np.zeros(0)


def plan_of(folder: Path) -> list[dict]:
    return json.loads((folder / "plan.json").read_text())["layers"]


def test_sums_do_not_depend_on_how_weights_are_spread():
    torch.manual_seed(0)
    matrices = [torch.randn(70, 50).bfloat16(), torch.randn(33, 90) * 1e3, torch.randn(5, 7) + 2]
    matrices[1][::2] = 0
    whole = np.concatenate([m.double().numpy().ravel() for m in matrices])
    assert kurtosis([power_sums(matrices)]) == pytest.approx(scipy_stats.kurtosis(whole, fisher=False), rel=1e-12)
    matrices = [part for m in matrices for part in m.split(3)]
    spread = [power_sums([part.T.contiguous().T]) for part in reversed(matrices)]  # strides do not matter either
    assert kurtosis(spread) == kurtosis([power_sums(matrices)]) == kurtosis([together(spread[:4]), together(spread[4:])])
    some = whole[whole != 0]
    assert kurtosis([power_sums(matrices, True)]) == pytest.approx(scipy_stats.kurtosis(some, fisher=False), rel=1e-12)
    assert kurtosis([power_sums([torch.tensor([[1.0, math.inf]])])]) is None
    assert kurtosis([power_sums([torch.ones(2, 2)])]) is None and kurtosis([power_sums([])]) is None


def test_parameters_and_sparsity_by_kind(measured, run):
    """... from the tensors of both checkpoints; what the page shows is that."""
    source, folder = measured
    before, after = (by_layer(load_tensors(path)) for path in (source, folder / "model"))
    shown = data.sparsity(run)
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        sizes = {kind: (len(values(old[kind])), int(np.count_nonzero(values(new[kind])))) for kind in old}
        counted = {kind: {"parameters": size, "nonzero": nonzero} for kind, (size, nonzero) in sizes.items()}
        found = json.loads((folder / "layers.json").read_text())["prune"][layer]["kinds"]
        assert found == counted
        for kind, own in counted.items():
            assert shown[kind][layer] == pytest.approx(1 - own["nonzero"] / own["parameters"])
        whole = [sum(own[field] for own in counted.values()) for field in ("nonzero", "parameters")]
        assert shown["all"][layer] == pytest.approx(1 - whole[0] / whole[1])
    assert shown["experts"][0] is not None and any(own is None for own in shown["mlp"]), "a layer has one or the other"
    assert run.summary["nonzero"] == sum(int(np.count_nonzero(values(own))) for new in after for own in new.values())


def test_kurtosis(measured, run):
    source, folder = measured
    before, after = (by_layer(load_tensors(path)) for path in (source, folder / "model"))
    shown = data.kurtosis(run)
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        kept = {f".experts.{expert}." for expert in plan_of(folder)[layer]["kept"]}
        survivors = [own for own in old["experts"] if any(mark in own[0] for mark in kept)]
        inside = [own for kind in ("shared", "mlp", "attention") for own in old[kind]]
        left = np.concatenate([values(new[kind]) for kind in ("experts", "shared", "mlp", "attention")])
        stages = {
            "dense": values(inside + old["experts"]),
            "experts_removed": values(inside + survivors),
            "weights_removed": left[left != 0],
        }
        for stage, weights in stages.items():
            assert shown[stage][layer] == pytest.approx(scipy_stats.kurtosis(weights, fisher=False), rel=1e-9), (stage, layer)


def test_experts_kept_usage_and_scores(measured, run):
    """Survivors from the shards' headers; shares, scores and distances from the files of statistics."""
    _, folder = measured
    numbers = defaultdict(set)
    for name in load_tensors(folder / "model"):
        match = re.match(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.", name)
        if match:
            numbers[int(match[1])].add(int(match[2]))
    assert data.experts_kept(run) == {"experts": [8, 0, 8], "kept": [len(numbers[layer]) for layer in range(3)]}
    sources = list(json.loads((folder / "stats" / "about.json").read_text())["sources"])
    shown, selections = data.usage(run), data.scores(run)
    assert [own.source for own in shown] == sources == ["math", "code"]
    for place, layer in enumerate((0, 2)):
        raw = load_file(folder / "stats" / f"layer-{layer:05d}.safetensors")
        kept = plan_of(folder)[layer]["kept"]
        for own, matrix_EE in zip(shown, raw["coactivation"].double().numpy(), strict=True):
            served = np.diag(matrix_EE)
            assert own.share_LE[place] == pytest.approx(list(served / served.sum()))
            assert own.kept_L[place] == pytest.approx(served[kept].sum() / served.sum())
        powers = (raw["powers"] * torch.tensor([1.0, 0.5])[:, None, None, None]).sum(0).numpy()
        both = (raw["coactivation"].double() * torch.tensor([1.0, 0.5])[:, None, None]).sum(0).numpy()
        np.fill_diagonal(both, 0)
        reap = np.divide(powers[:, 1, 1], powers[:, 0, 0], out=np.zeros(8), where=powers[:, 0, 0] > 0)
        assert selections[place].score_E == pytest.approx(list(reap))
        distance = raw["router_distance"].numpy() - 0.5 * both / (both.sum() / 56)
        off = ~np.eye(8, dtype=bool)
        assert selections[place].distance_EE[off] == pytest.approx(distance[off])
        assert selections[place].kept == kept and sorted(selections[place].order) == list(range(8))


def test_tree_and_cut(measured, run):
    """The branches below the cut are the clusters of plan.json, and their members are neighbours on the map."""
    _, folder = measured
    for own in data.scores(run):
        clusters = [sorted(cluster) for cluster in plan_of(folder)[own.layer]["clusters"]]
        made = [bracket for bracket, is_made in branches(own) if is_made]
        assert len(branches(own)) == 7 and len(made) == 8 - len(clusters)
        for cluster in clusters:
            places = sorted(own.order.index(expert) for expert in cluster)
            assert places == list(range(places[0], places[0] + len(places)))
        height = cut(own)
        if made and len(clusters) > 1:
            assert max(bracket[1, 1] for bracket in made) <= height
            assert sum(bracket[1, 1] > height for bracket, _ in branches(own)) == len(clusters) - 1


def test_saliency_of_magnitudes(checkpoint, tmp_path, ranks):
    """Scores of every sixteenth row are the weights themselves, and the removed ones are zero in the result."""
    source = checkpoint("mixtral")
    how = SparsifyConfig(method=SparsifyMethod.magnitude)
    prune(config(source, tmp_path / "run", experts=ExpertsConfig(fraction=0), sparsify=how), ranks)
    before, after = load_tensors(source), load_tensors(tmp_path / "run" / "model")
    every, removed = Counter(), Counter()
    joined = re.compile(r"(.*)\.w([123])\.weight")
    for name in before:
        match = joined.fullmatch(name)
        names = [name] if not match else [] if match[2] == "3" else [name, f"{match[1]}.w3.weight"] if match[2] == "1" else [name]
        if not names or ".layers." not in name or before[name].dim() < 2 or "gate.weight" in name:
            continue
        old, new = (torch.cat([tensors[part] for part in names])[::16].numpy() for tensors in (before, after))
        place = np.floor(np.log2(np.abs(old)) * 4).astype(int)
        every.update(place.ravel().tolist())
        removed.update(place[new == 0].tolist())
    shown = data.saliency(RunFolder.open(tmp_path / "run"))
    counts = {round(4 * math.log2(score)): pair for score, *pair in zip(*shown.values(), strict=True) if any(pair)}
    assert sum(abs(every[p] - sum(counts.get(p, (0, 0)))) for p in every) <= 4, "numpy's logarithm may differ in its last bit"
    assert sum(removed.values()) == sum(shown["removed"]) and sum(every.values()) == sum(shown["kept"]) + sum(shown["removed"])


def test_result_time_and_size(measured, run):
    """What other files say is shown as it stands there."""
    source, folder = measured
    layers = json.loads((folder / "layers.json").read_text())
    assert data.layer_error(run) == RESULT["layer_error"]
    assert data.evaluation(run) == {"adding": (1.0, 0.5), "sorting": (1.0, 1.0)}
    shown = data.timeline(run)
    for stream in ("observe", "prune"):
        assert len(layers[stream]) == 3 and shown[stream]["read"] == [own["seconds"]["read"] for own in layers[stream]]
        assert all(0 < own["peak_bytes"] <= run.summary["peak_bytes"] for own in layers[stream])
        assert all(own["seconds"][phase] > 0 for own in layers[stream] for phase in ("read", "compute", "write"))
    files = {"before": source, "after": folder / "model"}
    files = {name: sum(file.stat().st_size for file in path.glob("*.safetensors")) for name, path in files.items()}
    assert data.size(run) == files


@pytest.mark.ranks
def test_the_same_on_two_ranks_and_from_shared_statistics(checkpoint, tmp_path, ranks):
    """Everything that is not time or memory; ranking reads no experts that leave, whose weights the first stream has seen."""
    source, ranked = checkpoint("mixtral"), ExpertsConfig(method=ExpertsMethod.rank)
    take_statistics(config(source, tmp_path / "observed"), ranks)
    prune(config(source, tmp_path / "one", experts=ranked), ranks)
    same = {"calibration__samples": CALIBRATION.samples, "calibration__length": CALIBRATION.length, "experts": "rank"}
    run_job("prune", settings(source, tmp_path / "two", statistics=tmp_path / "observed", **same), 2)
    found = [json.loads((tmp_path / name / "layers.json").read_text()) for name in ("one", "two")]
    for one, two in zip(*(layers["prune"] for layers in found), strict=True):
        assert all(one[key] == two[key] for key in ("kinds", "kurtosis", "saliency"))
        assert None not in one["kurtosis"]["scope"].values()
    assert len(found[0]["observe"]) == 3 and not found[1]["observe"]
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["summary"]["statistics"] == "../observed"
    run = RunFolder.open(tmp_path / "two")
    assert not data.scores(run)[0].clusters and "by score" in write_reports(tmp_path / "two")[0].read_text()


def test_a_resumed_run_keeps_what_was_measured(checkpoint, tmp_path, ranks):
    cfg = config(checkpoint("mixtral"), tmp_path / "run")
    with stopped_after("prune", 1):
        prune(cfg, ranks)
    entries = {
        stream: [json.loads(file.read_text()) for file in sorted((tmp_path / "run" / "progress").glob(f"{stream}-*"))]
        for stream in ("observe", "prune")
    }
    prune(cfg, ranks)
    layers = json.loads((tmp_path / "run" / "layers.json").read_text())
    for stream, count in (("observe", 3), ("prune", 2)):
        assert [own["seconds"] for own in layers[stream]][:count] == [own["seconds"] for own in entries[stream]]
        assert [own["peak_bytes"] for own in layers[stream]][:count] == [own["peak_bytes"] for own in entries[stream]]


def test_statistics_alone_are_measured_too(checkpoint, tmp_path, ranks):
    cfg = config(checkpoint("mixtral"), tmp_path / "run")
    take_statistics(cfg, ranks)
    first = (tmp_path / "run" / "layers.json").read_text()
    assert len(json.loads(first)["observe"]) == 3
    take_statistics(cfg, ranks)
    assert (tmp_path / "run" / "layers.json").read_text() == first
    with pytest.raises(StunError, match="holds statistics alone"):
        report(tmp_path / "run")


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_a_kind_of_tensor_has_one_colour(theme):
    """Whichever kinds a model has; and no two kinds share one."""
    colors = {}
    for kinds in (KINDS, ("experts", "attention"), ("mlp", "other")):
        (axes,) = charts.sparsity(theme, {kind: [0.1, 0.2] for kind in (*kinds, "all")}).axes
        drawn = {line.get_label(): line.get_color() for line in axes.lines if line.get_label() in KINDS}
        assert drawn.keys() == set(kinds)
        assert all(colors.setdefault(kind, color) == color for kind, color in drawn.items())
    assert len(set(colors.values()) - {theme.kept, theme.removed}) == len(KINDS)


def test_pictures_show_differences():
    """Where nearly all is as in the dense model, what differs is drawn, and the axis says so."""
    (axes,) = charts.experts_kept(LIGHT, {"experts": [128, 128], "kept": [127, 125]}).axes
    assert [bar.get_height() for bar in axes.patches] == [1, 3] and axes.get_ylabel() == "experts removed, of 128"
    (axes,) = charts.experts_kept(LIGHT, {"experts": [8, 8], "kept": [3, 8]}).axes
    assert [bar.get_height() for bar in axes.patches] == [8, 8, 3, 8] and axes.get_ylabel() == "experts"
    (axes,) = charts.evaluation(LIGHT, {"adding": (0.98, 0.96), "sorting": (0.99, 1.0)}).axes
    low, high = axes.get_xlim()
    assert -0.03 < low < -0.02 < 0.01 < high < 0.02 and axes.get_xlabel() == "exact match, pruned minus dense"
    assert [text.get_text() for text in axes.texts] == ["0.98 → 0.96", "0.99 → 1.00"]
    assert charts.evaluation(LIGHT, {"adding": (None, 0.96)}).axes[0].get_xlabel() == "exact match"


def test_too_many_dots_are_drawn_as_ranges():
    score_E = np.random.default_rng(0).pareto(2, size=1200)
    choices = [data.Selection(layer, np.zeros(0), score_E.tolist(), list(range(900)), [], []) for layer in range(2)]
    (axes,) = charts.scores(LIGHT, choices).axes
    lines, dots, removed_lines, removed_dots = axes.collections
    for group, line, dot in ((score_E[:900], lines, dots), (score_E[900:], removed_lines, removed_dots)):
        low, high = np.percentile(group / score_E.mean(), (5, 95))
        assert np.array(line.get_segments())[:, :, 1] == pytest.approx(np.array([[low, high]] * 2))
        assert dot.get_offsets()[:, 1].tolist() == pytest.approx([group.max() / score_E.mean()] * 2)
    (axes,) = charts.scores(LIGHT, choices[:1]).axes
    assert [len(own.get_offsets()) for own in axes.collections] == [900, 300]


@pytest.mark.slow
def test_page_is_whole(measured):
    """Every section has its picture in both themes; nothing comes from elsewhere; what files say is text, never HTML."""
    _, folder = measured
    page = report(folder).removeprefix("wrote ")
    text, pngs = Path(page).read_text(), {file.name for file in (folder / "report").glob("*.png")}
    names = ["evaluation", "experts-kept", "sparsity", "usage", "expert-scores", "saliency", "kurtosis", "timeline", "size"]
    names.append("layer-error")
    assert pngs == {f"{n}-{t}.png" for n in names for t in ("light", "dark")} | {f"experts-of-layer-00{n}.png" for n in (0, 2)}
    assert text.count("<picture>") == len(names) and text.count("<img ") == len(names) + 2
    links = re.findall(r"(?:src|srcset|href)=\"([^\"]{0,12})|url\(([^)]*)|@import|<script", text)
    assert links and all(link[0].startswith(("data:", "#")) for link in links)
    assert "task &lt;b&gt;: acc" in text and "task <b>" not in text
    assert "experts.fraction=auto" in text and "experts.fraction was given" in text, "what has no data says what gives it"
    assert 'name="viewport"' in text and len(text) < 3e6
    words = re.sub(r"<style>.*?</style>|<[^>]*>", " ", text, flags=re.S) + (folder / "model" / "README.md").read_text()
    assert not re.search(r"\b(left|leaves?|stay(s|ed)?|gone)\b", words), "experts and weights are kept or removed"


@pytest.mark.slow
def test_page_of_a_large_model(tmp_path):
    """As many layers and experts as Kimi-K2: every layer is there, and the page can be sent and opened."""
    page = write_reports(make_run(tmp_path / "run", 61, 384))[0]
    assert page.stat().st_size < 3e6
    text = page.read_text()
    assert all(f'id="map-{layer}"' in text for layer in range(61)) and text.count('class="map"') == 61
    (own, *_) = data.scores(RunFolder.open(tmp_path / "run"))
    near_EE, low, high = near(own)
    pairs = own.distance_EE[own.order][:, own.order]
    assert near_EE == pytest.approx(np.clip((high - pairs) / (high - low), 0, 1)) and f"{low:.3g}<i></i>{high:.3g}" in text
    alone = Image.open(tmp_path / "run" / "report" / "experts-of-layer-000.png").convert("RGBA").getchannel("A")
    assert np.abs(np.asarray(alone) / 255 - near_EE).max() < 0.02, "a square for every pair"


def test_order_of_the_experts_is_written_beside_the_map(tmp_path):
    """Clusters of the plan in brackets, kept experts in bold, in the order of the map's columns."""
    run = RunFolder.open(make_run(tmp_path / "run", 1, 12))
    (own,) = data.scores(run)
    text = re.search(r'class="experts">(.*?)</p>', tiles([own], tmp_path))[1]
    assert [int(number) for number in re.findall(r"\d+", text)] == own.order
    assert [int(number) for number in re.findall(r"<b>(\d+)", text)] == [e for e in own.order if e in own.kept]
    groups = {frozenset(map(int, re.findall(r"\d+", group))) for group in re.findall(r"\[(.*?)\]", text)}
    assert groups == {frozenset(cluster) for cluster in own.clusters if len(cluster) > 1} != set()


def test_scores_that_are_all_alike_are_told_apart(tmp_path):
    """Bars of the ranked experts rise from the least score, kept and removed ones in their own paths."""
    choice = data.Selection(0, np.zeros((3, 3)), [-0.80, -0.73, -0.79], [1], [], [])
    text = tiles([choice], tmp_path)
    heights = {name: re.findall(r"V(\d+)h", path) for name, path in re.findall(r'class="(kept|removed)" d="([^"]*)"', text)}
    assert heights == {"kept": ["0"], "removed": ["171", "198"]} and "from the least score, -0.8, to the highest, -0.73" in text
    assert re.search(r'class="experts"><b>1</b> 2 0</p>', text)


@pytest.mark.slow
def test_split_that_was_searched(checkpoint, tmp_path, ranks):
    cfg = config(checkpoint("mixtral"), tmp_path / "run", experts=ExpertsConfig(fraction="auto"))
    prune(replace(cfg, calibration=replace(CALIBRATION, samples=16)), ranks)
    curve = json.loads((tmp_path / "run" / "search.json").read_text())["error"]
    shown = data.budget(RunFolder.open(tmp_path / "run"))
    assert dict(zip(map(str, shown["fraction"]), shown["error"], strict=True)) == curve
    report(tmp_path / "run")
    assert (tmp_path / "run" / "report" / "budget-dark.png").is_file()


@pytest.mark.slow
def test_routing_groups_and_a_given_plan(checkpoint, tmp_path, ranks):
    """Trees stay within the groups that routing is limited to; with a plan from outside there are no trees."""
    source = checkpoint("deepseek_v3")
    cfg = config(source, tmp_path / "run", experts=ExpertsConfig(representative=Representative.score))
    prune(cfg, ranks)
    (own, *_) = data.scores(RunFolder.open(tmp_path / "run"))
    assert len(own.merges) == 6 and all(merge.first // 4 == merge.second // 4 for merge in own.merges)
    given = replace(cfg, run_dir=str(tmp_path / "given"), plan=str(tmp_path / "run" / "plan.json"))
    prune(given, ranks)
    assert data.scores(RunFolder.open(tmp_path / "given")) is None
    assert "took no statistics" in write_reports(tmp_path / "given")[0].read_text()
    kurtoses = json.loads((tmp_path / "given" / "layers.json").read_text())["prune"][1]["kurtosis"]
    assert kurtoses["experts"]["dense"] is None and kurtoses["experts"]["experts_removed"] > 0


@pytest.mark.slow
def test_comparison(measured, checkpoint, tmp_path, ranks):
    """Runs of a folder: a page each, one beside one another; a run without an evaluation is in the table alone."""
    for name, target in (("a=0.3", 0.3), ("b 0.5", 0.5)):
        experts = ExpertsConfig(method=ExpertsMethod.rank)
        prune(config(checkpoint("mixtral"), tmp_path / name, target=target, experts=experts), ranks)
    (tmp_path / "a=0.3" / "result.json").write_text(json.dumps({"average": 0.5, "perplexity": 3.0, "exact_match": {"all": 0.5}}))
    (tmp_path / "c" / "progress").mkdir(parents=True)
    (tmp_path / "c" / "config.yaml").write_text("config: {}\n")
    printed = report(tmp_path)
    assert printed.splitlines()[-1] == f"wrote {tmp_path / 'report' / 'index.html'}" and "not complete" in printed
    page = (tmp_path / "report" / "index.html").read_text()
    assert 'href="../b%200.5/report/index.html"' in page and page.count("<picture>") == 2 and "not complete" in page
    assert (tmp_path / "a=0.3" / "report" / "index.html").is_file() and (tmp_path / "b 0.5" / "report" / "index.html").is_file()
    assert report(tmp_path).splitlines()[-1] == printed.splitlines()[-1], "what is there already is no obstacle"


@pytest.mark.slow
def test_names_are_only_text(measured, tmp_path):
    """No formula, no markup, whatever a group or a run is called."""
    shutil.copytree(measured[1], tmp_path / "runs" / "[b]")
    names = [r"$\frac{$", "costs $5 to $9", "[/red]", ":smile:"]
    (tmp_path / "runs" / "[b]" / "result.json").write_text(json.dumps({**RESULT, "exact_match": dict.fromkeys(names, 0.5)}))
    assert re.search(r"^\[b\] +0\.", report(tmp_path / "runs"), re.M)
    printed = results_table({"runs/[/x]": {"exact_match": dict.fromkeys(names, 0.5)}})
    assert all(name.replace("_", " ") in printed for name in [*names, "runs/[/x]"])


@pytest.mark.slow
def test_statistics_and_model_that_are_elsewhere(measured, tmp_path):
    """A run whose model was moved has its report; other statistics where its own were are not shown as its own."""
    shutil.copytree(measured[1], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    assert (
        "Which experts are alike" in write_reports(tmp_path / "run")[0].read_text() and not (tmp_path / "run" / "model").exists()
    )
    about = json.loads((tmp_path / "run" / "stats" / "about.json").read_text())
    (tmp_path / "run" / "stats" / "about.json").write_text(json.dumps({**about, "model": "another"}))
    assert RunFolder.open(tmp_path / "run").stats is None


@pytest.mark.parametrize(
    "folder", ["runs/a", "runs/sweep/experts.fraction=0.1,target=0.3", "my runs/[x]", "it's", 'a"b', "\u00e9"]
)
def test_commands_can_be_pasted(folder):
    """Into a shell, and are then understood by Hydra; a sweep names the folders of its runs by what differs."""
    *start, word, other = shlex.split(job_command("evaluate", model__path=f"{folder}/model", dense="DENSE.json"))
    assert start == ["stun", "evaluate"] and other == "dense=DENSE.json"
    parsed = OverridesParser.create().parse_override(word)
    assert (parsed.key_or_group, parsed.value()) == ("model.path", f"{folder}/model") and not parsed.is_sweep_override()


MANIFEST = json.dumps({"summary": summary(1, 4, 3)})
DONE = {"config.yaml": "config: {}\n", "manifest.json": MANIFEST, "plan.json": '{"layers": []}'}


@pytest.mark.parametrize(
    "files, match",
    [
        (None, r"folder=.*: is no folder"),
        ({}, "holds no run folders"),
        ({"config.yaml": "config: {}\n"}, "the run is not complete"),
        ({"config.yaml": "a: ["}, "config.yaml: cannot be read as YAML"),
        ({**DONE, "manifest.json": '{"summary": {"kept": 3}}'}, "manifest.json: summary.target: must be there"),
        ({**DONE, "plan.json": "{"}, "plan.json: cannot be read as JSON"),
        ({**DONE, "config.yaml": "config: {experts: {method: magic}}\n"}, "magic"),
    ],
)
def test_folders_without_a_report(tmp_path, files, match):
    folder = tmp_path / "run"
    if files is not None:
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "config.json").write_text("{}")
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(StunError, match=match):
        report(folder)


@pytest.mark.parametrize("name", ["layers.json", "result.json", "manifest.json"])
def test_damaged_files_of_a_run(measured, tmp_path, name):
    """One clear error, whatever is in them."""
    shutil.copytree(measured[1], tmp_path / "run")
    wrong = {"layers.json": {"prune": [7]}, "result.json": {"average": "<b>"}, "manifest.json": {"summary": {"sparsity": []}}}
    for text in (json.dumps(wrong[name]), "{", "[]"):
        (tmp_path / "run" / name).write_text(text)
        with pytest.raises(StunError, match=rf"{name}|not as a run writes it"):
            report(tmp_path / "run")


@pytest.mark.slow
def test_runs_with_less_to_show(measured, tmp_path):
    """An evaluation of text alone; a run made before layers were measured, whose statistics are gone."""
    for name in ("text", "old"):
        shutil.copytree(measured[1], tmp_path / name)
    (tmp_path / "text" / "result.json").write_text(json.dumps({"model": "m", "perplexity": 2.5, "tokens": 9, "seconds": 1.0}))
    shutil.rmtree(tmp_path / "old" / "stats")
    for name in ("layers.json", "result.json"):
        (tmp_path / "old" / name).unlink()
    old = json.loads((tmp_path / "old" / "manifest.json").read_text())["summary"]
    for key in ("groups", "model_type", "source", "source_bytes", "disk_bytes", "statistics", "command"):
        del old[key]
    (tmp_path / "old" / "manifest.json").write_text(json.dumps({"summary": old}))
    printed = report(tmp_path)
    assert re.search(r"^text .* -  +2\.500$", printed, re.M) and re.search(r"^old .* -  +-$", printed, re.M)
    page = (tmp_path / "old" / "report" / "index.html").read_text()
    assert page.count("<picture>") == 1 and "took no statistics" in page and "Not evaluated" in page and "layers.json" in page
    assert "model.path=MODEL" in page, "the source is not known either"
    assert "exact match" not in (tmp_path / "text" / "report" / "index.html").read_text()
