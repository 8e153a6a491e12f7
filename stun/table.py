"""The table that evaluation and comparison jobs end in."""

from __future__ import annotations

from io import StringIO

from rich.console import Console
from rich.table import Table


def results_table(results: dict[str, dict]) -> str:
    """A column per model, a line per measure. `results` maps a name to an evaluation, with the pruning summary under `prune`."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")

    def line(title: str, value) -> None:
        table.add_row(title, *(value(result) for result in results.values()))

    for group in next(iter(results.values()))["exact_match"]:
        line(group.replace("_", " "), lambda r, group=group: f"{r['exact_match'][group]:.2f}")
    line("exact match, average", lambda r: f"{r['average']:.3f}")
    line("perplexity", lambda r: f"{r['perplexity']:.3f}")
    if any("prune" in result for result in results.values()):
        line("nonzero share", lambda r: _of(r, lambda p: f"{p['nonzero'] / p['parameters']:.4f}"))
        line("experts kept", lambda r: _of(r, lambda p: f"{sum(p['kept'])}/{sum(p['experts'])}"))
        line("seconds to prune", lambda r: _of(r, lambda p: f"{p['seconds']:.1f}"))
        line("peak memory, GiB", lambda r: _of(r, lambda p: f"{p['peak_bytes'] / 2**30:.2f}"))
    text = StringIO()
    Console(file=text, width=200).print(table)
    return text.getvalue()


def _of(result: dict, show) -> str:
    return show(result["prune"]) if "prune" in result else "-"
