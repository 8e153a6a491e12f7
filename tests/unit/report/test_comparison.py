"""Pages and pictures that compare runs with one another and with the dense model."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from helpers.configs import composed
from helpers.large_runs import make_run
from helpers.pages import README, commands
from helpers.paths import ROOT
from jobs.draw import main as draw
from stun.files import load_json
from stun.report import quality_charts, wording
from stun.report.comparison import short_names, write_comparison
from stun.report.quality import Point, alike, dense_models, fronts, pareto, quality_measure
from stun.report.tables import report_table
from stun.report.theme import LIGHT
from stun.report.write import report, write_reports

DENSE, OF_DENSE = {"average": 0.976, "perplexity": 1.869}, "of the dense model's exact match"


def done(name: str = "", average: float | None = None, size: int = 9, **result) -> dict:
    """Summary of a run that removed a quarter of the experts and has this exact match."""
    scores = {} if average is None else {"average": average, "dense": DENSE}
    counts = {"sparsity": 0.5, "experts": [8, 8], "kept": [6, 6], "ratio": 0.335, "seconds": 1.0, "peak_bytes": 2**30}
    return {**counts, "disk_bytes": size, "source_bytes": 20, "source": f"/m/{name}", "result": {**scores, **result}}


def text_of(page: Path) -> str:
    """Words of a page, without its style and its tags."""
    return unescape(re.sub(r"<style>.*?</style>|<[^>]*>", "|", page.read_text().replace("<wbr>", ""), flags=re.S))


def test_pareto_front():
    """Against its definition, on random points with ties."""
    generator = np.random.default_rng(0)
    for more in (True, False):
        points = [Point(str(n), *map(float, generator.integers(0, 6, 2))) for n in range(40)]
        better = (lambda a, b: a >= b) if more else (lambda a, b: a <= b)
        for point in pareto(points, more):
            dominated = [
                p
                for p in points
                if p.cost <= point.cost
                and better(p.quality, point.quality)
                and (p.cost < point.cost or (p.quality != point.quality and better(p.quality, point.quality)))
            ]
            assert point.is_best is (not dominated)


def test_runs_that_were_asked_something_else_are_not_compared():
    """What they scored is no quality beside the others'."""
    asked = {name: done(average=value, request={"sequences": text}) for name, value, text in (("a", 0.5, "x"), ("b", 0.9, "y"))}
    runs = {**asked, "c": done(average=0.6, request={"sequences": "x"}), "d": done()}
    assert set(alike(runs)) == {"a", "c"} and alike({}) == {}
    measure = quality_measure(runs)
    assert measure.runs == {"a": 0.5, "c": 0.6} and measure.best == "c"
    assert [(point.name, point.is_best) for point in fronts(runs, measure)["bytes"]] == [("a", False), ("c", True)]


def test_the_dense_models_score_is_of_the_same_task():
    """A run that was asked something else beside the dense model says nothing of the others."""
    alone = {name: {**done(), "result": {"average": 0.5, "request": {"sequences": "x"}}} for name in "ab"}
    runs = {**alone, "c": done(average=0.9, request={"sequences": "y"})}
    assert "average" not in dense_models(runs)["dense"]["result"]


def test_the_dense_model_is_a_row_and_a_line(tmp_path):
    runs = {"a": done(average=0.5), "b": done(average=0.9, size=12)}
    assert dense_models(runs)["dense"]["kept"] == [8, 8]
    assert re.search(r"^dense +0\.0000 +16/16 +- +- +0\.976 +1\.869$", report_table(runs), re.M)
    page = write_comparison(tmp_path, runs)
    assert "|dense||0.0%||16/16||0.02 kB||0.976||1.869||" in text_of(page).replace("\u00a0", " ")
    measure = quality_measure(runs)
    (axes,) = quality_charts.front(LIGHT, fronts(runs, measure)["bytes"], "on disk", measure).axes
    assert [line.get_ydata() for line in axes.lines if line.get_linestyle() == "--"] == [[0, 0]]
    assert "dense  0.976" in [text.get_text() for text in axes.texts] and "minus dense 0.976" in axes.get_ylabel()


def test_two_dense_models_are_told_apart():
    """Then no difference is drawn, which would be from two of them."""
    runs = {"a": done("one", 0.5), "b": done("two", 0.9)}
    assert list(dense_models(runs)) == ["dense /m/one", "dense /m/two"]
    measure = quality_measure(runs)
    (axes,) = quality_charts.front(LIGHT, fronts(runs, measure)["bytes"], "on disk", measure).axes
    assert axes.get_ylabel() == "exact match" and len([line for line in axes.lines if line.get_linestyle() == "--"]) == 2


@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_names_of_points_can_be_read(count, spread):
    """No name lies over another or is cut off, whether the runs are alike or not; each is joined to its own point."""
    averages = {f"experts.fraction=0.{n},target=0.5": 0.9 - spread * n**2 / count**2 for n in range(count)}
    runs = {name: done(average=average, size=10 + n) for n, (name, average) in enumerate(averages.items())}
    measure = quality_measure(runs)
    figure = quality_charts.front(LIGHT, fronts(runs, measure)["bytes"], "on disk", measure)
    figure.draw_without_rendering()
    texts = figure.axes[0].texts
    assert len(texts) == count + 1
    boxes = [Text.get_window_extent(text) for text in texts]  # without the line
    boxes.append(figure.axes[0].get_legend().get_window_extent())
    assert not any(one.y0 < two.y1 and two.y0 < one.y1 for one, two in itertools.combinations(boxes, 2))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 and box.y1 <= figure.bbox.height for box in boxes)
    for text in texts:
        name = text.get_text().split("  ")[0]
        if name == "dense":
            continue
        assert text.xy == (runs[name]["disk_bytes"], pytest.approx(averages[name] - 0.976))


def test_a_wide_range_is_on_a_root_scale():
    """Else the best runs would look alike; the ticks are round and apart, and the axis says so."""
    measure = quality_measure({str(n): done(average=value) for n, value in enumerate((0.97, 0.965, 0.918, 0.331))})
    points = [Point(name, float(name), value) for name, value in measure.runs.items()]
    (axes,) = quality_charts.front(LIGHT, points, "x", measure).axes
    assert axes.get_ylabel() == "exact match, minus dense 0.976\non a root scale"
    heights = [axes.transData.transform((0, value - 0.976))[1] for value in (0.976, 0.97, 0.965, 0.918, 0.331)]
    gaps = -np.diff(heights) / (heights[0] - heights[-1])
    assert gaps.min() > 0.02, "0.97 and 0.965"
    assert 0 in axes.get_yticks() and np.diff(np.sqrt(np.abs(axes.get_yticks()))).max() < 0
    measure = quality_measure({str(n): done(average=value) for n, value in enumerate((0.97, 0.965, 0.96))})
    points = [Point(name, float(name), value) for name, value in measure.runs.items()]
    assert "root" not in quality_charts.front(LIGHT, points, "x", measure).axes[0].get_ylabel()


def test_methods_against_sparsity():
    """From the scores of a study, as they lie in docs: means over seeds and halves, as differences from the dense model."""
    scores = json.loads((ROOT / "docs" / "selection.json").read_text())
    (axes,) = quality_charts.methods(LIGHT, scores, ["paper", "weights only"]).axes
    dense = (scores["dense"]["odd"] + scores["dense"]["even"]) / 2
    drawn = [line for line in axes.lines if line.get_marker() == "o"]
    for method, line in zip(("paper", "weights only"), drawn, strict=True):
        x, y = line.get_data()
        assert list(x) == [0.3, 0.4, 0.5, 0.6, 0.65]
        for target, value in zip(x, y, strict=True):
            seeds = [(seed["odd"] + seed["even"]) / 2 for seed in scores["results"][method][f"{target:g}"]]
            assert value == pytest.approx(np.mean(seeds) - dense)
    colors = {text.get_text(): text.get_color() for text in axes.texts}
    assert colors.keys() == {"paper  0.842", "weights only  0.395", "dense  0.975"}
    assert drawn[0].get_color() == colors["paper  0.842"]


def test_the_picture_of_the_demo_is_that_of_its_scores(tmp_path):
    study, picture = commands("picture", (ROOT / "docs" / "selection.md").read_text())[0].splitlines()
    assert f"scores={shlex.split(picture)[3]}" in study
    cfg, scores = composed("study_demo", ["scores=s"]), load_json(ROOT / shlex.split(picture)[3])
    assert list(cfg.methods) == list(scores["results"]) and list(cfg.targets) == [0.3, 0.4, 0.5, 0.6, 0.65, 0.7]
    check_picture(picture, tmp_path)


@pytest.mark.parametrize("number", [0, 1])
def test_the_first_pictures_of_the_readme_are_those_of_their_scores(tmp_path, number):
    picture = commands("pictures", (ROOT / "docs" / "quality.md").read_text())[0].splitlines()[number]
    assert f"({shlex.split(picture)[4]})" in README
    check_picture(picture, tmp_path)


def check_picture(command: str, folder) -> None:
    """A picture is what the command on a page draws, but for what another version of matplotlib or another font changes."""
    scores, shown_in_page, *chosen = shlex.split(command)[3:]
    draw(str(ROOT / scores), str(folder / "picture.png"), *chosen)
    drawn, shown = (Image.open(file).convert("RGBA").convert("L") for file in (folder / "picture.png", ROOT / shown_in_page))
    assert drawn.size == shown.size
    assert np.abs(np.asarray(drawn, dtype=float) - np.asarray(shown, dtype=float)).mean() < 2


def test_names_in_pictures_are_short():
    sweep = ["experts.fraction-0.1+target-0.3", "experts.fraction-0.2+target-0.3"]
    assert list(short_names(sweep).values()) == ["fraction-0.1", "fraction-0.2"]
    assert short_names(["a-1+b-2"]) == {"a-1+b-2": "a-1+b-2"} and short_names(["a", "a+b"]) == {"a": "a", "a+b": "b"}
    long = ["a" * 60 + end for end in "xy"]
    assert [len(name) for name in short_names(long).values()] == [30, 30] and short_names(long)[long[0]].endswith("x")
    same = [f"{'a' * 30}{n}{'b' * 30}" for n in range(2)]
    assert list(short_names(same).values()) == same, "a name that says which is better than a short one"


@pytest.mark.parametrize(
    "summary, result, said",
    [
        (
            {},
            {"average": 0.965, "dense": DENSE},
            "Kept 98.9 % of the dense model's exact match at half the parameters: 0.965 of 0.976.",
        ),
        (
            {"sparsity": 0.4},
            {"average": 0.976, "dense": DENSE},
            "Kept 100 % of the dense model's exact match at 60 % of the parameters",
        ),
        (
            {"sparsity": 0.35},
            {"perplexity": 1.9, "dense": DENSE},
            "Perplexity 1.900 at 65 % of the parameters, the dense model's is 1.869.",
        ),
        ({}, {"average": 0.5}, "Exact match 0.500 at half the parameters. The dense model was not evaluated beside it."),
        ({}, {"average": 0.0, "dense": {"average": 0.0}}, "Exact match 0.000"),
        ({}, {}, "Removed 4 of 16 experts and 33.5 % of the other weights in scope, half the parameters in all. Not evaluated"),
        ({"ratio": 0}, {}, "Removed 4 of 16 experts, half"),
        ({"kept": [8, 8]}, {}, "Removed 33.5 % of the weights in scope, half"),
        ({"kept": [8, 8], "ratio": 0}, {}, "Removed nothing. Not evaluated"),
    ],
)
def test_verdict(summary, result, said):
    assert wording.of_run({**done(), **summary}, result).replace("\u00a0", " ").startswith(said)


def test_verdict_of_several_runs():
    runs = {"a": done(average=0.5), "b": done(average=0.965)}
    said = f"b is best: kept 98.9 % {OF_DENSE} at half the parameters: 0.965 of 0.976."
    assert wording.of_runs(quality_measure(runs), runs).replace("\u00a0", " ") == said
    runs = {name: done(perplexity=value) for name, value in (("a", 2.0), ("b", 3.0))}
    assert wording.of_runs(quality_measure(runs), runs) == "a is best: perplexity 2.000 at half the parameters."
    assert wording.of_runs(None, {"a": done()}) == "No run was evaluated, so which is best is not known."


def test_best_run_at_each_size(tmp_path):
    """A smaller run need not be better than a larger one, a larger one must be."""
    runs = {"small": done(average=0.4, size=10), "worse": done(average=0.3, size=20), "large": done(average=0.9, size=30)}
    text = text_of(write_comparison(tmp_path, runs)).replace("\u00a0", " ")
    best = text[text.index("The best run") : text.index("The runs")]
    assert re.findall(r"\b(?:small|worse|large)\b", best) == ["small", "large"] and "92.2%" in best
    page = write_comparison(tmp_path, {"a": done(), "b": done()}).read_text()
    assert "No run was evaluated" in page and page.count("stun evaluate") == 2 and "dense=" in page


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Four runs, two of which are damaged, and one that is not complete; the first was evaluated."""
    folder = tmp_path_factory.mktemp("sweep")
    for name in ("a,b=1", "deep/er", "last", "slow"):
        make_run(folder / name, 2, 8)
    summary = json.loads((folder / "slow" / "manifest.json").read_text())["summary"]
    (folder / "slow" / "manifest.json").write_text(json.dumps({"summary": {**summary, "seconds": "very"}}))
    (folder / "last" / "result.json").unlink()
    (folder / "deep" / "er" / "layers.json").write_text(json.dumps({"prune": [7]}))
    (folder / "begun" / "progress").mkdir(parents=True)
    (folder / "begun" / "config.yaml").write_text("config: {}\n")
    return folder, *report(folder)


@pytest.mark.slow
def test_a_damaged_run_does_not_end_the_report(sweep):
    """The others have their pages, and one line says what is wrong with it, on the page too."""
    folder, pages, printed = sweep
    assert [page.relative_to(folder).parts[0] for page in pages] == ["a,b=1", "last", "report"]
    for name in ("deep/er", "slow"):
        (line,) = [line for line in printed.splitlines() if line.startswith(name)]
        assert re.match(rf"{name}: (no page|cannot be read): .*/(layers|manifest).json: .*must be", line)
    assert re.search(r"^begun: not complete", printed, re.M) and re.search(r"^last +0\.4", printed, re.M)
    assert "layers.json: prune.0: must be an object" in text_of(pages[-1]) and "2 runs compared" in text_of(pages[-1])


@pytest.mark.slow
def test_a_run_leads_back_to_its_comparison(sweep):
    """... if its page was written with it; the commands on a page without an evaluation measure both models."""
    folder, pages, _ = sweep
    for page in pages[:-1]:
        (link,) = re.findall(r'<a href="([^"#]*)">Compared', page.read_text())
        assert (page.parent / link).resolve() == pages[-1].resolve()
    assert "Compared" not in write_reports(folder / "last")[0].read_text()
    assert pages[0].read_text().count("stun evaluate") == 0, "it was evaluated beside the dense model"
    (dense, pruned) = re.findall(r"<code>(stun evaluate.*?)</code>", pages[1].read_text())
    assert "model.path=/data/large" in dense and f"output={folder}/last/dense.json" in dense
    assert f"dense={folder}/last/dense.json" in pruned and f"output={folder}/last/result.json" in pruned
