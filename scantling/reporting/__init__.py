"""One self-contained HTML page from runs, laws, comparisons, plans and specs."""

from scantling.reporting.page import report

__all__ = ["report"]
