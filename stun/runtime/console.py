"""Tables rendered as text."""

from io import StringIO

from rich.console import Console
from rich.table import Table


def printed(table: Table) -> str:
    """A table as text, 200 columns wide at most."""
    text = StringIO()
    # Names of models may hold brackets or colons, which are neither markup nor emoji.
    Console(file=text, width=200, markup=False, emoji=False, force_terminal=False).print(table)
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())
