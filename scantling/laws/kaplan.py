"""The law of Kaplan et al. 2020 (arXiv 2001.08361, eq. 1.5): L(N, D) = [(Nc/N)^(alpha_N/alpha_D) + Dc/D]^alpha_D.

At a given q = alpha_D it is a sum of power laws for L^(1/q): A N^-p + B D^-1 with p = alpha_N/q, A = Nc^p and B = Dc. So the
one fitter does the rest, and q is searched on a grid and then by golden section, for all resamples in one batch. It has no
irreducible loss: on data with one, chinchilla extrapolates better.
"""

import numpy as np
import pandas as pd

from scantling.errors import InputError
from scantling.laws.bootstrap import case_counts, enough_runs, noisy_losses, residual_sd
from scantling.laws.descent import Objective, refine
from scantling.laws.evidence import Certificate
from scantling.laws.forms import Floats
from scantling.laws.formula import parse_law
from scantling.laws.lawfit import LawFit
from scantling.laws.newton import minimise
from scantling.laws.rows import Rows, usable_rows
from scantling.laws.solving import SINGULAR, Problem, place, refuse_few

INNER = "A*N^-p + B*D^-1"
GRID = np.geomspace(0.02, 1.0, 24)  # values of alpha_D searched first
GOLDEN = (np.sqrt(5) - 1) / 2
ROUNDS = 40  # golden sections: the bracket shrinks to 4e-9 of itself


def fit_kaplan(
    table: pd.DataFrame,
    target: Objective,
    *,
    objective: str,
    loss: str = "loss",
    params: str = "N",
    tokens: str = "D",
    weights: str | None = None,
    clusters: str | None = None,
    conventions: dict[str, str] | None = None,
    excluded: tuple[str, ...] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> LawFit:
    """Nc, Dc, alpha_N, alpha_D with bootstrap intervals; arguments as in `fitting.fit`.

    Raises:
        InputError: too few sizes or token multipliers, or squares of the raw loss were asked for.
    """
    if target.raw:
        raise InputError("kaplan: fitted to log losses only; use the objective huber, ols or lad")
    rows, warnings = usable_rows(table, {"N": params, "D": tokens}, loss=loss, weights=weights, clusters=clusters)
    problem = Problem(parse_law(INNER), target, {}, {}, {})
    refuse_few(rows, problem)
    where, design = place(rows, problem)

    def at(q: Floats, theta: Floats, losses: Floats, w: Floats) -> tuple[Floats, Floats]:
        """Refit the inner law at each q: the residual of log L is q times that of log L^(1/q)."""
        size = q[:, None]
        inner = Objective(target.delta, scale=1 / size) if np.isfinite(target.delta) else target
        return refine(design, losses ** (1 / size), w * size**2, inner, theta)

    starts = [minimise(design, rows.loss ** (1 / q), rows.weight * q**2, Objective(target.delta / q)) for q in GRID]
    values = np.array([one.value for one in starts])
    best = int(np.argmin(values))
    q, theta, value = _search(at, GRID[[best]], starts[best].theta[None], rows.loss[None], rows.weight[None])
    if design.condition(theta[0], rows.weight) > SINGULAR or not theta[0][design.names.index("p")] > 0:
        raise InputError("kaplan: the rows cannot separate its parameters; add sizes or token multipliers")
    residuals = np.log(rows.loss) - q[0] * design.log_prediction(theta)[0]
    free, number = 4, int(rows.run.max()) + 1
    draws, how = None, "no resamples were asked for"
    if resamples and len(rows.loss) > free:
        rng = np.random.default_rng(seed)
        if enough_runs(number, free):
            how = f"{resamples} resamples of {number} runs"
            losses, w = rows.loss[None], rows.weight * case_counts(rows.run, resamples, rng)
        else:
            how = f"parametric: {resamples} draws of noise around the fitted law, because {number} runs are few to draw"
            fitted, w = rows.loss * np.exp(-residuals), rows.weight[None]
            losses = noisy_losses(fitted, residuals, rows.run, free=free, resamples=resamples, rng=rng)
        found = _search(at, np.repeat(q, resamples), np.repeat(theta, resamples, 0), losses, w)
        draws = _named(where.values(found[1]), found[0])
        draws = draws[np.isfinite(draws).all(1) & (draws > 0).all(1)]
    estimate = _named(where.values(theta), q)[0]
    return LawFit(
        law="kaplan",
        params=dict(zip(("Nc", "Dc", "alpha_N", "alpha_D"), map(float, estimate), strict=True)),
        source=f"fitted to {len(rows.loss)} rows, columns {params}, {tokens}, {loss}",
        conventions={
            "N": f"column {params!r}", "D": f"column {tokens!r}", "C": "6 N D", "loss": f"column {loss!r}, nats per token",
        } | (conventions or {}),
        ranges={
            name: (float(x.min()), float(x.max()))
            for name, x in {"N": rows.N, "D": rows.D, "M": rows.D / rows.N, "loss": rows.loss}.items()
        },
        draws=draws,
        bootstrap=how,
        objective=objective,
        delta=target.delta if objective == "huber" else None,
        objective_value=float(value[0]),
        n=len(rows.loss),
        n_runs=number,
        residual_sd=residual_sd(residuals, free) if len(residuals) > free else None,
        certificate=Certificate(
            gradient=starts[best].gradient, starts=starts[best].starts, agreeing=starts[best].agreeing,
            condition=design.condition(theta[0], rows.weight),
        ),
        fingerprint=rows.fingerprint,
        warnings=(*excluded, *warnings, *_doubts(q[0], rows)),
    )  # fmt: skip


def _search(at, q: Floats, theta: Floats, losses: Floats, weights: Floats) -> tuple[Floats, Floats, Floats]:  # type: ignore[no-untyped-def]
    """Golden section over log q within a factor 2, one bracket for each of the S starts."""
    low, high = np.log(q) - np.log(2.0), np.log(q) + np.log(2.0)
    x = [high - GOLDEN * (high - low), low + GOLDEN * (high - low)]
    found = [at(np.exp(one), theta, losses, weights) for one in x]
    for _ in range(ROUNDS):
        left = found[0][1] < found[1][1]
        low, high = np.where(left, low, x[0]), np.where(left, x[1], high)
        kept = np.where(left, x[0], x[1])
        near = np.where(left[:, None], found[0][0], found[1][0])
        level = np.where(left, found[0][1], found[1][1])
        new = np.where(left, high - GOLDEN * (high - low), low + GOLDEN * (high - low))
        fresh = at(np.exp(new), near, losses, weights)
        x = [np.where(left, new, kept), np.where(left, kept, new)]
        found = [
            (np.where(left[:, None], fresh[0], near), np.where(left, fresh[1], level)),
            (np.where(left[:, None], near, fresh[0]), np.where(left, level, fresh[1])),
        ]
        if np.max(high - low) < 1e-7:
            break
    first = found[0][1] < found[1][1]
    return (
        np.exp(np.where(first, x[0], x[1])),
        np.where(first[:, None], found[0][0], found[1][0]),
        np.where(first, found[0][1], found[1][1]),
    )


def _named(values: Floats, q: Floats) -> Floats:
    """(S, 4) Nc, Dc, alpha_N, alpha_D from (S, 3) A, B, p of the inner law."""
    a, b, p = values.T
    with np.errstate(all="ignore"):
        return np.stack([np.exp(np.log(a) / p), b, p * q, q], axis=1)


def _doubts(q: float, rows: Rows) -> list[str]:
    said = []
    if q > 0.9 or q < 0.025:
        said.append(f"alpha_D = {q:.3g} is at the edge of what is searched: it is not identified")
    low = int(np.sum(rows.D / rows.N < 5))
    if low:
        said.append(
            f"{low} rows have fewer than 5 tokens per parameter, where power laws fail; compare a fit without them"
        )
    return said
