"""Token data: texts of any kind, tokenised once into the cache, read back in an order that is a function of a number.

corpus (the `data:` section) -> sources, readers -> survey -> tokens -> shards | ready -> streams -> dataset
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Batch": "dataset",
    "DataConfig": "corpus",
    "Dataset": "dataset",
    "Source": "dataset",
    "cache_root": "preparing",
    "default_cache_dir": "preparing",
    "open_dataset": "preparing",
    "prepare": "preparing",
}
__all__ = ["Batch", "DataConfig", "Dataset", "Source", "cache_root", "default_cache_dir", "open_dataset", "prepare"]


def __getattr__(name: str) -> Any:
    """Load a public name from its home module."""
    if name in _HOMES:
        return getattr(import_module(f"scantling.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'scantling.data' has no attribute {name!r}")
