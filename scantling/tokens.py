"""Text to token ids and back. A closed set: bytes, and the characters of a corpus.

Id 0 ends a document in both; text never holds character 0, and decoding shows id 0 as that character.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from scantling.errors import InputError

END_OF_DOCUMENT = 0
_CHARS = "chars.json"

TokenizerKind = Literal["bytes", "chars"]
TokenArray = npt.NDArray[np.unsignedinteger[Any]]
IdArray = npt.NDArray[np.integer[Any]]


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Little-endian uint16 where every id fits in it, else uint32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


@dataclass(frozen=True)
class ByteTokenizer:
    """One id per UTF-8 byte."""

    kind: Literal["bytes"] = "bytes"
    vocab_size: int = 256

    def encode(self, text: str) -> TokenArray:
        """Ids [tokens] of a text, without an end of document.

        Raises:
            InputError: the text holds character 0 or half a surrogate pair.
        """
        _refuse_zero(text)
        try:
            return np.frombuffer(text.encode(), np.uint8).astype(token_dtype(self.vocab_size))
        except UnicodeEncodeError as error:
            raise InputError(
                f"bytes tokenizer: half a surrogate pair at character {error.start} of the text"
            ) from error

    def decode(self, ids: IdArray) -> str:
        """Text of ids [tokens]; bytes that are not UTF-8 (a model may write them) become U+FFFD."""
        return _checked(ids, self.vocab_size).astype(np.uint8).tobytes().decode(errors="replace")


@dataclass(frozen=True)
class CharTokenizer:
    """One id per character of `characters`: character 0, then those of the corpus, in code-point order."""

    characters: str
    kind: Literal["chars"] = "chars"

    def __post_init__(self) -> None:
        if self.characters[:1] != "\0" or list(self.characters) != sorted(set(self.characters)):
            raise InputError("chars tokenizer: expected character 0 and then distinct characters in code-point order")

    @property
    def vocab_size(self) -> int:
        """Characters of the corpus, and one for the end of a document."""
        return len(self.characters)

    def encode(self, text: str) -> TokenArray:
        """Ids [tokens] of a text, without an end of document.

        Raises:
            InputError: a character is not in the table, or is character 0.
        """
        _refuse_zero(text)
        table, points = _code_points(self.characters), _code_points(text)
        ids = np.minimum(np.searchsorted(table, points), len(table) - 1)
        unknown = np.flatnonzero(table[ids] != points)
        if unknown.size:
            at = int(unknown[0])
            raise InputError(
                f"chars tokenizer: character {text[at]!r} (U+{ord(text[at]):04X}) at position {at} is not among the "
                f"{self.vocab_size - 1} of the corpus; leave it out, or use tokenizer: bytes"
            )
        return ids.astype(token_dtype(self.vocab_size))

    def decode(self, ids: IdArray) -> str:
        """Text of ids [tokens]."""
        points = _code_points(self.characters)[_checked(ids, self.vocab_size)]
        return points.tobytes().decode("utf-32-le")


Tokenizer = ByteTokenizer | CharTokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write what `load_tokenizer` needs: for chars `chars.json`, the list of characters; for bytes nothing."""
    if isinstance(tokenizer, CharTokenizer):
        (folder / _CHARS).write_text(json.dumps(list(tokenizer.characters)), encoding="utf-8")


def load_tokenizer(folder: Path, kind: TokenizerKind, vocab_size: int) -> Tokenizer:
    """The tokenizer of a folder.

    Raises:
        InputError: its table is missing, damaged or of another size.
    """
    if kind == "bytes":
        return ByteTokenizer()
    path = folder / _CHARS
    try:
        tokenizer = CharTokenizer("".join(json.loads(path.read_bytes())))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, InputError) as error:
        raise InputError(f"{path}: not a table of characters: {error}") from error
    if tokenizer.vocab_size != vocab_size:
        raise InputError(f"{path}: expected {vocab_size} characters, got {tokenizer.vocab_size}")
    return tokenizer


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _refuse_zero(text: str) -> None:
    at = text.find("\0")
    if at >= 0:
        raise InputError(f"text: character 0 at position {at}; it stands for the end of a document")


def _checked(ids: IdArray, vocab_size: int) -> IdArray:
    ids = np.asarray(ids)
    if ids.size == 0:
        return np.zeros(0, np.int64)
    if ids.min() < 0 or ids.max() >= vocab_size:
        bad = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise InputError(f"decode: id {bad} is outside the vocabulary of {vocab_size}")
    return ids
