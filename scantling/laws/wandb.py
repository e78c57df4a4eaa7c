"""Chart exports of Weights & Biases: one column per run and metric, turned into one row per run and step.

The header is `Step` followed by `run - metric`, `run - metric__MIN` and `run - metric__MAX` for each run; a run without a
value at a step leaves it empty. (The export of the runs table is one row per run, and is read as any other table.)
"""

from typing import Any

STEPS = ("Step", "_step", "global_step", "trainer/global_step")
BETWEEN = " - "


def melted(lines: list[int], rows: list[dict[str, Any]]) -> tuple[list[int], list[dict[str, Any]]]:
    """Rows of run, step and metrics where the columns are those of a chart export; other tables as they are."""
    if not rows:
        return lines, rows
    names = list(rows[0])
    step = next((name for name in STEPS if name in names), None)
    charts = [name for name in names if BETWEEN in name]
    if step is None or not charts or len(charts) + 1 < len(names):
        return lines, rows
    found_lines, found = [], []
    values = [name for name in charts if not name.endswith(("__MIN", "__MAX"))]
    runs: dict[str, list[str]] = {}
    for name in values:
        runs.setdefault(name.rpartition(BETWEEN)[0], []).append(name)
    for line, row in zip(lines, rows, strict=True):
        for run, columns in runs.items():
            entry = {name.rpartition(BETWEEN)[2]: row[name] for name in columns}
            if any(str(value).strip() for value in entry.values()):
                found_lines.append(line)
                found.append({"run": run, "step": row[step], **entry})
    return found_lines, found
