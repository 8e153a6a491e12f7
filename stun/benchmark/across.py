"""Tables of one study on several models: a row per method, a column per model."""

from pathlib import Path

from stun.files import load_json
from stun.report.quality import exact_match


def read_scores(folder: Path, kind: str) -> dict[str, dict]:
    """Scores of a study by model, from the files KIND-MODEL.json of a folder."""
    files = sorted(folder.glob(f"{kind}-*.json"), key=lambda file: ORDER.index(file.stem.removeprefix(f"{kind}-")))
    return {file.stem.removeprefix(f"{kind}-"): load_json(file) for file in files}


ORDER = ["reference", "qwen3_moe", "deepseek_v3", "gpt_oss"]  # methods were chosen on the first two


def across(scores: dict[str, dict], share: str) -> str:
    """Markdown table at one share removed: exact match, and in brackets the percentage of the dense model's that is kept."""
    dense = {model: exact_match([own["dense"]]) for model, own in scores.items()}
    lines = [f"| {share} removed | {' | '.join(scores)} |", "|---" * (len(scores) + 1) + "|"]
    lines.append(f"| dense | {' | '.join(f'{value:.3f}' for value in dense.values())} |")
    for method in next(iter(scores.values()))["results"]:
        cells = []
        for model, own in scores.items():
            results = own["results"].get(method, {}).get(share)  # not every model was asked for everything
            kept = exact_match(results) if results else 0.0
            cells.append(f"{kept:.3f} ({kept / dense[model]:.1%})" if results else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)
