"""Candidate shapes per second on one core: parameters, FLOPs and KV cache of arrays of shapes through the one cost code."""

import os
import sys
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import harness
import numpy as np

from scantling import costing, rows
from scantling.costing import flops_per_token, param_counts, total
from scantling.rows import Stack, StackFFN, StackLayer

SHAPES = 1_000_000
CHUNKS = (1_000_000, 100_000, 10_000)
ROUNDS = 9
GOAL = 2e6


def shapes(count: int) -> dict[str, Any]:
    """Random valid shapes as int64 arrays."""
    draw = np.random.default_rng(0)
    kv_heads, head_dim = draw.integers(1, 17, count), 64 * draw.integers(1, 4, count)
    return {
        "hidden": 128 * draw.integers(2, 65, count),
        "heads": kv_heads * draw.integers(1, 9, count),
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "inner": 128 * draw.integers(4, 257, count),
        "depth": draw.integers(2, 97, count),
    }


def price(sizes: dict[str, Any]) -> tuple[Any, ...]:
    """Total parameters, forward FLOPs per token at 4096 positions, cached elements per token."""
    layer = StackLayer(
        hidden_size=sizes["hidden"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        v_head_dim=sizes["head_dim"],
        ffn=StackFFN(sizes["inner"]),
        repeat=sizes["depth"],
    )
    stack = Stack(50304, sizes["hidden"], sizes["hidden"], False, (layer,))
    found = rows.rows(stack)
    return param_counts(found)["total"], flops_per_token(found, 4096)["forward"], total(found, "kv_elements")


def in_chunks(sizes: dict[str, Any], chunk: int) -> None:
    for start in range(0, SHAPES, chunk):
        price({name: values[start : start + chunk] for name, values in sizes.items()})


def lines(sizes: dict[str, Any]) -> Counter[tuple[str, int]]:
    """Seconds by line of rows.py and costing.py while one pass prices the shapes; a call's time is its own lines'."""
    files = {rows.__file__, costing.__file__}
    spent: Counter[tuple[str, int]] = Counter()
    current: list[Any] = [None, time.perf_counter()]

    def charge(place: tuple[str, int] | None) -> None:
        now = time.perf_counter()
        if current[0] is not None:
            spent[current[0]] += now - current[1]
        current[:] = [place, now]

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "return":
            back = frame.f_back
            inside = back is not None and back.f_code.co_filename in files
            charge((back.f_code.co_filename, back.f_lineno) if inside and back is not None else None)
        else:
            charge((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        price(sizes)
    finally:
        sys.settrace(None)
    return spent


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sizes = shapes(SHAPES)
    seconds = harness.interleaved({str(c): lambda c=c: in_chunks(sizes, c) for c in CHUNKS}, ROUNDS)
    found = []
    for chunk in CHUNKS:
        rates = [SHAPES / one for one in seconds[str(chunk)]]
        found.append(
            {
                "shapes per array": chunk,
                "million shapes/s/core, median": float(np.median(rates)) / 1e6,
                "worst to best round": [min(rates) / 1e6, max(rates) / 1e6],
                "speed / one array of all": harness.ratio(seconds[str(SHAPES)], seconds[str(chunk)]),
                "goal 2 million": "hit" if np.median(rates) >= GOAL else "miss",
            }
        )
    spent = lines(sizes)
    everything = sum(spent.values())
    heaviest = []
    for (file, number), part in spent.most_common(12):
        text = Path(file).read_text(encoding="utf-8").splitlines()[number - 1].strip()
        heaviest.append({"share": part / everything, "line": f"{Path(file).name}:{number}", "code": f"`{text}`"})
    harness.report(
        "cost_arrays",
        "Pricing arrays of candidate shapes",
        {"One core": found, "Where the time goes (one array of all shapes, traced)": heaviest},
        [f"{SHAPES:,} shapes of int64 sizes, one layer kind repeated; all named parameter counts and FLOP conventions are "
         f"made, as callers get them; {ROUNDS} interleaved rounds on one core."],
    )  # fmt: skip


if __name__ == "__main__":
    main()
