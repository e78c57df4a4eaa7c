"""A run's folder: whose it is, the metrics in it, and what interrupts the run that writes there."""

import fcntl
import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any

from scantling.config import RunConfig, load_run
from scantling.data import prepare
from scantling.data.dataset import Dataset
from scantling.errors import InputError, RunError
from scantling.files import explained, write_text
from scantling.trackers import Tracker
from scantling.training.parallel import World
from scantling.yamlio import dumps


@contextmanager
def owned(config: RunConfig, out: Path) -> Iterator[None]:
    """The run folder, made or checked to be this run's, locked against a second process.

    Raises:
        InputError: it holds another run.
        RunError: another process is training there, or it cannot be written.
    """
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")  # noqa: SIM115  (held for the whole run)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"{out}: another process is training in this folder") from None
        existing = out / "config.yaml"
        if existing.exists():
            found = load_run(existing).hash
            if found != config.hash:
                raise InputError(
                    f"{out}: holds another run (hash {found[:12]}, this one is {config.hash[:12]}); "
                    "choose another --out or delete it"
                )
        else:
            write_text(existing, dumps(config.to_mapping()))
        yield


def opened_dataset(config: RunConfig, quiet: bool = False) -> Dataset:
    """The run's data, checked to serve its model and its sequences.

    Raises:
        InputError: more ids than the model's vocabulary, or a split shorter than one sequence.
    """
    dataset = prepare(config.data, report=(lambda *_: None) if quiet else None)
    if dataset.vocab_size > config.spec.vocab_size:
        raise InputError(
            f"model.vocab_size {config.spec.vocab_size} is smaller than the tokenizer's {dataset.vocab_size} ids; "
            f"set it to {dataset.vocab_size} or more"
        )
    for split in ("train", "validation"):
        dataset.windows(config.train.sequence_length, split)  # raises when the split is shorter than one sequence
    return dataset


class Metrics:
    """metrics.jsonl, one row per noted step, and the trackers that get the same rows."""

    def __init__(self, out: Path, step: int, trackers: Sequence[Tracker], main: bool) -> None:
        self.path, self.trackers, self.main = out / "metrics.jsonl", trackers, main
        self.file: IO[str] | None = None
        if main:
            self._cut(step)

    def _cut(self, step: int) -> None:
        """Drop rows after `step`: those steps will be taken again."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError, TypeError):
                break  # a line cut by a kill; everything after it is younger
        write_text(self.path, "".join(line + "\n" for line in kept))

    def __enter__(self) -> "Metrics":
        if self.main:
            with explained(self.path):
                self.file = open(self.path, "a", encoding="utf-8", buffering=1)
        return self

    def write(self, row: Mapping[str, Any]) -> None:
        """One row."""
        if self.file is None:
            return
        with explained(self.path):
            self.file.write(json.dumps(row) + "\n")
        for tracker in self.trackers:
            tracker.log(row, row["step"])

    def __exit__(self, *_: object) -> None:
        for tracker in self.trackers:
            tracker.close()
        if self.file is not None:
            self.file.close()


class Interrupt:
    """SIGINT, SIGTERM and the deadline ask for a checkpoint after the step; a second signal ends the process at once."""

    def __init__(self, ends: float | None) -> None:
        self.ends, self.signalled = ends, False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: leave signals alone
                break
        return self

    def wanted(self, world: World) -> str | None:
        """Why the run shall stop now, the same answer in all its processes; None to go on."""
        late = self.ends is not None and time.monotonic() >= self.ends
        return world.any_reason("interrupted" if self.signalled else "deadline reached" if late else None)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signalled = True
        signal.signal(number, self.before[number] or signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
