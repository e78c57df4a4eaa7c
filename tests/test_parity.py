"""Our modules against recorded outputs of the authors' code, and that the comparison notices what is wrong."""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scantling.model.ffn import BlockDenseLinear, BlockShuffleLinear, LowRankLinear
from scantling.model.guided import GuidedLinear
from scantling.optim import learning_rate_factor
from scantling.recipe import TrainConfig
from tests.parity.__main__ import find, main
from tests.parity.check import Case

ORACLES = Path(__file__).parent / "data/oracles"
KINDS: dict[tuple[str, str], list[Case]] = defaultdict(list)
for _folder, _, _cases in find(ORACLES):
    for _case in _cases:
        KINDS[_folder.name, _case.kind].append(_case)


@pytest.mark.parametrize("kind", sorted(KINDS), ids="-".join)
def test_agrees_with_the_authors(kind: tuple[str, str]) -> None:
    failures = {case.name: checks.line() for case in KINDS[kind] if not (checks := case.checked()).passed}
    assert not failures


def test_every_recorded_file_is_run() -> None:
    assert {path.stem for _, path, cases in find(ORACLES) if not cases} == set()
    assert sum(len(cases) for cases in KINDS.values()) > 100


def copied(folder: str, tmp_path: Path) -> Path:
    shutil.copytree(ORACLES / folder, tmp_path / folder)
    return tmp_path / folder


@pytest.mark.parametrize(
    ("file", "tensor", "case"),
    [
        ("structured_ffn/blockshuffle_expand.safetensors", "output", "blockshuffle_expand"),
        ("structured_ffn/guided_lowrank.safetensors", "grad.guide_linear", "guided_lowrank"),
        ("gpt_variants/a_conv.safetensors", "expect64.logits", "a_conv"),
        ("variable_width/resize.safetensors", "zero_x/output", "zero_x"),
        ("variable_width/models.safetensors", "moe_move_up/grad.layers.2.moe.router.weight", "moe_move_up"),
    ],
)
def test_a_perturbed_tensor_fails(
    file: str, tensor: str, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(file.split("/", maxsplit=1)[0], tmp_path) / file.rsplit("/", maxsplit=1)[-1]
    tensors = load_file(path)
    tensors[tensor].flatten()[0] += 0.25
    save_file(tensors, path)
    assert main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    (failed,) = [line for line in lines if line.startswith("FAILED")]
    assert f" {case}: largest deviation 0.25 " in failed
    assert lines[-1].endswith(" passed, 1 failed")


def test_a_wrong_count_a_nan_an_unknown_kind_and_an_unused_tensor_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied("structured_ffn", tmp_path)
    for name, key in (("lowrank_expand", "output"), ("lowrank_float32", "more")):
        tensors = load_file(folder / f"{name}.safetensors")
        tensors[key] = torch.full((2, 5, 96), float("nan"), dtype=torch.float64)
        save_file(tensors, folder / f"{name}.safetensors")
    costs = json.loads((folder / "costs.json").read_text())
    costs[0]["parameters_total"] += 1
    (folder / "costs.json").write_text(json.dumps(costs))
    cases = json.loads((folder / "cases.json").read_text())
    cases[4]["kind"] = "new"
    (folder / "cases.json").write_text(json.dumps(cases))
    (folder / "schedules.json").write_text("{")
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    expected = (
        "costs 0: parameters_total: got 182848, expected 182849",
        "largest deviation nan",
        "['more']",
        "does not know",
    )
    assert all(text in out for text in expected) and "cannot be read as cases" in out
    assert out.splitlines()[-1].endswith(" 5 failed")


def test_all_agree_exits_0_and_nothing_found_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ORACLES / "structured_ffn")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "44 passed, 0 failed"
    assert main([str(tmp_path)]) == 1
    assert main([str(tmp_path / "missing")]) == 2


def test_guidance_starts_and_ends_without_changing_the_function() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 24)
    for structured in (
        LowRankLinear(24, 12, 4, True),
        BlockShuffleLinear(24, 12, 3, True),
        BlockDenseLinear(24, 12, 6, 3, True),
    ):
        for parameter in structured.parameters():
            torch.nn.init.normal_(parameter)
        guided = GuidedLinear(structured, stochastic=True)
        before = structured(x)
        for alpha in (1.0, 0.4, 0.0, None):
            guided.alpha = alpha
            torch.testing.assert_close(guided(x), before)
            torch.testing.assert_close(guided(x, draw=0.0), before)
        guided.guide.data.zero_()
        guided.alpha = 1.0
        assert not torch.allclose(guided.train()(x), before)
        torch.testing.assert_close(guided.eval()(x), before)
        assert torch.equal(guided.merge(), structured.merge())


def test_the_power_schedule_is_written_like_any_other() -> None:
    keys = {"tokens": 524288e3, "batch_tokens": 524288, "optimizer": {"learning_rate": 0.05}}
    train = TrainConfig.model_validate({**keys, "schedule": {"kind": "power"}})
    factors = [learning_rate_factor(train, step) for step in range(train.steps)]
    assert max(factors) == factors[79] == pytest.approx(512 * (524288 * 80) ** -0.566 / 0.05)
    assert factors[0] == pytest.approx(factors[79] / 80) and factors[-1] < factors[80] < factors[79]
