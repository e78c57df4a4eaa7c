"""Text to token ids and back. A closed set: bytes, the characters of a corpus, a `tokenizer.json`, bare ids.

In the first two id 0 ends a document; text never holds character 0, and decoding shows id 0 as that character. A
`tokenizer.json` is run by the `tokenizers` library: no special token is put around a text, and one that is written out
in it ("<|endoftext|>") is encoded as the characters it is made of, so that the end-of-document id appears nowhere but
where a document ends. `ids` stands for tokens made elsewhere: they can be trained on, and their text is not known.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tokenizers

from scantling.errors import InputError

END_OF_DOCUMENT = 0
USUAL_ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")  # looked for in this order
_CHARS, TOKENIZER_JSON = "chars.json", "tokenizer.json"

TokenizerKind = Literal["bytes", "chars", "json", "ids"]
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
    end_of_document: int = END_OF_DOCUMENT

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
    end_of_document: int = END_OF_DOCUMENT

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


@dataclass(frozen=True)
class JsonTokenizer:
    """A tokenizer of the `tokenizers` library, by its file's text. Made by `read_tokenizer` or `train_bpe`."""

    text: str = field(repr=False)
    vocab_size: int
    end_of_document: int
    library: tokenizers.Tokenizer = field(repr=False, compare=False)
    kind: Literal["json"] = "json"

    def encode(self, text: str) -> TokenArray:
        """Ids [tokens] of a text, without special tokens.

        Raises:
            InputError: the text holds half a surrogate pair.
        """
        try:
            (encoding,) = self.library.encode_batch_fast([text], add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:  # the library takes what is not UTF-8 for another type
            raise InputError(f"{TOKENIZER_JSON}: the text holds half a surrogate pair") from error
        return np.array(encoding.ids, token_dtype(self.vocab_size))

    def decode(self, ids: IdArray) -> str:
        """Text of ids [tokens]; special tokens are shown."""
        return str(self.library.decode(_checked(ids, self.vocab_size).tolist(), skip_special_tokens=False))


@dataclass(frozen=True)
class IdTokenizer:
    """No tokenizer: ids made elsewhere, `end_of_document` among them if it is known."""

    vocab_size: int
    end_of_document: int | None
    kind: Literal["ids"] = "ids"

    def encode(self, text: str) -> TokenArray:
        """Never: nothing is known of the text.

        Raises:
            InputError: always.
        """
        raise InputError("tokenizer: kind ids cannot read text; set data.tokenizer to the tokenizer.json of these ids")

    def decode(self, ids: IdArray) -> str:
        """The ids themselves, in decimal, with a space between them."""
        return " ".join(map(str, _checked(ids, self.vocab_size).tolist()))


Tokenizer = ByteTokenizer | CharTokenizer | JsonTokenizer | IdTokenizer


def read_tokenizer(path: Path, end_of_document: str | None = None) -> JsonTokenizer:
    """A `tokenizer.json`.

    Args:
        path: the file.
        end_of_document: the token that ends a document; default the first of `USUAL_ENDS` that the file knows.

    Raises:
        InputError: the file is missing or is not a tokenizer, or no token ends a document.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"data.tokenizer: {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"data.tokenizer: {path}: not a tokenizer.json: not UTF-8 at byte {error.start}") from error
    return _from_text(text, end_of_document, f"data.tokenizer: {path}")


def _library(text: str, where: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{where}: not a tokenizer.json: {error}") from error


def _from_text(text: str, end_of_document: str | None, where: str) -> JsonTokenizer:
    library = _library(text, where)
    library.encode_special_tokens = True
    library.no_truncation()
    library.no_padding()
    wanted = USUAL_ENDS if end_of_document is None else (end_of_document,)
    end = next((i for i in map(library.token_to_id, wanted) if i is not None), None)
    if end is None:
        raise InputError(
            f"{where}: no token that ends a document; looked for {', '.join(wanted)}; name it: "
            "tokenizer: {kind: file, path: ..., end_of_document: <the token>}"
        )
    vocab_size = max(library.get_vocab(with_added_tokens=True).values()) + 1
    return JsonTokenizer(text, vocab_size, end, library)


def train_bpe(texts: Iterable[str], vocab_size: int, end_of_document: str) -> JsonTokenizer:
    """Byte-level BPE of at most `vocab_size` ids: the end of document is id 0, then the 256 bytes, then merges.

    The same texts in any order give the same tokenizer. Few texts may not hold enough pairs for `vocab_size` ids.
    """
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = byte_level(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[end_of_document],
        initial_alphabet=sorted(byte_level.alphabet()),
    )
    library.train_from_iterator(texts, trainer)
    return _from_text(library.to_str(), end_of_document, "data.tokenizer: bpe")


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write what `load_tokenizer` needs: `chars.json`, the list of characters, or `tokenizer.json`, or nothing."""
    if isinstance(tokenizer, CharTokenizer):
        _write(folder / _CHARS, json.dumps(list(tokenizer.characters)))
    elif isinstance(tokenizer, JsonTokenizer):
        _write(folder / TOKENIZER_JSON, tokenizer.text)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def load_tokenizer(folder: Path, kind: TokenizerKind, vocab_size: int, end_of_document: int | None) -> Tokenizer:
    """The tokenizer of a prepared folder.

    Raises:
        InputError: its table is missing, damaged or of another size.
    """
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "ids":
        return IdTokenizer(vocab_size, end_of_document)
    path = folder / (_CHARS if kind == "chars" else TOKENIZER_JSON)
    tokenizer: CharTokenizer | JsonTokenizer
    try:
        text = path.read_text(encoding="utf-8")
        if kind == "chars":
            tokenizer = CharTokenizer("".join(json.loads(text)))
        else:
            end = None if end_of_document is None else _library(text, str(path)).id_to_token(end_of_document)
            tokenizer = _from_text(text, end, str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, InputError) as error:
        raise InputError(f"{path}: not a table of {'characters' if kind == 'chars' else 'tokens'}: {error}") from error
    if tokenizer.vocab_size != vocab_size:
        unit = "characters" if kind == "chars" else "tokens"
        raise InputError(f"{path}: expected {vocab_size} {unit}, got {tokenizer.vocab_size}")
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
