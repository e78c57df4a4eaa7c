"""The verb of the local page: explore."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from scantling.cli.app import Set, app


@app.command
def explore(
    plan: Path | None = None,
    *,
    port: int = 8642,
    no_browser: Annotated[bool, Parameter(negative=())] = False,
    set_: Set = (),
) -> None:
    """Move budget, context, served tokens, batch and device on a local page, and watch the planner's answer follow.

    Args:
        plan: The plan YAML to start from; default the one that `scantling init plan` writes.
        port: Of the page on this machine; 0 for any free one.
        no_browser: Print the address only.
    """
    from scantling.explore.base import read_base
    from scantling.explore.server import serve

    serve(read_base(plan, set_), port, browser=not no_browser)
