"""Runs: the record, exact resume under SIGKILL, faults of disk and data."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scantling import checkpoint
from scantling.config import load_run, resolve_run, run_from
from scantling.costing import train_flops
from scantling.errors import InputError, RunError
from scantling.files import checkpoint_folders
from scantling.model import build
from scantling.optim import learning_rate_factor
from scantling.record import read_record
from scantling.training import train
from scantling.yamlio import dumps, load
from tests.runs import assert_same_run


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder of text: quick to prepare."""
    folder = tmp_path_factory.mktemp("text")
    words = ["alpha", "beta", "gamma", "delta", "loss", "width", "depth", "heads"]
    for number in range(12):
        chosen = random.Random(number)
        (folder / f"{number}.txt").write_text("\n".join(" ".join(chosen.choices(words, k=9)) for _ in range(120)))
    return folder


def mapping(text: Path, **train_keys: Any) -> dict[str, Any]:
    return {
        "name": "t",
        "model": {
            "vocab_size": 256, "hidden_size": [16, 8, 16], "num_hidden_layers": 3, "num_attention_heads": 2,
            "max_position_embeddings": 32, "ffn": {"kind": "dense", "expansion": 2}, "transition": "carry_forward",
        },
        "data": {"source": str(text), "validation_fraction": 0.2},
        "train": {
            "tokens": 20 * 256, "batch_tokens": 256, "sequence_length": 32, "checkpoint_every": 3,
            "validation_tokens": 2048, "optimizer": {"learning_rate": 3e-3}, **train_keys,
        },
    }  # fmt: skip


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint's weights, copied out of the mapped file."""
    loaded = load_file(checkpoint_folders(folder / "checkpoints")[-1] / "model.safetensors")
    return {name: tensor.clone() for name, tensor in loaded.items()}


def test_a_run_leaves_what_the_design_says(text: Path, tmp_path: Path) -> None:
    config = run_from(mapping(text), "t")
    record = train(config, tmp_path / "run", quiet=True)
    found = read_record(tmp_path / "run")
    assert found == record and record.status == "done"
    assert record.tokens == 20 * 256 and record.steps == 20
    assert record.flops["train"] == pytest.approx(train_flops(config.spec, 32, record.tokens))
    assert record.final["validation_loss"] < 5.0  # guessing gives ln 256 = 5.55
    assert record.run_hash == config.hash and record.spec_hash == config.spec.hash
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert load_run(tmp_path / "run/config.yaml").hash == config.hash
    assert all(
        path.suffix in (".safetensors", ".json") for path in (tmp_path / "run/checkpoints").rglob("*") if path.is_file()
    )


def test_a_finished_run_says_so(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_from(mapping(text, tokens=512), "t")
    first = train(config, tmp_path / "run", quiet=True)
    before = (tmp_path / "run/record.json").stat().st_mtime_ns
    assert train(config, tmp_path / "run") == first
    assert "done already" in capsys.readouterr().err
    assert (tmp_path / "run/record.json").stat().st_mtime_ns == before


def test_another_run_is_not_written_over(text: Path, tmp_path: Path) -> None:
    train(run_from(mapping(text, tokens=512), "t"), tmp_path / "run", quiet=True)
    with pytest.raises(InputError, match="holds another run"):
        train(run_from(mapping(text, tokens=512, seed=1), "t"), tmp_path / "run", quiet=True)


def test_accumulation_equals_one_batch(text: Path, tmp_path: Path) -> None:
    exact = {"precision": "float32"}
    whole = train(run_from(mapping(text, **exact), "t"), tmp_path / "whole", quiet=True)
    four = run_from(mapping(text, gradient_accumulation_steps=4, **exact), "t")
    parts = train(four, tmp_path / "parts", quiet=True)
    assert parts.final["validation_loss"] == pytest.approx(whole.final["validation_loss"], abs=1e-4)


# A server that imports torch once and forks a child per attempt: kill -9 then costs a fork, not an import. Where a run is done
# before all kills are, the next one begins. Both runs compute alike: the killed one takes over engine.json.
SERVER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from scantling.config import load_run
from scantling.training import train
config, root, how, kills, longest, seed = sys.argv[1], Path(sys.argv[2]), sys.argv[3], *map(float, sys.argv[4:])
chance, done, cut_short = random.Random(seed), 0, 0
def attempt(out, flushes=None):
    child = os.fork()
    if child:
        return child
    code, real = 1, os.fsync
    def fsync(file):
        nonlocal flushes
        flushes -= 1
        if flushes == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(file)
    if flushes:
        os.fsync = fsync
    try:
        train(load_run(config), out, quiet=True)
        code = 0
    finally:
        os._exit(code)
def ended(child):
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return False
    if os.WEXITSTATUS(status):
        sys.exit(os.WEXITSTATUS(status))
    return True
train(load_run(config), root / "peace", quiet=True)  # in this process: children inherit what it imported and measured
runs = 0
while done < kills:
    out = root / f"killed-{runs}"
    runs += 1
    out.mkdir()
    shutil.copy(root / "peace/engine.json", out)
    while True:
        killing = done < kills
        # before each flush to disk in turn, or at a random moment
        child = attempt(out, 1 + done % int(longest) if killing and how == "flush" else None)
        if killing and how == "moment":
            time.sleep(chance.uniform(0.0, longest))
            os.kill(child, signal.SIGKILL)
        if ended(child):
            break
        done += 1
        cut_short += bool(list((out / "checkpoints").glob(".*.tmp")))  # the next start sees these and clears them away
print(json.dumps({"killed": done, "cut_short": cut_short, "runs": runs}))
"""


def kill_and_resume(
    tmp_path: Path, config: dict[str, Any], how: str, kills: int, longest: float, seed: int = 0
) -> dict[str, int]:
    """Train once in peace and under SIGKILL; what is left must be equal bit for bit. Returns what the server counted."""
    (tmp_path / "run.yaml").write_text(dumps(config))
    (tmp_path / "server.py").write_text(textwrap.dedent(SERVER))
    words = [tmp_path / "server.py", tmp_path / "run.yaml", tmp_path, how, kills, longest, seed]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    served = subprocess.run(
        [sys.executable, *map(str, words)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert served.returncode == 0, served.stdout + served.stderr
    counted: dict[str, int] = json.loads(served.stdout.splitlines()[-1])
    assert counted["killed"] == kills
    first = read_record(tmp_path / "peace")
    for number in range(counted["runs"]):
        killed = tmp_path / f"killed-{number}"
        assert_same_run(tmp_path / "peace", killed)
        second = read_record(killed)
        assert (first.final, first.flops, first.tokens) == (second.final, second.flops, second.tokens)
        assert not list((killed / "checkpoints").glob(".*"))
    return counted


def everything(text: Path, steps: int) -> dict[str, Any]:
    """A run with all that a checkpoint can hold, saved after every step."""
    keys: dict[str, Any] = {
        "tokens": steps * 256, "checkpoint_every": 1, "evaluate_every": 5, "keep_best": True, "average_decay": 0.9,
        "guide": {"mode": "fixed_flops", "ratio": 0.5}, "guard": {"spike": "skip"}, "validation_tokens": 256,
    }  # fmt: skip
    config = mapping(text, **keys)
    config["model"]["ffn"] = {"kind": "low_rank", "rank": 4, "intermediate_size": 32}
    return config


def test_killed_at_every_flush_to_disk_runs_end_with_the_same_bits(text: Path, tmp_path: Path) -> None:
    """Before each of the 20 flushes after a start: of the metrics, each file of a checkpoint, both folders, and again."""
    counted = kill_and_resume(tmp_path, everything(text, 10), "flush", kills=20, longest=20)
    assert counted["cut_short"] >= 10


def test_killed_runs_end_with_the_same_bits(text: Path, tmp_path: Path) -> None:
    kill_and_resume(tmp_path, mapping(text, checkpoint_every=2), "moment", kills=4, longest=0.5, seed=1)


@pytest.mark.slow
def test_a_hundred_kills(text: Path, tmp_path: Path) -> None:
    """At random moments, of which many fall into the writing of a checkpoint."""
    counted = kill_and_resume(tmp_path, everything(text, 60), "moment", kills=100, longest=0.8, seed=3)
    assert counted["cut_short"] >= 10, counted


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2])
def test_twenty_kills_of_the_contract_run(contract: Path, tmp_path: Path, seed: int) -> None:
    config = load(contract / "run-tiny.yaml", ["train.checkpoint_every=2"]).value
    kill_and_resume(tmp_path, config, "moment", kills=20, longest=1.5, seed=seed)


def test_sigterm_saves_and_the_same_command_goes_on(text: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dumps(mapping(text, tokens=4000 * 256, checkpoint_every=100000)))
    command = [sys.executable, "-m", "scantling", "train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (tmp_path / "run/metrics.jsonl").exists() and (tmp_path / "run/metrics.jsonl").stat().st_size > 2000:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "run the same command to go on" in said
    assert len(checkpoint_folders(tmp_path / "run/checkpoints")) == 1
    assert not (tmp_path / "run/record.json").exists()


@pytest.mark.parametrize("what", ["truncate", "flip", "delete", "garbage state"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    text: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_from(mapping(text), "t")
    train(config, tmp_path / "run", quiet=True)
    expected = final_weights(tmp_path / "run")
    (tmp_path / "run/record.json").unlink()
    newest = checkpoint_folders(tmp_path / "run/checkpoints")[-1]
    file = newest / "model.safetensors"
    data = bytearray(file.read_bytes())
    if what == "truncate":
        file.write_bytes(data[: len(data) // 2])
    elif what == "flip":
        data[-5] ^= 1
        file.write_bytes(data)
    elif what == "delete":
        file.unlink()
    else:
        (newest / "state.json").write_text("{")
    record = train(config, tmp_path / "run", quiet=True)
    assert "passed over" in capsys.readouterr().err and any("passed over" in warning for warning in record.warnings)
    for name, tensor in final_weights(tmp_path / "run").items():
        assert torch.equal(tensor, expected[name])


def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_from(mapping(text), "t")
    real, calls = checkpoint.save_file, []

    def full(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) > 4:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match="disk is full"):
        train(config, tmp_path / "run", quiet=True)
    assert [folder.name for folder in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000003", "step_00000006"]
    monkeypatch.undo()
    record = train(config, tmp_path / "run", quiet=True)  # room again: it goes on
    assert record.status == "done"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_really_full_disk(text: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        with pytest.raises(RunError, match="disk is full"):
            train(run_from(mapping(text), "t"), small / "run", quiet=True)
        assert not list((small / "run").rglob("*.tmp"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_diverged_run_is_recorded(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_from(mapping(text, optimizer={"learning_rate": 1e30}, max_grad_norm=0), "t")
    with pytest.raises(RunError, match="diverged at step"):
        train(config, tmp_path / "run", quiet=True)
    assert read_record(tmp_path / "run").status == "diverged"


def test_a_sequence_longer_than_the_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short\n" * 30)
    run = mapping(tmp_path / "a.txt", sequence_length=4096, batch_tokens=4096, tokens=4096)
    run["model"]["max_position_embeddings"] = 4096
    with pytest.raises(InputError, match="sequence_length 4096 needs 4097 tokens"):
        train(run_from(run, "t"), tmp_path / "run", quiet=True)


@pytest.mark.parametrize(("content", "said"), [(b"", "empty"), (b"\xff\xfe\x00", "UTF-8|not")])
def test_an_unusable_corpus(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=said):
        train(run_from(mapping(tmp_path / "a.txt"), "t"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run/record.json").exists()


def test_faults_of_every_section_show_at_once(contract: Path) -> None:
    overrides = [
        "train.tokens=-1",
        "train.schedule={kind: cosin}",
        "model.hidden_size=wide",
        "data.tokeniser=bytes",
        "trian=1",
    ]
    with pytest.raises(InputError) as caught:
        resolve_run(load(contract / "run-tiny.yaml", overrides))
    said = str(caught.value)
    for part in ("trian: unknown key; did you mean 'train'", "hidden_size", "train.tokens", "kind", "tokeniser"):
        assert part in said or part.removeprefix("train.") in said


def test_schedules() -> None:
    base = {"tokens": 100 * 256, "batch_tokens": 256, "sequence_length": 32}
    cosine = run_from(mapping(Path("x"), **base, schedule={"kind": "cosine", "warmup": 0.1, "final": 0.1}), "t").train
    factors = [learning_rate_factor(cosine, step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0 and factors[10] == 1.0
    assert factors[-1] == pytest.approx(0.1) and all(a >= b for a, b in pairwise(factors[10:]))
    wsd = run_from(mapping(Path("x"), **base, schedule={"kind": "wsd"}), "t").train
    factors = [learning_rate_factor(wsd, step) for step in range(100)]
    assert factors[9:81] == [1.0] * 72 and factors[81] < 1.0 and factors[-1] == pytest.approx(0.1)
    constant = run_from(mapping(Path("x"), **base, schedule={"kind": "constant"}), "t").train
    assert [learning_rate_factor(constant, step) for step in (0, 50, 99)] == [1.0, 1.0, 1.0]


def test_a_loaded_model_is_the_saved_one(text: Path, tmp_path: Path) -> None:
    config = run_from(mapping(text, tokens=512), "t")
    train(config, tmp_path / "run", quiet=True)
    model = checkpoint.load_model(tmp_path / "run")
    assert model.spec == config.spec
    for name, tensor in final_weights(tmp_path / "run").items():
        assert torch.equal(dict(model.named_parameters())[name].detach(), tensor)
    with pytest.raises(InputError, match="not this model's"):
        checkpoint.restore_weights(
            build(config.spec.replace(layers=config.spec.layers[:1])), final_weights(tmp_path / "run")
        )
