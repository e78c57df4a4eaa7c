"""Screening ten million candidate shapes with their real costs, and the time to the first answer of the shipped examples.

Each plan is solved in a process of its own, whose peak memory is the operating system's. The naive way prices each shape as a
spec of its own, on a sample of the same shapes, whose prices must be the same.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np

from scantling.planning import plan, plan_from
from scantling.planning.outcome import pose
from scantling.planning.shapes import families, shape_chunks
from scantling.resolve import spec_from

ROOT = Path(__file__).parents[1]
GOAL_SHAPES, GOAL_SECONDS, GOAL_GIB, GOAL_FIRST = 10_000_000, 20.0, 2.0, 2.0
ROUNDS, SAMPLE = 3, 300
SPACE = {
    "vocab_size": 128256,
    "hidden_size": {"min": 512, "max": 16384, "step": 32},
    "num_hidden_layers": {"min": 4, "max": 215, "step": 1},
    "head_dim": [64, 128],
    "num_attention_heads": [8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96],
    "num_key_value_heads": [1, 2, 4, 8],
}
ASKED: dict[str, dict[str, Any]] = {
    "lifetime FLOPs, memory limited": {
        "minimize": "lifetime_flops",
        "serving": {"tokens": 1e13, "context": 32768, "batch": 8},
        "constraints": {"memory_bytes": "160GB"},
    },
    "money over two contexts, memory and latency limited": {
        "minimize": "usd",
        "hardware": {"device": "h100-sxm"},
        "serving": {"tokens": 1e13, "context": {8192: 0.8, 131072: 0.2}, "batch": 8},
        "constraints": {"memory_bytes": "160GB", "decode_seconds": 0.05},
    },
}


def config(name: str) -> dict[str, Any]:
    asked = {"law": "chinchilla-epoch", "target": {"loss": 2.1}, "training": {"sequence_length": 4096}}
    return {**asked, "space": SPACE, **ASKED[name]}


def solve(name: str) -> dict[str, Any]:
    """One plan in this process: shapes, seconds, peak memory."""
    started = time.perf_counter()
    answer = plan(plan_from(config(name)))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    best = answer.candidates[0]
    return {
        "shapes": answer.screened,
        "seconds": seconds,
        "gib": peak,
        "best": best.objective,
        "cpu": time.process_time(),
    }


def naive(name: str) -> dict[str, float]:
    """Seconds per shape of specs built and priced one at a time, and the largest relative difference to the screen's."""
    problem = pose(plan_from(config(name)))
    kinds = families(problem.config.space, None)
    chunks = shape_chunks(problem.config.space, kinds, (1, 1))
    chunk = next(chunks)
    rows = np.random.default_rng(0).choice(len(chunk), SAMPLE, replace=False)
    shapes = chunk.take(np.sort(rows))
    screened = problem.price(shapes, everything=True)
    started = time.perf_counter()
    worst = 0.0
    for index in range(SAMPLE):
        spec = spec_from(shapes.mapping(index, problem.config.space, problem.config.context))
        quote = problem.quote(spec, everything=True)
        for field in ("parameters", "training_flops_per_token", "serving_flops_per_token", "memory_bytes"):
            exact = float(getattr(quote, field))
            worst = max(worst, abs(float(getattr(screened, field)[index]) / exact - 1))
    return {"seconds": (time.perf_counter() - started) / SAMPLE, "difference": worst}


def first_answers() -> list[dict[str, Any]]:
    """Wall time of `scantling plan` on each shipped example, start of the process included, and whether torch was loaded."""
    found = []
    for example in sorted((ROOT / "examples").glob("plan-*.yaml")):
        command = [sys.executable, "-m", "scantling", "plan", str(example), "--json"]
        seconds = []
        for _ in range(ROUNDS + 1):
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - started)
        code = "import sys, scantling.planning as p; p.plan(p.load_plan(sys.argv[1])); print('torch' in sys.modules)"
        loaded = subprocess.run([sys.executable, "-c", code, str(example)], check=True, capture_output=True, text=True)
        median = statistics.median(seconds[1:])
        found.append(
            {
                "example": example.name,
                "seconds, median": median,
                "worst": max(seconds[1:]),
                "loads torch": "yes" if loaded.stdout.strip() == "True" else "no",
                "goal 2 s": "hit" if median < GOAL_FIRST else "miss",
            }
        )
    return found


def main() -> None:
    screens = []
    for name in ASKED:
        runs = []
        for _ in range(ROUNDS):
            command = [sys.executable, __file__, "--solve", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs.append(json.loads(done.stdout))
        by_hand = naive(name)
        seconds = statistics.median(run["seconds"] for run in runs)
        shapes, peak = runs[0]["shapes"], max(run["gib"] for run in runs)
        hit = shapes >= GOAL_SHAPES and seconds < GOAL_SECONDS and peak < GOAL_GIB
        screens.append(
            {
                "plan": name,
                "shapes": shapes,
                "seconds, median": seconds,
                "worst": max(run["seconds"] for run in runs),
                "processor seconds": statistics.median(run["cpu"] for run in runs),
                "peak GiB": peak,
                "naive / screen, per shape": by_hand["seconds"] / (seconds / shapes),
                "largest price difference": by_hand["difference"],
                "goal": "hit" if hit else "miss",
            }
        )
    load = f"load average of the last minute before the end: {os.getloadavg()[0]:.2f}"
    harness.report(
        "plan_screening",
        "Screening candidate shapes, and the first answer",
        {"Ten million shapes": screens, "First answer": first_answers()},
        [
            f"Goals: {GOAL_SHAPES:,} shapes in {GOAL_SECONDS:g} s on 2 cores within {GOAL_GIB:g} GiB; an example's first answer "
            f"in {GOAL_FIRST:g} s. Each plan solved {ROUNDS} times, whole answers (candidates, front, sensitivity), one thread.",
            f"Naive: {SAMPLE} of the shapes, each built and priced as a spec of its own; difference: of its parameters, FLOPs "
            "and memory to the screen's.",
            load,
        ],
    )


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--solve":
        print(json.dumps(solve(sys.argv[2])))
    else:
        main()
