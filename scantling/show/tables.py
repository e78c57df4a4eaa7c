"""The console that everything is shown on, and its kind of table."""

import sys

from rich.console import Console
from rich.table import Table

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def empty_table(title: str, *columns: str, caption: str | None = None) -> Table:
    """A table without rows: the first column to the left, the others to the right."""
    table = Table(
        title=title, title_justify="left", caption=caption, caption_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return table
