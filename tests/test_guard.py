"""When a step goes wrong: the threshold by hand, and runs whose loss is made NaN, infinite or huge at chosen steps."""

import json
import math
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from scantling import checkpoint
from scantling.config import RunConfig
from scantling.data.dataset import Dataset
from scantling.errors import RunError
from scantling.model import build
from scantling.recipe import Guard
from scantling.record import RunRecord, read_record
from scantling.training import engine as engines
from scantling.training import train
from scantling.training.folder import opened_dataset
from scantling.training.guard import SETTLED, WINDOW, Watch
from scantling.training.parallel import World
from scantling.training.step import Stepper
from tests.runs import (
    LOW_RANK,
    assert_same_run,
    losses,
    newest,
    state,
    tiny,
    train_with_stops,
)

pytestmark = pytest.mark.usefixtures("same_kernel")

NAN, INF = math.nan, math.inf


# --- the watch -----------------------------------------------------------------------------------------------------------


def watch(losses: list[float] | None = None, **guard: Any) -> Watch:
    return Watch(Guard(**guard), list(losses or []))


def test_the_threshold_by_hand() -> None:
    """Median and median absolute deviation of 1, 2, ..., 17: 9 and 4."""
    spread = watch([float(n) for n in range(1, 18)], spike="skip", spike_sigmas=3.0)
    assert spread.threshold() == pytest.approx(9 + 3 * 1.4826 * 4, rel=1e-12)
    even = watch([1.0, 2.0, 3.0, 10.0] * 4, spike="skip", spike_sigmas=2.0)  # median 2.5, deviations 0.5, 1.5, 7.5
    assert even.threshold() == pytest.approx(2.5 + 2 * 1.4826 * 1.0, rel=1e-12)
    flat = watch([5.0] * 20, spike="stop", spike_sigmas=4.0)  # no deviation: one in a hundred of the median
    assert flat.threshold() == pytest.approx(5 + 4 * 0.05, rel=1e-12)


def test_no_threshold_before_there_is_enough_to_tell() -> None:
    assert watch([1.0] * (SETTLED - 1), spike="skip").threshold() == INF
    assert watch([1.0] * SETTLED, spike="skip").threshold() < INF
    assert watch([1.0] * 64).threshold() == INF  # spikes are ignored by default


def test_only_the_last_losses_of_good_steps_count() -> None:
    seen = watch(spike="skip")
    for step in range(1, 101):
        assert seen.judge(step, float(step), 1.0, applied=True) == "ok"
    assert seen.losses == [float(n) for n in range(101 - WINDOW, 101)]
    assert seen.threshold() == pytest.approx(68.5 + 8 * 1.4826 * 16)
    before = seen.threshold()
    assert seen.judge(101, 1e9, 1.0, applied=False) == "skip"
    assert seen.judge(102, NAN, 1.0, applied=False) == "stop"
    assert seen.threshold() == before and len(seen.losses) == WINDOW


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
@pytest.mark.parametrize(
    ("loss", "norm", "what"),
    [(NAN, 1.0, "non_finite"), (1.0, INF, "non_finite"), (1.0, NAN, "non_finite"), (99.0, 1.0, "spike")],
)
def test_each_fault_has_its_policy(policy: Any, loss: float, norm: float, what: str) -> None:
    seen = watch(**{"non_finite": "stop", "spike": "stop", what: policy})
    assert seen.judge(7, loss, norm, applied=False) == policy
    (event,) = seen.events
    assert (event["step"], event["decision"]) == (7, policy)
    assert float(event["loss"]) == pytest.approx(loss, nan_ok=True)
    json.dumps(seen.events, allow_nan=False)
    kind = "loss spike" if what == "spike" else "loss or gradient not finite"
    done = {"skip": "update left out", "rollback": "went back to the last checkpoint", "stop": "stopped"}[policy]
    assert seen.sentences() == [f"step 7: {kind} (loss {loss!r}, gradient norm {norm!r}): {done}"]


def test_after_so_many_events_it_stops_in_any_case() -> None:
    seen = watch(non_finite="skip", most=3)
    found = [seen.judge(step, NAN, NAN, applied=False) for step in (1, 2, 3)]
    assert found == ["skip", "skip", "stop"]
    assert watch(non_finite="skip", most=1).judge(1, NAN, NAN, applied=False) == "stop"


# --- runs with injected faults -------------------------------------------------------------------------------------------

Faults = Callable[[int, int], float]  # (0-based step, shift) -> what the loss is multiplied by


class Seen:
    """What a run did: (step, shift) of every step taken, and the weights before each."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.weights: dict[str, Tensor] = {}


@contextmanager
def faulty(faults: Faults) -> Any:
    """Runs inside have these faults."""
    real_step, real_loss, seen = Stepper.step, World.loss, Seen()

    def step(self: Stepper, at: int, shift: int, threshold: float) -> Any:
        seen.steps.append((at, shift))
        found = real_step(self, at, shift, threshold)
        seen.weights = {name: value.clone() for name, value in checkpoint.weights_of(self.model)[0].items()}
        return found

    def loss(self: World, model: Any) -> Callable[..., Tensor]:
        plain = real_loss(self, model)
        return lambda *arguments: plain(*arguments) * faults(*seen.steps[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", step)
        patch.setattr(World, "loss", loss)
        yield seen


def at(value: float, *steps: int) -> Faults:
    """A fault whenever one of these 0-based steps is taken."""
    return lambda step, shift: value if step in steps else 1.0


def once(value: float, *places: tuple[int, int]) -> Faults:
    """A fault only where a step meets certain data."""
    return lambda step, shift: value if (step, shift) in places else 1.0


def stepped(config: RunConfig, leaving_out: set[int]) -> dict[str, Tensor]:
    """The weights after all steps but some, taken by hand."""
    world = World()
    engine = engines.chosen(config, world)
    model = build(config.spec, config.train.seed, world.device)
    stepper = Stepper(config, engine, world, opened_dataset(config, quiet=True), model)
    for step in range(config.steps):
        if config.guidance is not None and step == config.guidance.guided_steps:
            stepper.remove_guides()
        if step not in leaving_out:
            stepper.step(step, 0, INF)
    stepper.close()
    return {name: value.clone() for name, value in checkpoint.weights_of(model)[0].items()}


def assert_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("bad", [0, 7])
def test_stop_leaves_the_last_good_weights(corpus: Path, tmp_path: Path, value: float, bad: int) -> None:
    config = tiny(corpus, checkpoint_every=3)
    train(tiny(corpus, checkpoint_every=1, keep_last=99), tmp_path / "good", quiet=True)
    with faulty(at(value, bad)) as seen, pytest.raises(RunError, match=f"diverged at step {bad + 1} .*not finite"):
        train(config, tmp_path / "run", quiet=True)
    record = read_record(tmp_path / "run")
    assert record.status == "diverged" and record.steps == bad and record.tokens == bad * 256
    assert len(record.warnings) == 1 and f"step {bad + 1}: loss or gradient not finite" in record.warnings[0]
    assert "stopped" in record.warnings[0]
    good = tmp_path / "good/checkpoints"
    expected = saved(good / f"step_{bad:08d}") if bad else dict(build(config.spec).named_parameters())
    assert_weights(seen.weights, expected)  # in memory, after the bad step
    if bad:  # on disk: the checkpoint before it, as ever
        assert newest(tmp_path / "run").name == "step_00000006"
        assert_weights(saved(newest(tmp_path / "run")), saved(good / "step_00000006"))
    assert [step for step, _, _ in losses(tmp_path / "run")] == list(range(1, bad + 2))
    assert json.loads((tmp_path / "run/record.json").read_text())["status"] == "diverged"


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"optimizer": {"kind": "muon", "learning_rate": 1e-2}, "gradient_accumulation_steps": 2},
        {"optimizer": {"kind": "sgd"}, "average_decay": 0.7},
    ],
    ids=["adamw", "muon", "sgd"],
)
def test_skip_leaves_that_update_out(corpus: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    config = tiny(corpus, guard={"non_finite": "skip"}, **keys)
    with faulty(lambda step, _: {0: NAN, 4: INF, 5: -INF}.get(step, 1.0)):
        record = train(config, tmp_path / "run", quiet=True)
    assert record.status == "done" and record.steps == 12
    assert_weights(saved(newest(tmp_path / "run")), stepped(config, {0, 4, 5}))
    assert [warning.partition(":")[0] for warning in record.warnings] == ["step 1", "step 5", "step 6"]
    assert all("update left out" in warning for warning in record.warnings)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("decision") == "skip"] == [1, 5, 6]


def test_a_skipped_last_step_is_not_a_diverged_run(corpus: Path, tmp_path: Path) -> None:
    config = tiny(corpus, guard={"non_finite": "skip"})
    with faulty(at(NAN, 11)):
        record = train(config, tmp_path / "run", quiet=True)
    assert record.status == "done"
    assert record.final["train_loss"] == losses(tmp_path / "run")[10][1]  # the last good one


def test_a_spike_is_left_out(corpus: Path, tmp_path: Path) -> None:
    config = tiny(corpus, tokens=24 * 256, guard={"spike": "skip", "spike_sigmas": 20.0})
    with faulty(at(50.0, 3, 20)):  # the first comes before there is a threshold
        record = train(config, tmp_path / "run", quiet=True)
    (event,) = state(tmp_path / "run")["events"]
    assert (event["step"], event["what"], event["decision"]) == (21, "loss spike", "skip")
    assert len(record.warnings) == 1 and record.status == "done"
    with faulty(at(50.0, 3)):
        assert_weights(saved(newest(tmp_path / "run")), stepped(config, {20}))


def test_a_spike_stops_where_that_is_asked_for(corpus: Path, tmp_path: Path) -> None:
    config = tiny(corpus, tokens=24 * 256, guard={"spike": "stop", "spike_sigmas": 20.0})
    with faulty(at(50.0, 18)), pytest.raises(RunError, match="diverged at step 19 .loss spike"):
        train(config, tmp_path / "run", quiet=True)
    assert read_record(tmp_path / "run").status == "diverged"


def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first number of every batch of training sequences that a run asks for; they come one ahead."""
    firsts: list[int] = []
    real = Dataset.sequences

    def spied(self: Dataset, **keys: Any) -> Any:
        firsts.append(keys["first"])
        return real(self, **keys)

    monkeypatch.setattr(Dataset, "sequences", spied)
    return firsts


def test_rollback_passes_over_the_data_since(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 1 to 7 (checkpoint at 6), 8 fails: steps 7 and 8 are taken anew on the data of what would be steps 9 and 10."""
    config = tiny(corpus, checkpoint_every=3, guard={"non_finite": "rollback"})
    train(tiny(corpus, checkpoint_every=3, keep_last=9), tmp_path / "good", quiet=True)
    firsts = asked(monkeypatch)
    with faulty(once(NAN, (7, 0))) as seen:
        record = train(config, tmp_path / "run", quiet=True)
    assert seen.steps == [(step, 0) for step in range(8)] + [(step, 16) for step in range(6, 12)]
    assert firsts == [8 * n for n in range(14)]  # nothing twice, and nothing left out
    assert record.status == "done" and record.steps == 12 and record.tokens == 12 * 256
    assert len(record.warnings) == 1 and "step 8" in record.warnings[0]
    assert "went back to the last checkpoint" in record.warnings[0]
    good = losses(tmp_path / "good")
    found = losses(tmp_path / "run")
    assert found[:7] == good[:7] and [step for step, _, _ in found] == [*range(1, 9), *range(7, 13)]
    # and the weights: those of step 6, then six steps on the later data
    stepper = Stepper(
        config, engines.chosen(config, World()), World(), opened_dataset(config, quiet=True), build(config.spec)
    )
    for step, shift in [*((step, 0) for step in range(6)), *((step, 16) for step in range(6, 12))]:
        stepper.step(step, shift, INF)
    stepper.close()
    assert_weights(saved(newest(tmp_path / "run")), checkpoint.weights_of(stepper.model)[0])


def test_rollback_without_a_checkpoint_starts_from_the_beginning(corpus: Path, tmp_path: Path) -> None:
    config = tiny(corpus, guard={"non_finite": "rollback"}, average_decay=0.9)
    with faulty(once(INF, (4, 0))) as seen:
        record = train(config, tmp_path / "run", quiet=True)
    assert seen.steps == [(step, 0) for step in range(5)] + [(step, 40) for step in range(12)]
    assert record.status == "done" and len(record.warnings) == 1


def test_rollbacks_add_up(corpus: Path, tmp_path: Path) -> None:
    """Again before the next checkpoint, and once more after it."""
    config = tiny(corpus, checkpoint_every=3, guard={"non_finite": "rollback"})
    with faulty(once(NAN, (4, 0), (3, 16), (8, 24))) as seen:
        record = train(config, tmp_path / "run", quiet=True)
    assert seen.steps == [
        *((step, 0) for step in range(5)),  # 3 saved, 5 fails: two steps passed over
        (3, 16),  # fails too: one more
        *((step, 24) for step in range(3, 9)),  # 6 saved, 9 fails: three more
        *((step, 48) for step in range(6, 12)),
    ]
    assert [warning.partition(":")[0] for warning in record.warnings] == ["step 5", "step 4", "step 9"]


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (4, [*((step, 0) for step in range(5)), *((step, 8) for step in range(4, 18))]),  # guided
        (6, [*((step, 0) for step in range(7)), *((step, 24) for step in range(4, 18))]),  # back among the guided steps
        (13, [*((step, 0) for step in range(14)), *((step, 16) for step in range(12, 18))]),  # repeating
        (12, [*((step, 0) for step in range(13)), *((step, 8) for step in range(12, 18))]),  # where the plan ended
    ],
)
def test_rollback_of_a_guided_run(corpus: Path, tmp_path: Path, bad: int, expected: list[tuple[int, int]]) -> None:
    config = tiny(
        corpus, {"ffn": LOW_RANK}, guide={"mode": "fixed_flops", "ratio": 0.5}, average_decay=0.8, checkpoint_every=4,
        guard={"non_finite": "rollback"},
    )  # fmt: skip
    with faulty(once(NAN, (bad, 0))) as seen:
        record = train(config, tmp_path / "run", quiet=True)
    assert seen.steps == expected
    assert record.status == "done" and not (newest(tmp_path / "run") / "guides.safetensors").exists()


def test_rollback_over_the_end_of_the_plan_goes_forward(corpus: Path, tmp_path: Path) -> None:
    """The repeats read low numbers again; the data passed over are still counted forward."""
    config = tiny(
        corpus, {"ffn": LOW_RANK}, guide={"mode": "fixed_flops", "ratio": 0.5}, checkpoint_every=5,
        guard={"non_finite": "rollback"},
    )  # fmt: skip
    with faulty(once(NAN, (13, 0))) as seen:  # the checkpoint is at 10, the plan ends at 12
        train(config, tmp_path / "run", quiet=True)
    assert seen.steps[14:] == [(step, 32) for step in range(10, 18)]


def test_most_events_end_the_run(corpus: Path, tmp_path: Path) -> None:
    for policy in ("skip", "rollback"):
        config = tiny(corpus, guard={"non_finite": policy, "most": 3})
        with faulty(at(NAN, 2, 3, 5)), pytest.raises(RunError, match="diverged"):
            train(config, tmp_path / policy, quiet=True)
        record = read_record(tmp_path / policy)
        assert record.status == "diverged" and len(record.warnings) == 3 and "stopped" in record.warnings[-1]


def test_threshold_and_tail_survive_an_interruption(corpus: Path, tmp_path: Path) -> None:
    """A spike soon after a resumption is still one, and the reported training loss is a mean over both starts."""
    config = tiny(corpus, tokens=40 * 256, guard={"spike": "skip", "spike_sigmas": 20.0})
    with faulty(at(50.0, 24)):
        whole = train(config, tmp_path / "whole", quiet=True)
        parts = train_with_stops(config, tmp_path / "parts", [20, 39])
    assert len(whole.warnings) == 1 and whole.warnings == parts.warnings
    last = [loss for _, loss, _ in losses(tmp_path / "parts")[-2:]]
    assert whole.final == parts.final and parts.final["train_loss"] == sum(last) / 2
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_events_survive_an_interruption(corpus: Path, tmp_path: Path, policy: str) -> None:
    """The run ends with the same weights, events and losses; `most` counts over all starts.

    A rollback goes to the last checkpoint, which an interruption can add: those here come where there is one anyway, and in
    the very step that fails (the fourth).
    """
    config = tiny(corpus, checkpoint_every=2, guard={"non_finite": policy, "most": 4})
    faults = once(NAN, (3, 0), (7, 0), (8, 16))

    def run(out: Path, stops: list[int]) -> RunRecord:
        with faulty(faults):
            return train_with_stops(config, out, stops)

    whole = run(tmp_path / "whole", [])
    assert len(whole.warnings) >= 2
    for stop in (3, 4, 5, 8) if policy == "skip" else (2, 4, 6, 8):
        parts = run(tmp_path / str(stop), [stop])
        assert parts.warnings == whole.warnings
        assert_same_run(tmp_path / "whole", tmp_path / str(stop))


def test_a_kill_after_a_rollback_repeats_it(corpus: Path, tmp_path: Path) -> None:
    """Killed between a rollback and the next checkpoint: the same events come again, once each."""
    config = tiny(corpus, checkpoint_every=4, guard={"non_finite": "rollback"})

    class Killed(BaseException):
        pass

    def killing(step: int, shift: int) -> float:
        if (step, shift) == (5, 16) and not (tmp_path / "mark").exists():
            (tmp_path / "mark").touch()
            raise Killed
        return NAN if (step, shift) == (5, 0) else 1.0

    with faulty(once(NAN, (5, 0))):
        whole = train(config, tmp_path / "whole", quiet=True)
    with faulty(killing), pytest.raises(Killed):
        train(config, tmp_path / "run", quiet=True)
    with faulty(killing):
        again = train(config, tmp_path / "run", quiet=True)
    assert again.warnings == whole.warnings and len(again.warnings) == 1
    assert_same_run(tmp_path / "whole", tmp_path / "run")
