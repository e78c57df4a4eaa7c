"""Equations, and the laws written in them: parsing, recovery of each, ties, bounds and groups."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scantling.errors import InputError
from scantling.laws import Chinchilla, LawFit, clean, extrapolate, fit, from_overtraining, with_errors
from scantling.laws.formula import LAWS, parse_law
from tests.laws.ladders import MULTIPLIERS, SIZES, TIED, TRUE, grid


@pytest.mark.parametrize(
    ("law", "columns", "parameters"),
    [
        ("chinchilla", ("N", "D"), ("A", "B", "E", "alpha", "beta")),
        ("overtraining", ("C", "M"), ("a", "b", "E", "eta")),
        ("E + A[f]*N^-p[f]", ("N",), ("A[x]", "A[y]", "E", "p[x]", "p[y]")),
        ("1.5 + A * width^-0.5 + B*D^-b", ("width", "D"), ("A", "B", "b")),
        ("E + N^-alpha", ("N",), ("E", "alpha")),
    ],
)
def test_equations(law: str, columns: tuple[str, ...], parameters: tuple[str, ...]) -> None:
    formula = parse_law(law)
    assert formula.columns == columns
    assert formula.parameters({"f": ("x", "y")}) == parameters


@pytest.mark.parametrize(
    ("law", "said"),
    [
        ("chinchila", "did you mean 'chinchilla'"),
        ("E + F + A*N^-a", "at most one constant"),
        ("E + A*B*N^-a", "two prefactors, A and B"),
        ("E + A*N^-a + N*D^-b", "'N' is both a column and a parameter"),
        ("E + A*N^-A", "'A' is both a prefactor and an exponent"),
        ("E + (a/N)^b", "cannot read"),
        ("E + 3*4", "two prefactors"),
        ("A + 1", "at most one constant"),
        ("E*N[f]^-a", "groups a column"),
    ],
)
def test_equations_that_are_none(law: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_law(law)


RECOVERED = {
    "overtraining": ({"a": 141.0, "b": 190.0, "E": 1.51, "eta": 0.121}, {}),
    "frontier": ({"A": 300.0, "E": 1.7, "eta": 0.13}, {}),
    "sizes": ({"A": 200.0, "E": 1.7, "alpha": 0.3}, {}),
    "tokens": ({"B": 900.0, "E": 1.7, "beta": 0.3}, {}),
    "head-count": ({"a": 0.579, "E": 2.473, "b": 0.124}, {"fixed": {"E": 2.473}}),
    "head-configurations": (
        {"A[1,1]": 30.0, "A[8,8]": 27.0, "E": 1.95, "alpha[1,1]": 0.18, "alpha[8,8]": 0.184}, {},
    ),
    "width-depth": ({"A": 60.0, "B": 0.9, "K": 600.0, "E": 1.5, "alpha": 0.7, "beta": 0.6, "gamma": 0.3}, {}),
    "width-depth-size": (
        {"A": 60.0, "B": 0.9, "P": 50.0, "K": 600.0, "E": 1.5, "alpha": 0.7, "beta": 0.6, "delta": 0.3, "gamma": 0.3}, {},
    ),
    "two-architectures": (
        {"A[plain]": 120.0, "A[thrifty]": 112.0, "B[plain]": 190.0, "B[thrifty]": 180.0, "E": 1.7, "alpha": 0.25, "beta": 0.3},
        {},
    ),
    "kaplan": ({"Nc": 8.8e13, "Dc": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095}, {}),
}  # fmt: skip


def rows_for(law: str) -> pd.DataFrame:
    formula = parse_law(law)
    if "width" in formula.columns:
        axes = np.meshgrid([256.0, 512, 1024, 2048], [4.0, 8, 16, 48], [2e9, 8e9, 6.4e10], [1.0, 1.6], indexing="ij")
        width, depth, tokens, wide = (x.ravel() for x in axes)
        return pd.DataFrame({"width": width, "depth": depth, "D": tokens, "N": 12 * depth * width**2 * wide})
    if law == "head-count":
        return pd.DataFrame({"heads": [1.0, 2, 4, 8, 16, 32, 64, 128]})
    table = grid(TRUE, (*SIZES, 2.4e9), MULTIPLIERS)[["N", "D"]]
    for column in formula.by.values():
        names = {"heads": ("1,1", "8,8"), "family": ("plain", "thrifty")}[column]
        table = pd.concat([table.assign(**{column: name}) for name in names], ignore_index=True)
    return table.assign(C=6 * table.N * table.D, M=table.D / table.N)


@pytest.mark.parametrize("law", sorted(RECOVERED))
def test_every_law_is_recovered(law: str) -> None:
    true, options = RECOVERED[law]
    table, formula = rows_for(law), parse_law(law)
    columns = {name: table[name].to_numpy(float) for name in formula.columns}
    groups = {name: list(table[name]) for name in formula.by.values()}
    exact = formula.predict(true, columns, groups)
    found = fit(table.assign(loss=exact), law=law, resamples=0, checks=False, **options)
    for name, wanted in true.items():
        assert found.params[name] == pytest.approx(wanted, rel=2e-3), name
    first = {name: values[0] for name, values in groups.items()}
    point = {name: float(values[0]) for name, values in columns.items()}
    assert float(found.predict_at(point, first).value) == pytest.approx(exact[0], rel=1e-7)
    assert LawFit.from_json(found.to_json()).to_json() == found.to_json()


def test_every_named_law_is_tried() -> None:
    assert set(LAWS) == set(RECOVERED) | {"chinchilla", "isoflop", "envelope"}


def test_overtraining_is_the_tied_law_of_sizes_and_tokens() -> None:
    table = grid(TIED, SIZES, MULTIPLIERS, noise=0.004)
    two = fit(table, law="overtraining", resamples=400, checks=False)
    one = fit(table, tied=True, resamples=400, checks=False)
    assert two.objective_value == pytest.approx(one.objective_value, rel=1e-9)
    assert vars(from_overtraining(**two.params)) == pytest.approx(vars(one.form), rel=1e-5)
    assert two.predict(3e9, 6e10).low == pytest.approx(one.predict(3e9, 6e10).low, rel=5e-3)  # other draws
    assert two.optimum(1e21).M.value == pytest.approx(one.optimum(1e21).M.value, rel=1e-5)


def test_an_equation_in_other_columns_is_the_same_law() -> None:
    table = grid(TRUE, SIZES, MULTIPLIERS, noise=0.004).rename(columns={"N": "n_params"})
    named = fit(table, params="n_params", resamples=0, checks=False)
    written = fit(table, law="floor + a*size^-p + b*D^-q", columns={"size": "n_params"}, resamples=0, checks=False)
    assert list(written.params.values()) == pytest.approx([named.params[n] for n in ("A", "B", "E", "alpha", "beta")])


def test_ties_bounds_and_what_is_at_one() -> None:
    table = grid(TIED, SIZES, MULTIPLIERS, noise=0.003)
    tied = fit(table, tied=True, resamples=40, checks=False)
    by_name = fit(table, ties={"beta": "alpha"}, resamples=40, checks=False)
    assert by_name.params == tied.params and by_name.ties == {"beta": "alpha"}
    loose = fit(table, tied=True, bounds={"alpha": (0.1, 0.9)}, resamples=40, checks=False)
    assert loose.params == tied.params and loose.at_bound == ()
    tight = fit(table, tied=True, bounds={"alpha": (0.3, 0.5)}, resamples=40, checks=False)
    held = fit(table, tied=True, fixed={"alpha": 0.3}, resamples=0, checks=False)
    assert tight.at_bound == ("alpha",)
    assert tight.params == pytest.approx(held.params, rel=1e-6)
    assert any("alpha = 0.3 is at its bound" in sentence for sentence in tight.warnings)


def test_draws_keep_to_their_bounds() -> None:
    table = grid(TIED, SIZES, MULTIPLIERS, noise=0.01)
    law = fit(table, tied=True, bounds={"alpha": (0.24, 0.26)}, resamples=80, checks=False)
    assert law.draws is not None
    alpha = law.draws[:, list(law.params).index("alpha")]
    assert alpha.min() >= 0.24 - 1e-9 and alpha.max() <= 0.26 + 1e-9
    assert np.isclose(alpha, 0.24).any() or np.isclose(alpha, 0.26).any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bounds": {"alfa": (0.1, 0.2)}}, "bounds: unknown parameter 'alfa'; did you mean 'alpha'"),
        ({"bounds": {"alpha": (0.3, 0.2)}}, "0 <= low < high"),
        ({"ties": {"beta": "gamma"}}, "ties: unknown parameter 'gamma'"),
        ({"columns": {"width": "d"}}, "has no column 'width'"),
        ({"law": "E + A*width^-p"}, "column 'width' .argument width. is not in the table"),
        ({"law": "kaplan", "tied": True}, "tied cannot be imposed"),
        ({"law": "two-architectures"}, "column 'family'"),
    ],
)
def test_wrong_impositions(options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        fit(grid(TRUE, SIZES, MULTIPLIERS), resamples=0, **options)


def test_a_group_with_too_few_rows_is_refused() -> None:
    table = rows_for("head-configurations")
    table = table.assign(loss=1.9 + 30 * table.N**-0.2)
    few = table[(table.heads == "1,1") | (table.N.min() == table.N)]
    with pytest.raises(InputError, match="cannot separate"):
        fit(few, law="head-configurations", resamples=0)


def ladder_of_budgets(law: Chinchilla, noise: float) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    rows = []
    for c in np.geomspace(1e18, 1e21, 6):
        for factor in np.geomspace(0.3, 3.3, 9):
            n = float(law.optimum(c).N) * factor
            rows.append((n, c / 6 / n, float(law.loss(n, c / 6 / n)) * np.exp(noise * draw.standard_normal())))
    return pd.DataFrame(rows, columns=["N", "D", "loss"])


def test_isoflop_finds_the_exponent_of_the_closed_form() -> None:
    found = fit(ladder_of_budgets(TRUE, 1e-3), law="isoflop", resamples=200)
    wanted = TRUE.beta / (TRUE.alpha + TRUE.beta)
    low, high = found.intervals()["a"]
    assert low < wanted < high and high - low < 0.02
    assert float(found.predict_at({"C": 3e19}).value) == pytest.approx(float(TRUE.optimum(3e19).N), rel=0.03)


def test_isoflop_leaves_out_budgets_without_a_minimum() -> None:
    table = ladder_of_budgets(TRUE, 0.0)
    budget = 6 * table.N * table.D
    cut = table[(budget < 5e20) | (0.8 * float(TRUE.optimum(1e21).N) > table.N)]
    found = fit(cut, law="isoflop", resamples=20)
    assert any("no interior minimum" in sentence for sentence in found.warnings)
    with pytest.raises(InputError, match="at least 3 budgets"):
        fit(table[budget < 3e18], law="isoflop")


def test_envelope_of_training_curves() -> None:
    rows = [(i, n, n * m, float(TRUE.loss(n, n * m)))
            for i, n in enumerate(np.geomspace(1e7, 3e9, 16)) for m in np.geomspace(1, 400, 60)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["run", "N", "D", "loss"])
    found = fit(table, law="envelope", clusters="run", resamples=50)
    assert found.params["a"] == pytest.approx(TRUE.beta / (TRUE.alpha + TRUE.beta), abs=0.03)
    with pytest.raises(InputError, match="name the run of each row"):
        fit(table, law="envelope")


def test_the_rule_says_what_it_chose() -> None:
    table = grid(TIED, SIZES, (2.0, 6.0, *MULTIPLIERS), noise=0.003)
    law = extrapolate(table, resamples=0, checks=False)
    assert law.n == 20
    assert "4 rows with fewer than 5 tokens per parameter are left out" in law.warnings
    more = grid(TIED, (*SIZES, 2e9), (2.0, 6.0, *MULTIPLIERS), noise=0.003)
    many = extrapolate(more, resamples=0, checks=False)
    assert (law.n, law.delta, many.n, many.delta) == (20, 1e-3, 20, 1e-3)
    assert "10 rows with fewer than 10 tokens per parameter are left out" in many.warnings
    assert extrapolate(table[table.D < 70 * table.N], resamples=0, checks=False).delta == 1e-2
    assert law.bounds == {"alpha": (0.2, 0.5)} and law.ties == {"beta": "alpha"}
    one_path = extrapolate(table[table.D / table.N == 20], resamples=0, checks=False)
    assert one_path.law == "frontier"
    one_size = extrapolate(table[table.N == 4e7], resamples=0, checks=False)
    assert one_size.law == "tokens"
    with pytest.raises(InputError, match="chooses delta itself"):
        extrapolate(table, delta=1e-2)


def test_clean_then_extrapolate_keeps_the_sentences() -> None:
    table = grid(TIED, SIZES, MULTIPLIERS, noise=0.003).assign(state="finished")
    table.loc[3, "state"] = "failed"
    rows, said = clean(table)
    law = extrapolate(rows, resamples=0, checks=False, excluded=said)
    assert law.warnings[0] == said[0]


def test_error_laws_go_with_the_law_of_loss() -> None:
    table = grid(TIED, SIZES, MULTIPLIERS).assign(err=lambda t: 0.85 - 2.1 * np.exp(-0.75 * t.loss))
    law = with_errors(fit(table, tied=True, resamples=0, checks=False), table, "loss", ["err"])
    assert vars(law.downstream["err"]) == pytest.approx({"epsilon": 0.85, "k": 2.1, "gamma": 0.75}, rel=1e-5)
    assert LawFit.from_json(law.to_json()).downstream == law.downstream
    with pytest.raises(InputError, match="did you mean 'err'"):
        with_errors(law, table, "loss", ["eror"])


@settings(max_examples=settings().max_examples // 5)
@given(
    alpha=st.floats(0.12, 0.9), beta=st.floats(0.12, 0.9), floor=st.floats(0.5, 3.0),
    share_n=st.floats(0.05, 2.0), share_d=st.floats(0.05, 2.0), objective=st.sampled_from(["huber", "ols", "lad"]),
)  # fmt: skip
def test_any_law_in_range_is_found_from_exact_rows(
    alpha: float, beta: float, floor: float, share_n: float, share_d: float, objective: str
) -> None:
    """The global minimum, whatever the exponents: the terms are `share` of the floor in the middle of the grid."""
    true = Chinchilla(A=share_n * floor * 8e7**alpha, B=share_d * floor * 4e9**beta, E=floor, alpha=alpha, beta=beta)
    found = fit(grid(true, SIZES, MULTIPLIERS), objective=objective, resamples=0, checks=False)
    assert found.params == pytest.approx(vars(true), rel=2e-3)
    assert found.predict(6e9, 1.2e11).value == pytest.approx(true.loss(6e9, 1.2e11), rel=1e-4)
    assert found.certificate is not None and found.certificate.agreeing >= 1
