"""The reference model. In: a generator of tasks. Out: a small trained Arctic, its texts, and the questions it is judged by."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
MODEL, CALIBRATION, HELDOUT = _HERE / "model", _HERE / "calibration.jsonl", _HERE / "heldout.jsonl"
