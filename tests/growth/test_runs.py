"""Growth inside a run, and runs that start from a checkpoint: nothing but the model's size may change where it grows."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scantling import checkpoint
from scantling.cli import main
from scantling.config import RunConfig, load_run, run_from
from scantling.costing import flops_per_token
from scantling.errors import InputError, RunError
from scantling.files import checkpoint_folders
from scantling.growth import grow, grow_folder
from scantling.hf_folder import export_checkpoint, import_folder
from scantling.laws.cleaning import clean
from scantling.record import find_records, read_record, to_frame
from scantling.rows import rows
from scantling.training import train
from scantling.yamlio import dumps
from tests.runs import (
    STEPS,
    assert_same_run,
    losses,
    mapping,
    newest,
    state,
    train_with_stops,
)
from tests.test_guard import faulty, once
from tests.test_training import kill_and_resume

pytestmark = pytest.mark.usefixtures("same_kernel")

SMALL: dict[str, Any] = {
    "vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
    "max_position_embeddings": 32, "ffn": {"kind": "dense", "intermediate_size": 24},
}  # fmt: skip
WIDE = {**SMALL, "hidden_size": 24, "num_attention_heads": 4, "ffn": {"kind": "dense", "intermediate_size": 40}}
DEEP = {**WIDE, "num_hidden_layers": 3}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"learning_rate": 1e-2},
    "muon": {"kind": "muon", "learning_rate": 1e-2},
    "sgd": {"kind": "sgd", "learning_rate": 1e-1},
}


def growing(corpus: Path, *growth: dict[str, Any], **train_keys: Any) -> dict[str, Any]:
    config = mapping(corpus, **train_keys)
    config["model"] = SMALL
    return {**config, "growth": list(growth)}


def resolved(value: dict[str, Any]) -> RunConfig:
    return run_from(value, "t")


TWICE = ({"at": "0.25 of tokens", "to": WIDE}, {"at": 0.6, "to": DEEP, "rewarmup": 0.2, "learning_rate_factor": 0.5})


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_told_to_stop_around_its_growths_ends_with_the_same_bits(corpus: Path, tmp_path: Path, kind: str) -> None:
    config = resolved(growing(corpus, *TWICE, optimizer=OPTIMIZERS[kind], average_decay=0.9, evaluate_every=4))
    assert [stage.first for stage in config.stages] == [0, 3, 8]
    train(config, tmp_path / "whole", quiet=True)
    train_with_stops(config, tmp_path / "stopped", [2, 3, 7, 8, 9])
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_killed_at_every_flush_a_growing_run_ends_with_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    """Checkpoints, receipts, metrics and folders: killed before each flush to disk in turn."""
    config = growing(corpus, {"at": 0.4, "to": WIDE}, tokens=5 * 256, checkpoint_every=1, validation_tokens=256)
    counted = kill_and_resume(tmp_path, config, "flush", kills=8, longest=14)
    assert counted["cut_short"] >= 3


def test_the_first_step_of_a_grown_model_has_the_loss_of_the_small_one(corpus: Path, tmp_path: Path) -> None:
    train(resolved(growing(corpus, {"at": 0.5, "to": DEEP})), tmp_path / "grown", quiet=True)
    train(resolved(growing(corpus)), tmp_path / "small", quiet=True)
    grown, small = losses(tmp_path / "grown"), losses(tmp_path / "small")
    assert grown[:6] == small[:6]
    assert grown[6][1] == pytest.approx(small[6][1], abs=2e-3)  # bfloat16's rounding where the device has it
    assert grown[7][1] != small[7][1]


def test_the_grown_model_is_what_grow_makes_of_the_checkpoint(corpus: Path, tmp_path: Path) -> None:
    """Two routes: at a growth with a rate of zero afterwards, the run's last weights are those of `grow`."""
    stay = {"at": 0.5, "to": DEEP, "learning_rate_factor": 1e-30}
    config = resolved(growing(corpus, stay, keep_last=9, checkpoint_every=6, optimizer={"weight_decay": 0.0}))
    train(config, tmp_path, quiet=True)
    first, last = checkpoint_folders(tmp_path / "checkpoints")
    model = checkpoint.load_model(first)
    expected, _ = checkpoint.weights_of(grow(model, config.final_spec))
    found = load_file(last / "model.safetensors")
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12)


def test_the_learning_rate_rises_again_and_takes_its_factor(corpus: Path, tmp_path: Path) -> None:
    entry = {"at": 0.5, "to": WIDE, "rewarmup": 0.25, "learning_rate_factor": 0.5}
    keys: dict[str, Any] = {"schedule": {"kind": "constant"}, "optimizer": {"learning_rate": 1e-2}}
    train(resolved(growing(corpus, entry, **keys)), tmp_path, quiet=True)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([1e-2] * 6 + [5e-3 / 3, 1e-2 / 3, 5e-3, 5e-3, 5e-3, 5e-3])


def test_flops_and_stages_are_summed(corpus: Path, tmp_path: Path) -> None:
    config = resolved(growing(corpus, *TWICE))
    record = train(config, tmp_path, quiet=True)
    parts = [(SMALL, 3), (WIDE, 5), (DEEP, 4)]
    for key in ("train", "train_causal", "chinchilla_6nd"):
        costs = [flops_per_token(rows(stage.spec), 32)[key] for stage in config.stages]
        assert record.flops[key] == sum(
            float(cost) * steps * 256 for cost, (_, steps) in zip(costs, parts, strict=True)
        )
    assert record.flops["train_cumulative"] == record.flops["train"] == sum(s["train_flops"] for s in record.stages)
    assert [stage["steps"] for stage in record.stages] == [3, 5, 4]
    assert sum(stage["tokens"] for stage in record.stages) == record.tokens == STEPS * 256
    assert record.params["total"] == record.stages[-1]["params"] > record.stages[0]["params"]
    assert record.spec_hash == config.final_spec.hash and read_record(tmp_path) == record
    for stage in record.stages[1:]:
        receipt = stage["receipt"]
        assert receipt["exact"] and receipt["max_abs_logit_difference"] < 1e-10 and receipt["liveness"] > 0.99
    assert state(tmp_path)["stages"] == config.history(STEPS)


def test_every_policy_of_growth_works_within_a_run(corpus: Path, tmp_path: Path) -> None:
    doubled = {**SMALL, "hidden_size": 32, "num_attention_heads": 4, "ffn": {"kind": "dense", "intermediate_size": 48}}
    copies = {"at": 0.5, "to": doubled, "width": "copies", "snr_db": 10, "moments": "zero"}
    stack = {"at": 0.5, "to": {**SMALL, "num_hidden_layers": 4}, "new_layers": "stack", "optimizer": "fresh"}
    exact = {}
    for name, entry in (("copies", copies), ("stack", stack)):
        record = train(resolved(growing(corpus, entry)), tmp_path / name, quiet=True)
        exact[name] = record.stages[1]["receipt"]["exact"]
        said = [warning for warning in record.warnings if "not function-preserving" in warning]
        assert bool(said) is not exact[name]
    assert exact == {"copies": True, "stack": False}


def test_a_rollback_after_a_growth_goes_back_to_it(corpus: Path, tmp_path: Path) -> None:
    """The checkpoint where the model grows is the small one; what comes back from it is the large one."""
    config = resolved(growing(corpus, {"at": 0.5, "to": DEEP}, guard={"non_finite": "rollback"}))
    with faulty(once(float("nan"), (8, 0))) as seen:
        record = train(config, tmp_path, quiet=True)
    assert seen.steps == [*((step, 0) for step in range(9)), *((step, 24) for step in range(6, 12))]
    assert record.steps == STEPS and len(record.warnings) == 1


# --- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("growth", "expected"),
    [
        ([{"at": 0.5, "to": WIDE}, {"at": 0.5, "to": DEEP}], "expected a step after step 6"),
        ([{"at": 0.01, "to": WIDE}], None),  # rounded up to the first step's end
        ([{"at": 0.999, "to": WIDE}], "before step 12 of 12"),
        ([{"at": 1.5, "to": WIDE}], "less than 1"),
        ([{"at": "3 of steps", "to": WIDE}], "a share of the tokens such as 0.3"),
        ([{"at": 0.5}], "to: "),
        ([{"at": 0.5, "to": "nowhere.yaml"}], "no such file"),
        ([{"at": 0.5, "to": {**WIDE, "hidden_sise": 3}}], "did you mean 'hidden_size'"),
        ([{"at": 0.5, "to": WIDE, "moment": "mean"}], "did you mean 'moments'"),
        ([3], "expected `at` and `to`"),
        ({"at": 0.5}, "expected a list"),
    ],
)
def test_a_growth_that_cannot_be_planned_is_refused(
    corpus: Path, tmp_path: Path, growth: Any, expected: str | None
) -> None:
    value = {**growing(corpus), "growth": growth}
    if expected is None:
        assert resolved(value).stages[1].first == 1
        return
    (tmp_path / "run.yaml").write_text(dumps(value))
    with pytest.raises(InputError) as error:
        load_run(tmp_path / "run.yaml")
    assert expected in str(error.value)


def test_a_target_that_cannot_be_reached_exactly_is_refused_before_anything_is_trained(
    corpus: Path, tmp_path: Path
) -> None:
    value = growing(corpus, {"at": 0.5, "to": {**SMALL, "hidden_size": 8}})
    with pytest.raises(InputError, match=r"growth\[0\].to: .*8 would shrink"):
        train(resolved(value), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run/checkpoints").exists()


def test_guided_runs_do_not_grow(corpus: Path) -> None:
    value = growing(corpus, {"at": 0.5, "to": WIDE}, guide={})
    value["model"] = {**SMALL, "ffn": {"kind": "low_rank", "rank": 4, "intermediate_size": 32}}
    with pytest.raises(InputError, match="guided runs cannot grow"):
        resolved(value)


def test_growth_changes_the_identity_and_its_absence_does_not(corpus: Path) -> None:
    plain = growing(corpus)
    assert resolved(plain).hash == resolved({key: plain[key] for key in plain if key != "growth"}).hash
    hashes = {
        resolved(growing(corpus, {"at": 0.5, "to": WIDE, **more})).hash
        for more in ({}, {"at": 0.3}, {"to": DEEP}, {"moments": "zero"}, {"rewarmup": 0.1}, {"seed": 1})
    }
    assert len(hashes | {resolved(plain).hash}) == 7


def test_targets_are_found_beside_the_run(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "wide.yaml").write_text(dumps(WIDE))
    (tmp_path / "run.yaml").write_text(dumps(growing(corpus, {"at": "30% of tokens", "to": "wide.yaml"})))
    config = load_run(tmp_path / "run.yaml")
    again = resolved(config.to_mapping())
    assert config.stages[1].first == 4 and again.hash == config.hash and again.to_mapping() == config.to_mapping()


def test_laws_are_fitted_to_runs_from_scratch(corpus: Path, tmp_path: Path) -> None:
    train(resolved(growing(corpus)), tmp_path / "small", quiet=True)
    train(resolved(growing(corpus, {"at": 0.5, "to": WIDE})), tmp_path / "grown", quiet=True)
    table = to_frame(find_records(tmp_path))
    kept, said = clean(table)
    assert len(kept) == 1 and "grown or begun with another run's weights" in " ".join(said)


# --- starting from a checkpoint --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parent(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parent") / "run"
    train(resolved(growing(corpus)), folder, quiet=True)
    return folder


def test_a_run_starts_from_a_grown_checkpoint(corpus: Path, parent: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep.yaml"
    target.write_text(dumps(DEEP))
    grow_folder(parent, target, tmp_path / "grown")
    value = {key: item for key, item in growing(corpus).items() if key not in ("model", "growth")}
    value["start"] = {"checkpoint": str(tmp_path / "grown")}
    config = resolved(value)
    assert config.spec == resolved(growing(corpus, {"at": 0.5, "to": DEEP})).final_spec
    record = train(config, tmp_path / "run", quiet=True)
    before = read_record(parent)
    assert losses(tmp_path / "run")[0][1] == pytest.approx(losses(parent)[-1][1], abs=0.3)  # not that of a fresh model
    assert [entry["spec_hash"] for entry in record.parents] == [before.spec_hash]
    assert record.parents[0]["train_flops"] == before.flops["train"]
    assert record.flops["train_cumulative"] == pytest.approx(record.flops["train"] + before.flops["train"])
    with pytest.raises(RunError, match="deadline reached"):
        train(config, tmp_path / "stopped", quiet=True, deadline=0.0)
    shutil.rmtree(tmp_path / "grown")  # once begun, a run needs no parent
    train(load_run(tmp_path / "stopped/config.yaml"), tmp_path / "stopped", quiet=True)
    assert_same_run(tmp_path / "run", tmp_path / "stopped")
    assert train(load_run(tmp_path / "run/config.yaml"), tmp_path / "run", quiet=True) == record
    with pytest.raises(InputError, match="no such file"):
        train(load_run(tmp_path / "run/config.yaml"), tmp_path / "another", quiet=True)


def test_weights_from_elsewhere_are_no_run_from_scratch(corpus: Path, parent: Path, tmp_path: Path) -> None:
    """An imported checkpoint tells nothing of its training: its cost is said to be unknown, and no law is fitted to the run."""
    export_checkpoint(parent, tmp_path / "stock")
    import_folder(tmp_path / "stock", tmp_path / "imported")
    value = {key: item for key, item in growing(corpus).items() if key not in ("model", "growth")}
    record = train(
        resolved({**value, "start": {"checkpoint": str(tmp_path / "imported")}}), tmp_path / "run", quiet=True
    )
    assert [entry["train_flops"] for entry in record.parents] == [None]
    assert record.flops["train_cumulative"] == record.flops["train"]
    assert any("cost is not known" in warning for warning in record.warnings)
    assert to_frame([(tmp_path, record)])["grown"].all() and read_record(tmp_path / "run") == record


def test_a_kept_optimizer_goes_on(corpus: Path, parent: Path, tmp_path: Path) -> None:
    counts = {}
    for kind in ("fresh", "kept"):
        value = {**growing(corpus), "start": {"checkpoint": str(parent), "optimizer": kind}}
        train(resolved(value), tmp_path / kind, quiet=True)
        found = load_file(newest(tmp_path / kind) / "optimizer.safetensors")
        counts[kind] = {int(tensor) for name, tensor in found.items() if name.startswith("step.")}
    assert counts == {"fresh": {STEPS}, "kept": {2 * STEPS}}


def test_what_cannot_be_started_from_is_refused(corpus: Path, parent: Path, tmp_path: Path) -> None:
    def start(checkpoint: Path, **keys: Any) -> dict[str, Any]:
        return {**growing(corpus), "start": {"checkpoint": str(checkpoint), **keys}}

    with pytest.raises(InputError, match="expected a checkpoint folder or a run folder"):
        resolved(start(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="import it first: scantling import"):
        resolved(start(tmp_path))
    with pytest.raises(InputError, match=r"model: is not the model of .*grow the checkpoint first"):
        resolved({**start(parent), "model": WIDE})
    with pytest.raises(InputError, match="expected the checkpoint 000000"):
        resolved(start(parent, identity="0" * 64))
    damaged = tmp_path / "damaged"
    shutil.copytree(newest(parent), damaged)
    with open(damaged / "model.safetensors", "rb+") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    with pytest.raises(InputError, match="altered or damaged"):
        train(resolved(start(damaged)), tmp_path / "run", quiet=True)


def test_documented_snippets_are_read(corpus: Path, parent: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8")
    grows, starts = re.findall(r"```yaml\n((?:growth|start):.*?)```", page, re.S)
    shutil.copytree(parent, tmp_path / "runs/first")
    for name, spec in (("wide", WIDE), ("deep", DEEP)):
        (tmp_path / f"{name}.yaml").write_text(dumps(spec))
    run = growing(corpus)
    del run["growth"]
    (tmp_path / "run.yaml").write_text(dumps(run) + grows + starts)
    config = load_run(tmp_path / "run.yaml")
    assert [stage.first for stage in config.stages] == [0, 4, 8]
    assert config.start is not None and config.start.folder == newest(tmp_path / "runs/first")


def test_the_verb_says_what_grew(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(dumps(growing(corpus, {"at": 0.5, "to": DEEP})))
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), "--json"])
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert "step 6: grown from" in said.err
    assert len(json.loads(said.out)["stages"]) == 2
