"""The receipt where memory is short."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from scantling.checkpoint import weights_of
from scantling.cli import main
from scantling.growth import grow_folder
from scantling.growth.layerwise import largest_part, layerwise_logits
from scantling.hf_weights import cast
from scantling.model import Decoder
from scantling.parts import Gaussian
from scantling.spec import ModelSpec
from scantling.tensor_files import Held
from tests.growth.families import FAMILIES, family
from tests.growth.growing import random_model, some_ids, times
from tests.growth.test_folders import config_to, stock
from tests.strategies import specs

pytest.importorskip("transformers")


def layerwise_as_held(spec: ModelSpec) -> bool:
    model, ids = random_model(spec, dtype=torch.float32), some_ids(spec)
    weights, _ = weights_of(model)
    with torch.no_grad():
        return torch.equal(layerwise_logits(spec, cast(Held(weights), torch.float32), ids), model(ids))


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_compute_what_the_whole_does(name: str) -> None:
    assert layerwise_as_held(family(name))


@settings(max_examples=times(40))
@given(spec=specs().filter(lambda spec: not isinstance(spec.transition, Gaussian)))
def test_of_any_model(spec: ModelSpec) -> None:
    assert layerwise_as_held(spec)


def test_a_part_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters that hold bytes at any moment: no more than the largest part's."""
    spec, held = family("llama"), []
    forward = torch.nn.Linear.forward
    models: list[Decoder] = []
    monkeypatch.setattr("scantling.growth.layerwise.build_meta", lambda spec: models.append(built(spec)) or models[-1])
    from scantling.model import build_meta as built

    def counted(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        held.append(sum(each.numel() for each in models[0].parameters() if not each.is_meta))
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    layerwise_logits(spec, Held(weights_of(random_model(spec, dtype=torch.float32))[0]), some_ids(spec))
    assert held and max(held) <= largest_part(spec) < sum(each.numel() for each in models[0].parameters()) / 4


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stock(tmp_path / "old", "llama")
    to = config_to(tmp_path / "old", {"intermediate_size": 60, "hidden_size": 48, "num_attention_heads": 6})
    (tmp_path / "text").write_text("the width of a beam")
    whole = grow_folder(tmp_path / "old", to, tmp_path / "whole", text=tmp_path / "text")
    assert whole.logit_difference is not None and whole.text_logit_difference is not None and whole.one_step is not None
    monkeypatch.setattr("scantling.growth.receipt.available_memory", lambda: 200_000)
    with pytest.raises(SystemExit) as end:
        main(f"grow {tmp_path}/old --to {to} --out {tmp_path}/parts --text {tmp_path}/text".split())
    said = capsys.readouterr().out
    assert end.value.code == 0 and "only in float32" in said and "not compared" not in said
    parts = grow_folder(tmp_path / "old", to, tmp_path / "again", text=tmp_path / "text")
    assert parts.logit_difference == {"float32": whole.logit_difference["float32"]}
    assert parts.text_logit_difference == {"float32": whole.text_logit_difference["float32"]}
    assert (
        parts.largest_logit == pytest.approx(whole.largest_logit, rel=0.02) and parts.liveness is None
    )  # there in bfloat16
    assert parts.to_json()["max_abs_logit_difference"] == whole.logit_difference["float32"]

    monkeypatch.setattr("scantling.growth.receipt.available_memory", lambda: 1000)
    nothing = grow_folder(tmp_path / "old", to, tmp_path / "nothing")
    assert nothing.logit_difference is None and "1,000 are free" in str(nothing.not_measured)
    assert nothing.to_json()["max_abs_logit_difference"] is None
