"""Tables that jobs print at the end."""

from rich.table import Table
from rich.text import Text

from stun.model.runtimes import in_words
from stun.report.quality import dense_models
from stun.report.wording import form_in_words, job_command
from stun.runtime.console import printed
from stun.runtime.units import count, duration, size


def table_of(*titles: str) -> Table:
    """Table without lines; columns with a title are aligned to the right."""
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right" if title else "left")
    return table


def results_table(results: dict[str, dict]) -> str:
    """Table with a column per model and a row per measure. `results` maps names to evaluations, with the summary in `prune`."""
    table = table_of("", *results)

    def line(title: str, value) -> None:
        table.add_row(title, *(value(result) for result in results.values()))

    first = next(iter(results.values()))
    for group in first.get("exact_match", ()):
        line(group.replace("_", " "), lambda r, group=group: f"{r['exact_match'][group]:.2f}")
    if "average" in first:
        line("exact match, average", lambda r: f"{r['average']:.3f}")
    if "perplexity" in first:
        line("perplexity", lambda r: f"{r['perplexity']:.3f}")
    if any("agreement" in result for result in results.values()):
        line("KL from dense, nats a token", lambda r: f"{r['agreement']['kl']:.4f}" if "agreement" in r else "-")
        line("same first choice as dense", lambda r: f"{r['agreement']['top1']:.4f}" if "agreement" in r else "-")
        line("error of the last layer", lambda r: f"{r['layer_error'][-1]:.4f}" if "layer_error" in r else "-")
    for task, metrics in first.get("harness", {}).items():
        for metric in metrics:
            line(f"{task}, {metric}", lambda r, task=task, metric=metric: f"{r['harness'][task][metric]:.4f}")
    if any("prune" in result for result in results.values()):
        line("nonzero share", lambda r: _of(r, lambda p: f"{p['nonzero'] / p['parameters']:.4f}"))
        line("experts kept", lambda r: _of(r, lambda p: f"{sum(p['kept'])}/{sum(p['experts'])}"))
        line("seconds to prune", lambda r: _of(r, lambda p: f"{p['seconds']:.1f}"))
        line("peak memory, GiB", lambda r: _of(r, lambda p: f"{p['peak_bytes'] / 2**30:.2f}"))
    return printed(table)


def plan_table(plans: dict) -> str:
    """Table with a column per plan and a row per layer: experts kept, and how many of them the first plan keeps too."""
    table = table_of("", *plans)
    first = next(iter(plans.values())).plan

    def cell(layer, other) -> str:
        count = f"{len(layer.clusters)}/{layer.experts}"
        both = len(set(layer.kept) & set(other.kept))
        return count if layer is other or not layer.kept or not other.kept else f"{count} ({both} the same)"

    for number, layer in enumerate(first.layers):
        if layer.experts:
            table.add_row(f"layer {number}", *(cell(d.plan.layers[number], layer) for d in plans.values()))
    for number, layer in enumerate(first.mtp):
        table.add_row(f"prediction head {number}", *(cell(d.plan.mtp[number], layer) for d in plans.values()))
    rows = {
        "experts kept": lambda d: f"{sum(len(x.clusters) for x in d.plan.layers)}/{sum(x.experts for x in d.plan.layers)}",
        "parameters removed as experts": lambda d: f"{d.plan.dropped / d.plan.parameters:.4f}",
        "... as single weights": lambda d: f"{d.plan.zeros / d.plan.parameters:.4f}",
        "weights in scope removed": lambda d: f"{d.plan.ratio:.4f}",
        "size on disk": lambda d: size(d.nbytes),
    }
    for title, show in rows.items():
        table.add_row(title, *(show(described) for described in plans.values()))
    for source in next(iter(plans.values())).needs:
        cells = (f"{'?' if d.needs[source][1] is None else d.needs[source][1]} of {d.needs[source][0]}" for d in plans.values())
        table.add_row(f"kept of those serving 90 % of {source!r}", *cells)
    return printed(table)


def report_table(runs: dict[str, dict | str]) -> str:
    """Table with a row for the dense model and for every run: its summary and, if there is one, its evaluation. Below it a line
    for every run that has a text instead: its progress, or why it cannot be read."""
    table = table_of("", "sparsity", "experts kept", "seconds", "peak, GiB", "exact match", "perplexity")
    complete = {name: run for name, run in runs.items() if isinstance(run, dict)}
    for name, run in {**dense_models(complete), **complete}.items():
        kept, result = f"{sum(run['kept'])}/{sum(run['experts'])}", run.get("result", {})
        scores = [f"{result[key]:.3f}" if key in result else "-" for key in ("average", "perplexity")]
        cost = [f"{run['seconds']:.0f}", f"{run['peak_bytes'] / 2**30:.2f}"] if "seconds" in run else ["-", "-"]
        table.add_row(name, f"{run['sparsity']:.4f}", kept, *cost, *scores)
    others = "".join(f"{name}: {text}\n" for name, text in runs.items() if isinstance(text, str))
    return (printed(table) if complete else "") + others


def summary_table(summary: dict, run_dir: str) -> str:
    """Table with the summary of a run of jobs.prune. Times are those of the launch that finished it, on its first rank."""
    table = Table(box=None, pad_edge=False, show_header=False)
    before, after = (f"{summary[key] / 1e6:,.2f}M" for key in ("parameters", "nonzero"))
    written, speed = summary["bytes_written"], sum(summary.get("read_bytes_per_second", []))
    rows = {
        "sparsity": f"{summary['sparsity']:.4f} (target {summary['target']:g})",
        "experts kept": f"{sum(summary['kept'])} of {sum(summary['experts'])}",
        "nonzero weights": f"{after} of {before}, in the decoder layers",
        "size on disk": size(written) + (f" of {size(summary['source_bytes'])}" if speed else ""),
        "time": f"{duration(summary['seconds'])} on {count(summary['ranks'], 'rank')}",
    }
    if form := form_in_words(summary):
        rows["weights stored as"] = form
    for stream, seconds in summary.get("phases", {}).items():
        rows[f"... {stream}"] = ", ".join(f"{phase} {value:,.1f}s" for phase, value in seconds.items())
    rows |= {
        "read": size(sum(summary["bytes_read"])) + (f" at {size(speed)}/s" if speed else ""),
        "peak memory": f"{size(summary['peak_bytes'])} a rank",
        **in_words(summary["loads_in"]),
        "the model": f"{run_dir}/model",
        "next": job_command("report", folder=run_dir),
    }
    for title, value in rows.items():
        table.add_row(title, Text(value))
    return printed(table)


def _of(result: dict, show) -> str:
    return show(result["prune"]) if "prune" in result else "-"
