"""Experiment trackers beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow; each loaded only when a run names it.

A tracker sees the numbers of each metrics row under the row's own names (`train/loss`, `val/loss`, `perf/mfu`, `lr`, ...).
A resumed run goes on in the same tracker run: what identifies it lies in the run folder. A tracker that fails while the run
trains is reported once and left out from then on; training goes on.
"""

import math
import os
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scantling.config import RunConfig
from scantling.errors import InputError
from scantling.files import write_text

PROJECT = "scantling"


class Tracker(ABC):
    """One tracker of one run. `log` and `close` never raise."""

    name: str

    def __init__(self) -> None:
        self.failed = False

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Record the numbers of one row.

        Args:
            row: metrics by name; what is not a finite number is left out.
            step: optimizer steps done.
        """
        numbers = {
            name: float(value)
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        if numbers:
            self._guarded(lambda: self._log(numbers, step))

    def close(self) -> None:
        """Send what is left, and end the tracker run."""
        self._guarded(self._close)

    def _guarded(self, action: Callable[[], None]) -> None:
        """Do it; the first failure is said on stderr and ends this tracker, not the run."""
        if self.failed:
            return
        try:
            action()
        except Exception as error:
            self.failed = True
            print(f"{self.name} failed and is left out from here on: {error or type(error).__name__}", file=sys.stderr)

    @abstractmethod
    def _log(self, numbers: dict[str, float], step: int) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...


class TensorBoard(Tracker):
    """Event files in the run folder's `tensorboard/`."""

    name = "tensorboard"

    def __init__(self, config: RunConfig, out: Path, step: int) -> None:
        super().__init__()
        from torch.utils.tensorboard import SummaryWriter

        # A file written before hides what it holds from this step on: those steps are done again.
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)
        if step == 0:
            self.writer.add_text("config", f"hash {config.hash}")

    def _log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step, double_precision=True)

    def _close(self) -> None:
        self.writer.close()


class WandB(Tracker):
    """A Weights & Biases run; its environment variables (WANDB_MODE, WANDB_PROJECT, ...) decide where it goes."""

    name = "wandb"

    def __init__(self, config: RunConfig, out: Path, step: int) -> None:
        super().__init__()
        import wandb

        self.run = wandb.init(
            project=None if "WANDB_PROJECT" in os.environ else PROJECT,
            id=_identity(out / "wandb-id.txt", lambda: uuid.uuid4().hex[:12]),
            name=config.name,
            dir=str(out),
            config={**config.to_mapping(), "hash": config.hash},
            resume="allow",
            allow_val_change=True,
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Their own counter refuses steps below its last; a resumed run repeats some.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def _log(self, numbers: dict[str, float], step: int) -> None:
        self.run.log({**numbers, "step": step})

    def _close(self) -> None:
        self.run.finish()


class MLflow(Tracker):
    """A run at MLFLOW_TRACKING_URI, in the experiment MLFLOW_EXPERIMENT_NAME (default: scantling)."""

    name = "mlflow"

    def __init__(self, config: RunConfig, out: Path, step: int) -> None:
        super().__init__()
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self.metric, self.client = Metric, MlflowClient()

        def started() -> str:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self.client.get_experiment_by_name(name)
            experiment = found.experiment_id if found is not None else self.client.create_experiment(name)
            run = self.client.create_run(experiment, run_name=config.name)
            params = [Param("hash", config.hash), Param("seed", str(config.train.seed))]
            self.client.log_batch(run.info.run_id, params=params)
            return str(run.info.run_id)

        self.id = _identity(out / "mlflow-id.txt", started)
        self.client.update_run(self.id, status="RUNNING")

    def _log(self, numbers: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(self.id, [self.metric(name, value, now, step) for name, value in numbers.items()])

    def _close(self) -> None:
        self.client.set_terminated(self.id)


KINDS: dict[str, type[TensorBoard] | type[WandB] | type[MLflow]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def trackers(config: RunConfig, out: Path, step: int = 0) -> list[Tracker]:
    """The trackers that `train.trackers` names, started or gone on with.

    Args:
        config: the run.
        out: its folder, which exists.
        step: optimizer steps done before; rows after it will be logged again.

    Raises:
        InputError: a package is missing, or a tracker cannot start (no account, no such server).
    """
    found: list[Tracker] = []
    for name in dict.fromkeys(config.train.trackers):
        try:
            found.append(KINDS[name](config, out, step))
        except Exception as error:
            for one in found:
                one.close()
            if isinstance(error, ImportError):
                raise InputError(
                    f"train.trackers: {name} needs a package that is not installed ({error}); "
                    "pip install 'scantling[track]', or take it out of trackers"
                ) from error
            raise InputError(f"train.trackers: {name} cannot start: {error or type(error).__name__}") from error
    return found


def _identity(path: Path, new: Callable[[], str]) -> str:
    """What is in a file of the run folder, or a new value written there."""
    if not path.exists():
        write_text(path, f"{new()}\n")
    return path.read_text(encoding="utf-8").strip()
