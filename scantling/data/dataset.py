"""Which tokens a sequence holds: a pure function of its number, so that no loop position has to be saved.

A split of n tokens has (n - 1) // T windows of T tokens, window i being tokens [i*T, i*T + T] (inputs and, one later,
labels; the tail is left out). Epoch e is a permutation of all windows drawn from (seed, e), and the sequences of all
epochs, one after the other, are numbered. A rank, a micro-batch or a later batch size asks for other numbers of the same
order. In a mixture each number belongs to one part: of the first n, part k has its share of n to within less than one
per part, for every n, and it counts its own sequences and epochs (`Dataset.sequences`).

Documents are packed: a window may hold several, each ended by its end-of-document id. With `documents=True` positions
are numbered by document, so that attention can be kept inside: the end-of-document id belongs to the document it ends.
Labels are not masked: the id after an end of document is predicted at that end, which sees the document before it, and
losses with and without document masks are means over the same tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from math import lcm
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scantling.data.streams import AnyIds, Ids, TokenStream
from scantling.data.survey import Split
from scantling.data.tokens import Tokenizer
from scantling.errors import InputError

_MOST_WEIGHT = 2**20  # sum of whole weights: with it, share x number stays far below 2**63
_DECODED = 2**18  # tokens of a split made elsewhere that are decoded to learn their bytes


class Batch(NamedTuple):
    """Rows of tokens.

    Attributes:
        inputs: [rows, tokens].
        labels: [rows, tokens]; `labels[:, t]` follows `inputs[:, t]` in the text.
        documents: [rows, tokens], the number of each input's document within its row, from 0; None if not asked for.
    """

    inputs: Ids
    labels: Ids
    documents: Ids | None


@dataclass(frozen=True, eq=False)
class Source:
    """One part of a mixture, or the whole of a corpus.

    Attributes:
        name: of the part.
        weight: proportional to its share of the sequences.
        path: its prepared folder, or the folder of tokens made elsewhere.
        fingerprint: of its tokens.
        streams: its tokens.
        text_bytes: UTF-8 bytes of text of each split; None where only the tokens are known.
    """

    name: str
    weight: float
    path: Path
    fingerprint: str
    streams: Mapping[Split, TokenStream]
    text_bytes: Mapping[Split, int] | None = None

    def tokens(self, split: Split = "train") -> int:
        """Tokens of a split, ends of documents included."""
        return len(self.streams[split])

    def windows(self, sequence_length: int, split: Split = "train") -> int:
        """Sequences of `sequence_length` tokens in one epoch of a split.

        Raises:
            InputError: not even one fits.
        """
        _at_least(1, sequence_length=sequence_length)
        windows = (self.tokens(split) - 1) // sequence_length
        if windows < 1:
            raise InputError(
                f"sequence_length {sequence_length} needs {sequence_length + 1} tokens, but the {split} split of "
                f"{self.path} has {self.tokens(split)}; shorten the sequences or add text"
            )
        return windows

    def rows(self, seed: int, numbers: Ids, sequence_length: int, split: Split, stream: int) -> AnyIds:
        """The tokens of some of its sequences [numbers, sequence_length + 1]."""
        windows = self.windows(sequence_length, split)
        epoch, place = np.divmod(numbers, windows)
        chosen = np.empty(len(numbers), np.int64)
        for e in range(int(epoch.min()), int(epoch.max()) + 1):
            mine = epoch == e
            if mine.any():
                chosen[mine] = _permutation(seed, e, windows, stream)[place[mine]]
        return self.streams[split].gather(chosen * sequence_length, sequence_length + 1)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Tokens to train on, and their order. Made by `prepare` or `open_dataset`."""

    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    fingerprint: str  # SHA-256 over the texts and the settings; equal fingerprints mean equal tokens
    known_bytes_per_token: float | None = None  # of tokens made elsewhere, where the user knows it

    @property
    def path(self) -> Path:
        """The folder of its first source."""
        return self.sources[0].path

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    def tokens(self, split: Split = "train") -> int:
        """Tokens of a split, ends of documents included, of all sources together."""
        return sum(source.tokens(split) for source in self.sources)

    def shares(self) -> dict[str, float]:
        """Share of the sequences of each source."""
        return {
            source.name: weight / sum(self._weights) for source, weight in zip(self.sources, self._weights, strict=True)
        }

    def bytes_per_token(self, split: Split = "validation") -> float:
        """UTF-8 bytes of text per token: bits per byte = nats per token / ln 2 / bytes per token.

        Of a mixture, with sources by their shares. NaN when only ids are known.
        """
        shares = self.shares()
        return sum(shares[source.name] * self._bytes_per_token(source, split) for source in self.sources)

    def _bytes_per_token(self, source: Source, split: Split) -> float:
        if source.text_bytes is not None:
            return source.text_bytes[split] / source.tokens(split)
        if self.known_bytes_per_token is not None:
            return self.known_bytes_per_token
        if self.tokenizer.kind == "ids":
            return float("nan")
        ids = source.streams[split].read(0, min(_DECODED, source.tokens(split)))
        return len(self.tokenizer.decode(ids[ids != self.tokenizer.end_of_document]).encode()) / max(1, len(ids))

    def windows(self, sequence_length: int, split: Split = "train") -> int:
        """Different sequences of `sequence_length` tokens in a split, of all sources together.

        Raises:
            InputError: not even one fits into one of the sources.
        """
        return sum(source.windows(sequence_length, split) for source in self.sources)

    def epochs_by_source(self, tokens: float, sequence_length: int, split: Split = "train") -> dict[str, float]:
        """How often a budget of training tokens goes through each source."""
        shares = self.shares()
        return {
            source.name: tokens * shares[source.name] / (source.windows(sequence_length, split) * sequence_length)
            for source in self.sources
        }

    def epochs(self, tokens: float, sequence_length: int, split: Split = "train") -> float:
        """How often a budget of training tokens goes through the source it repeats most; above 1, text is repeated."""
        return max(self.epochs_by_source(tokens, sequence_length, split).values())

    def sequences(
        self,
        *,
        seed: int,
        first: int,
        count: int,
        sequence_length: int,
        split: Split = "train",
        documents: bool = False,
    ) -> Batch:
        """Sequences `first`, `first + 1`, ... of the order; any of them, without replay.

        Args:
            seed: of the order, at least 0.
            first: number of the first one, from 0; those of all epochs are numbered one after the other.
            count: rows; it may exceed an epoch.
            sequence_length: tokens of a row.
            split: which tokens.
            documents: number the documents of each row.

        Returns:
            `Batch` of [count, sequence_length] each.

        Raises:
            InputError: the split is shorter than one sequence, a number is out of its range, or documents are asked for
                and no id ends one.
            RunError: a shard vanished or changed.
        """
        _at_least(0, seed=seed, first=first)
        _at_least(1, count=count)
        self.windows(sequence_length, split)
        numbers = np.arange(first, first + count)
        if len(self.sources) == 1:
            return self._batch(self.sources[0].rows(seed, numbers, sequence_length, split, 0), documents)
        rows = np.empty((count, sequence_length + 1), np.int64)
        before, after = self._counts(numbers), self._counts(numbers + 1)
        for stream, source in enumerate(self.sources):
            mine = after[stream] > before[stream]
            if mine.any():
                rows[mine] = source.rows(seed, before[stream][mine], sequence_length, split, stream)
        return self._batch(rows, documents)

    def batch(
        self, *, seed: int, step: int, batch_sequences: int, sequence_length: int, split: Split = "train"
    ) -> tuple[Ids, Ids]:
        """Inputs and labels of step `step` (from 0) of `batch_sequences` rows; see `sequences`."""
        _at_least(0, seed=seed, step=step)
        _at_least(1, batch_sequences=batch_sequences)
        return self.sequences(
            seed=seed, first=step * batch_sequences, count=batch_sequences, sequence_length=sequence_length, split=split
        )[:2]

    def validation_batches(
        self, sequence_length: int, batch_sequences: int, max_tokens: int | None = None, documents: bool = False
    ) -> Iterator[Batch]:
        """Batches of [rows, sequence_length] through the validation split in the order of the text.

        The same at every call. A batch may have fewer than `batch_sequences` rows, and holds one source. Of a mixture
        each source gives its share of the sequences, as many as the one that runs out first allows.

        Args:
            sequence_length: tokens of a row.
            batch_sequences: most rows of a batch.
            max_tokens: take only as many whole sequences as fit in it, evenly spaced over the split.
            documents: number the documents of each row too.

        Raises:
            InputError: the split or `max_tokens` is shorter than one sequence.
        """
        _at_least(1, batch_sequences=batch_sequences)
        windows = [source.windows(sequence_length, "validation") for source in self.sources]
        total = self._most(windows)
        if max_tokens is not None:
            if max_tokens < sequence_length:
                raise InputError(f"max_tokens {max_tokens} is less than one sequence of {sequence_length} tokens")
            total = min(total, max_tokens // sequence_length)
        taken = self._counts(np.array([total]))[:, 0].tolist()

        def batches() -> Iterator[Batch]:
            for source, number, have in zip(self.sources, taken, windows, strict=True):
                chosen = np.arange(number) * have // max(1, number) * sequence_length
                for start in range(0, number, batch_sequences):
                    places = chosen[start : start + batch_sequences]
                    yield self._batch(source.streams["validation"].gather(places, sequence_length + 1), documents)

        return batches()

    def _batch(self, rows: AnyIds, documents: bool) -> Batch:
        inputs, labels = rows[:, :-1].astype(np.int64, order="C"), rows[:, 1:].astype(np.int64, order="C")
        return Batch(inputs, labels, self._documents(inputs) if documents else None)

    def _documents(self, inputs: Ids) -> Ids:
        end = self.tokenizer.end_of_document
        if end is None:
            raise InputError(
                "document masks need the id that ends a document; name it: data.tokenizer: {kind: ids, end_of_document: ...}"
            )
        ends = (inputs == end).astype(np.int64)
        found: Ids = np.cumsum(ends, axis=1) - ends
        return found

    @cached_property
    def _weights(self) -> list[int]:
        """The weights as whole numbers in the same proportions."""
        return whole_weights([source.weight for source in self.sources])

    def _counts(self, numbers: Ids) -> Ids:
        """How many of the first n sequences each source has [sources, numbers]: adds up to n, and never falls with n.

        Source by source its share of what is left, rounded.
        """
        rest, left, found = numbers, sum(self._weights), []
        for weight in self._weights[:-1]:
            mine = (2 * rest * weight + left) // (2 * left)
            found.append(mine)
            rest, left = rest - mine, left - weight
        return np.stack([*found, rest])

    def _most(self, windows: Sequence[int]) -> int:
        """Most sequences of which no source gives more than its windows."""
        low, high = 0, sum(windows)
        while low < high:
            middle = (low + high + 1) // 2
            fits = (self._counts(np.array([middle]))[:, 0] <= windows).all()
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportions of `weights`: exactly, where they are short decimals, else to 1 in 2**20."""
    exact = [Fraction(str(weight)) for weight in weights]
    unit = lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * unit) for fraction in exact]
    total = sum(whole)
    return whole if total <= _MOST_WEIGHT else [max(1, round(number * _MOST_WEIGHT / total)) for number in whole]


def _at_least(low: int, **numbers: int) -> None:
    faults = [f"{name}: expected at least {low}, got {value}" for name, value in numbers.items() if value < low]
    if faults:
        raise InputError(*faults)


@lru_cache(maxsize=16)
def _permutation(seed: int, epoch: int, count: int, stream: int) -> Ids:
    """Order of the windows in an epoch [count]. Raw bits, stably sorted: the same under every NumPy version."""
    key = (epoch, stream) if stream else (epoch,)
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)
    order = np.argsort(bits, kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order
