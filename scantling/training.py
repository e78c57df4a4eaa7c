"""One run: RunConfig -> RunRecord. Interrupt it at any moment; the same command goes on, to the same weights bit for bit."""

import fcntl
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from scantling import checkpoint
from scantling.config import RunConfig, load_run
from scantling.costing import flops_per_token, param_counts
from scantling.data import Dataset, prepare
from scantling.device import environment, fastest_float32, matmul_ceiling
from scantling.errors import InputError, RunError
from scantling.evaluate import autocast, validation
from scantling.files import explained, write_text
from scantling.model import Decoder, build
from scantling.optim import adamw, learning_rate_factor
from scantling.progress import Progress
from scantling.record import FILE, RunRecord, read_record
from scantling.rows import rows
from scantling.yamlio import dumps

TAIL = 0.05  # share of the last steps whose mean is the reported training loss


def train(config: RunConfig, out: Path, quiet: bool = False) -> RunRecord:
    """Train, or go on, or say that it is done.

    Args:
        config: the resolved run.
        out: the run folder; made when missing. It holds config.yaml, metrics.jsonl, checkpoints/, and at the end record.json.
        quiet: no progress display.

    Raises:
        InputError: the folder belongs to another run, or the data cannot serve this run.
        RunError: the disk is full, the run was interrupted, or it diverged (then a record with status `diverged` exists).
    """
    with _owned(config, out):
        if (out / FILE).exists():
            record = read_record(out)
            print(f"{out}: done already ({record.status}, {record.tokens:,} tokens)", file=sys.stderr)
            return record
        dataset = _dataset(config)
        run = _Run(config, out, dataset, quiet)
        return run.finish(run.loop())


@contextmanager
def _owned(config: RunConfig, out: Path) -> Iterator[None]:
    """The run folder, made or checked to be this run's, locked against a second process."""
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


def _dataset(config: RunConfig) -> Dataset:
    dataset = prepare(config.data)
    if dataset.vocab_size > config.spec.vocab_size:
        raise InputError(
            f"model.vocab_size {config.spec.vocab_size} is smaller than the tokenizer's {dataset.vocab_size} ids; "
            f"set it to {dataset.vocab_size} or more"
        )
    for split in ("train", "validation"):
        dataset.windows(config.train.sequence_length, split)  # raises when the split is shorter than one sequence
    return dataset


@dataclass
class _Progressed:
    """What changes while a run runs, beside weights and optimizer."""

    step: int = 0
    seconds: float = 0.0
    tail: list[float] = field(default_factory=list)
    diverged: bool = False


class _Run:
    """One run in progress."""

    def __init__(self, config: RunConfig, out: Path, dataset: Dataset, quiet: bool) -> None:
        self.config, self.out, self.dataset, self.quiet = config, out, dataset, quiet
        self.device = "cpu"
        self.table = rows(config.spec)
        self.flops_per_token = float(flops_per_token(self.table, config.train.sequence_length)["train"])
        fastest_float32()
        self.ceiling = matmul_ceiling(config.train.precision, self.device)
        self.model: Decoder = build(config.spec, seed=config.train.seed, device=self.device)
        self.optimizer = adamw(self.model, config.train.optimizer)
        self.warnings: list[str] = []
        self.state = self._resume()

    # --- resuming --------------------------------------------------------------------------------------------------

    def _resume(self) -> _Progressed:
        found, passed = checkpoint.load_latest(self.out / "checkpoints")
        self.warnings += passed
        for sentence in passed:
            print(sentence, file=sys.stderr)
        if found is None:
            self._cut_metrics(0)
            return _Progressed()
        if found.state.get("run_hash") != self.config.hash:
            raise InputError(f"{found.folder}: belongs to another run; delete {self.out} or choose another --out")
        checkpoint.restore_weights(self.model, found.weights)
        checkpoint.restore_optimizer(self.model, self.optimizer, found.optimizer)
        step = int(found.state["step"])
        self._cut_metrics(step)
        if not self.quiet:
            print(f"{self.out}: going on at step {step} of {self.config.train.steps}", file=sys.stderr)
        return _Progressed(step, float(found.state["seconds"]), list(found.state["tail"]))

    def _cut_metrics(self, step: int) -> None:
        """Drop metrics after `step`: they will be measured again."""
        path = self.out / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError, TypeError):
                break  # a line cut by a kill; everything after it is younger
        write_text(path, "".join(line + "\n" for line in kept))

    # --- the loop --------------------------------------------------------------------------------------------------

    def loop(self) -> _Progressed:
        """Train to the end; returns the final state."""
        train, state = self.config.train, self.state
        saved_at = state.step
        every = max(1, train.steps // 1000)
        with (
            _Interrupt() as interrupt,
            Progress(self.config.name, train.steps, state.step, self.quiet) as progress,
            self._metrics() as metrics,
        ):
            while state.step < train.steps and not state.diverged:
                started = time.perf_counter()
                loss, norm, rate = self._step(state.step)
                if not math.isfinite(loss):
                    state.diverged = True
                    break
                state.step += 1
                elapsed = time.perf_counter() - started
                state.seconds += elapsed
                if state.step > train.steps - max(1, round(TAIL * train.steps)):
                    state.tail.append(loss)
                speed = train.batch_tokens / elapsed
                row = {
                    "step": state.step,
                    "tokens": state.step * train.batch_tokens,
                    "train/loss": loss,
                    "lr": rate,
                    "grad_norm": norm,
                    "perf/tokens_per_second": round(speed, 1),
                    "perf/mfu": round(speed * self.flops_per_token / self.ceiling, 4),
                }
                if train.evaluate_every and state.step % train.evaluate_every == 0 and state.step < train.steps:
                    row["val/loss"] = self._validate()["validation_loss"]
                if state.step % every == 0 or state.step == train.steps or "val/loss" in row:
                    metrics(row)
                progress.update(state.step, loss, speed, row["perf/mfu"])
                if state.step % train.checkpoint_every == 0 or state.step == train.steps or interrupt.wanted:
                    self._save()
                    saved_at = state.step
                if interrupt.wanted and state.step < train.steps:
                    raise RunError(f"{self.out}: interrupted, saved at step {saved_at}; run the same command to go on")
        return state

    def _step(self, step: int) -> tuple[float, float, float]:
        """One optimizer step: mean loss over its micro-batches, gradient norm before clipping, learning rate."""
        train = self.config.train
        parts = train.gradient_accumulation_steps
        rate = train.optimizer.learning_rate * learning_rate_factor(train, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sequences = train.batch_tokens // train.sequence_length // parts
        loss = 0.0
        for part in range(parts):
            inputs, labels = self.dataset.batch(
                seed=train.seed,
                step=step * parts + part,
                batch_sequences=sequences,
                sequence_length=train.sequence_length,
            )
            with autocast(train.precision, self.device):
                part_loss = self.model.loss(torch.from_numpy(inputs), torch.from_numpy(labels)) / parts
            part_loss.backward()
            loss += part_loss.item()
        limit = train.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit, foreach=True).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm, rate

    def _save(self) -> None:
        state = {"run_hash": self.config.hash, "seconds": self.state.seconds, "tail": self.state.tail}
        checkpoint.save(
            self.out / "checkpoints",
            self.state.step,
            self.model,
            self.optimizer,
            state,
            keep=self.config.train.keep_last,
        )

    @contextmanager
    def _metrics(self) -> Iterator[Any]:
        path = self.out / "metrics.jsonl"
        with explained(path), open(path, "a", encoding="utf-8", buffering=1) as file:
            yield lambda row: file.write(json.dumps(row) + "\n")

    def _validate(self) -> dict[str, float]:
        train = self.config.train
        sequences = max(1, train.batch_tokens // train.sequence_length // train.gradient_accumulation_steps)
        return validation(
            self.model, self.dataset, train.sequence_length, sequences, int(train.validation_tokens), train.precision
        )

    # --- the record ------------------------------------------------------------------------------------------------

    def finish(self, state: _Progressed) -> RunRecord:
        """Evaluate, write the record last, and return it."""
        config, train = self.config, self.config.train
        tokens = state.step * train.batch_tokens
        final = {} if state.diverged else {"train_loss": sum(state.tail) / len(state.tail), **self._validate()}
        diverged = state.diverged or not all(math.isfinite(value) for value in final.values())
        costs = flops_per_token(self.table, train.sequence_length)
        speed = tokens / state.seconds if state.seconds else 0.0
        epochs = self.dataset.epochs(tokens, train.sequence_length)
        if epochs > 1:
            self.warnings.append(f"the training text was seen {epochs:.2f} times")
        record = RunRecord(
            name=config.name,
            status="diverged" if diverged else "done",
            run_hash=config.hash,
            spec_hash=config.spec.hash,
            config=config.to_mapping(),
            params=param_counts(self.table),
            flops={name: float(costs[name]) * tokens for name in ("train", "train_causal", "chinchilla_6nd")},
            tokens=tokens,
            steps=state.step,
            seed=train.seed,
            final={name: value for name, value in final.items() if math.isfinite(value)},
            data={
                "fingerprint": self.dataset.fingerprint,
                "vocab_size": self.dataset.vocab_size,
                "train_tokens": self.dataset.tokens("train"),
                "validation_tokens": self.dataset.tokens("validation"),
                "epochs": epochs,
            },
            performance={
                "seconds": state.seconds,
                "tokens_per_second": speed,
                "mfu": speed * self.flops_per_token / self.ceiling,
                "ceiling_flops_per_second": self.ceiling,
            },
            environment=environment(train.precision, self.device),
            labels=config.labels,
            warnings=tuple(self.warnings),
        )
        record.write(self.out)
        if diverged:
            raise RunError(f"{self.out}: diverged at step {state.step + 1} (non-finite loss); lower the learning rate")
        return record


class _Interrupt:
    """SIGINT and SIGTERM ask for a checkpoint at the next step; a second one ends the process at once."""

    def __init__(self) -> None:
        self.wanted = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "_Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: leave signals alone
                break
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.wanted = True
        signal.signal(number, self.before[number] or signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
