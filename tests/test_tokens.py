"""Tokenizers: against each other, against the library called directly, and what may be wrong with their files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from scantling.data import open_dataset, prepare
from scantling.data.corpus import DataConfig
from scantling.data.tokens import USUAL_ENDS, ByteTokenizer, CharTokenizer, IdTokenizer, read_tokenizer, train_bpe
from scantling.errors import InputError
from tests.corpora import config, prepared, tokens, write_jsonl

FIXED = settings(derandomize=True, deadline=None, max_examples=60, database=None)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
WORDS = ["the ship sails", "a ship of the line", "lines of héllo", "the rope\n\nthe mast", "sailing ships 123 "]
TEXTS = [f"{i} " + " ".join(WORDS[(i * k) % 5] for k in range(1, 9)) for i in range(60)]


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_text(train_bpe(TEXTS, 320, "<|endoftext|>").text, encoding="utf-8")
    return path


@given(TEXT)
@FIXED
def test_round_trip(text: str) -> None:
    found = ByteTokenizer(), CharTokenizer("".join(sorted({"\0", *text})))
    for tokenizer in found:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and 0 not in ids and ids.dtype == np.uint16
    assert found[0].encode(text).astype(np.uint8).tobytes() == text.encode()
    assert len(found[1].encode(text)) == len(text)


def test_chars_table_is_stored_and_an_unknown_character_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    dataset = prepare(config(path, tokenizer="chars"), tmp_path / "cache")
    table = json.loads((dataset.path / "chars.json").read_text(encoding="utf-8"))
    distinct = sorted(set("".join(TEXTS)))
    assert table == ["\0", *distinct] and dataset.vocab_size == len(distinct) + 1
    assert dataset.tokenizer.encode("é")[0] == table.index("é")
    with pytest.raises(InputError, match=r"character 'Ж' \(U\+0416\) at position 2 is not among the"):
        dataset.tokenizer.encode("aaЖ")
    for tokenizer in (dataset.tokenizer, ByteTokenizer()):
        with pytest.raises(InputError, match="position 1; it stands for the end of a document"):
            tokenizer.encode("a\0")
        with pytest.raises(InputError, match=f"id {tokenizer.vocab_size} is outside the vocabulary"):
            tokenizer.decode(np.array([1, tokenizer.vocab_size]))


def test_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    characters = [chr(c) for c in range(1, 0x11000) if not 0xD800 <= c < 0xE000]
    (tmp_path / "wide.txt").write_bytes("".join(characters).encode())
    dataset = prepare(config(tmp_path / "wide.txt", tokenizer="chars"), tmp_path / "cache")
    assert prepared(dataset).manifest.dtype == "uint32" and dataset.vocab_size == len(characters) + 1 > 2**16
    inputs, *_ = next(dataset.validation_batches(8, 1))
    assert dataset.tokenizer.decode(inputs[0]) in "".join(characters)
    last, _ = dataset.batch(seed=0, step=0, batch_sequences=dataset.windows(16), sequence_length=16)
    assert 2**16 - 0x800 < last.max() < dataset.vocab_size


# --- tokenizer.json ------------------------------------------------------------------------------------------------


@given(TEXT)
@FIXED
def test_a_file_encodes_as_the_library_does(bpe_file: Path, text: str) -> None:
    ours, library = read_tokenizer(bpe_file), tokenizers.Tokenizer.from_file(str(bpe_file))
    ids = ours.encode(text)
    assert ids.tolist() == library.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == text and ours.end_of_document not in ids


def test_a_special_token_in_a_text_is_text(bpe_file: Path) -> None:
    tokenizer = read_tokenizer(bpe_file)
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.end_of_document == 0 not in ids and tokenizer.decode(ids) == "a<|endoftext|>b"


def test_trained_bpe_is_the_library_on_the_training_texts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    wanted = {"kind": "bpe", "vocab_size": 300, "end_of_document": "<end>"}
    dataset = prepare(config(path, tokenizer=wanted, validation_fraction=0.3), tmp_path / "cache")
    listed = [d for d in prepared(dataset).documents() if "split" in d]
    train = [text for text, d in zip(TEXTS, listed, strict=True) if d["split"] == "train"]
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(reversed(train), trainer)
    assert json.loads((dataset.path / "tokenizer.json").read_text(encoding="utf-8")) == json.loads(library.to_str())
    expected = [i for text in train for i in [*library.encode(text).ids, library.token_to_id("<end>")]]
    assert tokens(dataset).tolist() == expected
    assert dataset.tokenizer == open_dataset(dataset.path).tokenizer
    assert dataset.bytes_per_token("train") == sum(len(t.encode()) for t in train) / len(expected)


def test_a_second_bpe_and_one_of_another_cache_are_the_same(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    wanted = config(path, tokenizer={"kind": "bpe", "vocab_size": 300})
    first, second = (prepare(wanted, tmp_path / name) for name in ("one", "two"))
    assert first.fingerprint == second.fingerprint and first.tokenizer == second.tokenizer
    other = prepare(config(path, tokenizer={"kind": "bpe", "vocab_size": 301}), tmp_path / "one")
    named = prepare(config(path, tokenizer=str(first.path / "tokenizer.json")), tmp_path / "one")
    assert other.fingerprint != first.fingerprint == named.fingerprint


def without_special_tokens(path: Path) -> str:
    table = json.loads(path.read_text(encoding="utf-8"))
    table["added_tokens"] = []
    table["model"]["vocab"] = {"#" + k if k == "<|endoftext|>" else k: v for k, v in table["model"]["vocab"].items()}
    return json.dumps(table)


@pytest.mark.parametrize("token", USUAL_ENDS)
def test_the_usual_ends_are_found(bpe_file: Path, tmp_path: Path, token: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(bpe_file.read_text(encoding="utf-8").replace("<|endoftext|>", token), encoding="utf-8")
    assert read_tokenizer(path).end_of_document == 0
    with pytest.raises(InputError, match=r"no token that ends a document; looked for <no>; name it"):
        read_tokenizer(path, "<no>")


def test_wrong_tokenizer_files(bpe_file: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    path = tmp_path / "t.json"

    def refused(words: str, **keys: Any) -> None:
        with pytest.raises(InputError, match=words):
            prepare(config(source, tokenizer=keys or str(path)), tmp_path / "cache")

    refused(r"t\.json: cannot be read: No such file")
    path.write_text('{"model": 3}')
    refused(r"t\.json: not a tokenizer\.json")
    path.write_bytes(b"\xff")
    refused(r"t\.json: not a tokenizer\.json: not UTF-8 at byte 0")
    path.write_text(without_special_tokens(bpe_file))
    refused(r"no token that ends a document; looked for <\|endoftext\|>, </s>, <eos>, <\|end_of_text\|>")
    refused("kind ids is for tokens made elsewhere", kind="ids", vocab_size=300)
    named = DataConfig(source=str(source), tokenizer={"kind": "file", "path": str(path), "end_of_document": "!"})
    assert prepare(named, tmp_path / "cache").tokenizer.end_of_document == 2 - 1


def test_ids_have_no_text() -> None:
    tokenizer = IdTokenizer(10, None)
    assert tokenizer.decode(np.array([3, 9])) == "3 9"
    with pytest.raises(InputError, match=r"set data\.tokenizer to the tokenizer\.json"):
        tokenizer.encode("3")
    with pytest.raises(InputError, match="id 10 is outside"):
        tokenizer.decode(np.array([10]))
