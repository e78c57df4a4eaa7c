"""When to grow: the fact sheet's numbers, two routes to one schedule, published formulas and where they do not apply."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scantling.cli import main
from scantling.config import load_run
from scantling.errors import InputError
from scantling.laws import LawFit, load_published
from scantling.planning.curves import Curve
from scantling.planning.growing import shape_of, timing
from scantling.planning.schedule import Trained, cheapest, legs, spent_holding, switching_loss
from scantling.planning.stacking import stacking, stacking_tokens
from scantling.planning.timing import Shape, Timing
from scantling.resolve import spec_from
from scantling.units import format_count

HOFFMANN = load_published("chinchilla-hoffmann")
DRAWN = load_published("chinchilla-epoch-huber")
SPEC = """vocab_size: 32000
hidden_size: {width}
num_hidden_layers: {depth}
num_attention_heads: {heads}
num_key_value_heads: {heads}
intermediate_size: {ffn}
hidden_act: silu
max_position_embeddings: 1024
tie_word_embeddings: false
"""


def sized(*parameters: float) -> list[Shape]:
    """Shapes known by N alone, at 6 N FLOPs per token."""
    return [Shape(f"{n:g}", n, 6 * n) for n in parameters]


def ask(*parameters: float, tokens: float, paid: float | None = None, fit: LawFit = HOFFMANN) -> Timing:
    return timing([("law", fit)], sized(*parameters), tokens, paid)


def law(text: str, **params: float) -> LawFit:
    return LawFit(text, params, "test", {}, {}, bootstrap="none")


def curves(fit: LawFit, sizes: Sequence[float], flops: Sequence[float] | None = None) -> list[Trained]:
    return [
        Trained(Curve.of(fit, {"N": n}, {}), c) for n, c in zip(sizes, flops or [6 * n for n in sizes], strict=True)
    ]


# --- one switch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, multiple, saved",
    [
        ((1e9, 4e9), 20, 7.9), ((1e9, 4e9), 100, 1.6), ((1e9, 4e9), 300, 0.5),
        ((0.25e9, 1e9), 20, 5.9), ((0.25e9, 1e9), 100, 1.2), ((0.25e9, 1e9), 300, 0.4),
        ((1.75e9, 7e9), 20, 8.9), ((1.75e9, 7e9), 100, 1.8), ((1.75e9, 7e9), 300, 0.6),
    ],
)  # fmt: skip
def test_savings_of_the_sheet(sizes: tuple[float, float], multiple: float, saved: float) -> None:
    found = ask(*sizes, tokens=multiple * sizes[1])
    assert found.saved is not None and round(100 * found.saved.value, 1) == saved
    assert found.six_nd is not None and found.six_nd.saved == pytest.approx(found.saved.value, rel=1e-12)
    if sizes == (1e9, 4e9):
        switch = found.switches[0]
        assert round(switch.loss.value, 4) == 2.4195
        assert round(switch.tokens_before.value / 1e9) == 71 and round(switch.tokens_worth.value / 1e9) == 24


@given(
    A=st.floats(50, 2000), B=st.floats(50, 5000), E=st.floats(0, 2), alpha=st.floats(0.2, 0.6), beta=st.floats(0.2, 0.6),
    size=st.floats(1e7, 1e10), ratio=st.floats(1.3, 20), dear=st.floats(0.8, 1.25), multiple=st.floats(5, 1000),
)  # fmt: skip
def test_search_equals_the_closed_form(
    A: float, B: float, E: float, alpha: float, beta: float, size: float, ratio: float, dear: float, multiple: float
) -> None:
    fit = law("chinchilla", A=A, B=B, E=E, alpha=alpha, beta=beta)
    sizes = (size, size * ratio)
    flops = (6 * size * min(dear, 0.9 * ratio), 6 * size * ratio)
    small, large = curves(fit, sizes, flops)
    exact = switching_loss(fit.form, sizes, flops)
    tokens = multiple * sizes[1]
    goal = float(large.curve.loss(tokens))
    found = cheapest([small, large], goal)
    if goal < exact:
        assert [leg.shape for leg in found] == [0, 1]
        assert found[0].to_loss == pytest.approx(exact, abs=1e-8)
        assert small.marginal(exact) == pytest.approx(large.marginal(exact), rel=1e-6)
        assert found[0].tokens == pytest.approx(float(fit.form.tokens_for_loss(size, exact)), rel=1e-5)
        step = 1e-6 * exact
        slope = float(large.compute(exact - step) - large.compute(exact + step)) / (2 * step)
        assert large.marginal(exact) == pytest.approx(slope, rel=1e-3)
    else:
        assert [leg.shape for leg in found] == [0]
    assert sum(leg.flops for leg in found) <= float(large.compute(goal)) * (1 + 1e-9)  # loss and back loses digits


def test_marginal_cost_of_a_power_of_a_sum() -> None:
    fit = law("kaplan", Nc=8.8e13, Dc=5.4e13, alpha_N=0.076, alpha_D=0.095)
    (one,) = curves(fit, [1e9])
    loss = float(one.curve.loss(3e10))
    slope = float(one.compute(loss - 1e-6) - one.compute(loss + 1e-6)) / 2e-6
    assert one.marginal(loss) == pytest.approx(slope, rel=1e-5)
    assert one.marginal(0.5) == math.inf


# --- schedules -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000))
def test_no_other_schedule_is_cheaper(seed: int) -> None:
    """Against every choice of shapes and of losses on a grid, with one law per shape."""
    rng = np.random.default_rng(seed)
    shapes, cost = [], 1.0
    for floor in np.sort(rng.uniform(1.5, 2.2, 3))[::-1]:
        cost *= rng.uniform(1.2, 4)
        fit = law("tokens", E=float(floor), B=float(rng.uniform(10, 40)), beta=float(rng.uniform(0.15, 0.3)))
        shapes += [Trained(Curve.of(fit, {"N": 1.0}, {}), cost)]
    goal = float(shapes[-1].curve.loss(1e9))
    found = sum(leg.flops for leg in cheapest(shapes, goal))
    grid = np.asarray(shapes[-1].curve.loss(np.geomspace(1e3, 1e9, 25)))
    finite = [loss for loss in grid if all(np.isfinite(shape.compute(float(loss))) for shape in shapes)]
    for order in ([2], [1, 2], [0, 2], [0, 1, 2]):
        for ends in combinations(finite, len(order) - 1):
            other = sum(leg.flops for leg in legs(shapes, order, [math.inf, *ends, goal]))
            assert found <= other * (1 + 1e-9)


def test_one_law_of_several_shapes_switches_between_neighbours() -> None:
    found = ask(0.25e9, 1e9, 4e9, tokens=80e9)
    assert [leg.shape for leg in found.legs] == [0, 1, 2]
    for switch, pair in zip(found.switches, ((0.25e9, 1e9), (1e9, 4e9)), strict=True):
        assert switch.loss.value == pytest.approx(switching_loss(HOFFMANN.form, pair), abs=1e-9)
    assert found.saved is not None and found.saved.value > 0.079


def test_one_law_per_shape_is_the_same_question() -> None:
    """Laws of tokens whose floors are the law's at each size give the law's schedule."""
    form = HOFFMANN.form
    fits = [(f"{n:g}", law("tokens", E=form.E + form.A * n**-form.alpha, B=form.B, beta=form.beta)) for n in (1e9, 4e9)]
    found = timing(fits, sized(1e9, 4e9), 80e9)
    assert found.switches[0].loss.value == pytest.approx(switching_loss(form, (1e9, 4e9)), abs=1e-9)
    assert found.six_nd is not None and found.six_nd.closed_form is None


def test_other_laws_that_are_a_law_of_size_in_disguise() -> None:
    """Over-training's (C, M) form is one of N and D; a law of width is one of N with the width for N."""
    over = law("overtraining", E=1.8, a=140.0, b=150.0, eta=0.12)
    assert ask(1e9, 4e9, tokens=80e9, fit=over).switches[0].loss.value == pytest.approx(
        switching_loss(over.form, (1e9, 4e9)), abs=1e-9
    )
    wide = law("E + A*width^-alpha + B*D^-beta", E=1.7, A=20.0, alpha=0.6, B=400.0, beta=0.28)
    shapes = [Shape("a", 1e9, 7e9, {"width": 1024}), Shape("b", 2e9, 15e9, {"width": 2048})]
    plain = law("chinchilla", **wide.params).form
    found = timing([("wide", wide)], shapes, 500e9)
    assert found.switches[0].loss.value == pytest.approx(switching_loss(plain, (1024, 2048), (7e9, 15e9)), abs=1e-9)


def test_a_useless_shape_is_left_out_in_words() -> None:
    shapes = sized(0.5e9, 1e9, 4e9)
    dear = replace(shapes[1], flops_per_token=100 * shapes[1].flops_per_token)
    found = timing([("law", HOFFMANN)], [shapes[0], dear, shapes[2]], 80e9)
    assert [leg.shape for leg in found.legs] == [0, 2]
    assert any(note.startswith("1e+09 is left out") for note in found.notes)


def test_too_few_tokens_for_the_larger_one() -> None:
    found = ask(1e9, 4e9, tokens=10e9)
    assert not found.grows and found.saved is None and found.switches == () and found.run_config is None
    assert any(note.startswith("Do not grow for this") for note in found.notes)


def test_cheap_large_shape_is_trained_from_scratch() -> None:
    fits = [(name, law("tokens", E=floor, B=400.0, beta=0.28)) for name, floor in (("a", 2.2), ("b", 2.0))]
    found = timing(fits, [Shape("a", 1e9, 6e9), Shape("b", 1e9, 5e9)], 80e9)
    assert [leg.shape for leg in found.legs] == [1] and any("from scratch: at no loss" in note for note in found.notes)
    assert found.saved is not None and found.saved.value == pytest.approx(0, abs=1e-12)


# --- a checkpoint already paid for -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, multiples, covered",
    [((0.5e9, 1e9), (300, 100), 57), ((0.5e9, 1e9), (100, 100), 24), ((1e9, 4e9), (100, 20), 39)],
)
def test_what_a_checkpoint_covers(sizes: tuple[float, float], multiples: tuple[float, float], covered: int) -> None:
    found = ask(*sizes, tokens=multiples[1] * sizes[1], paid=multiples[0] * sizes[0])
    assert found.reuse is not None and round(100 * found.reuse.covered.value) == covered and not found.reuse.ahead
    assert [leg.shape for leg in found.legs] == [1]  # beyond l*: grow now
    assert found.saved is not None and found.saved.value == pytest.approx(found.reuse.covered.value, rel=1e-9)
    assert found.run_config is not None and "scantling grow CHECKPOINT --to" in found.run_config


def test_a_checkpoint_before_the_switch_is_trained_on_first() -> None:
    found = ask(1e9, 4e9, tokens=80e9, paid=20e9)
    assert [leg.shape for leg in found.legs] == [0, 1]
    switch = found.switches[0]
    assert switch.loss.value == pytest.approx(switching_loss(HOFFMANN.form, (1e9, 4e9)), abs=1e-9)
    assert found.legs[0].tokens == pytest.approx(switch.tokens_before.value - 20e9, rel=1e-6)
    assert switch.share.value == pytest.approx(found.legs[0].tokens / found.run_tokens)


def test_a_checkpoint_that_is_already_better() -> None:
    found = ask(1e9, 4e9, tokens=20e9, paid=1e12)
    assert found.reuse is not None and found.reuse.ahead and found.legs == () and found.run_config is None
    said = found.notes[0]
    assert "already at or below" in said and "only a lower floor" in said and "It pays only if" in said
    below = timing(
        [(name, law("tokens", E=floor, B=400.0, beta=0.28)) for name, floor in (("a", 1.0), ("b", 2.0))],
        sized(1e9, 4e9), 20e9, 1e14,
    )  # fmt: skip
    assert "never gets below the checkpoint's loss" in below.notes[0]
    assert below.to_json()["reuse"]["tokens_worth"]["value"] is None
    json.dumps(below.to_json(), allow_nan=False)


# --- uncertainty and refusals ----------------------------------------------------------------------------------------


def test_intervals_come_from_the_draws() -> None:
    found = ask(1e9, 4e9, tokens=80e9, fit=DRAWN)
    assert DRAWN.draws is not None and found.saved is not None
    every = [dict(zip(DRAWN.params, row, strict=True)) for row in DRAWN.draws[:: -(-len(DRAWN.draws) // 200)]]
    losses = [switching_loss(law("chinchilla", **row).form, (1e9, 4e9)) for row in every]
    switch = found.switches[0]
    assert switch.loss.low == pytest.approx(np.quantile(losses, 0.025, method="lower"), abs=1e-8)
    assert switch.loss.high == pytest.approx(np.quantile(losses, 0.975, method="higher"), abs=1e-8)
    held = []
    for row in every:
        form = law("chinchilla", **row).form
        worth = float(form.tokens_for_loss(4e9, form.loss(1e9, switch.tokens_before.value)))
        held.append((worth - switch.tokens_before.value / 4) / 80e9)
    assert found.saved.low == pytest.approx(np.quantile(held, 0.025, method="lower"), abs=1e-6)
    without = ask(1e9, 4e9, tokens=80e9)
    assert without.saved is not None and without.saved.low is None
    assert any(note.startswith("No interval from law: the source gives no") for note in without.notes)


def test_a_schedule_held_under_its_own_law_costs_what_it_says() -> None:
    now = curves(HOFFMANN, (0.25e9, 1e9, 4e9))
    for paid in (0.0, 5e9):
        start = float(now[0].curve.loss(paid)) if paid else math.inf
        found = cheapest(now, float(now[-1].curve.loss(80e9)), start)
        assert spent_holding(now, found, 80e9, paid) == pytest.approx(sum(leg.flops for leg in found), rel=1e-9)


def test_outside_the_fitted_range_the_law_warns() -> None:
    found = ask(1e9, 40e9, tokens=800e9)
    assert any(note.startswith("Extrapolated: law: N = 4e+10 is 2.5 times above") for note in found.notes)
    assert not any(note.startswith("Extrapolated") for note in ask(1e9, 4e9, tokens=80e9).notes)


@pytest.mark.parametrize(
    "name, said",
    [("gqa-figure-2", "fitted per heads"), ("heads-470m-1k", "does not know tokens")],
)
def test_laws_that_cannot_tell(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        ask(1e9, 4e9, tokens=80e9, fit=load_published(name))
    assert "laws that work: chinchilla, overtraining" in str(caught.value)


def test_questions_without_an_answer() -> None:
    with pytest.raises(InputError, match="cannot tell shapes apart"):
        ask(1e9, 4e9, tokens=80e9, fit=law("frontier", E=1.7, A=100.0, eta=0.2))
    with pytest.raises(InputError, match="gives the best N"):
        ask(1e9, 4e9, tokens=80e9, fit=replace(law("isoflop", G=0.1, a=0.5), predicts="N"))
    with pytest.raises(InputError, match="a law of width, which not every shape"):
        ask(1e9, 4e9, tokens=80e9, fit=law("E + A*width^-a + K*D^-g", E=1.7, A=10.0, a=0.5, K=400.0, g=0.3))
    with pytest.raises(InputError, match="growth only enlarges"):
        ask(4e9, 1e9, tokens=80e9)
    with pytest.raises(InputError, match="tokens: expected a positive"):
        ask(1e9, 4e9, tokens=-1.0)
    with pytest.raises(InputError, match="one for each of the 3 shapes"):
        timing([("a", HOFFMANN), ("b", HOFFMANN)], sized(1e9, 2e9, 4e9), 80e9)


# --- published formulas ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, d, expected", [(8e9, 15e12, 6.58), (7e9, 2e12, 11.11), (13e9, 2e12, 15.84), (70e9, 2e12, 42.48)]
)
def test_stacking_formula_gives_the_published_table(n: float, d: float, expected: float) -> None:
    assert round(stacking_tokens(n, 6 * n * d) / 1e9, 2) == expected


def test_stacking_outside_its_range() -> None:
    inside = stacking((275e6, 1.1e9), 150e9)
    assert inside.notes == () and inside.tokens == inside.formula_tokens and inside.factor == 4
    tiny = stacking((31e6, 124e6), 2.5e9)
    assert round(tiny.formula_tokens / 1e9, 1) == 20.8 and tiny.tokens == pytest.approx(2.5e9 * 10 / 97.5)
    assert "N = 124M (fitted 410M to 3B)" in tiny.notes[0] and "Held to a tenth" in tiny.notes[1]
    large = stacking((2e9, 8e9), 15e12)
    assert "C = 720 ZFLOP (fitted up to 1.2 ZFLOP)" in large.notes[0] and large.tokens == large.formula_tokens
    assert any("16 times the base" in note for note in stacking((0.1e9, 1.6e9), 100e9).notes)
    assert any("1.5 times the base" in note for note in stacking((1e9, 1.5e9), 100e9).notes)
    assert any("One step was better" in note for note in stacking((0.3e9, 0.6e9, 1.2e9), 100e9).notes)
    assert any("one layer" in note for note in stacking((0.3e9, 1.2e9), 100e9, 1).notes)


# --- specs and the command line --------------------------------------------------------------------------------------


def write_spec(folder: Path, name: str, depth: int, width: int) -> Path:
    path = folder / name
    path.write_text(SPEC.format(width=width, depth=depth, heads=width // 64, ffn=4 * width))
    return path


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["grow-when", *(str(word) for word in words)])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def as_json(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    code, out, err = command(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out)


def test_specs_are_priced_exactly() -> None:
    spec = spec_from(
        {"vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 2048,
         "max_position_embeddings": 1024}
    )  # fmt: skip
    shape = shape_of(spec, "spec", "non_embedding", 1024)
    from scantling.costing import cost, train_flops

    assert shape.parameters == cost(spec).params["non_embedding"] == shape.non_embedding
    assert shape.flops_per_token == train_flops(spec, 1024, 1.0)
    assert shape.columns["width"] == 512 and shape.columns["aspect"] == 64


def test_verb_and_what_to_paste(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small, large = write_spec(tmp_path, "small.yaml", 4, 512), write_spec(tmp_path, "large.yaml", 16, 512)
    asked = ("--law", "chinchilla-epoch-huber", "--from", small, "--to", large, "--tokens", "2B")
    found = as_json(capsys, *asked)
    (switch,) = found["switches"]
    assert switch["loss"]["low"] < switch["loss"]["value"] < switch["loss"]["high"]
    assert found["legs"][0]["from_loss"] is None and found["legs"][1]["shape"] == str(large)
    assert found["flops"] == pytest.approx(sum(leg["flops"] for leg in found["legs"]))
    share = found["legs"][0]["tokens"] / found["run_tokens"]
    assert f"at: {share:.6g} of tokens\n    to: {large}" in found["run_config"]
    assert "stacked layers" in " ".join(found["notes"])
    run = (
        f"name: grown\nmodel:\n{''.join('  ' + line + chr(10) for line in small.read_text().splitlines())}"
        "data: {source: python-stdlib}\n"
        f"train: {{tokens: {int(found['run_tokens'])}, sequence_length: 1024, batch_tokens: 1048576}}\n{found['run_config']}"
    )
    (tmp_path / "run.yaml").write_text(run)
    code, out, _ = command(capsys, *asked)
    row = next(line for line in out.splitlines() if line.startswith(large.name))
    assert f"{format_count(found['legs'][1]['already'], 4)}  " in row and row.index(
        format_count(found["legs"][1]["already"], 4)
    ) < row.index(format_count(found["legs"][1]["tokens"], 4))
    assert out.index("as if after") < out.index(" tokens  ")
    assert code == 0 and "saves" in out and "growth:\n  - at:" in out and "6 to 10 %" in " ".join(out.split())
    loaded = load_run(tmp_path / "run.yaml")
    assert loaded.growth[0][0].at == pytest.approx(share, abs=1e-4) and loaded.final_spec.num_hidden_layers == 16


def test_verb_with_a_law_per_shape_and_width(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    specs = [write_spec(tmp_path, f"{width}.yaml", 8, width) for width in (256, 512)]
    texts = [law("tokens", E=floor, B=400.0, beta=0.28).to_json() for floor in (2.6, 2.3)]
    paths = [tmp_path / f"law{number}.json" for number in (0, 1)]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(json.dumps(text))
    asked = ("--law", paths[0], "--law", paths[1], "--from", specs[0], "--to", specs[1], "--tokens", "5B")
    found = as_json(capsys, *asked, "--paid", "100M")
    assert found["legs"][0]["shape"] == str(specs[0]) and found["reuse"]["paid"] == 1e8
    assert "start: {checkpoint: CHECKPOINT}" in found["run_config"]
    assert any("Width growth" in note and "2602.02472" in note for note in found["notes"])
    code, _, err = command(capsys, "--law", paths[0], "--from", specs[0], "--to", specs[1], "--tokens", "5B")
    assert code == 2 and "cannot tell shapes apart" in err
