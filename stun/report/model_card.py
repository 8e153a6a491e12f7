"""Model card beside a pruned checkpoint: README.md with the hub's metadata."""

import re
import shutil
from pathlib import Path

import yaml

from stun.checkpoint.hub import name_of
from stun.config import StunError
from stun.files import load_json, parse_yaml, read_bytes, write_atomically
from stun.model.runtimes import SERVED, SERVED_RESULTS, in_words, served_in_words
from stun.report.wording import form_in_words
from stun.run.layer_records import left_by_refits, sparsity_by_kind
from stun.runtime.units import count, size
from stun.schema import load_record

CARD, SOURCE_CARD = "README.md", "SOURCE_README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")
_LOCAL = {"runs", "data", "models", "model", "checkpoints", "outputs", "tmp"}  # first parts of paths, not organisations
_PASSED_ON = re.compile(r"[\w.+:/ -]{1,100}")  # allowed content of a field of the source's metadata


def keep_source_card(source: Path, model: Path) -> None:
    """Copy the source's card, which may hold its terms, to SOURCE_README.md beside the new card."""
    if (source / CARD).is_file():
        write_atomically(model / SOURCE_CARD, lambda path: shutil.copyfile(source / CARD, path))


def write_card(run: Path, summary: dict, config: dict, layers: dict, result: dict) -> Path:
    """Write model/README.md of a run, from the summary in manifest.json and the content of config.yaml, layers.json and, if there
    is one, result.json; returns its path."""
    model = run / "model"
    metadata = yaml.safe_dump(_metadata(model, summary), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{metadata}---\n",
        f"# {_text(_name(summary))}, {summary['sparsity']:.0%} pruned\n",
        _method(summary, config, layers, (model / SOURCE_CARD).is_file()),
        _sparsity(summary, layers),
        _evaluation(result),
        _loading(summary, load_record(run / SERVED, SERVED_RESULTS) if (run / SERVED).is_file() else {}),
        f"## Made by\n\n{_code(without_folders(summary['command']))}\n\non {count(summary['ranks'], 'rank')}."
        if summary.get("command")
        else "",
    ]
    text = "\n".join(part for part in parts if part).rstrip() + "\n"
    write_atomically(model / CARD, lambda path: path.write_text(text))
    return model / CARD


def without_folders(command: str) -> str:
    """Command with every absolute path cut to its last part, so that a public card shows no local folders."""
    return re.sub(r"(?<![\w.])~?/(?:[^\s/'\",}\]]+/)*", "", command)


def _metadata(model: Path, summary: dict) -> dict:
    passed_on = _source_metadata(model / SOURCE_CARD)
    base = _hub_id(summary.get("source", ""), load_json(model / "config.json"))
    is_ordinary = str(summary.get("loads_in", {}).get("transformers", "")).startswith("yes")
    return {
        **({"base_model": base} if base else {}),
        "library_name": "transformers" if is_ordinary else "stun-moe",
        "pipeline_tag": "text-generation",
        "tags": ["stun", "pruning", "sparsity", "mixture-of-experts", *filter(None, [summary.get("model_type")])],
        **passed_on,
    }


def _source_metadata(file: Path) -> dict:
    """Licence and languages from the source's card; empty if its metadata cannot be read."""
    if not file.is_file():
        return {}
    match = re.match(rb"---\r?\n(.{0,20000}?)\r?\n---", read_bytes(file), re.S)
    try:
        front_matter = parse_yaml(match[1], str(file)) if match else {}
    except StunError:
        return {}
    metadata = {}
    for name in ("license", "license_name", "license_link", "language") if isinstance(front_matter, dict) else ():
        value = front_matter.get(name)
        values = value if isinstance(value, list) and name == "language" else [value]
        if values and all(isinstance(item, str) and _PASSED_ON.fullmatch(item) for item in values):
            metadata[name] = value
    return metadata


def _hub_id(path: str, config: dict) -> str:
    """Name of the source on the hub, from a pinned name, a path in the hub's cache or config.json; empty if none has one."""
    if name_of(path):
        return name_of(path)
    cached = _CACHED.search(f"{path}/")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    name = config.get("_name_or_path")
    is_id = isinstance(name, str) and _HUB_ID.fullmatch(name) and name.partition("/")[0] not in _LOCAL
    return name if is_id else ""


def _name(summary: dict) -> str:
    source = summary.get("source", "")
    return (_hub_id(source, {}) or Path(source).name or summary.get("model_type", "model")).rpartition("/")[2]


def _text(value: object) -> str:
    """Value as one line of plain Markdown."""
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", " ".join(str(value).split()))


def _code(text: str) -> str:
    """Text as a block of shell code, whatever it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}sh\n{text}\n{fence}"


def _method(summary: dict, config: dict, layers: dict, has_source_card: bool) -> str:
    experts, weights, calibration = config.get("experts", {}), config.get("sparsify", {}), config.get("calibration", {})
    kept, whole = sum(summary["kept"]), sum(summary["experts"])
    counts = sorted({after for after, before in zip(summary["kept"], summary["experts"], strict=True) if before})
    a_layer = f"{counts[0]} a layer" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} a layer"
    method, score, budget = (experts.get(name) for name in ("method", "score", "budget"))
    choice = "a given plan" if config.get("plan") else f"{method}, score {score}, budget {budget}"
    pattern = weights.get("pattern")
    share = f"pattern {_text(pattern)}" if pattern else f"{summary['ratio']:.1%} of those in scope removed"
    source = _text(_name(summary))
    constants = "; each of the others gives a constant vector" if experts.get("dropped") == "novice" and kept < whole else ""
    is_padded = experts.get("uneven") == "padded" and len(counts) > 1
    padding = f" Experts of zeros, which the router never chooses, fill every layer up to {counts[-1]}." if is_padded else ""
    lines = [
        f"Pruned from {source} with STUN: {_what_was_removed(summary)}.\n",
        f"- Experts: {kept} of {whole} kept ({a_layer}), chosen by {_text(choice)}{constants}{_refit(layers)}.{padding}",
        f"- Single weights: {_text(weights.get('method'))}, {share}; scope: {_text(', '.join(weights.get('scope', [])))}.",
        f"- Calibration: {_calibration(calibration)}.",
    ]
    if has_source_card:
        lines.append(f"- The source's own card, with its terms: [{SOURCE_CARD}]({SOURCE_CARD}).")
    return "\n".join(lines) + "\n"


def _refit(layers: dict) -> str:
    left = [share for share in left_by_refits(layers) if share is not None]
    return f", then refitted together; {min(left):.0%} to {max(left):.0%} of a layer's error remains" if left else ""


def _what_was_removed(summary: dict) -> str:
    parts = {"whole experts": sum(summary["kept"]) < sum(summary["experts"]), "single weights": summary["ratio"] > 0}
    return " first, then ".join(name for name, is_removed in parts.items() if is_removed) or "nothing removed"


def _calibration(calibration: dict) -> str:
    mixture = calibration.get("mixture") or {"": calibration}
    names = [f"{name}: {source.get('path')}" if name else str(source.get("path")) for name, source in mixture.items()]
    texts = ", ".join(_text(without_folders(name)) for name in names)
    samples, tokens = count(calibration.get("samples", 0), "sample"), count(calibration.get("length", 0), "token")
    return f"{samples} of {tokens} from {texts}"


def _sparsity(summary: dict, layers: dict) -> str:
    lines = ["## Sparsity of the decoder layers\n", "| | parameters | non-zero now | removed |", "|---|---:|---:|---:|"]
    for kind, (before, after) in sparsity_by_kind(layers).items():
        lines.append(f"| {kind} | {before:,} | {after:,} | {1 - after / before:.1%} |")
    lines.append(f"| **all** | {summary['parameters']:,} | {summary['nonzero']:,} | {summary['sparsity']:.1%} |")
    before, after = summary.get("source_bytes"), summary.get("disk_bytes")
    form = f" Weights are stored as {_text(form_in_words(summary))}." if form_in_words(summary) else ""
    sizes = f"\nFiles with weights: {size(before)} before, {size(after)} now.{form}\n" if before and after else ""
    return "\n".join(lines) + "\n" + sizes


def _evaluation(result: dict) -> str:
    dense = result.get("dense", {})
    rows = [("exact match, average", "average"), ("perplexity", "perplexity")]
    lines = [f"| {name} | {_number(dense.get(key))} | {_number(result[key])} |" for name, key in rows if key in result]
    for group, value in result.get("exact_match", {}).items():
        lines.append(f"| exact match, {_text(group)} | {_number(dense.get('exact_match', {}).get(group))} | {_number(value)} |")
    for name, key in (("KL to dense, nats a token", "kl"), ("same first choice as dense", "top1")):
        if key in result.get("agreement", {}):
            lines.append(f"| {name} | | {_number(result['agreement'][key])} |")
    sizes = [f"{result[key]:,} {what}" for key, what in (("rows", "questions"), ("tokens", "predicted tokens")) if key in result]
    sizes_line = [f"Over {' and '.join(sizes)}.\n"] if sizes else []
    return "\n".join(["## Evaluation\n", *sizes_line, "| | dense | pruned |", "|---|---:|---:|", *lines]) + "\n" if lines else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _loading(summary: dict, served: dict) -> str:
    answers = summary.get("loads_in", {})
    of_transformers = str(answers.get("transformers", ""))
    load = 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")'
    if "trust_remote_code" in of_transformers:
        load = load.replace('dtype="auto"', 'dtype="auto", trust_remote_code=True')
    elif not of_transformers.startswith("yes"):
        load = f"import stun  # pip install stun-moe\n{load}"
    lines = [f"- {_text(runtime)}: {_text(answer)}" for runtime, answer in (in_words(answers) | served_in_words(served)).items()]
    return "\n".join(["## How to load\n", *lines, f"\n```python\n{load}\n```\n"])
