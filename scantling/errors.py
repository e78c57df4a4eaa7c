"""The two ways a command can end badly: the input is wrong (exit 2), or the work failed while running (exit 1).

Every message says where, what was expected, what came, and what to do about it.
"""

import difflib
from collections.abc import Iterable


class ScantlingError(Exception):
    """Base of every error meant for the user; the command line prints it without a traceback."""

    exit_code = 1


class InputError(ScantlingError):
    """The input is wrong. Holds every fault found, one line each."""

    exit_code = 2

    def __init__(self, *faults: str) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))


class RunError(ScantlingError):
    """The input was fine but the work failed while running (full disk, diverged run, vanished data)."""


def suggest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or the list of names when none is near and they are few."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; expected one of {', '.join(sorted(names))}" if len(names) <= 12 else ""
