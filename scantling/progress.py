"""What a person watching a run sees, on stderr: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from scantling.units import format_count

LINE_SECONDS = 30.0


class Progress:
    """Loss, tokens/s, MFU and time left of one run."""

    def __init__(self, name: str, steps: int, start: int, quiet: bool) -> None:
        self.name, self.steps, self.quiet = name, steps, quiet
        self.last_line = time.monotonic()
        self.bar: RichProgress | None = None
        if not quiet and sys.stderr.isatty():
            self.bar = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} steps · loss {task.fields[loss]}"),
                TextColumn("{task.fields[speed]} tok/s · MFU {task.fields[mfu]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task(name, total=steps, completed=start, loss="-", speed="-", mfu="-")

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def update(self, step: int, loss: float, tokens_per_second: float, mfu: float) -> None:
        """Show the state after `step`."""
        if self.bar:
            self.bar.update(
                self.task,
                completed=step,
                loss=f"{loss:.4f}",
                speed=format_count(tokens_per_second),
                mfu=f"{100 * mfu:.0f} %",
            )
        elif not self.quiet and (step == self.steps or time.monotonic() - self.last_line > LINE_SECONDS):
            self.last_line = time.monotonic()
            speed = format_count(tokens_per_second)
            print(
                f"{self.name}: step {step}/{self.steps} loss {loss:.4f} {speed} tok/s MFU {100 * mfu:.0f} %",
                file=sys.stderr,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()
