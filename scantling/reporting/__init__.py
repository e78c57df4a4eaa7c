"""One self-contained HTML page from runs, laws, comparisons, plans and specs; and one from a coordinate check."""

from scantling.reporting.coordinates import coordinates_page
from scantling.reporting.page import report

__all__ = ["coordinates_page", "report"]
