"""What the benchmarks share: sides timed in turn within one process, medians and ratios, a table, two result files.

An absolute time says more about the machine's other guests than about the code. So every comparison times all its sides
in each round, one after the other in an order that rotates, and reports the median over rounds of the ratio within a round.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from scantling.device import fastest_float32, processor
from scantling.files import write_json, write_text

RESULTS = Path(__file__).parent / "results"


def interleaved(
    sides: Mapping[str, Callable[[], object]], rounds: int, repeats: int = 1, limit: float = 60.0
) -> dict[str, list[float]]:
    """Seconds per call of every side in every round; the first, untimed round warms up.

    Args:
        limit: no new round after so many seconds, once there are three.
    """
    names, began = list(sides), time.perf_counter()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        if number > 3 and time.perf_counter() - began > limit:
            break
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            for _ in range(repeats):
                sides[name]()
            if number:
                seconds[name].append((time.perf_counter() - started) / repeats)
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over rounds of above / below."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def spread(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """The quartiles of above / below over rounds."""
    quartiles = statistics.quantiles([a / b for a, b in zip(above, below, strict=True)], n=4)
    return [round(quartiles[0], 3), round(quartiles[2], 3)]


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    import torch

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "float32_matmul": torch.get_float32_matmul_precision(),
        "date": date.today().isoformat(),
    }


def prepare_torch() -> None:
    """The settings under which training is timed: one thread, since a second one on a busy core distorts every ratio."""
    import torch

    torch.set_num_threads(1)
    fastest_float32()
    torch.manual_seed(0)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; the first row's keys are the columns."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"
    if isinstance(value, list):
        return " to ".join(_cell(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def report(name: str, title: str, sections: Mapping[str, Sequence[Mapping[str, Any]]], notes: Sequence[str]) -> None:
    """Print, and write results/NAME.json and results/NAME.md."""
    where, command = machine(), f"python benchmarks/{name}.py {' '.join(sys.argv[1:])}".strip()
    text = [f"# {title}", "", f"`{command}`", "", ", ".join(f"{key} {value}" for key, value in where.items()), ""]
    for heading, rows in sections.items():
        text += [f"## {heading}", "", table(rows), ""]
    text += [f"- {note}" for note in notes]
    print("\n".join(text))
    RESULTS.mkdir(exist_ok=True)
    write_json(
        RESULTS / f"{name}.json", {"command": command, "machine": where, "sections": _plain(sections), "notes": notes}
    )
    write_text(RESULTS / f"{name}.md", "\n".join(text) + "\n")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=list))
