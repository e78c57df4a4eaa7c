"""Files in and out: lines, duplicate keys, exponents, overrides."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scantling.errors import InputError
from scantling.yamlio import canonical_json, dumps, load, loads


def test_exponents_are_numbers_and_words_stay_words() -> None:
    value = loads("a: 3e-4\nb: 1e6\nc: 4e5\nd: e5\ne: 1.5e3\nf: '1e3'").value
    assert value == {"a": 3e-4, "b": 1e6, "c": 4e5, "d": "e5", "e": 1500.0, "f": "1e3"}


def test_every_key_knows_its_line() -> None:
    document = loads("a: 1\nb:\n  - x\n  - {c: 2,\n     d: 3}\n", "f.yaml")
    assert document.place(("b", 1, "d")) == "f.yaml:5"
    assert document.fault(("b", 1, "nothing"), "missing") == "f.yaml:4: b[1].nothing: missing"


def test_a_duplicate_key_names_both_lines() -> None:
    with pytest.raises(InputError, match=r"f:3: a: duplicate key; it is already given in line 1"):
        loads("a: 1\nb: 2\na: 3", "f")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file is empty"),
        ("- 1\n- 2", "expected a mapping at the top level"),
        ("a: [1, 2", "not valid YAML"),
        ("a: !!python/object/apply:os.system [true]", "expected|not valid|could not determine|a"),
        ("[1, 2]: 3", "expected a word or a number as key"),
        ("a: b: c", "f:1: not valid YAML"),
        ("[" * 200 + "]" * 200, "nested"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, said: str) -> None:
    if "python/object" in text:
        assert loads(text, "f").value == {"a": [True]}  # tags are not executed; the value is plain data
        return
    with pytest.raises(InputError, match=said):
        loads(text, "f")


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: caf\xe9")
    for path, said in (
        (tmp_path / "none.yaml", "no such file"),
        (tmp_path, "got a folder"),
        (tmp_path / "latin.yaml", "byte 6 is 0xe9"),
    ):
        with pytest.raises(InputError, match=said):
            load(path)


def test_overrides_reach_into_lists_and_name_themselves() -> None:
    document = loads(
        "train: {lr: 1}\nsizes: [{a: 1}, {a: 2}]\nper: {3: {x: 1}}", "f", ["train.lr=3e-4", "sizes[1].a=7", "per.3.x=9"]
    )
    assert document.value == {"train": {"lr": 3e-4}, "sizes": [{"a": 1}, {"a": 7}], "per": {3: {"x": 9}}}
    assert document.place(("train", "lr")) == "--set train.lr"
    for bad in ("novalue", "=3", "sizes[5].a=1", "train.lr.deeper=1"):
        with pytest.raises(InputError, match="--set"):
            loads("train: {lr: 1}\nsizes: [{a: 1}]", "f", [bad])


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), plain, min_size=1, max_size=6))
def test_written_yaml_reads_back(value: dict[str, object]) -> None:
    assert canonical_json(loads(dumps(value)).value) == canonical_json(value)
