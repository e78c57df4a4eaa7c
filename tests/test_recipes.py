"""Recipes of training: exact resume of every part of the state, guides, averages, the best checkpoint, the engine's choices."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scantling import checkpoint
from scantling.cli import main
from scantling.config import RunConfig, run_from
from scantling.errors import InputError, RunError
from scantling.evaluate import validation
from scantling.files import checkpoint_folders, step_of
from scantling.model import Decoder, build
from scantling.model.guided import GuidedLinear
from scantling.recipe import TrainConfig
from scantling.training import engine as engines
from scantling.training import run as runs
from scantling.training import train
from scantling.training.folder import opened_dataset
from scantling.training.parallel import World
from scantling.yamlio import dumps, loads
from tests.runs import (
    LOW_RANK,
    STEPS,
    assert_same_run,
    losses,
    mapping,
    newest,
    settle_attention,
    tiny,
    train_with_stops,
    write_corpus,
)

pytestmark = pytest.mark.usefixtures("same_kernel")

GUIDED: dict[str, Any] = {"guide": {"mode": "fixed_flops", "ratio": 0.5}, "average_decay": 0.8}  # 6 guided of 12 + 6


def validated(model: Decoder, config: RunConfig) -> float:
    """The validation loss of a model, as the run takes it."""
    train = config.train
    found = validation(
        model, opened_dataset(config, quiet=True), train.sequence_length, 8, int(train.validation_tokens), "float32"
    )
    return found["validation_loss"]


def loaded(folder: Path, group: str = checkpoint.MODEL) -> Decoder:
    """The model of one group of a checkpoint's tensors."""
    found = checkpoint.load(folder)
    model = build(found.spec)
    names = found.group(checkpoint.MODEL)
    checkpoint.restore_weights(model, {name: found.group(group)[name] for name in names})
    return model


# --- exact resume --------------------------------------------------------------------------------------------------------

RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "muon, average, batch warm-up": (
        {},
        {
            "optimizer": {"kind": "muon", "learning_rate": 1e-2},
            "average_decay": 0.8,
            "batch_warmup": {"start_batch_tokens": 64, "warmup": 0.5},
        },
    ),
    "z-loss, document mask, sgd": (
        {},
        {"z_loss": 0.01, "document_mask": True, "optimizer": {"kind": "sgd", "nesterov": True}, "evaluate_every": 5},
    ),
    "sgd without momentum": ({}, {"optimizer": {"kind": "sgd", "momentum": 0.0}, "precision": "float32"}),
    "wsd, accumulation": ({}, {"schedule": {"kind": "wsd"}, "gradient_accumulation_steps": 4, "precision": "float32"}),
    "gaussian transition": ({"transition": "gaussian"}, {"evaluate_every": 4}),
    "experts, mup, rematerialised": (
        {"ffn": {"kind": "moe", "num_local_experts": 3, "num_experts_per_tok": 2, "expert": LOW_RANK}},
        {"parametrization": {"kind": "mup", "base_hidden_size": 8}, "parallel": {"activation_checkpointing": True}},
    ),
    "two epochs": ({}, {"tokens": 2.2 * 20000, "batch_tokens": 4096}),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(corpus: Path, tmp_path: Path, recipe: str) -> None:
    model, keys = RECIPES[recipe]
    config = tiny(corpus, model, **keys)
    whole = train(config, tmp_path / "whole", quiet=True)
    stops = [1, config.steps // 2, config.steps - 1]
    parts = train_with_stops(config, tmp_path / "parts", stops)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert whole.final == parts.final and whole.flops == parts.flops and whole.tokens == parts.tokens
    assert len(losses(tmp_path / "parts")) == config.steps
    (tmp_path / "whole/record.json").unlink()  # as if killed between the last checkpoint and the record
    torch.manual_seed(99)
    assert train(config, tmp_path / "whole", quiet=True).final == whole.final


@pytest.mark.parametrize("optimizer", [{"learning_rate": 1e-2}, {"kind": "muon", "learning_rate": 1e-2}])
def test_a_guided_run_is_resumed_exactly_in_every_phase(
    corpus: Path, tmp_path: Path, optimizer: dict[str, Any]
) -> None:
    """Within the guided steps (3), at their end (6), after it (9), where the plan ends (12), in the repeats (14)."""
    config = tiny(corpus, {"ffn": LOW_RANK}, **GUIDED, optimizer=optimizer, evaluate_every=4)
    assert config.guidance is not None and config.guidance.guided_steps == 6 and config.steps == 18
    train(config, tmp_path / "whole", quiet=True)
    train_with_stops(config, tmp_path / "parts", [3, 6, 9, 12, 14])
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    for stop in (
        (5, 6, 7) if "kind" not in optimizer else ()
    ):  # alone: an error in one resumption cannot be undone by another
        train_with_stops(config, tmp_path / f"at-{stop}", [stop])
        assert_same_run(tmp_path / "whole", tmp_path / f"at-{stop}")


def test_a_deadline_interrupts_and_the_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    config = tiny(corpus, average_decay=0.5, tokens=6 * 256)
    train(config, tmp_path / "whole", quiet=True)
    starts = 0
    while not (tmp_path / "parts/record.json").exists():
        starts += 1
        try:  # past from the beginning: one step per start
            train(config, tmp_path / "parts", quiet=True, deadline=1e-9)
        except RunError as error:
            assert f"deadline reached, saved at step {starts}; run the same command to go on" in str(error)
    assert starts == 6
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_the_state_says_what_was_saved(corpus: Path, tmp_path: Path) -> None:
    config = tiny(corpus, {"ffn": LOW_RANK}, **GUIDED)
    for stops, groups in (([3], {"model", "optimizer", "average", "guides"}), ([9], {"model", "optimizer", "average"})):
        out = tmp_path / str(stops[0])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "Interrupt", stopping_at(stops[0]))
            with pytest.raises(RunError, match="told to stop"):
                train(config, out, quiet=True)
        assert {path.stem for path in newest(out).glob("*.safetensors")} == groups
        tensors = load_file(newest(out) / "optimizer.safetensors")
        assert any("guide" in name for name in tensors) == ("guides" in groups)


def stopping_at(step: int) -> type:
    """An Interrupt that stops once, after a step."""

    class Stopping(runs.Interrupt):
        taken = 0

        def wanted(self, world: World) -> str | None:
            self.taken += 1
            return "told to stop" if self.taken == step else None

    return Stopping


# --- guides --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guide", [{"mode": "fixed_flops", "ratio": 0.5}, {"mode": "fixed_flops"}, {"ratio": 1.0, "stochastic": False}]
)
def test_a_guided_run_ends_as_a_plain_model(corpus: Path, tmp_path: Path, guide: dict[str, Any]) -> None:
    """Also where guidance lasts to the last step: neither guides nor their optimizer state and average stay."""
    config = tiny(corpus, {"ffn": {**LOW_RANK, "rank": 6}}, guide=guide, average_decay=0.8, precision="float32")
    record = train(config, tmp_path / "run", quiet=True)
    final = newest(tmp_path / "run")
    assert {path.name for path in final.glob("*.safetensors")} == {
        "model.safetensors", "optimizer.safetensors", "average.safetensors",
    }  # fmt: skip
    plain = dict(build(config.spec).named_parameters())
    for name in ("model", "average"):
        assert load_file(final / f"{name}.safetensors").keys() == plain.keys()
    owners = {name.partition(".")[2] for name in load_file(final / "optimizer.safetensors")}
    assert owners == plain.keys()
    assert validated(checkpoint.load_model(tmp_path / "run"), config) == pytest.approx(
        record.final["validation_loss"], abs=1e-5
    )
    assert record.flops["train"] == pytest.approx(config.train_flops, rel=1e-12)
    assert record.flops["guides"] > 0 and record.tokens == config.tokens
    assert record.flops["train"] - record.flops["guides"] == pytest.approx(
        tiny(corpus, {"ffn": {**LOW_RANK, "rank": 6}}).train_flops * config.tokens / (STEPS * 256), rel=1e-9
    )


def test_evaluation_never_uses_guides(corpus: Path, tmp_path: Path) -> None:
    """In the guided phase too: the same loss as the plain model with the checkpoint's structured weights."""
    config = tiny(
        corpus, {"ffn": LOW_RANK}, guide={"stochastic": False}, evaluate_every=3, checkpoint_every=3, keep_last=9,
        precision="float32", optimizer={"learning_rate": 0.05},
    )  # fmt: skip
    train(config, tmp_path / "run", quiet=True)
    guides = load_file(tmp_path / "run/checkpoints/step_00000003/guides.safetensors")
    model = loaded(tmp_path / "run/checkpoints/step_00000003")
    name, guide = next(iter(guides.items()))
    structured = model.get_submodule(name.removesuffix(".guide"))
    assert not torch.allclose(structured.merge(), guide, atol=1e-3)  # they have parted by now
    for step, _, found in losses(tmp_path / "run"):
        if found is not None:
            alone = validated(loaded(tmp_path / f"run/checkpoints/step_{step:08d}"), config)
            assert found == pytest.approx(alone, abs=1e-6)


def test_training_does_use_guides(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[bool] = []
    real = GuidedLinear.guided

    def spied(self: GuidedLinear, draw: float | None = None) -> bool:
        found = real(self, draw)
        used.append(found)
        return found

    monkeypatch.setattr(GuidedLinear, "guided", spied)
    train(tiny(corpus, {"ffn": LOW_RANK}, guide={"ratio": 0.5}), tmp_path / "run", quiet=True)
    assert 0 < sum(used) < len(used) == 6 * 6  # two linears in three layers; some draws use them, some do not


# --- averages and the best checkpoint ------------------------------------------------------------------------------------


def test_the_average_is_what_is_evaluated_and_loaded(corpus: Path, tmp_path: Path) -> None:
    config = tiny(corpus, average_decay=0.9, precision="float32", evaluate_every=6, checkpoint_every=6)
    record = train(config, tmp_path / "run", quiet=True)
    final = newest(tmp_path / "run")
    averaged, own = validated(loaded(final, checkpoint.AVERAGE), config), validated(loaded(final), config)
    assert abs(averaged - own) > 1e-3
    assert record.final["validation_loss"] == pytest.approx(averaged, abs=1e-6)
    model = checkpoint.load_model(tmp_path / "run")
    for name, tensor in load_file(final / "average.safetensors").items():
        assert torch.equal(dict(model.named_parameters())[name], tensor)
    early = loaded(tmp_path / "run/checkpoints/step_00000006", checkpoint.AVERAGE)
    (found,) = [value for step, _, value in losses(tmp_path / "run") if step == 6]
    assert found == pytest.approx(validated(early, config), abs=1e-6)


@pytest.mark.parametrize(
    ("values", "best", "kept"),
    [
        ([5.0, 3.0, 4.0, 3.5, 3.0, 4.0], 4, [4, 12]),  # a tie goes to the earlier one
        ([5.0, 4.0, 3.0, 4.0, 4.0, 2.0], 12, [6, 12]),  # the last evaluation counts too
        ([float("nan"), 4.0, 5.0, 6.0, 7.0, 8.0], 4, [4, 12]),
    ],
)
@pytest.mark.parametrize("stops", [[], [4, 7]])
def test_the_best_checkpoint_is_kept(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    values: list[float],
    best: int,
    kept: list[int],
    stops: list[int],
) -> None:
    left = list(values)
    monkeypatch.setattr(runs, "validation", lambda *_, **__: {"validation_loss": left.pop(0)})
    config = tiny(corpus, evaluate_every=2, checkpoint_every=5, keep_last=1, keep_best=True)
    record = train_with_stops(config, tmp_path / "run", stops)
    assert not left
    assert record.final["best_step"] == best and record.final["best_validation_loss"] == values[best // 2 - 1]
    assert [step_of(folder) for folder in checkpoint_folders(tmp_path / "run/checkpoints")] == kept
    assert checkpoint.load(tmp_path / f"run/checkpoints/step_{best:08d}").state["step"] == best


# --- the engine's choices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["block", "fused"])
def test_a_resumed_run_keeps_the_recorded_choices(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    config, second = tiny(corpus), "fused" if first == "block" else "block"
    monkeypatch.setattr(engines, "bfloat16_is_fast", lambda _: first == "block")
    settle_attention(monkeypatch, first)
    whole = train(config, tmp_path / "whole", quiet=True)
    precision = "bfloat16" if first == "block" else "float32"
    assert (whole.environment["attention"], whole.environment["precision"]) == (first, precision)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "Interrupt", stopping_at(5))
        with pytest.raises(RunError, match="told to stop"):
            train(config, tmp_path / "parts", quiet=True)
    chosen = (tmp_path / "parts/engine.json").read_bytes()
    settle_attention(monkeypatch, second)
    monkeypatch.setattr(engines, "bfloat16_is_fast", lambda _: first != "block")
    monkeypatch.setattr(engines, "fastest_float32", lambda: "highest")
    monkeypatch.setattr(engines, "available_memory", lambda _: 1)
    parts = train(config, tmp_path / "parts", quiet=True)
    assert (tmp_path / "parts/engine.json").read_bytes() == chosen
    assert (parts.environment["attention"], parts.environment["precision"]) == (first, precision)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"{", b"[]", b"\xff\xfe", b'{"device": "cpu"}',
        {"micro_batch_sequences": 0}, {"micro_batch_sequences": "many"}, {"attention": "quick"}, {"precision": "int3"},
        {"reasons": 5}, {"surprise": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_engine_file_is_one_sentence(corpus: Path, tmp_path: Path, damage: Any) -> None:
    config = tiny(corpus)
    chosen = engines.choose(config, tmp_path, World())
    path = tmp_path / "engine.json"
    assert engines.choose(config, tmp_path, World()) == chosen
    whole = json.loads(path.read_text())
    path.write_bytes(damage if isinstance(damage, bytes) else json.dumps({**whole, **damage}).encode())
    with pytest.raises(InputError, match=r"engine\.json: not an engine file .*; delete it to choose anew") as caught:
        train(config, tmp_path, quiet=True)
    assert len(caught.value.faults) == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize(("fast", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_precision_auto_is_decided_and_recorded(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, expected: str
) -> None:
    monkeypatch.setattr(engines, "bfloat16_is_fast", lambda _: fast)
    record = train(tiny(corpus, tokens=512), tmp_path / "run", quiet=True)
    assert record.environment["precision"] == expected and record.config["train"]["precision"] == "auto"
    told = json.loads((tmp_path / "run/engine.json").read_text())
    assert told["precision"] == expected and any("bfloat16 units" in reason for reason in told["reasons"])
    weights = load_file(newest(tmp_path / "run") / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


# --- memory --------------------------------------------------------------------------------------------------------------


def least_memory(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> int:
    """The least free memory, to 1 in 1000, in which one sequence fits."""
    low, high = 1, 2**32
    while high > low * 1.001:
        middle = (low + high) // 2
        monkeypatch.setattr(engines, "available_memory", lambda _, size=middle: size)
        try:
            engines.micro_batch(config, World(), "float32", "block")
            high = middle
        except InputError:
            low = middle
    return high


def test_steps_are_split_to_fit_into_memory(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(corpus, precision="float32", document_mask=True, z_loss=0.01)
    train(config, tmp_path / "whole", quiet=True)
    assert json.loads((tmp_path / "whole/engine.json").read_text())["micro_batch_sequences"] == 8
    least, seen = least_memory(config, monkeypatch), set()
    for name, memory in (("one", least), ("few", int(1.3 * least)), ("more", int(1.8 * least))):
        monkeypatch.setattr(engines, "available_memory", lambda _, size=memory: size)
        record = train(config, tmp_path / name, quiet=True)
        micro = record.environment["micro_batch_sequences"]
        seen.add(micro)
        assert micro < 8
        for one, two in zip(losses(tmp_path / name), losses(tmp_path / "whole"), strict=True):
            assert one[1] == pytest.approx(two[1], abs=1e-5)
    assert 1 in seen and len(seen) > 1


def test_too_little_memory_is_said_before_the_first_step(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(corpus)
    monkeypatch.setattr(engines, "available_memory", lambda _: int(0.9 * least_memory(config, monkeypatch)))
    with pytest.raises(InputError, match="one sequence of 32 tokens needs .* to train: .* are usable here; use "):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run/metrics.jsonl").exists() and not (tmp_path / "run/checkpoints").exists()
    monkeypatch.undo()
    assert train(config, tmp_path / "run", quiet=True).status == "done"  # nothing in the folder is in the way


# --- the command ---------------------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["train", *(str(word) for word in words)])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_data_that_changed_between_two_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_corpus(tmp_path / "texts.jsonl")
    (tmp_path / "run.yaml").write_text(dumps(mapping(source)))
    with monkeypatch.context() as patch:
        patch.setattr(runs, "Interrupt", stopping_at(2))
        assert command(capsys, tmp_path / "run.yaml", "--out", tmp_path / "run")[0] == 1
    kept = source.read_bytes()
    write_corpus(source, seed=1)
    code, out, err = command(capsys, tmp_path / "run.yaml", "--out", tmp_path / "run")
    said = [line for line in err.splitlines() if "step_00000002" in line]
    assert code == 2 and out == "" and "Traceback" not in err
    assert len(said) == 1 and "the data changed since this run began (fingerprint " in said[0]
    source.write_bytes(kept)
    assert command(capsys, tmp_path / "run.yaml", "--out", tmp_path / "run")[0] == 0


def test_profile_says_where_the_time_goes_and_leaves_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(dumps(mapping(corpus, {"ffn": LOW_RANK}, **GUIDED)))
    code, out, _ = command(capsys, "run.yaml", "--profile", "--out", "elsewhere")
    assert code == 0 and out.startswith("A step takes ") and "Matrix products: " in out
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_deadline_on_the_command_line(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(dumps(mapping(corpus, tokens=256 * 100000)))
    words = [tmp_path / "run.yaml", "--out", tmp_path / "run", "--deadline", "0.2s"]
    saved = []
    for _ in range(2):
        code, out, err = command(capsys, *words)
        assert code == 1 and out == "" and "deadline reached, saved at step " in err and "Traceback" not in err
        saved.append(step_of(newest(tmp_path / "run")))
    assert 0 < saved[0] < saved[1] and not (tmp_path / "run/record.json").exists()


@pytest.mark.parametrize("text", ["soon", "-5m", "0", "0s", "5x", "", "1h1h", "nan", "inf", "5 m", "m"])
def test_bad_durations(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / "run.yaml").write_text(dumps(mapping(corpus)))
    code, _, err = command(capsys, tmp_path / "run.yaml", "--out", tmp_path / "run", f"--deadline={text}")
    assert code == 2 and f"--deadline: expected a duration such as 90s, 45m or 2h30m, got {text!r}" in err
    assert not (tmp_path / "run").exists()


# --- what is documented --------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs/training.md").read_text(encoding="utf-8")
SNIPPETS = [text for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.S) if not text.startswith(("growth", "start"))]


@pytest.mark.parametrize("text", SNIPPETS)
def test_documented_snippets_are_recipes(text: str) -> None:
    """Each on its own, in a run whose feed-forwards can be guided."""
    snippet = loads(text).value
    assert snippet.keys() == {"train"}
    base = mapping(Path("texts.jsonl"), {"ffn": LOW_RANK, "max_position_embeddings": 256})
    base["train"] = {"tokens": 1e8, **snippet["train"]}
    config = run_from(base, "docs/training.md")
    told = config.train.model_dump(mode="json", exclude_unset=True)
    assert told.keys() == snippet["train"].keys() | {"tokens"}


def test_the_page_shows_every_recipe() -> None:
    shown = {key for text in SNIPPETS for key in loads(text).value["train"]}
    told_elsewhere = {"parametrization", "compile", "seed", "validation_tokens"}
    assert TrainConfig.model_fields.keys() - shown == told_elsewhere
    assert "`compile: auto`" in PAGE and "(recipes.md)" in PAGE
