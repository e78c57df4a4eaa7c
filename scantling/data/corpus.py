"""What to train on: the `data:` section of a run, as people write it.

data: {source: python-stdlib, tokenizer: bytes}
data: {source: [web.jsonl.zst, shards/], tokenizer: {kind: bpe, vocab_size: 32768}}
data: {source: openwebtext/, tokenizer: {kind: ids, vocab_size: 50304, end_of_document: 50256}}
data:
  mixture:
    web: {source: web.parquet, weight: 0.7}
    code: {source: {kind: datasets, path: owner/name, split: train}, text_key: content, weight: 0.3}
  tokenizer: tokenizer.json
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

from scantling.parts import Frozen, Positive, Size
from scantling.yamlio import show

PYTHON_STDLIB = "python-stdlib"


class HubSource(Frozen):
    """A data set of the `datasets` library. Code that comes with one is never run.

    Attributes:
        path: a folder made by `save_to_disk`, or what `load_dataset` takes: a folder of files, or `owner/name` on the hub.
        name: its configuration, if it has several.
        split: which of its splits holds the text.
        revision: a commit or tag on the hub; without it, the newest.
    """

    kind: Literal["datasets"]
    path: str = Field(min_length=1)
    name: str | None = None
    split: str = "train"
    revision: str | None = None


class Bpe(Frozen):
    """Byte-level BPE, trained on the training texts.

    Attributes:
        vocab_size: most ids, those of the end of document and of the 256 bytes among them.
        end_of_document: the special token that ends a document; id 0.
        sample_bytes: about as many bytes of text are taken; from a mixture, by its weights.
    """

    kind: Literal["bpe"]
    vocab_size: Size = Field(ge=258)
    end_of_document: str = Field(default="<|endoftext|>", min_length=1)
    sample_bytes: Positive = 5e8


class TokenizerFile(Frozen):
    """A `tokenizer.json`; `end_of_document` names the token that ends a document (default: a usual one is looked for)."""

    kind: Literal["file"]
    path: str = Field(min_length=1)
    end_of_document: str | None = None


class Ids(Frozen):
    """Tokens made elsewhere: `.bin` and `.npy` files.

    Attributes:
        vocab_size: every id lies below it.
        end_of_document: the id after each document, or null when none is; document masks need it.
        bytes_per_token: UTF-8 bytes of text per token, if known; without it there are no bits per byte.
    """

    kind: Literal["ids"]
    vocab_size: Size
    end_of_document: int | None = Field(default=None, ge=0)
    bytes_per_token: Positive | None = None

    @model_validator(mode="after")
    def _end_is_an_id(self) -> Self:
        if self.end_of_document is not None and self.end_of_document >= self.vocab_size:
            raise ValueError(f"end_of_document {self.end_of_document} is not below vocab_size {self.vocab_size}")
        return self


def _kind(value: object) -> str:
    """The tag of a value: its `kind`, or what a bare string stands for."""
    if isinstance(value, str):
        return "name"
    if isinstance(value, list | tuple):
        return "list"
    return str(value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None))


def _one_of(expected: str, *kinds: str) -> Callable[[object], object]:
    def check(value: object) -> object:
        if _kind(value) not in kinds:
            raise ValueError(f"expected {expected}, got {show(value)}")
        if value in ("", [], ()):
            raise ValueError(f"expected {expected}, got nothing")
        return value

    return check


_PATH = "python-stdlib, a path, or {kind: datasets, path: ...}"
_TOKENIZER = "bytes, chars, the path of a tokenizer.json, or a mapping of kind bpe, file or ids"

Place: TypeAlias = Annotated[
    Annotated[str, Tag("name")] | Annotated[HubSource, Tag("datasets")],
    Discriminator(_kind),
    BeforeValidator(_one_of(_PATH, "name", "datasets")),
]
Places: TypeAlias = Annotated[
    Annotated[str, Tag("name")] | Annotated[HubSource, Tag("datasets")] | Annotated[tuple[Place, ...], Tag("list")],
    Discriminator(_kind),
    BeforeValidator(_one_of(f"{_PATH}, or a list of these", "name", "datasets", "list")),
]
TokenizerConfig: TypeAlias = Annotated[
    Annotated[str, Tag("name")]
    | Annotated[Bpe, Tag("bpe")]
    | Annotated[TokenizerFile, Tag("file")]
    | Annotated[Ids, Tag("ids")],
    Discriminator(_kind),
    BeforeValidator(_one_of(_TOKENIZER, "name", "bpe", "file", "ids")),
]


_LATER = ("source", "mixture", "separator", "text_key")


class _Brief(Frozen):
    """Base of what is dumped without the keys of `_LATER` where they are null: older files keep their hash."""

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name not in _LATER or value is not None}


class Part(_Brief):
    """One part of a mixture: `weight`, its share of the sequences, and keys that mean here what they mean in `data`."""

    source: Places
    weight: Positive
    text_key: str | None = None
    separator: str | None = Field(default=None, min_length=1)

    @property
    def sources(self) -> Sequence[str | HubSource]:
        """`source` as a tuple."""
        return self.source if isinstance(self.source, tuple) else (self.source,)


class DataConfig(_Brief):
    """What to train on: `source` or `mixture`. Relative paths start at the working directory."""

    source: Places | None = Field(
        default=None,
        description="python-stdlib, or a path: a text, .jsonl, .parquet, .bin or .npy file (texts also as .zst or .gz), "
        "or a folder of these; or {kind: datasets, path: ...}; or a list of these",
    )
    mixture: dict[str, Part] | None = Field(
        default=None,
        min_length=1,
        description="name -> source, weight: parts drawn from in proportion to their weights",
    )
    tokenizer: TokenizerConfig = "bytes"
    validation_fraction: float = Field(default=0.05, gt=0, lt=1, description="expected share of documents held out")
    text_key: str = Field(default="text", description="key of the text in a .jsonl record, or the column that holds it")
    separator: str | None = Field(
        default=None,
        min_length=1,
        description="what stands between documents in a text file; default: one document a file",
    )

    @field_validator("tokenizer")
    @classmethod
    def _known_name(cls, value: TokenizerConfig) -> TokenizerConfig:
        if isinstance(value, str) and value not in ("bytes", "chars") and not value.endswith(".json"):
            raise ValueError(f"expected {_TOKENIZER}, got {show(value)}")
        return value

    @model_validator(mode="after")
    def _source_or_mixture(self) -> Self:
        if (self.source is None) == (self.mixture is None):
            raise ValueError(f"expected either source or mixture, got {'neither' if self.source is None else 'both'}")
        return self

    @property
    def parts(self) -> dict[str, Part]:
        """The mixture, with what its parts leave to `data` filled in; a single source is one part named `text`."""
        parts = self.mixture
        if parts is None:
            assert self.source is not None
            parts = {"text": Part(source=self.source, weight=1.0)}
        return {
            name: part.replace(text_key=part.text_key or self.text_key, separator=part.separator or self.separator)
            for name, part in parts.items()
        }
