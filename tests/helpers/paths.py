"""Where things are."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
FIXTURES = TESTS / "fixtures"
REFERENCE = ROOT / "stun" / "reference"
TEXT = REFERENCE / "calibration.jsonl"
HELDOUT = REFERENCE / "heldout.jsonl"
