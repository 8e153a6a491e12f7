"""What a step finds."""

from __future__ import annotations

from dataclasses import dataclass


class NeedsGPU(Exception):
    """What a step, or a part of it, cannot do without a real GPU."""


@dataclass(frozen=True)
class Row:
    """A number or word, `beside` another one, of which `about` says what it is ("limit", "estimate"). Not `is_right`: what must
    hold does not."""

    name: str
    value: float | str
    unit: str = ""
    beside: float | None = None
    about: str = ""
    is_right: bool = True

    def __str__(self) -> str:
        value = self.value if isinstance(self.value, str) else f"{self.value:.3g}"
        beside = "" if self.beside is None else f"  ({self.about} {self.beside:.3g})"
        return f"{self.name}: {value} {self.unit}".rstrip() + beside + ("" if self.is_right else "  WRONG")
