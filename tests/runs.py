"""Tiny runs for the tests of training: a corpus, a configuration, interruptions, and what must be equal afterwards."""

import json
import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from scantling.config import RunConfig, run_from
from scantling.errors import RunError
from scantling.files import checkpoint_folders
from scantling.record import RunRecord
from scantling.training import engine as engines
from scantling.training import train
from scantling.training.folder import Interrupt

STEPS = 12
LOW_RANK: dict[str, Any] = {"kind": "low_rank", "rank": 4, "intermediate_size": 32}


def write_corpus(path: Path, documents: int = 500, seed: int = 0) -> Path:
    """Short documents, so that a sequence of 32 bytes often holds two."""
    chance = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "loss", "width", "depth", "heads"]
    texts = (" ".join(chance.choices(words, k=chance.randint(2, 9))) + f" {number}" for number in range(documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def mapping(corpus: Path, model: dict[str, Any] | None = None, **train_keys: Any) -> dict[str, Any]:
    """A run of 12 steps of 8 sequences, which leaves one checkpoint unless it is interrupted."""
    return {
        "name": "t",
        "model": {
            "vocab_size": 257, "hidden_size": [16, 8, 16], "num_hidden_layers": 3, "num_attention_heads": 2,
            "max_position_embeddings": 32, "ffn": {"kind": "dense", "intermediate_size": 24},
            "transition": "carry_forward", **(model or {}),
        },
        "data": {"source": str(corpus), "validation_fraction": 0.2},
        "train": {
            "tokens": STEPS * 256, "batch_tokens": 256, "sequence_length": 32, "checkpoint_every": 1000,
            "validation_tokens": 512, "optimizer": {"learning_rate": 1e-2}, **train_keys,
        },
    }  # fmt: skip


def tiny(corpus: Path, model: dict[str, Any] | None = None, **train_keys: Any) -> RunConfig:
    return run_from(mapping(corpus, model, **train_keys), "t")


def settle_attention(monkeypatch: pytest.MonkeyPatch, kernel: str = "block") -> None:
    """Two runs to be compared bit by bit must not each measure which kernel is faster."""
    monkeypatch.setattr(engines, "fastest_attention", lambda *_: (kernel, f"attention {kernel}: by the test"))


def train_with_stops(config: RunConfig, out: Path, stops: Collection[int]) -> RunRecord:
    """Train, told to stop after each of these steps and started again."""
    taken = 0

    def wanted(self: Interrupt, world: object) -> str | None:
        nonlocal taken
        taken += 1
        return "told to stop" if taken in stops else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interrupt, "wanted", wanted)
        for _ in stops:
            with pytest.raises(RunError, match="told to stop, saved at step"):
                train(config, out, quiet=True)
            torch.manual_seed(taken)  # a new process would not have the old one's random state either
        return train(config, out, quiet=True)


def newest(run: Path) -> Path:
    return checkpoint_folders(run / "checkpoints")[-1]


def state(run: Path) -> dict[str, Any]:
    """state.json of the newest checkpoint, without what depends on the clock."""
    found: dict[str, Any] = json.loads((newest(run) / "state.json").read_text())
    return {key: value for key, value in found.items() if key not in ("seconds", "sha256")}


def losses(run: Path) -> list[tuple[int, float, float | None]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["train/loss"], row.get("val/loss")) for row in rows]


def assert_same_run(one: Path, two: Path) -> None:
    """Every file of the last checkpoint bit by bit, its state, and every loss."""
    first, second = newest(one), newest(two)
    assert first.name == second.name
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir())
    for name in files:
        if name != "state.json":
            assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert state(one) == state(two)
    assert losses(one) == losses(two)


__all__ = [
    "LOW_RANK",
    "STEPS",
    "assert_same_run",
    "losses",
    "mapping",
    "newest",
    "settle_attention",
    "state",
    "tiny",
    "train_with_stops",
    "write_corpus",
]
