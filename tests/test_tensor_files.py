"""Safetensors in and out: equal to the safetensors library's own reading, damage found and named, memory and disk respected."""

import errno
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from scantling.errors import InputError, RunError
from scantling.tensor_files import Held, Produced, Tensors, open_tensors, verify, write_shards, write_tensors
from scantling.tensor_files.reading import DTYPES

SMALL = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def equal(found: Tensors, expected: dict[str, Tensor]) -> bool:
    return set(found.names) == set(expected) and all(
        found.dtype(name) == value.dtype
        and found.shape(name) == value.shape
        and torch.equal(found.tensor(name).view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))
        for name, value in expected.items()
    )


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, Tensor]:
    names = draw(st.lists(st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"), unique=True))
    found = {}
    for name in names:
        dtype = draw(st.sampled_from([*DTYPES.values()]))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        raw = draw(st.binary(min_size=(size := prod(shape) * dtype.itemsize), max_size=size))
        bits = torch.tensor(list(raw), dtype=torch.uint8)
        found[name] = (bits % 2 if dtype == torch.bool else bits).view(dtype).view(shape)
    return found


# --- equal to the library ----------------------------------------------------------------------------------------------


@given(state=state_dicts(), most=st.integers(1, 200))
def test_written_and_read_as_the_library_does(
    state: dict[str, Tensor], most: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("state")
    written = write_tensors(folder / "ours", Held(state), most, {"who": "me"})
    shards = sorted((folder / "ours").glob("*.safetensors"))
    ours: dict[str, Tensor] = {}
    for shard in shards:
        here = load_file(shard)
        assert not ours.keys() & here.keys()
        assert len(here) <= 1 or sum(value.nbytes for value in here.values()) <= most
        ours |= here
    assert equal(Held(ours), state)
    assert equal(open_tensors(folder / "ours"), state)
    assert [path.name for path in shards] == (
        [f"model-{at:05d}-of-{len(shards):05d}.safetensors" for at in range(1, len(shards) + 1)]
        if len(shards) > 1
        else ["model.safetensors"]
    )
    index = folder / "ours/model.safetensors.index.json"
    if len(shards) > 1:
        assert json.loads(index.read_text())["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    assert index.exists() == (len(shards) > 1)
    assert verify(folder / "ours") == written.sha256
    save_file(state, folder / "theirs.safetensors")
    assert equal(open_tensors(folder / "theirs.safetensors"), state)


def test_the_library_finds_metadata_and_aligned_tensors(tmp_path: Path) -> None:
    from safetensors import safe_open

    odd = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2, dtype=torch.float64), "c": torch.ones(1).half()}
    write_tensors(tmp_path / "out", Held(odd), metadata={"who": "me"})
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "me"}
    raw = (tmp_path / "out/model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    for name, value in odd.items():
        assert (8 + length + header[name]["data_offsets"][0]) % value.itemsize == 0


def test_views_that_are_not_contiguous_are_written_as_they_read(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    write_tensors(tmp_path / "out", Held({"t": matrix.T, "cut": matrix[:, 1:3]}))
    assert equal(open_tensors(tmp_path / "out"), {"t": matrix.T.contiguous(), "cut": matrix[:, 1:3].contiguous()})


def test_a_larger_tensor_comes_in_several_pieces(tmp_path: Path) -> None:
    large = torch.arange(700_001)  # 5.6 MB, in pieces of 1 MiB
    write_tensors(tmp_path / "one", Held({"x": large}))
    source = open_tensors(tmp_path / "one")
    assert [len(piece) for piece in source.pieces("x")] == [2**20] * 5 + [700_001 * 8 - 5 * 2**20]
    assert (
        write_tensors(tmp_path / "two", source).sha256 == write_tensors(tmp_path / "three", Held({"x": large})).sha256
    )
    assert torch.equal(open_tensors(tmp_path / "two").tensor("x"), large)


# --- damage ------------------------------------------------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A file with another header around the same bytes."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def header_text(path: Path, text: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text)


ENTRY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(b""), "expected a safetensors file, got 0 bytes"),
        (lambda path: path.write_bytes(path.read_bytes()[:30]), "cut short: its header claims"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"b: expected a file of .* cut short"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes of no tensor"),
        (lambda path: path.write_bytes(b"\x80\x04PK not a tensor file at all"), "not a safetensors file"),
        (lambda path: header_text(path, b"{]"), "damaged: "),
        (lambda path: header_text(path, b"[1]"), "expected a JSON object"),
        (lambda path: header_text(path, b"[" * 100_000), "damaged: "),
        (lambda path: header_text(path, b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}"), "'a' is named twice"),
        (lambda path: rewritten(path, lambda h: h["a"].update(dtype="F4")), "a: expected a dtype of .*, got 'F4'"),
        (lambda path: rewritten(path, lambda h: h["a"].update(shape=[2, -3])), "a: expected a list of whole numbers"),
        (lambda path: rewritten(path, lambda h: h["a"].update(shape=[True, 6])), "a: expected a list of whole numbers"),
        (lambda path: rewritten(path, lambda h: h["a"].update(shape=[2, 4])), r"a: expected 32 bytes for F32 \[2, 4\]"),
        (lambda path: rewritten(path, lambda h: h["a"].update(data_offsets=[0])), "a: expected 2 bytes|a: expected"),
        (lambda path: rewritten(path, lambda h: h["a"].pop("shape")), "a: expected dtype, shape and data_offsets"),
        (lambda path: rewritten(path, lambda h: h["b"].update(data_offsets=[16, 24])), "b: expected its bytes to start"),
        (lambda path: rewritten(path, lambda h: h["b"].update(data_offsets=[25, 33])), "b: expected its bytes to start"),
        (lambda path: rewritten(path, lambda h: h.update(c=7)), "c: expected dtype, shape and data_offsets"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_in_words(damage: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(SMALL, path)
    damage(path)
    with pytest.raises(InputError, match=said) as caught:
        open_tensors(tmp_path)
    assert all(fault.startswith(f"{path}: ") for fault in caught.value.faults)


@given(raw=st.binary(max_size=120), length=st.integers(0, 130))
def test_hostile_bytes_end_in_words(raw: bytes, length: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("raw") / "x.safetensors"
    for content in (raw, struct.pack("<Q", length) + raw):
        path.write_bytes(content)
        try:
            open_tensors(path)
        except InputError:
            continue


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    write_tensors(tmp_path / "out", Held(SMALL))
    source = open_tensors(tmp_path / "out")
    os.truncate(tmp_path / "out/model.safetensors", 150)
    with pytest.raises(InputError, match="b: the file ends .* early"):
        source.tensor("b")
    with pytest.raises(InputError, match="has no tensor 'c'"):
        source.tensor("c")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_tensors(tmp_path / "model", Held(SMALL), max_shard_bytes=1)
    return tmp_path / "model"


def index_changed(folder: Path, **weight_map: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= weight_map
    path.write_text(json.dumps(index))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / SECOND).unlink(), [f"{SECOND}: missing; .* 1 tensors in it, such as b"]),
        (lambda folder: index_changed(folder, c=FIRST), [f"{FIRST}: c: missing; .*index.json places it"]),
        (lambda folder: index_changed(folder, b=FIRST), [f"{FIRST}: b: missing"]),
        (lambda folder: shutil.copy(folder / FIRST, folder / SECOND), ["b: missing", f"a: in {FIRST} too"]),
        (lambda folder: save_file(SMALL, folder / SECOND), [f"{SECOND}: a: in {FIRST} too; expected every tensor once"]),
        (
            lambda folder: save_file({"b": SMALL["b"], "z": SMALL["a"]}, folder / SECOND),
            [f"{SECOND}: z: not named by the index"],
        ),
        (lambda folder: index_changed(folder, c="../c.safetensors"), ["expected file names, got '../c.safetensors'"]),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), ["expected a weight_map"]),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), ["damaged"]),
        (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": []}'), ["weight_map"]),
    ],
)  # fmt: skip
def test_damaged_shards_are_named(sharded: Path, damage: Callable[[Path], object], said: list[str]) -> None:
    assert equal(open_tensors(sharded), SMALL)
    damage(sharded)
    for sentence in said:
        with pytest.raises(InputError, match=sentence):
            open_tensors(sharded)


def test_pickles_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected model.safetensors or .*, got nothing"):
        open_tensors(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        open_tensors(tmp_path / "missing")
    torch.save(SMALL, tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(
            InputError, match=r"pytorch_model.bin: a pickle, which could execute code .* save_pretrained"
        ):
            open_tensors(path)


@given(data=st.data())
def test_any_flipped_bit_is_caught(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("flip") / "model"
    write_tensors(folder, Held(SMALL), max_shard_bytes=1)
    path = data.draw(st.sampled_from(sorted(folder.glob("model*"))))
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    with pytest.raises(InputError, match=rf"{path.name}: expected sha256 .* altered or damaged"):
        verify(folder)
    path.unlink()
    with pytest.raises(InputError, match=rf"{path.name}: missing"):
        verify(folder)


def test_checksums_themselves_may_be_wrong(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"checksums.json: cannot be read: No such file"):
        verify(tmp_path)
    (tmp_path / "checksums.json").write_text('{"sha256": {"../x": "00"}}')
    with pytest.raises(InputError, match=r"expected checksums by file name, got '../x'"):
        verify(tmp_path)
    (tmp_path / "checksums.json").write_text('{"sha256": 3}')
    with pytest.raises(InputError, match=r"expected sha256 by file name, got 3"):
        verify(tmp_path)


# --- whole or not at all -----------------------------------------------------------------------------------------------


def test_an_existing_target_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("out", "link"):
        with pytest.raises(InputError, match="exists already"):
            write_tensors(tmp_path / name, Held(SMALL))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("error", [InputError("the source broke"), KeyboardInterrupt(), ZeroDivisionError()])
def test_a_source_that_fails_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    def produce(name: str) -> Tensor:
        if name == "b":
            raise error
        return SMALL[name]

    kinds = {name: (tuple(value.shape), value.dtype) for name, value in SMALL.items()}
    with pytest.raises(type(error)):
        write_tensors(tmp_path / "out", Produced(kinds, produce), max_shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_target_and_the_next_one_succeeds(tmp_path: Path) -> None:
    kinds = {name: (tuple(value.shape), value.dtype) for name, value in SMALL.items()}
    child = os.fork()
    if child == 0:
        write_tensors(tmp_path / "out", Produced(kinds, lambda name: SMALL[name] if name == "a" else os._exit(7)))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not (tmp_path / "out").exists()
    write_tensors(tmp_path / "out", Held(SMALL))
    assert equal(open_tensors(tmp_path / "out"), SMALL)


def test_a_tensor_other_than_promised_is_a_fault_of_ours(tmp_path: Path) -> None:
    for kind in (((2, 2), torch.float32), ((2, 3), torch.float16)):
        with pytest.raises(AssertionError, match="a: promised"):
            write_tensors(tmp_path / "out", Produced({"a": kind}, SMALL.__getitem__))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 69, 31))  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="needs 32 bytes, the disk has 31 free; make room"):
        write_tensors(tmp_path / "out", Held(SMALL))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = Held({"x": torch.zeros(2**20)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(RunError, match="out: cannot be written: File too large"):
            write_tensors(tmp_path / "out", large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"out: the disk is full \(free: [\d,]+ bytes\); make room"):
        write_tensors(tmp_path / "out", large)
    assert list(tmp_path.iterdir()) == []


def test_shards_join_other_files_of_a_folder(tmp_path: Path) -> None:
    written = write_shards(tmp_path, Held(SMALL), None)
    assert (written.tensors, written.bytes, [*written.sha256]) == (2, 32, ["model.safetensors"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


# --- memory ------------------------------------------------------------------------------------------------------------

PEAK = """
import sys, torch
from pathlib import Path
from scantling.tensor_files import Produced, open_tensors, write_tensors
folder, count, side = Path(sys.argv[1]), 12, 2048  # 12 tensors of 16 MiB
kinds = {f"w{at}": ((side, side), torch.float32) for at in range(count)}
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
write_tensors(folder / "warm", Produced({"x": ((2, 2), torch.float32)}, lambda name: torch.ones(2, 2)))
def measured(out, tensors):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew at what is held now
    before = peak()
    write_tensors(folder / out, tensors, 5 * 2**24)
    print(peak() - before)
measured("made", Produced(kinds, lambda name: torch.full((side, side), float(name[1:]))))
source = open_tensors(folder / "made")
measured("copy", source)
measured("turned", Produced(kinds, lambda name: source.tensor(name).T))
"""


def test_memory_is_two_tensors_at_most(tmp_path: Path) -> None:
    """In MiB above what the process holds before: one tensor made, none copied, a read one and its transpose."""
    found = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], check=True, capture_output=True, text=True)
    made, copied, turned = map(float, found.stdout.split())
    assert made < 16 + 8
    assert copied < 8
    assert turned < 32 + 8
