"""Small corpora for the tests of prepared data."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from scantling.data import Dataset, Source
from scantling.data.corpus import DataConfig
from scantling.data.readers import Empty, Text, read_piece
from scantling.data.shards import Prepared, open_prepared
from scantling.data.sources import find_files, pieces
from scantling.data.streams import Shard, TokenStream
from scantling.data.survey import SPLITS
from scantling.data.tokens import ByteTokenizer, IdTokenizer, token_dtype


def config(source: Path, **keys: Any) -> DataConfig:
    return DataConfig(source=str(source), **keys)


def leftovers(cache: Path) -> list[str]:
    """What lies in a cache, beside what is remembered of files."""
    return sorted(path.name for path in cache.glob("*") if path.name != "known") if cache.exists() else []


def read(data: DataConfig) -> list[Text | Empty]:
    """Every document of the sources of a config, in order."""
    (part,) = data.parts.values()
    found = [(source, find_files(source)) for source in part.sources]
    return [item for piece in pieces(part, found) for item in read_piece(piece)]


def prepared(dataset: Dataset) -> Prepared:
    """The folder of a dataset of one source."""
    (source,) = dataset.sources
    return open_prepared(source.path)


def tokens(dataset: Dataset, split: str = "train") -> np.ndarray[Any, Any]:
    """All tokens of a split of a dataset of one source."""
    (source,) = dataset.sources
    return source.streams[split].read(0, source.tokens(split))  # type: ignore[index, arg-type]


def in_memory(
    train: int, validation: int = 2, vocab_size: int = 256, name: str = "text", weight: float = 1.0, shards: int = 1
) -> Dataset:
    """A dataset whose token i is i (modulo the vocabulary), in so many shards."""
    dtype = token_dtype(vocab_size)
    sizes = {"train": train, "validation": validation}
    streams = {}
    for split in SPLITS:
        ids = (np.arange(sizes[split], dtype=np.int64) % vocab_size).astype(dtype)
        streams[split] = TokenStream([Shard(part) for part in np.array_split(ids, shards)])
    source = Source(name, weight, Path("memory"), "0" * 64, streams, {"train": train, "validation": validation})
    tokenizer = ByteTokenizer() if vocab_size == 256 else IdTokenizer(vocab_size, 0)
    return Dataset((source,), tokenizer, "0" * 64)


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path
