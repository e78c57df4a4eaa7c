"""A growth that ends badly: killed, no room on the disk, damaged folders. The source stays, and nothing half appears."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scantling.cli import main
from scantling.errors import InputError, RunError
from scantling.growth import grow_folder
from tests.growth.test_folders import config_to, stock

transformers = pytest.importorskip("transformers")

KINDS = ("llama", "gpt_neox", "gemma", "olmo2", "mixtral")


def sums(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- killed ------------------------------------------------------------------------------------------------------------

SLOW_GROWTH = """
import sys, time
from scantling.growth.weights import Grown
def slowed(usual):
    def slowly(self, name):
        print(name, flush=True)
        time.sleep(0.02)
        return usual(self, name)
    return slowly
Grown.tensor, Grown.pieces = slowed(Grown.tensor), slowed(Grown.pieces)
from scantling.cli import main
main(sys.argv[1:])
"""


def begun(source: Path, to: Path, out: Path) -> "subprocess.Popen[str]":
    """A growth that takes its time over every tensor and says which."""
    words = ["grow", str(source), "--to", str(to), "--out", str(out), "--no-measure", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_GROWTH, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip


def after(process: "subprocess.Popen[str]", tensors: int) -> None:
    """Wait until so many tensors were asked for."""
    assert process.stdout is not None
    for _ in range(tensors):
        assert process.stdout.readline()


def rerun(source: Path, to: Path, out: Path) -> None:
    receipt = grow_folder(source, to, out)
    assert receipt.logit_difference is not None and receipt.logit_difference["float64"] < 1e-9


def killed(tmp_path: Path, kind: str, how: signal.Signals, tensors: int) -> tuple[int, str]:
    """A growth of a stock folder that gets a signal after so many tensors: how it ended and what it said."""
    stock(tmp_path / "old", kind)
    to = config_to(tmp_path / "old", {"intermediate_size": 60})
    before = sums(tmp_path / "old")
    process = begun(tmp_path / "old", to, tmp_path / "new")
    after(process, tensors)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0, said
    assert sums(tmp_path / "old") == before
    assert not (tmp_path / "new").exists()
    return process.returncode, said


@pytest.mark.parametrize(
    ("kind", "tensors"),
    [("llama", 9)] + [pytest.param(kind, at, marks=pytest.mark.slow) for kind in KINDS for at in (1, 5, 12, 17, 21)],
)
def test_killed_at_any_tensor(kind: str, tensors: int, tmp_path: Path) -> None:
    """Nothing at --out; the next growth clears away what was left beside it and succeeds."""
    killed(tmp_path, kind, signal.SIGKILL, tensors)
    left = [name for name in names(tmp_path) if name.startswith(".new.")]
    assert len(left) <= 1
    rerun(tmp_path / "old", tmp_path / "target.json", tmp_path / "new")
    assert names(tmp_path) == ["new", "old", "target.json"]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.1, 0.3])
def test_killed_at_any_moment(delay: float, tmp_path: Path) -> None:
    """The same by the clock: while tensors are made, written, synchronised or renamed."""
    stock(tmp_path / "old", "llama")
    to = config_to(tmp_path / "old", {"intermediate_size": 60})
    before = sums(tmp_path / "old")
    process = begun(tmp_path / "old", to, tmp_path / "new")
    after(process, 1)
    time.sleep(delay)
    process.kill()
    process.communicate(timeout=60)
    assert sums(tmp_path / "old") == before
    if (tmp_path / "new").exists():  # then whole
        assert json.loads((tmp_path / "new" / "growth.json").read_text())["params_after"]
        shutil.rmtree(tmp_path / "new")
    rerun(tmp_path / "old", to, tmp_path / "new")
    assert names(tmp_path) == ["new", "old", "target.json"]


def test_interrupted_from_the_keyboard(tmp_path: Path) -> None:
    code, said = killed(tmp_path, "llama", signal.SIGINT, 9)
    assert code == 1 and said.endswith("interrupted\n")
    assert names(tmp_path) == ["old", "target.json"]


@pytest.mark.slow
def test_another_growth_at_work_is_left_alone(tmp_path: Path) -> None:
    """What a living process writes is no left-over: its lock says so."""
    stock(tmp_path / "old", "llama")
    to = config_to(tmp_path / "old", {"intermediate_size": 60})
    process = begun(tmp_path / "old", to, tmp_path / "new")
    after(process, 3)
    process.send_signal(signal.SIGSTOP)
    grow_folder(tmp_path / "old", to, tmp_path / "new", measure=False)
    assert f".new.{process.pid}.tmp" in names(tmp_path)
    finished = sums(tmp_path / "new")
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "new: " in said
    assert sums(tmp_path / "new") == finished and names(tmp_path) == ["new", "old", "target.json"]


# --- the disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_room(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Foreseen, and met at the last moment."""
    stock(tmp_path / "old", kind)
    to = config_to(tmp_path / "old", {"intermediate_size": 60})
    before = sums(tmp_path / "old")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 9, 9))  # type: ignore[attr-defined]
        with pytest.raises(RunError, match=r"new: needs [\d,]+ bytes, the disk has 9 free; make room"):
            grow_folder(tmp_path / "old", to, tmp_path / "new", measure=False)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="the disk is full"):
            grow_folder(tmp_path / "old", to, tmp_path / "new", measure=False)
    assert names(tmp_path) == ["old", "target.json"] and sums(tmp_path / "old") == before


# --- damaged sources ---------------------------------------------------------------------------------------------------


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def cut(folder: Path) -> str:
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-50])
    return f"{path.name}: .*cut short"


def lost(folder: Path) -> str:
    path = shards(folder)[0]
    path.unlink()
    return f"{path.name}: missing"


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def missing_tensor(folder: Path) -> str:
    path = shards(folder)[1]
    name = sorted(load_file(path))[0]
    rewritten(path, lambda tensors: tensors.pop(name))
    return f"{name}: missing"


def wrong_dtype(folder: Path) -> str:
    path = shards(folder)[1]
    name = sorted(load_file(path))[-1]
    rewritten(path, lambda tensors: tensors.update({name: tensors[name].to(torch.int16)}))
    return f"{name}: expected float64, float32"


def wrong_shape(folder: Path) -> str:
    path = shards(folder)[1]
    name = sorted(load_file(path))[-1]
    rewritten(path, lambda tensors: tensors.update({name: tensors[name][1:].clone()}))
    return f"{name}: expected shape"


def indexed(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def no_entry(folder: Path) -> str:
    name = sorted(load_file(shards(folder)[1]))[0]
    indexed(folder, lambda places: places.pop(name))
    return f"{name}: (not named by the index|missing)"  # missing, where the shard has no other tensor


def wrong_entry(folder: Path) -> str:
    name = sorted(load_file(shards(folder)[1]))[0]
    indexed(folder, lambda places: places.update({name: shards(folder)[0].name}))
    return f"{name}: missing"


def no_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").unlink()
    return "expected model.safetensors"


def flipped(folder: Path) -> str:
    """A bit of a weight; known by the checksums that a folder of ours carries."""
    path = shards(folder)[1]
    raw = bytearray(path.read_bytes())
    sha = {each.name: sha256(each.read_bytes()).hexdigest() for each in folder.iterdir()}
    (folder / "checksums.json").write_text(json.dumps({"sha256": sha}))
    raw[-3] ^= 4
    path.write_bytes(raw)
    return f"{path.name}: expected sha256 .*altered or damaged"


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_folders(kind: str, tmp_path: Path) -> None:
    """In shards; each kind of damage named with its file or tensor, exit code 2, nothing written."""
    stock(tmp_path / "whole", kind, max_shard_size="12KB")
    assert len(shards(tmp_path / "whole")) > 2
    to = config_to(tmp_path / "whole", {"intermediate_size": 60})
    for damage in (
        cut, lost, missing_tensor, wrong_dtype, wrong_shape, no_entry, wrong_entry, no_index, flipped,
    ):  # fmt: skip
        shutil.copytree(tmp_path / "whole", tmp_path / "old")
        said = damage(tmp_path / "old")
        before = sums(tmp_path / "old")
        with pytest.raises(InputError, match=said):
            grow_folder(tmp_path / "old", to, tmp_path / "new")
        assert sums(tmp_path / "old") == before
        shutil.rmtree(tmp_path / "old")
        assert names(tmp_path) == ["target.json", "whole"]


def test_the_exit_code_of_a_smaller_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock(tmp_path / "old", "llama")
    to = config_to(tmp_path / "old", {"intermediate_size": 40})
    with pytest.raises(SystemExit) as end:
        main(["grow", str(tmp_path / "old"), "--to", str(to), "--out", str(tmp_path / "new")])
    assert end.value.code == 2
    assert "intermediate_size: 48 to 40 would shrink; expected at least 48" in capsys.readouterr().err
    assert names(tmp_path) == ["old", "target.json"]
