"""Token data for training: `prepare` once into a cache folder, then `Dataset.sequences`, a pure function of a number.

    sources -> pieces -> survey (hash, de-duplicate, split) -> tokenizer -> shards -> Dataset

Texts are tokenised once into a folder of the cache that is named by their fingerprint; tokens made elsewhere stay where
they lie. What the files of a source were is remembered by their sizes and times of change, so that texts that have not
changed since are not read again.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import tokenizers

from scantling.data.corpus import Bpe, DataConfig, HubSource, Ids, Part, TokenizerFile
from scantling.data.dataset import Batch, Dataset, Source, whole_weights
from scantling.data.readers import File
from scantling.data.ready import is_ready, open_ready
from scantling.data.shards import LAYOUT, Prepared, fingerprint, open_prepared, tokenise, write_error
from scantling.data.sources import find_files, pieces, text_size
from scantling.data.survey import Split, Survey, sampled_texts, survey
from scantling.data.tokens import (
    END_OF_DOCUMENT,
    ByteTokenizer,
    CharTokenizer,
    IdTokenizer,
    JsonTokenizer,
    Tokenizer,
    read_tokenizer,
    token_dtype,
    train_bpe,
)
from scantling.data.workers import Report, default_workers, locked, narrated
from scantling.errors import InputError
from scantling.files import write_json

__all__ = ["Batch", "DataConfig", "Dataset", "Source", "default_cache_dir", "open_dataset", "prepare"]

STALE_SECONDS = 7 * 86400.0  # a temporary folder nobody has written to for this long will not be gone on with
REST_SECONDS = 2.0  # a file changed later than this before it is read may change again within the clock's step
POOL_BYTES = 3 * 2**24  # of text; less is read in this process, and tokenised in it where that is quick

_TEMPORARY, _SURVEY, _LOCK = ".preparing-", ".survey-", ".lock-"

Found = Mapping[str, list[tuple[str | HubSource, tuple[File, ...]]]]


def cache_root() -> Path:
    """`$SCANTLING_CACHE`, or `~/.cache/scantling`."""
    return Path(os.environ.get("SCANTLING_CACHE") or "~/.cache/scantling").expanduser()


def default_cache_dir() -> Path:
    """Where prepared data lie: a folder of the cache named by the layout of what is in it, so that layouts never meet."""
    return cache_root() / f"data-{LAYOUT}"


def open_dataset(folder: Path | str) -> Dataset:
    """Open a prepared folder.

    Raises:
        InputError: the folder is not a prepared one, or a file is missing, damaged or of the wrong size.
    """
    prepared = open_prepared(Path(folder))
    return Dataset((_source("text", 1.0, prepared),), prepared.tokenizer, prepared.manifest.fingerprint)


def prepare(
    config: DataConfig,
    cache_dir: Path | str | None = None,
    report: Report | None = None,
    workers: int | None = None,
) -> Dataset:
    """The dataset of a config: opened where it lies in the cache, else tokenised into it.

    Large texts are read and tokenised by processes that are spawned, so a script needs `if __name__ == "__main__":`.
    Killed at any moment, the same call goes on, with the shards that were finished. The result does not depend on that,
    nor on `workers`. Of several processes that prepare the same data one does, and the others wait for it.

    Args:
        config: what to read and how.
        cache_dir: parent of the prepared folders; default `default_cache_dir()`.
        report: told (what, bytes done, bytes in all); default a line on stderr every few seconds.
        workers: processes; default one per core, and only this one for a few megabytes.

    Raises:
        InputError: a source cannot be used, a split would be empty, the cache cannot be written or is damaged.
        RunError: the disk is full, or the texts changed while they were read.
    """
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    found = {name: [(s, find_files(s)) for s in part.sources] for name, part in config.parts.items()}
    with ExitStack() as stack:
        work = _Work(config, cache, found, report or stack.enter_context(narrated()), workers)
        if (dataset := work.recalled()) is not None:
            return dataset
        try:
            cache.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(cache / f"{_LOCK}{work.key[:32]}"))
            return work.recalled() or work.build()
        except OSError as error:
            raise write_error(error, cache, work.most_bytes) from error


class _Work:
    """One call of `prepare`."""

    def __init__(self, config: DataConfig, cache: Path, found: Found, report: Report, workers: int | None) -> None:
        self.config, self.cache, self.found, self.report = config, cache, found, report
        self.parts = config.parts
        self.files = [file for sources in found.values() for _, files in sources for file in files]
        self.ready = {name: is_ready([f for _, files in sources for f in files]) for name, sources in found.items()}
        many = workers or default_workers()
        self.readers = workers or (many if sum(map(text_size, self.files)) > POOL_BYTES else 1)
        self.tokenisers = self.readers if config.tokenizer in ("bytes", "chars") else many
        self.most_bytes = 0
        self.began = time.time()
        stamps = [[str(file.path.absolute()), file.size, file.mtime_ns] for file in self.files]
        settings = config.model_dump(mode="json")
        self.key = hashlib.sha256(json.dumps([tokenizers.__version__, settings, stamps]).encode()).hexdigest()
        self.fixed = self._fixed_tokenizer()

    # --- what is known ----------------------------------------------------------------------------------------------

    def recalled(self) -> Dataset | None:
        """The dataset, if these very files have been prepared before."""
        names = _recall(self.cache, self.key)
        if names is None and not all(self.ready.values()):
            return None
        names = names or {}
        if (
            self.fixed is not None
            and not isinstance(self.fixed, IdTokenizer)
            and names.get("") != _identity(self.fixed)
        ):
            names = {}
        folders = {name: self.cache / names[name] for name in self.parts if not self.ready[name] and name in names}
        if any(not self.ready[name] and not (name in folders and folders[name].exists()) for name in self.parts):
            return None
        return self._dataset({name: open_prepared(folder) for name, folder in folders.items()})

    def _remember(self, folders: Mapping[str, Path], tokenizer: Tokenizer) -> None:
        """Only what was at rest: a file changed just now may change again and keep its time of change."""
        sources = [source for part in self.parts.values() for source in part.sources]
        unseen = any(isinstance(s, HubSource) and not Path(s.path).expanduser().exists() for s in sources)
        if not unseen and all(file.mtime_ns / 1e9 < self.began - REST_SECONDS for file in self.files):
            names = {name: folder.name for name, folder in folders.items()}
            _store(self.cache, self.key, {**names, "": _identity(tokenizer)})

    # --- building ----------------------------------------------------------------------------------------------------

    def build(self) -> Dataset:
        """Survey, tokenise, remember."""
        _remove_stale(self.cache)
        scratch = self.cache / f"{_SURVEY}{os.getpid()}-{secrets.token_hex(8)}"
        scratch.mkdir()
        try:
            surveys = {
                name: self._survey(name, part, scratch) for name, part in self.parts.items() if not self.ready[name]
            }
            tokenizer = self.fixed or self._made_tokenizer(surveys)
            folders = {name: self._tokenised(found, tokenizer) for name, found in surveys.items()}
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if folders:
            self._remember(folders, tokenizer)
        return self._dataset({name: open_prepared(folder) for name, folder in folders.items()})

    def _survey(self, name: str, part: Part, scratch: Path) -> Survey:
        if isinstance(self.fixed, IdTokenizer):
            raise InputError(
                f"data.tokenizer: kind ids is for tokens made elsewhere (.bin, .npy), but {self.found[name][0][0]} holds text; "
                "name a tokenizer"
            )
        cut = pieces(part, self.found[name])
        folder = scratch / f"{len(list(scratch.iterdir())):03d}"
        folder.mkdir()
        wants = self.config.tokenizer == "chars"
        progress = self._progress("reading", sum(piece.size for piece in cut))
        return survey(cut, folder, self.config.validation_fraction, wants, self.readers, progress)

    def _tokenised(self, found: Survey, tokenizer: Tokenizer) -> Path:
        name = fingerprint(found, _identity(tokenizer))
        folder = self.cache / name
        most_tokens = found.bytes_of("train") + found.bytes_of("validation") + found.documents()
        self.most_bytes = token_dtype(tokenizer.vocab_size).itemsize * most_tokens
        with locked(self.cache / f"{_LOCK}{name[:32]}"):
            if not folder.exists():
                progress = self._progress("tokenising", sum(piece.size for piece in found.pieces))
                tokenise(self.cache / f"{_TEMPORARY}{name}", folder, found, tokenizer, self.tokenisers, progress)
        return folder

    def _progress(self, what: str, total: int) -> Callable[[int], None]:
        done = 0

        def progress(size: int) -> None:
            nonlocal done
            done += size
            self.report(what, done, total)

        progress(0)
        return progress

    # --- tokenizers ----------------------------------------------------------------------------------------------------

    def _fixed_tokenizer(self) -> Tokenizer | None:
        """The tokenizer, unless it has to be made from the texts."""
        wanted = self.config.tokenizer
        if isinstance(wanted, Ids):
            return IdTokenizer(wanted.vocab_size, wanted.end_of_document)
        if isinstance(wanted, TokenizerFile):
            return read_tokenizer(Path(wanted.path).expanduser(), wanted.end_of_document)
        if isinstance(wanted, str) and wanted not in ("bytes", "chars"):
            return read_tokenizer(Path(wanted).expanduser())
        if any(self.ready.values()) and wanted != "bytes":
            raise InputError(
                "data.tokenizer: the sources hold tokens made elsewhere; expected the tokenizer.json they were made with, or "
                "{kind: ids, vocab_size: ...}"
            )
        return ByteTokenizer() if wanted == "bytes" else None

    def _made_tokenizer(self, surveys: Mapping[str, Survey]) -> Tokenizer:
        wanted = self.config.tokenizer
        if not isinstance(wanted, Bpe):
            seen = frozenset().union(*(found.characters for found in surveys.values()))
            return CharTokenizer("".join(sorted(seen | {chr(END_OF_DOCUMENT)})))
        weights = whole_weights([self.parts[name].weight for name in surveys])
        shares = {
            name: wanted.sample_bytes * weight / sum(weights) / max(1, found.bytes_of("train"))
            for (name, found), weight in zip(surveys.items(), weights, strict=True)
        }
        key = json.dumps(
            [tokenizers.__version__, wanted.model_dump(), [[s.digest(), shares[n]] for n, s in surveys.items()]]
        )
        stored = self.cache / "tokenizers" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
        if stored.exists():
            return read_tokenizer(stored, wanted.end_of_document)
        sizes = [min(1.0, shares[name]) * found.bytes_of("train") for name, found in surveys.items()]
        self.report("training the tokenizer", 0, int(sum(sizes)))
        texts = (text for name, found in surveys.items() for text in sampled_texts(found, shares[name]))
        tokenizer = train_bpe(texts, wanted.vocab_size, wanted.end_of_document)
        stored.parent.mkdir(exist_ok=True)
        temporary = stored.with_name(f".{stored.name}.{os.getpid()}")
        temporary.write_text(tokenizer.text, encoding="utf-8")
        temporary.replace(stored)
        return tokenizer

    # --- the result ----------------------------------------------------------------------------------------------------

    def _dataset(self, prepared: Mapping[str, Prepared]) -> Dataset:
        tokenizer = self.fixed or next(iter(prepared.values())).tokenizer
        sources = tuple(
            self._ready_source(name, part, tokenizer)
            if self.ready[name]
            else _source(name, part.weight, prepared[name])
            for name, part in self.parts.items()
        )
        total = sources[0].fingerprint
        if len(sources) > 1:
            weights = whole_weights([source.weight for source in sources])
            identity = [[s.fingerprint, weight] for s, weight in zip(sources, weights, strict=True)]
            total = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        known = self.config.tokenizer.bytes_per_token if isinstance(self.config.tokenizer, Ids) else None
        return Dataset(sources, tokenizer, total, known)

    def _ready_source(self, name: str, part: Part, tokenizer: Tokenizer) -> Source:
        files = [file for _, found in self.found[name] for file in found]
        progress = self._progress("checking tokens", sum(file.size for file in files))
        mark, streams = open_ready(
            files, tokenizer.vocab_size, self.config.validation_fraction, self._remembered, progress
        )
        return Source(name, part.weight, files[0].path.parent, mark, streams)

    def _remembered(self, key: str, look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = hashlib.sha256(key.encode()).hexdigest()
        if (known := _recall(self.cache, key)) is not None:
            return known
        facts = look()
        if all(file.mtime_ns / 1e9 < self.began - REST_SECONDS for file in self.files):
            _store(self.cache, key, facts)
        return facts


def _source(name: str, weight: float, prepared: Prepared) -> Source:
    splits = prepared.manifest.splits
    sizes: dict[Split, int] = {split: entry.bytes for split, entry in splits.items()}
    return Source(name, weight, prepared.path, prepared.manifest.fingerprint, prepared.streams, sizes)


def _identity(tokenizer: Tokenizer) -> Any:
    """What tells apart the tokens of two tokenizers."""
    if isinstance(tokenizer, CharTokenizer):
        return {"chars": hashlib.sha256(tokenizer.characters.encode()).hexdigest()}
    if isinstance(tokenizer, JsonTokenizer):
        return {
            "json": hashlib.sha256(tokenizer.text.encode()).hexdigest(),
            "end_of_document": tokenizer.end_of_document,
        }
    return tokenizer.kind


def _recall(cache: Path, key: str) -> dict[str, Any] | None:
    try:
        found = json.loads((cache / "known" / f"{key}.json").read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _store(cache: Path, key: str, value: dict[str, Any]) -> None:
    write_json(cache / "known" / f"{key}.json", value)


def _remove_stale(cache: Path) -> None:
    """Temporary folders of processes that were killed and not started again."""
    for folder in (*cache.glob(f"{_TEMPORARY}*"), *cache.glob(f"{_SURVEY}*")):
        try:
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        except OSError:
            continue  # its owner has just finished with it
        if time.time() - newest > STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
