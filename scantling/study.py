"""A grid of runs: made into cells, estimated, run as separate processes, finished ones skipped, failures recorded."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pandas as pd

from scantling.config import RunConfig, StudyConfig, run_from
from scantling.costing import param_counts
from scantling.errors import InputError, RunError
from scantling.files import write_json, write_text
from scantling.record import FILE, find_records, read_record, to_frame
from scantling.resolve import spec_from
from scantling.rows import rows
from scantling.yamlio import dumps

STUDY_FILE, FAILURE_FILE = "study.yaml", "failure.json"
STARTUP_SECONDS = 4.0
ASSUMED_UTILISATION = 0.25  # of a NumPy matrix product's rate, for models this small; replaced by measured runs


def cells(study: StudyConfig) -> list[RunConfig]:
    """Every run of the grid, cheapest first.

    All families of one (size, tokens per parameter, seed) get the same number of tokens: M x the baseline family's N.

    Raises:
        InputError: a family or size does not make a valid model; the message names it.
    """
    faults: list[str] = []
    found: list[RunConfig] = []
    baseline = next(iter(study.families))
    for number, size in enumerate(study.sizes):
        models = {family: {**study.model, **size, **keys} for family, keys in study.families.items()}
        try:
            spec = spec_from(models[baseline], f"study {study.name}, families.{baseline}, sizes[{number}]")
        except InputError as error:
            faults += error.faults
            continue
        count = param_counts(rows(spec))[study.parameters]
        label = f"{spec.num_hidden_layers}x{max(spec.widths)}"
        for family, model in models.items():
            for per_parameter in study.tokens_per_parameter:
                for seed in study.seeds:
                    labels = {"family": family, "size": label, "tokens_per_parameter": per_parameter, "seed": seed}
                    name = f"{family}-{label}-m{per_parameter:g}-s{seed}"
                    train = _train_keys(study, size, per_parameter * count, seed)
                    mapping = {"name": name, "model": model, "data": study.data, "train": train, "labels": labels}
                    try:
                        found.append(run_from(mapping, f"study {study.name}, families.{family}, sizes[{number}]"))
                    except InputError as error:
                        faults += error.faults
    if faults:
        raise InputError(*dict.fromkeys(faults))
    return sorted(found, key=lambda run: run.train_flops)


def _train_keys(study: StudyConfig, size: dict[str, Any], tokens: float, seed: int) -> dict[str, Any]:
    train = {**study.train, "tokens": tokens, "seed": seed}
    if study.learning_rate is not None:
        rule = study.learning_rate
        width = float(size.get("hidden_size") or study.model["hidden_size"])
        rate = rule.base * (width / rule.reference_hidden_size) ** rule.exponent
        train["optimizer"] = {**train.get("optimizer", {}), "learning_rate": float(f"{rate:.4g}")}
    return train


def dry_run(study: StudyConfig, folder: Path) -> pd.DataFrame:
    """What the study would run: one row per cell with parameters, tokens, FLOPs, learning rate, minutes, state.

    Minutes come from finished runs of this study when there are any, else from a NumPy matrix product timed now.
    """
    planned = cells(study)
    rate = measured_rate(folder)
    table = []
    for cell in planned:
        counts = param_counts(rows(cell.spec))
        flops = cell.train_flops
        table.append(
            {
                "run": cell.name,
                **cell.labels,
                "params": counts["total"],
                "non_embedding": counts["non_embedding"],
                "tokens": cell.tokens,
                "flops": flops,
                "learning_rate": cell.train.optimizer.learning_rate,
                "minutes": (flops / rate + STARTUP_SECONDS) / 60,
                "state": state_of(folder / "runs" / cell.name),
            }
        )
    return pd.DataFrame(table)


def measured_rate(folder: Path) -> float:
    """Training FLOP/s of one process: the median of finished runs, else a share of a matrix product's rate."""
    achieved = [
        record.flops["train"] / record.performance["seconds"]
        for _, record in (find_records(folder) if folder.is_dir() else [])
        if record.performance["seconds"] > 0
    ]
    if achieved:
        return float(np.median(achieved))
    a = np.ones((512, 512), np.float32)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * 512**3 / best * ASSUMED_UTILISATION / max(1, os.cpu_count() or 1)


def state_of(run: Path) -> str:
    """`done`, `diverged`, `failed`, `started` or `new`."""
    if (run / FILE).exists():
        return read_record(run).status
    if (run / FAILURE_FILE).exists():
        return "failed"
    return "started" if (run / "config.yaml").exists() else "new"


def run_study(study: StudyConfig, folder: Path, report: Callable[[str], None]) -> pd.DataFrame:
    """Run every cell that is not done yet; returns the table of runs.

    Each run is a process of its own; a diverged or crashed one is recorded in its folder and does not stop the others.
    Interrupting saves the running ones; the same command goes on.

    Args:
        report: told one line per event.

    Raises:
        InputError: the folder holds another study.
        RunError: interrupted.
    """
    planned = cells(study)
    _claim(study, folder)
    waiting = [cell for cell in planned if state_of(folder / "runs" / cell.name) not in ("done", "diverged")]
    report(f"{study.name}: {len(planned)} runs, {len(planned) - len(waiting)} already finished")
    cores = len(os.sched_getaffinity(0))
    workers = min(study.workers or cores, max(1, len(waiting)))
    # the dearest first, so that no core idles beside the last long run
    waiting.sort(key=lambda cell: -cell.train_flops)
    total = sum(cell.train_flops for cell in planned)
    finished = total - sum(cell.train_flops for cell in waiting)
    running: list[tuple[RunConfig, subprocess.Popen[bytes], Path]] = []
    started = time.monotonic()
    try:
        with _terminated_as_interrupt():
            while waiting or running:
                while waiting and len(running) < workers:
                    cell = waiting.pop(0)
                    running.append((cell, *_start(cell, folder, max(1, cores // workers))))
                time.sleep(0.1)
                for item in [item for item in running if item[1].poll() is not None]:
                    running.remove(item)
                    cell, process, log = item
                    finished += cell.train_flops
                    note = _conclude(cell, process.returncode, folder, log)
                    report(f"[{100 * finished / total:3.0f} % · {time.monotonic() - started:4.0f} s] {note}")
    except KeyboardInterrupt:
        _stop([process for _, process, _ in running])
        raise RunError(f"{folder}: interrupted; running cells were saved, run the same command to go on") from None
    except BaseException:
        _stop([process for _, process, _ in running])
        raise
    table = collect(folder, study.parameters)
    if table.empty:
        raise RunError(f"{folder}: no run finished; see {FAILURE_FILE} in the run folders")
    return table


@contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """Within it, SIGTERM raises KeyboardInterrupt, as SIGINT does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: signals go elsewhere
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _claim(study: StudyConfig, folder: Path) -> None:
    text = dumps(study.model_dump(mode="json"))
    path = folder / STUDY_FILE
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise InputError(
            f"{path}: this folder holds another study (or an older version of it); choose another --out or delete it"
        )
    write_text(path, text)


def _start(cell: RunConfig, folder: Path, threads: int) -> tuple[subprocess.Popen[bytes], Path]:
    """Start one run as its own process with its share of the cores."""
    run = folder / "runs" / cell.name
    (run / FAILURE_FILE).unlink(missing_ok=True)
    config = folder / "configs" / f"{cell.name}.yaml"
    write_text(config, dumps(cell.to_mapping()))
    log = folder / "configs" / f"{cell.name}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "scantling", "train", str(config), "--out", str(run)]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    return process, log


def _conclude(cell: RunConfig, code: int, folder: Path, log: Path) -> str:
    """One line on a finished cell; a crash is recorded with the end of what it printed."""
    run = folder / "runs" / cell.name
    if (run / FILE).exists():
        record = read_record(run)
        loss = record.final.get("validation_loss")
        return f"{cell.name}: {record.status}" + (f", validation loss {loss:.4f}" if loss is not None else "")
    tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    write_json(run / FAILURE_FILE, {"exit_code": code, "output": tail, "labels": cell.labels})
    last = tail.strip().splitlines()[-1] if tail.strip() else "no output"
    return f"{cell.name}: failed (exit {code}): {last}"


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ask every run to save and end; wait for them."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


def collect(folder: Path, parameters: str = "total") -> pd.DataFrame:
    """The table of finished runs below a folder (see `record.to_frame`)."""
    return to_frame(find_records(folder), parameters)


def failures(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(run name, what was recorded) of each crashed cell."""
    for path in sorted((folder / "runs").glob(f"*/{FAILURE_FILE}")):
        yield path.parent.name, json.loads(path.read_text(encoding="utf-8"))
