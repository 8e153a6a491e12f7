"""A run in words: a sentence on what pruning came to, the stored form of the weights, and commands that go on from it."""

import re
import shlex
from pathlib import Path

from stun.report.quality import Measure

_SPACE = "\u00a0"  # a number and its unit stay on one line


def _percent(share: float) -> str:
    """Share as `98.9 %`, or `60 %`."""
    return f"{100 * share:.1f}".removesuffix(".0") + f"{_SPACE}%"


def of_run(summary: dict, result: dict) -> str:
    """Sentence on a run: its quality beside the dense model's if that is known, else what was removed."""
    dense, at = result.get("dense", {}), f"at {_parameters(1 - summary['sparsity'])}"
    if "average" in result and dense.get("average"):
        return _kept("exact match", result["average"], dense["average"], at)
    if "perplexity" in result and "perplexity" in dense:
        return f"Perplexity {result['perplexity']:.3f} {at}, the dense model's is {dense['perplexity']:.3f}."
    for name, key in (("Exact match", "average"), ("Perplexity", "perplexity")):
        if key in result:
            return f"{name} {result[key]:.3f} {at}. The dense model was not evaluated beside it."
    return f"{_removed(summary)} Not evaluated, so its quality is not known."


def of_runs(measure: Measure | None, runs: dict[str, dict]) -> str:
    """Sentence on several runs: the best of them."""
    if measure is None:
        return "No run was evaluated, so which is best is not known."
    best, value = measure.best, measure.runs[measure.best]
    dense, at = next(iter(measure.dense.values()), None), f"at {_parameters(1 - runs[best]['sparsity'])}"
    if measure.more_is_better and dense and len(measure.dense) == 1:
        kept = _kept(measure.name, value, dense, at)
        return f"{best} is best: k{kept[1:]}"
    beside = f", the dense model's is {dense:.3f}" if len(measure.dense) == 1 else ""
    return f"{best} is best: {measure.name} {value:.3f} {at}{beside}."


def _kept(measure: str, value: float, dense: float, at: str) -> str:
    return f"Kept {_percent(value / dense)} of the dense model's {measure} {at}: {value:.3f} of {dense:.3f}."


def _parameters(share: float) -> str:
    return "half the parameters" if abs(share - 0.5) < 5e-4 else f"{_percent(share)} of the parameters"


def _removed(summary: dict) -> str:
    kept, whole = sum(summary["kept"]), sum(summary["experts"])
    experts = f"{whole - kept:,} of {whole:,} experts" if kept < whole else ""
    weights = f"{_percent(summary['ratio'])} of the {'other ' if experts else ''}weights in scope" if summary["ratio"] else ""
    what = " and ".join(filter(None, (experts, weights)))
    return f"Removed {what}, {_parameters(summary['sparsity'])} in all." if what else "Removed nothing."


def commands(source: str, run: str, dense: Path) -> list[str]:
    """Commands that evaluate the dense model, into the file `dense`, and beside it the model in the folder `run`."""
    task = {"task__path": "ROWS.jsonl"}
    first = job_command("evaluate", model__path=source, **task, output=str(dense))
    return [first, job_command("evaluate", model__path=f"{run}/model", **task, dense=str(dense), output=f"{run}/result.json")]


def job_command(job: str, **settings: str) -> str:
    """Command line for a shell. In `settings` two underscores stand for a dot. Values with spaces, commas or `=`, as in the names
    of a sweep's runs, are quoted, since Hydra parses them only in quotes."""
    words = []
    for key, value in settings.items():
        is_plain = re.fullmatch(r"[\w./:-]+", value, re.A)
        quoted = value if is_plain else '"{}"'.format(value.replace('"', r"\""))
        words.append(f"{key.replace('__', '.')}={quoted}")
    return shlex.join(["stun", job, *words])


def stored_as(summary: dict) -> tuple[str, str]:
    """Form and bits a weight, and where they come from; both empty if a plain source's weights are as they were."""
    form = summary.get("form")
    if not form:
        return "", ""
    source = _with_bits(" and ".join(form["source"]), form["bits"]) if form["source"] else "plain weights"
    if form["written"] == "source":
        return source, "as in the source"
    new = form["written"] if form["written"] == "bfloat16" else _with_bits(form["written"], form["written_bits"])
    return new, f"from {source}"


def form_in_words(summary: dict) -> str:
    """The same as one text."""
    return ", ".join(filter(None, stored_as(summary)))


def _with_bits(form: str, bits: float) -> str:
    return f"{form}, {bits:.3g} bits a weight"
