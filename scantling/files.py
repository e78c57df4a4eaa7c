"""Writing files so that a reader sees the old content or the new, never half of it."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scantling.errors import InputError, RunError

SPEC, STATE = "spec.json", "state.json"  # of a checkpoint
_STEP = re.compile(r"^step_(\d{8,})$")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError about `path` into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            try:
                free = f"{shutil.disk_usage(path if path.is_dir() else path.parent).free:,} bytes"
            except OSError:
                free = "unknown"
            raise RunError(
                f"{path}: the disk is full (free: {free}); make room and run the same command again"
            ) from error
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a whole file atomically: a temporary name beside it, flushed to disk, then renamed.

    Raises:
        RunError: the disk is full or the place is not writable; the old file, if any, is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """`write_text` of readable JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def sync_folder(path: Path) -> None:
    """Make a rename inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_folders(root: Path) -> list[Path]:
    """Checkpoint folders below `root`, oldest first; temporary ones are not among them."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if _STEP.match(path.name)), key=step_of)


def step_of(folder: Path) -> int:
    """The step that a checkpoint folder's name tells."""
    match = _STEP.match(folder.name)
    assert match is not None
    return int(match[1])


def checkpoint_folder(path: Path) -> Path:
    """The folder of one checkpoint: the given one, or a run folder's newest.

    Raises:
        InputError: neither is there.
    """
    if (path / STATE).is_file():
        return path
    found = checkpoint_folders(path / "checkpoints")
    if not found:
        raise InputError(f"{path}: expected a checkpoint folder or a run folder with checkpoints")
    return found[-1]
