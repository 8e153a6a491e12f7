"""Tables of the cases' results."""

from stun.preflight.hardware import GIB
from stun.report.tables import table_of
from stun.runtime.console import printed
from stun.runtime.units import count, size


def benchmark_table(result: dict) -> str:
    """Table of a case's result, below a line on its hardware."""
    tables = {"layer": _layer, "io": _io, "weights": _weights, "growth": _growth, "ranks": _ranks}
    tables |= {"depth": _depth, "peers": _peers}
    return f"{result['device']}, {count(result['ranks'], 'rank')}\n{tables[result['case']](result)}"


def _layer(result: dict) -> str:
    """A line per phase: seconds, least seconds, their ratio and the limiting rate; then the totals."""
    table, rates = table_of("", "seconds", "limit", "/ limit", "bound by"), result["rates"]
    for phase, row in result["phases"].items():
        cells = (f"{row['limit']:.3g}", f"{row['ratio']:.1f}", row["rate"]) if "limit" in row else ("", "", "")
        table.add_row(phase, f"{row['seconds']:.3g}", *cells)
    with_storage, without = result["seconds_with_storage"], result["seconds_without_storage"]
    lines = [
        f"{_shape(result)} in {result['dtype']}",
        _rates(rates),
        printed(table).rstrip("\n"),
        f"observe / plain: {result['observe_to_plain']:.2f}",
        f"mask / all of both streams: {result['mask_share']:.2f}",
        f"{count(result['depth'], 'layer')}: {with_storage:,.0f} seconds with storage, {without:,.0f} without",
        f"peak memory: {size(result['peak_bytes'])}",
    ]
    return "\n".join(lines) + "\n"


def _shape(result: dict) -> str:
    shape, tokens = result["shape"], result["tokens"]
    experts = f"{count(shape['experts'], 'expert')}, top-{shape['top_k']}"
    return f"hidden {shape['hidden']}, expert width {shape['expert_width']}, {experts}; {count(tokens, 'token')}"


def _rates(rates: dict) -> str:
    disk = f"disk read {size(rates['read'])}/s, write {size(rates['write'])}/s"
    return f"{disk}; memory copy {size(rates['copy'])}/s; flops {rates['flops'] / 1e12:.3g} T/s"


def _io(result: dict) -> str:
    """A line per operation and number of threads: bytes/s, those of a bare loop, their ratio, and the ratio to the first number
    of threads; then dd, and the seconds of quantised forms with their ratio to bfloat16's."""
    table, runs = table_of("", "a second", "bare loop", "ratio", "/ first"), result["runs"]
    first = next(iter(runs.values()))
    for threads, row in runs.items():
        for name, found in row.items():
            speed_up = f"{found['rate'] / first[name]['rate']:.2f}"
            cells = (size(found["rate"]), size(found["bare"]), f"{found['ratio']:.2f}", speed_up)
            table.add_row(f"{name}, {count(int(threads), 'thread')}", *cells)
    for name, rate in result["dd"].items():
        table.add_row(f"{name}, dd", size(rate), "", "", "")
    forms = table_of("", "seconds", "bfloat16", "ratio")
    for name, row in result["forms"].items():
        forms.add_row(f"read and dequantise {name}", *(f"{row[key]:.3g}" for key in ("seconds", "bfloat16", "ratio")))
    return f"{size(result['bytes'])} in one file\n{printed(table)}\n{printed(forms)}"


def _weights(result: dict) -> str:
    """A line per method: seconds, their ratio to the seconds of reading and writing the weights, and peak memory."""
    table, disk = table_of("", "seconds", "/ read and write", "peak, GiB"), result["disk_seconds"]
    table.add_row(f"read and write {size(result['bytes'])}", f"{disk:.2f}", "1.0", "")
    for method, row in result["methods"].items():
        table.add_row(method, f"{row['seconds']:.1f}", f"{row['seconds'] / disk:.1f}", f"{row['peak_bytes'] / GIB:.2f}")
    return printed(table)


def _growth(result: dict) -> str:
    """A line per run: seconds, least seconds, their ratio, the limit, seconds relative to the first run, memory."""
    table = table_of("", "seconds", "limit", "/ limit", "bound by", "/ base", "peak, GiB")
    for name, row in result["runs"].items():
        bound = max(row["limits"], key=row["limits"].get)
        limit = (f"{row['limit']:.3g}", f"{row['ratio']:.1f}", bound)
        table.add_row(name, f"{row['seconds']:.2f}", *limit, f"{row['cost']:.2f}", f"{row['peak_bytes'] / GIB:.2f}")
    return f"{_rates(result['rates'])}\n{printed(table)}"


def _ranks(result: dict) -> str:
    """A line per number of ranks: seconds, speed-up, memory of a rank; then whether all tensors are identical."""
    table = table_of("", "seconds", "speed-up", "peak a rank, GiB")
    for world, row in result["runs"].items():
        table.add_row(
            count(int(world), "rank"), f"{row['seconds']:.2f}", f"{row['speed_up']:.2f}", f"{row['peak_bytes'] / GIB:.2f}"
        )
    return f"{printed(table)}tensors written: {'identical' if result['identical'] else 'NOT identical'}\n"


def _depth(result: dict) -> str:
    """A line per number of layers: memory, seconds, and for each stream the ratio of its seconds to the longest of reading,
    computing and writing."""
    streams = list(dict.fromkeys(stream for row in result["runs"].values() for stream in row["streams"]))
    table = table_of("", "peak, GiB", "seconds", *(f"{stream} / largest phase" for stream in streams))
    for layers, row in result["runs"].items():
        overlaps = (f"{row['streams'][stream]['ratio']:.2f}" for stream in streams)
        table.add_row(count(int(layers), "layer"), f"{row['peak_bytes'] / GIB:.2f}", f"{row['seconds']:.2f}", *overlaps)
    return printed(table)


def _peers(result: dict) -> str:
    """A line per task and tool: seconds, seconds of the whole process and memory, each with its ratio to STUN's, and the sparsity
    reached; or the reason why there are none."""
    measures = ("seconds", "wall_seconds", "peak_bytes")
    table = table_of("", "", "computes in", "seconds", "/ STUN", "process", "/ STUN", "peak, GiB", "/ STUN", "sparsity", "")
    for task, rows in result["tasks"].items():
        for tool, row in rows.items():
            if "reason" in row:
                table.add_row(task, tool, *[""] * 8, row["reason"])
                continue
            known = {**row, "peak_bytes": row["peak_bytes"] / GIB}
            cells = [text for name in measures for text in (_cell(known, name), _cell(row["ratios"], name))]
            table.add_row(task, tool, row["dtype"], *cells, _cell(row, "sparsity", 4), "")
    return f"{_shape(result)}; layers: {result['shape']['layers']}\n{printed(table)}{_PEERS}"


_PEERS = """seconds: of STUN all, reading included; of other tools after the model is loaded (transformers' forward too)
process: with imports, loading and counting zeros; STUN's forward has none of its own, transformers' also tries implementations
"""


def _cell(values: dict, name: str, digits: int = 2) -> str:
    return f"{values[name]:.{digits}f}" if name in values else ""
