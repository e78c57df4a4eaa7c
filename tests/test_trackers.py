"""Trackers, read back by their own packages; nothing leaves the machine."""

import builtins
import json
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scantling.config import RunConfig, run_from
from scantling.errors import InputError
from scantling.trackers import KINDS, trackers

ROW = {
    "step": 1,
    "tokens": 4096,
    "train/loss": 2.5,
    "lr": 3e-4,
    "perf/mfu": 0.31,
    "note": "text",
    "val/loss": float("nan"),
}
NUMBERS = {"tokens": 4096.0, "train/loss": 2.5, "lr": 3e-4, "perf/mfu": 0.31}


def run(*names: str) -> RunConfig:
    model = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model |= {"max_position_embeddings": 32, "ffn": {"kind": "dense", "intermediate_size": 24}}
    train = {"tokens": 1e4, "batch_tokens": 64, "sequence_length": 32, "trackers": list(names)}
    data = {"source": "python-stdlib", "tokenizer": "bytes"}
    return run_from({"name": "first", "model": model, "data": data, "train": train}, "test")


def two_starts(name: str, out: Path) -> None:
    """Steps 1 to 3 logged, then resumed from a checkpoint after step 2: steps 3 and 4 with other numbers."""
    (first,) = trackers(run(name), out)
    for step in (1, 2, 3):
        first.log({**ROW, "train/loss": float(step)}, step)
    first.close()
    if name == "wandb":
        time.sleep(1.1)  # its folders are named by the second
    (second,) = trackers(run(name), out, step=2)
    for step in (3, 4):
        second.log({**ROW, "train/loss": 10.0 + step}, step)
    second.close()
    assert not first.failed and not second.failed


def test_no_trackers(tmp_path: Path) -> None:
    assert trackers(run(), tmp_path) == [] and not list(tmp_path.iterdir())


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    two_starts("tensorboard", tmp_path)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(found.Tags()["tensors"]) >= NUMBERS.keys() or set(found.Tags()["scalars"]) == NUMBERS.keys()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 13), (4, 14)]
    assert found.Scalars("lr")[0].value == pytest.approx(3e-4, rel=1e-6)


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    store = f"file:{tmp_path}/store"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the small package has no other local store
    two_starts("mlflow", tmp_path)
    client = MlflowClient(store)
    (only,) = client.search_runs([client.get_experiment_by_name("scantling").experiment_id])
    assert only.info.run_name == "first" and only.info.status == "FINISHED"
    assert only.info.run_id == (tmp_path / "mlflow-id.txt").read_text().strip()
    assert only.data.metrics.keys() == NUMBERS.keys() and only.data.params["hash"] == run().hash
    history = client.get_metric_history(only.info.run_id, "train/loss")
    assert sorted((item.step, item.value) for item in history) == [(1, 1), (2, 2), (3, 3), (3, 13), (4, 14)]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    started: list[dict[str, Any]] = []
    real = wandb.init

    def init(**keys: Any) -> Any:
        started.append(keys)
        return real(**keys)

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", init)
    two_starts("wandb", tmp_path)
    assert [keys["id"] for keys in started] == [(tmp_path / "wandb-id.txt").read_text().strip()] * 2
    assert all(keys["resume"] == "allow" and keys["config"]["hash"] == run().hash for keys in started)
    until = time.monotonic() + 30  # its writer is another process, which finish() does not always wait for
    while len(logged := read_wandb(tmp_path)) < 5 and time.monotonic() < until:
        time.sleep(0.05)
    assert [(row["step"], row["train/loss"]) for row in logged] == [(1, 1), (2, 2), (3, 3), (3, 13), (4, 14)]
    assert {key for key in logged[0] if not key.startswith("_")} == {*NUMBERS, "step"}


def read_wandb(out: Path) -> list[dict[str, float]]:
    """History rows of every offline run file below a folder.

    A file is 7 bytes of header and, in its first 32 KiB, whole records: checksum (4 bytes), length (2), kind (1), message.
    """
    from wandb.proto import wandb_internal_pb2 as pb

    rows = []
    for path in sorted(out.glob("wandb/offline-run-*/run-*.wandb")):  # named by the second they began
        data, at = path.read_bytes(), 7
        assert len(data) < 32768
        while at + 7 <= len(data):
            size, kind = struct.unpack_from("<HB", data, at + 4)
            if kind != 1 or at + 7 + size > len(data):
                break  # not all written yet
            record = pb.Record()
            record.ParseFromString(data[at + 7 : at + 7 + size])
            at += 7 + size
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


@pytest.mark.parametrize("name", list(KINDS))
def test_a_missing_package(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def importing(module: str, *rest: Any, **keys: Any) -> Any:
        if module.split(".", maxsplit=1)[0] in ("wandb", "mlflow") or module == "torch.utils.tensorboard":
            raise ModuleNotFoundError(f"No module named {module!r}")
        return real(module, *rest, **keys)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(InputError, match=rf"trackers: {name} needs a package .*pip install 'scantling\[track\]'"):
        trackers(run(name), tmp_path)


class Broken:
    """A stand-in for a tracker's client whose every call fails, as without a network."""

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError("no route to host")


def test_a_tracker_that_fails_is_said_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = SimpleNamespace(init=lambda **_: SimpleNamespace(define_metric=lambda *_, **__: None), Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tracker,) = trackers(run("wandb"), tmp_path)
    monkeypatch.setattr(tracker, "run", Broken())
    for step in (1, 2, 3):
        tracker.log(ROW, step)
    tracker.close()
    assert capsys.readouterr().err.splitlines() == ["wandb failed and is left out from here on: no route to host"]


def test_a_tracker_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no API key configured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse, Settings=dict))
    with pytest.raises(InputError, match="train.trackers: wandb cannot start: no API key configured"):
        trackers(run("wandb"), tmp_path)
