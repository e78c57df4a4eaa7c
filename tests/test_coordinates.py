"""The coordinate check: what must grow with width grows, what must not does not."""

import contextlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scantling import show
from scantling.cli import main
from scantling.config import RunConfig, resolve_run, run_from
from scantling.coordinates import GROWS, CoordinateCheck, Slope, coordinate_check, scaled
from scantling.errors import InputError, RunError
from scantling.model import build
from scantling.optim import lacking_for_mup
from scantling.recipe import MuP
from scantling.reporting import coordinates_page
from scantling.resolve import spec_from
from scantling.yamlio import dumps, loads

UNIFORM = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "ffn": {"kind": "dense", "intermediate_size": 64},
}
BOWTIE = {
    **UNIFORM,
    "hidden_size": [48, 32, 16, 32, 48],
    "num_hidden_layers": 5,
    "head_dim": [12, 8, 4, 8, 12],
    "attention_multiplier": [1 / 12, 1 / 8, 1 / 4, 1 / 8, 1 / 12],
    "transition": {"kind": "carry_forward"},
    "embedding_size": 32,
    "unembedding_size": 32,
    "ffn": {"kind": "dense", "intermediate_size": [96, 64, 32, 64, 96]},
}
INIT = {"kind": "mup", "std": 32**-0.5, "m_width": 1, "base_width": 32}
MUP = {"kind": "mup", "base_hidden_size": 32}


class Chain:
    """Text of a random Markov chain, with the one method that the check asks of a dataset."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        steps, ids = rng.dirichlet(np.full(64, 0.05), 64).cumsum(1), [0]
        for draw in rng.random(20000):
            ids.append(min(63, int(np.searchsorted(steps[ids[-1]], draw))))
        self.ids = np.array(ids)

    def batch(self, *, seed: int, step: int, batch_sequences: int, sequence_length: int) -> Any:
        at = np.random.default_rng((seed, step)).integers(0, len(self.ids) - sequence_length - 1, batch_sequences)
        rows = np.stack([self.ids[start : start + sequence_length + 1] for start in at])
        return rows[:, :-1].copy(), rows[:, 1:].copy()


def run(model: dict[str, Any], mup: bool, **train: Any) -> RunConfig:
    keys = {"tokens": 1e5, "batch_tokens": 512, "sequence_length": 64, "optimizer": {"learning_rate": 0.01}, **train}
    if mup:
        model, keys = {"initialization": INIT, **model}, {"parametrization": MUP, **keys}
    data = {"source": "python-stdlib", "tokenizer": "bytes"}
    return run_from({"name": "run", "model": model, "data": data, "train": keys}, "test")


@cache
def dataset() -> Any:
    return Chain()


def check(config: RunConfig, **keys: Any) -> CoordinateCheck:
    return coordinate_check(config, dataset(), **{"multipliers": (1, 2, 4), "seeds": (0,), **keys})


@pytest.mark.parametrize("model", [UNIFORM, BOWTIE], ids=["uniform", "bowtie"])
def test_standard_grows_and_mup_does_not(model: dict[str, Any]) -> None:
    standard, mup = (check(run(model, mup=mup, optimizer={"learning_rate": 0.02})) for mup in (False, True))
    for kind in ("attention", "ffn", "residual"):
        assert standard.worst[kind].end > 2 * GROWS, standard.verdict
        assert mup.worst[kind].end < GROWS, mup.verdict
    assert standard.grows and "grow with width" in standard.verdict
    assert not mup.grows and "no activation grows" in mup.verdict and not mup.warnings


@pytest.mark.slow
@pytest.mark.parametrize("model", [UNIFORM, BOWTIE], ids=["uniform", "bowtie"])
@pytest.mark.parametrize("rate", [3e-3, 1e-2, 3e-2])
@pytest.mark.parametrize("seeds", [(0, 1), (2, 3), (4, 5)])
def test_at_every_rate_and_seed(model: dict[str, Any], rate: float, seeds: tuple[int, ...]) -> None:
    keys: dict[str, Any] = {"seeds": seeds, "multipliers": (1, 2, 4, 8)}
    optimizer = {"learning_rate": rate}
    standard = check(run(model, mup=False, optimizer=optimizer), **keys)
    mup = check(run(model, mup=True, optimizer=optimizer), **keys)
    for kind in ("attention", "ffn", "residual"):
        least = 2 * GROWS if rate > 3e-3 else mup.worst[kind].end  # at 3e-3 five steps are the onset: 0.2 to 0.3
        assert standard.worst[kind].end > least, standard.verdict
    assert not mup.grows, mup.verdict


@pytest.mark.parametrize(
    ("changes", "said", "grows"),
    [
        ({"logits_scaling": 2.0}, "expected logits_scaling 1, got 2", "logits"),
        ({"initialization": {"kind": "normal", "std": 0.2}}, "normal keeps those of matrices", "ffn"),
        ({"initialization": {"kind": "mup"}}, "without base_width", "ffn"),
        ({"initialization": {"kind": "fan_in"}}, "fan_in lets those of tables shrink", None),
    ],
)
def test_what_is_missing_is_said_and_seen(changes: dict[str, Any], said: str, grows: str | None) -> None:
    found = check(run({**UNIFORM, **changes}, mup=True))
    assert any(said in warning for warning in found.warnings)
    if grows is not None:
        assert found.worst[grows].end >= GROWS


def test_attention_of_growing_heads() -> None:
    config = run(UNIFORM, mup=True)
    said = lacking_for_mup(config.spec, config.train, head_sizes_grow=True)
    assert len(said) == 1 and "c / head_dim" in said[0]
    assert not lacking_for_mup(config.spec, config.train)
    uneven = spec_from({**BOWTIE, "initialization": INIT, "attention_multiplier": 0.1})
    assert any("c / head_dim" in sentence for sentence in lacking_for_mup(uneven, config.train))
    assert not lacking_for_mup(spec_from({**BOWTIE, "initialization": INIT}), config.train)
    assert not lacking_for_mup(uneven, config.train.replace(parametrization=None))


def test_the_measured_activations_are_the_models() -> None:
    """Step 0 by hand, from the parts of the model themselves."""
    config = run(UNIFORM, mup=True)
    found = check(config, steps=1, seeds=(3,))
    model, (ids, _) = (
        build(config.spec, 3),
        dataset().batch(seed=0, step=0, batch_sequences=8, sequence_length=64),
    )
    x = model.embed(torch.from_numpy(ids))
    expected = {}
    for index, layer in enumerate(model.layers):
        attention = layer.self_attn(layer.input_layernorm(x))
        x = x + attention
        ffn = layer.mlp(layer.post_attention_layernorm(x))
        x = x + ffn
        expected |= {("attention", index): attention, ("ffn", index): ffn, ("residual", index): x}
    expected["logits", None] = model(torch.from_numpy(ids))
    got = {
        (row["kind"], row["layer"]): row["mean_abs"]
        for row in found.table
        if row["multiplier"] == 1 and not row["step"]
    }
    assert got == {key: pytest.approx(tensor.abs().mean().item(), rel=1e-5) for key, tensor in expected.items()}


def test_scaled_models() -> None:
    mup = MuP(kind="mup", base_hidden_size=32)
    spec = spec_from({**BOWTIE, "num_key_value_heads": 2})
    wide = scaled(spec, 2, "heads", mup)
    assert wide.widths == (96, 64, 32, 64, 96) and wide.embedding_size == wide.unembedding_size == 64
    assert [layer.num_attention_heads for layer in wide.layers] == [8] * 5
    assert [layer.num_key_value_heads for layer in wide.layers] == [4] * 5
    assert [layer.head_dim for layer in wide.layers] == [12, 8, 4, 8, 12]
    assert [layer.ffn.intermediate_size for layer in wide.layers] == [192, 128, 64, 128, 192]
    assert wide.logits_scaling == 2.0 and scaled(spec, 2).logits_scaling == 1.0
    tall = scaled(spec, 2, "head_dim", mup)
    assert [layer.head_dim for layer in tall.layers] == [24, 16, 8, 16, 24]
    assert [layer.v_head_dim for layer in tall.layers] == [24, 16, 8, 16, 24]
    assert [layer.scale * layer.head_dim for layer in tall.layers] == pytest.approx([1.0] * 5)
    experts = {
        "kind": "moe",
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "expert": {"kind": "block_dense", "intermediate_size": 64, "rank": 16, "num_blocks": 4},
        "shared_expert": {"kind": "low_rank", "intermediate_size": 32, "rank": 8},
    }
    ffn: Any = scaled(spec_from({**UNIFORM, "ffn": experts}), 0.5).layers[0].ffn
    assert (ffn.num_local_experts, ffn.expert.intermediate_size, ffn.expert.rank, ffn.expert.num_blocks) == (
        3,
        32,
        8,
        4,
    )
    assert (ffn.shared_expert.intermediate_size, ffn.shared_expert.rank) == (16, 4)
    with pytest.raises(InputError, match=r"expected whole sizes, got 12 x 0\.3"):
        scaled(spec_from({**UNIFORM, "hidden_size": 12, "head_dim": 4}), 0.3)
    with pytest.raises(InputError, match=r"the model at 0\.25 times its widths: .*even head_dim, got 3"):
        scaled(spec_from({**UNIFORM, "head_dim": 12}), 0.25, "head_dim")


def test_a_run_that_blows_up_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"mean \|.*\| is \S+ at width 32 .* lower the learning rate"):
        check(run(UNIFORM, mup=False, optimizer={"learning_rate": 1e30}, max_grad_norm=0))
    with pytest.raises(InputError, match="at least two width multipliers"):
        check(run(UNIFORM, mup=False), multipliers=(2,))


def test_slopes_are_powers_of_width(monkeypatch: pytest.MonkeyPatch) -> None:
    from scantling.coordinates import _slopes

    table = [
        {"kind": "ffn", "layer": 0, "step": step, "multiplier": m, "mean_abs": factor * m ** (0.3 * step)}
        for step in (0, 2)
        for m in (1, 2, 4)
        for factor in (0.5, 2.0)  # two seeds
    ]
    assert _slopes(table, 2) == [Slope("ffn", 0, pytest.approx(0.0), pytest.approx(0.6))]


def test_what_a_person_sees(capsys: pytest.CaptureFixture[str]) -> None:
    found = check(run({**UNIFORM, "logits_scaling": 2.0}, mup=True), steps=2).to_json()
    show.coordinates(found)
    said = capsys.readouterr().out
    assert found["verdict"] in said.replace("\n", " ") and "warning: muP divides logits" in said
    page = coordinates_page(found)
    assert page.count('class="plot"') == 4 and "What muP still needs" in page and "step 2" in page
    assert 'http-equiv="Content-Security-Policy"' in page


RECIPES = (Path(__file__).parent.parent / "docs/recipes.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", RECIPES, re.S))
def test_the_documented_recipes_lack_nothing(text: str) -> None:
    config = resolve_run(loads(text))
    assert isinstance(config.train.parametrization, MuP)
    assert lacking_for_mup(config.spec, config.train) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{number} squared is {number**2}\n" for number in range(2000)))
    (tmp_path / "run.yaml").write_text(dumps({**run(UNIFORM, mup=True).to_mapping(), "data": data_of(tmp_path)}))
    words = ["train", str(tmp_path / "run.yaml"), "--coord-check", "--out", str(tmp_path / "run")]
    with contextlib.suppress(SystemExit):
        main([*words, "--set", "model.vocab_size=256", "--set", "train.sequence_length=16", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["widths"] == {"1": 32, "2": 64, "4": 128, "8": 256} and len(found["steepest"]) == 4
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["coordinates.html"]


def data_of(folder: Path) -> dict[str, str]:
    return {"source": str(folder / "text.txt"), "tokenizer": "bytes"}
