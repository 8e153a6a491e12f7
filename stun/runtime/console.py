"""Tables as text."""

from __future__ import annotations

from io import StringIO

from rich.console import Console
from rich.table import Table


def printed(table: Table) -> str:
    """A table as text."""
    text = StringIO()
    Console(file=text, width=200, markup=False, emoji=False, force_terminal=False).print(table)  # names are text
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())
