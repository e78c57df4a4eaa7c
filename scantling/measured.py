"""What was measured on this machine, remembered, so that two runs of one recipe make the same choices.

A file of the cache folder holds a value per question; the question names processor, threads and torch, so that a cache
that moved with its user asks anew.
"""

import json
from collections.abc import Callable
from typing import Any

import torch

from scantling.data.preparing import cache_root
from scantling.data.workers import locked
from scantling.device import processor
from scantling.errors import RunError
from scantling.files import write_json

FILE = "measured.json"


def remembered(question: str, measure: Callable[[], Any]) -> Any:
    """The answer from the cache folder, or measured now and kept there; a cache that cannot be used is no obstacle.

    Args:
        question: what is asked, with all that the answer depends on beside the machine.
        measure: gives a JSON value.
    """
    key = f"{question}; {processor()}; {torch.get_num_threads()} threads; torch {torch.__version__}"
    path = cache_root() / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):
            known = _known(path.read_bytes()) if path.exists() else {}
            if key not in known:
                known[key] = measure()
                write_json(path, known)
            return known[key]
    except (OSError, RunError):
        return measure()


def _known(content: bytes) -> dict[str, Any]:
    try:
        known = json.loads(content)
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}
