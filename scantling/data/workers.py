"""Work in processes beside this one, and work that only one process may do at a time."""

import fcntl
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from scantling.errors import RunError

Job = TypeVar("Job")
Result = TypeVar("Result")

Report = Callable[[str, int, int], None]
"""Told what is being done, how much of it is, and of how much."""

LINE_SECONDS = 5.0


def default_workers() -> int:
    """One for each core this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    """`function` of every job, in the order of the jobs; in this process when `workers` is 1.

    Raises:
        RunError: a worker was killed.
    """
    if workers < 2 or len(jobs) < 2:
        yield from map(function, jobs)
        return
    pool = ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn"), _begin)
    try:
        yield from pool.map(function, jobs)
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process was killed, perhaps for want of memory; run the same command again: finished shards are kept "
            "(a script of your own needs `if __name__ == '__main__':` around its work, as workers import it)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when the parent does, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def narrated() -> Iterator[Report]:
    """A report that is told on stderr: a line every few seconds, none when it is over before."""
    began, over, latest = time.monotonic(), threading.Event(), ["looking at the files"]

    def tell() -> None:
        while not over.wait(LINE_SECONDS):
            print(f"data: {latest[0]}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    def report(what: str, done: int, total: int) -> None:
        latest[0] = f"{what}, {done / 1e6:,.0f} of about {total / 1e6:,.0f} MB"

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield report
    finally:
        over.set()
        thread.join()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, waiting for another process that does; it is removed at the end."""
    while True:
        with path.open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            try:
                if path.stat().st_ino != os.fstat(stream.fileno()).st_ino:
                    continue  # the one who held it has removed it meanwhile
            except FileNotFoundError:
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
