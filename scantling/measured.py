"""What was measured on this machine, remembered in a JSON file, so that two runs of one recipe make the same choices."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from scantling.data.workers import locked
from scantling.errors import RunError
from scantling.files import write_json

Value = TypeVar("Value")


def remembered(path: Path, key: str, measure: Callable[[], Value], usable: Callable[[Any], bool]) -> Value:
    """The value kept in a file under a key, or measured now, once whoever asks at the same time, and kept there.

    A file that is missing, damaged or not writable costs a measurement and nothing else.

    Args:
        path: the file, a mapping of keys to values.
        key: what is asked, with all that the answer depends on: processor, threads, versions.
        measure: gives a JSON value.
        usable: whether a value found in the file is one that `measure` could have given.
    """
    with _alone(path):
        known = _known(path)
        if key in known and usable(known[key]):
            return known[key]  # type: ignore[no-any-return]
        value = measure()
        with suppress(RunError):
            write_json(path, {**known, key: value})
        return value


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock of a file, where there can be one."""
    with ExitStack() as stack:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path.with_suffix(".lock")))
        yield


def _known(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
