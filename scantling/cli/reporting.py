"""The verb of pages: report."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from scantling.cli.app import Json, app, print_json


@app.command
def report(
    path: Annotated[list[Path], Parameter(negative=())], *, out: Path = Path("report.html"), json_: Json = False
) -> None:
    """One self-contained HTML page from studies, laws, comparisons, plans and specs.

    Args:
        path: Study or run folders, law / comparison / plan JSON files, spec YAML files.
        out: The page to write.
    """
    from scantling.reporting import report as write

    written = write(path, out)
    print_json({"file": str(written), "bytes": written.stat().st_size}) if json_ else print(written)
