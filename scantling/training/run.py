"""A run from its folder to its record: ownership, the loop with its checkpoints and interruptions, the record."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from scantling.config import RunConfig
from scantling.costing import flops_per_token, param_counts
from scantling.data.dataset import Dataset
from scantling.device import environment, matmul_ceiling
from scantling.errors import InputError, RunError
from scantling.evaluate import validation
from scantling.model import build
from scantling.optim import lacking_for_mup
from scantling.profile import Profile, profile_steps
from scantling.progress import Progress
from scantling.record import FILE, RunRecord, read_record
from scantling.rows import rows
from scantling.trackers import trackers
from scantling.training import engine as engines
from scantling.training import lineage, parallel
from scantling.training.folder import Interrupt, Metrics, opened_dataset, owned
from scantling.training.parallel import World
from scantling.training.state import restore, save
from scantling.training.step import Outcome, Stepper

TAIL = 0.05  # share of the last steps whose mean is the reported training loss


def train(config: RunConfig, out: Path, quiet: bool = False, deadline: float | None = None) -> RunRecord:
    """Train, or go on, or say that it is done. Under torchrun every process calls this.

    Args:
        config: the resolved run.
        out: the run folder; made when missing. It holds config.yaml, engine.json, metrics.jsonl, checkpoints/, and at the end
            record.json.
        quiet: no progress display.
        deadline: seconds from now after which the run saves itself and stops, to be gone on with.

    Raises:
        InputError: the folder belongs to another run, the data cannot serve this run, or the model does not fit into memory.
        RunError: the disk is full, the run was interrupted, or it diverged (then a record with status `diverged` exists).
    """
    ends = None if deadline is None else time.monotonic() + deadline
    with parallel.started(config) as world, owned(config, out) if world.main else nullcontext():
        world.wait()
        if (out / FILE).exists():
            record = read_record(out)
            if world.main:
                print(f"{out}: done already ({record.status}, {record.tokens:,} tokens)", file=sys.stderr)
            return record
        with _memory_explained(out):
            return _trained(config, out, world, quiet or not world.main, ends)


def _trained(config: RunConfig, out: Path, world: World, quiet: bool, ends: float | None) -> RunRecord:
    """From the newest checkpoint to the record. Nothing of the run outlives the call: its end can close the processes' ties."""
    run = _Run(config, out, world, quiet)
    run.loop(ends)
    return run.finish()


def profile(config: RunConfig) -> Profile:
    """Where the time of this run's steps goes. Nothing is written and nothing of the run changes.

    Raises:
        InputError: the data cannot serve this run, or the model does not fit into memory.
    """
    with parallel.started(config) as world:
        dataset = opened_dataset(config)
        engine = engines.chosen(config, world)
        model = build(config.spec, config.train.seed, world.building)
        sides = {side for parameter in model.layers.parameters() for side in parameter.shape}
        stepper = Stepper(config, engine, world, dataset, model)
        done = iter(range(config.steps))
        flops = config.train_flops / config.steps / world.data_size

        def one_step() -> None:
            stepper.step(next(done, 0), 0, math.inf).read()

        try:
            return profile_steps(
                one_step,
                flops,
                matmul_ceiling(engine.precision, engine.device),
                vocab_size=None if config.spec.vocab_size in sides else config.spec.vocab_size,
                sequence_length=config.train.sequence_length,
            )
        finally:
            stepper.close()


@contextmanager
def _memory_explained(out: Path) -> Iterator[None]:
    """Running out of memory as a sentence."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        if isinstance(error, RunError | InputError) or not ("out of memory" in text or "can't allocate memory" in text):
            raise
        raise RunError(
            f"{out}: out of memory although it was predicted to fit; set train.gradient_accumulation_steps (smaller "
            f"micro-batches), shorten the sequences, or free memory; then delete {out / engines.FILE} and start again"
        ) from error


class _Run:
    """One run in progress."""

    def __init__(self, config: RunConfig, out: Path, world: World, quiet: bool) -> None:
        self.config, self.out, self.world, self.quiet = config, out, world, quiet
        growths = lineage.plan(config)
        self.grows = {stage.first for stage, _ in growths}
        self.dataset: Dataset = world.first(lambda: opened_dataset(config, quiet))
        self.engine = engines.choose(config, out, world)
        self.ceiling = matmul_ceiling(self.engine.precision, self.engine.device)
        model = lineage.initial(config, world.building, out)
        self.stepper = Stepper(config, self.engine, world, self.dataset, model)
        self.state, self.warnings = restore(config, out, self.stepper)
        self.warnings += lacking_for_mup(config.spec, config.train)
        self.warnings += [
            f"growth at step {stage.first} is not function-preserving: {step.broken}"
            for stage, steps in growths
            for step in steps
            if step.broken is not None
        ]
        if self.state.step and not quiet:
            print(f"{out}: going on at step {self.state.step} of {config.steps}", file=sys.stderr)

    # --- the loop --------------------------------------------------------------------------------------------------

    def loop(self, ends: float | None) -> None:
        """Train to the end, or until told to stop. The state is then final."""
        config = self.config
        lag = 0 if self.engine.device == "cpu" else 1  # outcomes are read so many steps late, to keep the device busy
        waiting: list[Outcome] = []
        with ExitStack() as stack:
            interrupt = stack.enter_context(Interrupt(ends))
            progress = stack.enter_context(Progress(config.name, config.steps, self.state.step, self.quiet))
            kinds = trackers(config, self.out, self.state.step) if self.world.main else []
            self.metrics = stack.enter_context(Metrics(self.out, self.state.step, kinds, self.world.main))
            stack.callback(self.stepper.close)
            self.clock = time.perf_counter()
            while self.state.step < config.steps and not self.state.diverged:
                self._end_of_guidance()
                self._grow_if_due()
                state = self.state
                waiting.append(self.stepper.step(state.step, state.shift, state.watch.threshold()))
                state.step += 1
                wanted = interrupt.wanted(self.world)
                left = 0 if wanted or self._pauses() else lag
                while len(waiting) > left and not state.diverged:
                    if self._settle(waiting.pop(0), progress, wanted) == "rollback":
                        waiting.clear()
                        self._roll_back()
                if wanted and self.state.step < config.steps and not state.diverged:
                    self.world.wait()  # until the main process has saved
                    raise RunError(
                        f"{self.out}: {wanted}, saved at step {self.state.saved}; run the same command to go on"
                    )

    def _pauses(self) -> bool:
        """Whether this step ends with an evaluation, a checkpoint or the run."""
        step, last = self.state.step, self.config.steps
        return self._evaluates(step) or self._saves(step) or step == last

    def _saves(self, step: int) -> bool:
        """Whether a checkpoint is taken after so many steps: at its rhythm, and where the model is about to grow."""
        return step % self.config.train.checkpoint_every == 0 or step in self.grows

    def _evaluates(self, step: int) -> bool:
        """Whether the run is evaluated after so many steps; at its end `finish` does it."""
        every = self.config.train.evaluate_every
        return every is not None and step % every == 0 and step < self.config.steps

    def _settle(self, outcome: Outcome, progress: Progress, wanted: str | None) -> str:
        """Read a step's outcome, note it, and do what is due after it."""
        config, train, state = self.config, self.config.train, self.state
        step = outcome.step + 1
        loss, norm, applied = outcome.read()
        now = time.perf_counter()
        elapsed, self.clock = now - self.clock, now
        state.seconds += elapsed
        decision = state.watch.judge(step, loss, norm, applied)
        tokens = config.tokens_after(step)
        speed = (tokens - config.tokens_after(step - 1)) / elapsed
        flops = config.train_flops_after(step) - config.train_flops_after(step - 1)
        row: dict[str, Any] = {
            "step": step,
            "tokens": tokens,
            "train/loss": loss,
            "lr": outcome.rate,
            "grad_norm": norm,
            "perf/tokens_per_second": round(speed, 1),
            "perf/mfu": round(flops / elapsed / self.ceiling / self.world.size, 4),
        }
        progress.update(step, loss, speed, row["perf/mfu"])
        if decision != "ok":
            row |= {"event": state.watch.events[-1]["what"], "decision": decision}
        if decision == "stop":
            state.diverged, state.step = True, step - 1
        if decision in ("stop", "rollback"):
            self.metrics.write(row)
            return decision
        if applied and step > config.steps - max(1, round(TAIL * config.steps)):
            state.tail.append(loss)
        evaluates = self._evaluates(step)
        best = False
        if evaluates:
            row["val/loss"] = self._validate()["validation_loss"]
            best = state.note_validation(step, row["val/loss"]) and train.keep_best
        if evaluates or decision != "ok" or step % max(1, config.steps // 1000) == 0 or step == config.steps:
            self.metrics.write(row)
        if step == config.steps:
            self._end_of_guidance()  # which the last step may have been part of
        if best or self._saves(step) or step == config.steps or wanted:
            save(config, self.out, self.stepper, state)
        self.clock = time.perf_counter()  # evaluations and checkpoints are not training time
        return decision

    def _end_of_guidance(self) -> None:
        """After the guided phase the guides and their optimizer state go."""
        guidance, stepper = self.config.guidance, self.stepper
        if stepper.guided and guidance is not None and self.state.step >= guidance.guided_steps:
            stepper.remove_guides()

    def _grow_if_due(self) -> None:
        """At a growth the last checkpoint is read back as the larger model; so a kill in between changes nothing."""
        target = self.config.stage(self.state.step).spec
        if self.state.step not in self.grows or self.stepper.spec == target:
            return
        assert self.state.saved == self.state.step
        before = self.stepper.spec
        self.state, _ = restore(self.config, self.out, self.stepper)
        self.clock = time.perf_counter()
        if not self.quiet:
            sizes = [f"{param_counts(rows(spec))['total']:,}" for spec in (before, target)]
            print(f"step {self.state.step}: grown from {sizes[0]} to {sizes[1]} parameters", file=sys.stderr)

    def _roll_back(self) -> None:
        """The state of the last checkpoint, with the data since then passed over and the events kept."""
        state = self.state
        failed = state.watch.events[-1]["step"]
        watch, shift, seconds = state.watch, state.shift, state.seconds
        self.stepper.begin_again(lineage.initial(self.config, self.world.building, self.out))
        self.state, _ = restore(self.config, self.out, self.stepper)
        past = self.config.tokens_after(failed) - self.config.tokens_after(self.state.step)
        self.state.watch.events = watch.events
        self.state.shift = shift + past // self.config.train.sequence_length
        self.state.seconds = seconds

    def _validate(self) -> dict[str, float]:
        train, stepper = self.config.train, self.stepper
        average = stepper.average.swapped(stepper.model) if stepper.average else nullcontext()
        with average:
            found = validation(
                stepper.model,
                self.dataset,
                train.sequence_length,
                max(1, min(self.engine.micro_batch_sequences, 8192 // train.sequence_length)),
                int(train.validation_tokens),
                self.engine.precision,
                document_mask=train.document_mask,
            )
        return self.world.agree(lambda: found)

    # --- the record ------------------------------------------------------------------------------------------------

    def finish(self) -> RunRecord:
        """Evaluate, write the record last, and return it."""
        config, train, state = self.config, self.config.train, self.state
        tokens = config.tokens_after(state.step)
        final: dict[str, float] = {}
        if not state.diverged:
            tail = state.tail or state.watch.losses[-1:]  # the last steps may all have been left out
            final = {**({"train_loss": sum(tail) / len(tail)} if tail else {}), **self._validate()}
            state.note_validation(state.step, final["validation_loss"])
        if state.best is not None and train.keep_best:
            final |= {"best_validation_loss": state.best[1], "best_step": float(state.best[0])}
        diverged = state.diverged or not all(math.isfinite(value) for value in final.values())
        flops = dict.fromkeys(("train", "train_causal", "chinchilla_6nd"), 0.0)
        for stage, trained in config.stage_tokens(state.step):
            costs = flops_per_token(rows(stage.spec), train.sequence_length)
            flops = {name: total + float(costs[name]) * trained for name, total in flops.items()}
        performed = config.train_flops_after(state.step)
        earlier = [parent["train_flops"] for parent in state.parents]
        if None in earlier:
            self.warnings.append("what the weights it began with cost is not known; train_cumulative leaves it out")
        guides = performed - flops["train"]
        speed = tokens / state.seconds if state.seconds else 0.0
        rate = performed / state.seconds if state.seconds else 0.0
        epochs = self.dataset.epochs(tokens, train.sequence_length)
        if epochs > 1:
            self.warnings.append(f"the training text was seen {epochs:.2f} times")
        record = RunRecord(
            name=config.name,
            status="diverged" if diverged else "done",
            run_hash=config.hash,
            spec_hash=self.stepper.spec.hash,
            config=config.to_mapping(),
            params=param_counts(rows(self.stepper.spec)),
            flops={
                **flops,
                "train": performed,
                "train_causal": flops["train_causal"] + guides,
                "guides": guides,
                "train_cumulative": performed + sum(float(flops) for flops in earlier if flops is not None),
            },
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
                "epochs_by_source": self.dataset.epochs_by_source(tokens, train.sequence_length),
                "shares": self.dataset.shares(),
            },
            performance={
                "seconds": state.seconds,
                "tokens_per_second": speed,
                "mfu": rate / self.ceiling / self.world.size,
                "ceiling_flops_per_second": self.ceiling,
            },
            environment={
                **environment(self.engine.precision, self.engine.device),
                "processes": self.world.size,
                "attention": self.engine.attention,
                "compile": self.engine.compile,
                "micro_batch_sequences": self.engine.micro_batch_sequences,
            },
            labels=config.labels,
            warnings=(*self.warnings, *state.watch.sentences()),
            parents=tuple(state.parents),
            stages=tuple(lineage.described(config, state.step, self.out)),
        )
        if self.world.main:
            record.write(self.out)
        self.world.wait()
        if diverged:
            last = state.watch.events[-1] if state.watch.events else None
            why = f"{last['what']}, loss {last['loss']}" if last else "non-finite loss"
            raise RunError(
                f"{self.out}: diverged at step {state.step + 1} ({why}); lower the learning rate, or set train.guard"
            )
        return record
