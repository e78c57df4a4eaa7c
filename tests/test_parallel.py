"""Several processes on one machine: the numbers of one process, checkpoints for any number of them, clean ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scantling import checkpoint
from scantling.config import run_from
from scantling.errors import InputError
from scantling.files import checkpoint_folders, step_of
from scantling.record import read_record
from scantling.training import train
from scantling.training.parallel import refuse
from scantling.yamlio import dumps
from tests.test_training import mapping, text

__all__ = ["text"]
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
SETTINGS: dict[str, Any] = {"precision": "float32", "average_decay": 0.9, "evaluate_every": 10, "checkpoint_every": 10}
TIED: dict[str, Any] = {"tie_word_embeddings": True, "attention_bias": True}
LARGER: dict[str, Any] = {
    "hidden_size": [16, 8, 16, 16], "head_dim": [8, 4, 8, 8], "num_hidden_layers": 4, "num_attention_heads": 4,
    "ffn": {"kind": "dense", "intermediate_size": 40},
}  # fmt: skip
CLOSE = 1e-5  # nats: what sums in another order may differ by over 50 steps


def run_mapping(text: Path, steps: int, model: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    run = mapping(text, tokens=steps * 256, **{**SETTINGS, **keys})
    return {**run, "model": {**run["model"], **(TIED if model is None else model)}}


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def launched(processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*LAUNCH, str(processes), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def trained(processes: int, run: dict[str, Any], out: Path, *settings: str) -> Path:
    """The run trained by the command line under torchrun, or in this process."""
    file = out.with_suffix(".yaml")
    file.write_text(dumps(run))
    if processes == 1 and not settings:
        train(run_from(run, "t"), out, quiet=True)
        return out
    words = [word for setting in settings for word in ("--set", setting)]
    done = launched(processes, "-m", "scantling", "train", str(file), "--out", str(out), *words)
    assert done.returncode == 0, done.stderr
    return out


def same_numbers(one: Path, several: Path) -> None:
    """Losses, gradient norms and validation losses of every step."""
    first, second = rows(one), rows(several)
    assert [row["step"] for row in first] == [row["step"] for row in second]
    for a, b in zip(first, second, strict=True):
        for key in ("train/loss", "val/loss", "grad_norm"):
            assert a.get(key) == pytest.approx(b.get(key), abs=CLOSE), (a["step"], key)
    loss = [read_record(folder).final["validation_loss"] for folder in (one, several)]
    assert loss[0] == pytest.approx(loss[1], abs=1e-6)


def same_files(one: Path, two: Path) -> None:
    """The newest checkpoints' tensors, bit for bit."""
    newest = [checkpoint_folders(folder / "checkpoints")[-1] for folder in (one, two)]
    names = sorted(path.name for path in newest[0].glob("*.safetensors"))
    assert names == sorted(path.name for path in newest[1].glob("*.safetensors"))
    for name in names:
        a, b = (load_file(folder / name) for folder in newest)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


def with_choices_of(other: Path, out: Path) -> Path:
    """A folder for a run that computes as another did: which kernel is faster is measured, and decides the rounding."""
    out.mkdir()
    shutil.copy(other / "engine.json", out)
    return out


def back_to(step: int, folder: Path) -> None:
    """The run as if it had been interrupted after `step`."""
    (folder / "record.json").unlink()
    for newer in checkpoint_folders(folder / "checkpoints"):
        if step_of(newer) > step:
            for file in newer.iterdir():
                file.unlink()
            newer.rmdir()


SEVERAL = """
import shutil, sys
from pathlib import Path
from scantling.config import load_run
from scantling.errors import RunError
from scantling.training import train
folder = Path(sys.argv[1])
for kind in ("ddp", "fsdp"):
    train(load_run(folder / "run.yaml", [f"train.parallel.kind={kind}"]), folder / kind, quiet=True)
(folder / "again").mkdir(exist_ok=True)
shutil.copy(folder / "fsdp/engine.json", folder / "again")  # measured choices decide the rounding
again = load_run(folder / "run.yaml", ["train.parallel={kind: fsdp, activation_checkpointing: true}"])
try:
    train(again, folder / "again", quiet=True, deadline=0.0)
except (RunError, SystemExit) as end:
    print("ended:", end)
train(again, folder / "again", quiet=True)
"""


@pytest.mark.parametrize("grows", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_equal_one(text: Path, tmp_path: Path, grows: bool) -> None:
    """DDP, FSDP, and FSDP interrupted after a step, with recomputed activations: the numbers of one process."""
    run = run_mapping(text, 12)
    if grows:
        run["growth"] = [{"at": 0.5, "to": {**run["model"], **LARGER}}]
    (tmp_path / "run.yaml").write_text(dumps(run))
    (tmp_path / "several.py").write_text(textwrap.dedent(SEVERAL))
    done = launched(2, str(tmp_path / "several.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("deadline reached, saved at step 1") == 1
    one = trained(1, run, tmp_path / "one")
    for kind in ("ddp", "fsdp", "again"):
        same_numbers(one, tmp_path / kind)
    same_files(tmp_path / "fsdp", tmp_path / "again")
    assert checkpoint.load_model(tmp_path / "fsdp").spec == run_from(run, "t").final_spec
    for path in (tmp_path / "fsdp/checkpoints").rglob("*"):
        assert path.is_dir() or path.suffix in (".safetensors", ".json")
    back_to(10, tmp_path / "fsdp")  # two processes wrote it, one goes on
    same_numbers(one, trained(1, run, tmp_path / "fsdp"))


def test_activation_checkpointing_changes_no_number(text: Path, tmp_path: Path) -> None:
    run = run_mapping(text, 4, checkpoint_every=4)
    kept = trained(1, run, tmp_path / "kept")
    run["train"]["parallel"] = {"activation_checkpointing": True}
    same_files(kept, trained(1, run, with_choices_of(kept, tmp_path / "recomputed")))


LOW_RANK = {"ffn": {"kind": "low_rank", "expansion": 2, "rank": 4}}
REFUSED: list[tuple[int, dict[str, Any], dict[str, Any], list[str]]] = [
    (2, {}, {"parallel": {"tensor": 2}}, ["goes with kind fsdp, got ddp"]),
    (3, {}, {"parallel": {"kind": "fsdp", "tensor": 2}}, ["expected a multiple of that many, got 3"]),
    (3, {}, {"parallel": {"kind": "fsdp", "tensor": 3}}, ["2 query heads", "2 key/value heads", "32 feed-f"]),
    (2, LOW_RANK, {"parallel": {"kind": "fsdp", "tensor": 2}}, ["layer 0 has a low_rank feed-forward"]),
    (2, {"qk_norm": {"over": "head"}}, {"parallel": {"kind": "fsdp", "tensor": 2}}, ["layer 0 has qk_norm"]),
    (2, LOW_RANK, {"parallel": {"kind": "fsdp"}, "guide": {}}, ["guides appear and go"]),
    (2, {}, {"parallel": {"kind": "fsdp"}, "optimizer": {"kind": "muon"}}, ["muon needs whole matrices"]),
]  # fmt: skip


@pytest.mark.parametrize(("processes", "model", "keys", "said"), REFUSED)
def test_what_cannot_be_spread_is_refused(
    processes: int, model: dict[str, Any], keys: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        refuse(run_from(run_mapping(Path("x"), 20, model, **keys), "t"), processes)
    assert len(caught.value.faults) == len(said)
    for fault, words in zip(caught.value.faults, said, strict=True):
        assert words in fault


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "parallel"),
    [
        (4, "{kind: ddp}"),
        (4, "{kind: fsdp}"),
        (4, "{kind: fsdp, tensor: 2, activation_checkpointing: true}"),
        (2, "{kind: fsdp, tensor: 2}"),
    ],
)
def test_fifty_steps_equal_one_process_with_accumulation(
    text: Path, tmp_path: Path, processes: int, parallel: str
) -> None:
    run = run_mapping(text, 50)
    one = trained(1, {**run, "train": {**run["train"], "gradient_accumulation_steps": 4}}, tmp_path / "one")
    same_numbers(one, trained(processes, run, tmp_path / "several", f"train.parallel={parallel}"))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["{kind: ddp}", "{kind: fsdp}", "{kind: fsdp, tensor: 2}"])
def test_a_checkpoint_of_four_resumes_on_two_and_on_one(text: Path, tmp_path: Path, parallel: str) -> None:
    run = run_mapping(text, 50, keep_last=9)
    one = trained(1, run, tmp_path / "one")
    out = trained(4, run, tmp_path / "out", f"train.parallel={parallel}")
    back_to(10, out)
    trained(2, run, out, "train.parallel.kind=fsdp")
    same_numbers(one, out)
    back_to(20, out)
    same_numbers(one, trained(1, run, out))
    back_to(30, out)
    same_numbers(one, trained(2, run, out, "train.parallel.kind=ddp"))


@pytest.mark.slow
@pytest.mark.parametrize("stochastic", [True, False])
def test_guides_come_and_go_in_copies(text: Path, tmp_path: Path, stochastic: bool) -> None:
    run = run_mapping(text, 50, LOW_RANK, guide={"mode": "fixed_tokens", "ratio": 0.5, "stochastic": stochastic})
    one = trained(1, run, tmp_path / "one")
    out = trained(2, run, tmp_path / "out", "train.parallel.kind=ddp")
    same_numbers(one, out)
    back_to(20, out)  # within the guided phase
    same_numbers(one, trained(2, run, out, "train.parallel.kind=ddp"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_routers_see_the_shares_as_micro_batches(text: Path, tmp_path: Path, kind: str) -> None:
    experts = {"kind": "moe", "num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
    run = run_mapping(text, 50, {"ffn": {**experts, "expert": {"kind": "dense", "intermediate_size": 16}}})
    one = trained(1, {**run, "train": {**run["train"], "gradient_accumulation_steps": 2}}, tmp_path / "one")
    same_numbers(one, trained(2, run, tmp_path / "several", f"train.parallel.kind={kind}"))


@pytest.mark.slow
def test_a_killed_worker_ends_all_and_the_next_start_goes_on(text: Path, tmp_path: Path) -> None:
    run = run_mapping(text, 400, checkpoint_every=20, evaluate_every=None, parallel={"kind": "fsdp"})
    peace = trained(2, run, tmp_path / "peace", "train.keep_last=2")
    with_choices_of(peace, tmp_path / "out")
    (tmp_path / "run.yaml").write_text(dumps(run))
    words = ["-m", "scantling", "train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen([*LAUNCH, "2", *words], stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if checkpoint_folders(tmp_path / "out/checkpoints"):
            break
        time.sleep(0.05)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and not (tmp_path / "out/record.json").exists(), said
    same_files(peace, trained(2, run, tmp_path / "out", "train.keep_last=2"))


@pytest.mark.slow
def test_another_runs_folder_is_refused_once(text: Path, tmp_path: Path) -> None:
    out = trained(1, run_mapping(text, 2), tmp_path / "out")
    done = launched(
        2, "-m", "scantling", "train", str(out.with_suffix(".yaml")), "--out", str(out), "--set", "train.seed=1"
    )
    assert done.stderr.count("holds another run") == 1 and "exitcode: 2" in done.stderr
    assert "scantling/training" not in done.stderr  # no traceback of ours
