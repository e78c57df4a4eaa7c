"""Loss-matched savings: known ones are found, absent ones are not claimed, and limits are said."""

import numpy as np
import pytest

from scantling.errors import InputError
from scantling.laws import saving
from tests.laws.ladders import two_families
from tests.published.targets import value


@pytest.mark.parametrize("true", [-0.2, 0.0, 0.15, 0.4])
@pytest.mark.parametrize("multipliers", [(20.0,), (20.0, 80.0)])
def test_exact_saving(true: float, multipliers: tuple[float, ...]) -> None:
    table = two_families(true, noise=0.0, seed=0, multipliers=multipliers)
    found = saving(table, baseline="plain", path="M", resamples=0)
    assert found.value == pytest.approx(true, abs=1e-4)
    assert found.eta == pytest.approx(0.13, rel=1e-3)
    assert found.measured == pytest.approx(true, abs=0.01)
    assert [at.value for at in found.by_multiplier] == pytest.approx([true] * len(multipliers), abs=1e-3)
    assert found.low is None
    assert "not distinguishable" in found.sentence()


def test_saving_that_depends_on_the_path() -> None:
    """The candidate's parameters count for more, its tokens do not: it saves most where parameters are scarce."""
    table = two_families(0.0, noise=0.0, seed=0, multipliers=(20.0, 320.0))
    better = table.family == "thrifty"
    ratio = table.M[better] / 20
    size = 0.7 * ratio**0.13 + 0.8 * ratio**-0.13
    table.loc[better, "loss"] = 1.8 + size * (table.C[better] / 1e19) ** -0.13
    found = saving(table, baseline="plain", path="M", resamples=0)
    for at, m in zip(found.by_multiplier, (1.0, 16.0), strict=True):
        plain = 0.9 * m**0.13 + 0.8 * m**-0.13
        assert at.value == pytest.approx(1 - ((plain - 0.2 * m**0.13) / plain) ** (1 / 0.13), abs=1e-4)
    assert found.multiplier == pytest.approx(80.0)
    assert found.by_multiplier[0].value < found.value < found.by_multiplier[1].value


def test_known_saving_lies_in_the_interval() -> None:
    """4 sizes x 2 multipliers: 40 ladders, 95% intervals; at least 34 cover (99.9% of such counts do)."""
    covered, claimed = 0, 0
    for seed in range(40):
        table = two_families(0.15, noise=0.002, seed=seed, multipliers=(20.0, 80.0), budgets=4)
        found = saving(table, baseline="plain", path="M", resamples=200)
        covered += found.low <= 0.15 <= found.high
        claimed += "fewer FLOPs than plain" in found.sentence()
    assert covered >= 34
    assert claimed == 40


def test_identical_families_are_not_distinguishable() -> None:
    quiet = 0
    for seed in range(30):
        found = saving(two_families(0.0, noise=0.002, seed=seed), baseline="plain", resamples=200)
        quiet += "thrifty is not distinguishable from plain" in found.sentence()
    assert quiet >= 25


def test_sentence() -> None:
    table = two_families(0.15, noise=0.002, seed=1, seeds=3, multipliers=(20.0, 80.0), budgets=4)
    found = saving(table, baseline="plain", path="M", resamples=300)
    assert found.bootstrap == "300 resamples of 24 pairs of runs"
    assert found.runs == (24, 24)
    assert found.probability == 1.0
    assert found.sentence().startswith(
        f"thrifty needs {found.value:.1%} fewer FLOPs than plain for the same loss at 1e+20 training FLOPs and "
        f"40 tokens per parameter (95% interval {found.low:.1%} to {found.high:.1%}; 24 and 24 runs)"
    )
    worse = saving(table, baseline="thrifty", candidate="plain", path="M", resamples=300)
    assert "more FLOPs than thrifty" in worse.sentence()
    assert "Extrapolated: plain would need" in worse.sentence()


def test_unpaired_runs_are_drawn_within_families() -> None:
    table = two_families(0.15, noise=0.002, seed=1, seeds=3)
    table["run"] = table.family + table.run
    found = saving(table, baseline="plain", resamples=200)
    assert "within each family" in found.bootstrap
    assert found.low < 0.15 < found.high


def test_precision_of_the_design() -> None:
    """The spread of the estimate is that of the reference simulation (5 budgets, noise 0.2%, shared E and exponent)."""
    found = [
        saving(two_families(0.15, noise=0.002, seed=seed), baseline="plain", resamples=0).value for seed in range(200)
    ]
    wanted = value("saving/monte_carlo")["5 sizes, 3 decades, noise 0.2%"]["shared_E_eta_top"]
    assert np.percentile(found, [2.5, 97.5]) == pytest.approx(wanted, abs=0.02)


def test_different_exponents_are_noticed() -> None:
    table = two_families(0.0, noise=0.0, seed=0, budgets=6)
    steep = table.family == "thrifty"
    table.loc[steep, "loss"] = 1.8 + 1.7 * (table.C[steep] / 1e18) ** -0.2
    found = saving(table, baseline="plain", resamples=0)
    assert found.held_out_separate < found.held_out_shared
    assert "Separate exponents predict the largest budgets better" in found.sentence()


def test_paths_of_one_family_only_are_left_out() -> None:
    table = two_families(0.15, noise=0.0, seed=0, multipliers=(20.0, 80.0))
    table = table[~((table.family == "plain") & (table.M == 80))]
    found = saving(table, baseline="plain", path="M", resamples=0)
    assert found.value == pytest.approx(0.15, abs=1e-4)
    assert found.notes[0] == "5 rows on paths that only one family has are left out"


def test_bad_rows_are_named() -> None:
    table = two_families(0.15, noise=0.0, seed=0, budgets=6)
    table.loc[3, "loss"] = np.nan
    assert "number: row 4" in saving(table, baseline="plain", resamples=0).notes[0]


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (lambda t: t, {"baseline": "plian"}, "candidate: name one of"),
        (lambda t: t, {"baseline": "plian", "candidate": "thrifty"}, "no family 'plian'.*did you mean 'plain'"),
        (lambda t: t, {"candidate": "plain"}, "another family than the baseline"),
        (lambda t: t.rename(columns={"C": "flops"}), {}, "column 'C' .argument compute. is not in the table"),
        (lambda t: t[t.C < 1e18], {}, "at least 3 distinct compute budgets, got 2"),
        (lambda t: t.assign(C=t.C.where(t.family == "plain", t.C * 1e6)), {}, "share no compute"),
        (lambda t: t.assign(M=t.M.where(t.family == "plain", 80.0)), {"path": "M"}, "share no value of M"),
        (lambda t: t.assign(loss=t.loss.where(t.family == "plain")), {}, "no usable rows of thrifty"),
        (lambda t: t.assign(run=t.run.where(t.index != 4, "")), {}, "column 'run' .argument run. is empty in row 5"),
        (lambda t: t, {"resamples": 1}, "resamples: expected"),
    ],
)
def test_refusals(change, options, said) -> None:
    table = change(two_families(0.15, noise=0.002, seed=0))
    with pytest.raises(InputError, match=said):
        saving(table, **({"baseline": "plain"} | options))
