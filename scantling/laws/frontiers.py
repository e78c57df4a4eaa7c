"""Approaches 1 and 2 of arXiv 2203.15556: the compute-optimal size straight from runs, N*(C) = G C^a, without a law of loss.

isoflop: at each budget a parabola of loss in log N, its vertex, and a line through the vertices in log-log.
envelope: at each of 1,500 budgets the run of lowest loss along its training curve, and a line through their sizes.

The parabola is a local expansion: it biases the vertex where the curve is asymmetric or the grid wide or off-centre
(arXiv 2603.22339). A vertex at the edge of its grid is no minimum and is left out.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from scantling.errors import InputError
from scantling.laws.forms import Floats
from scantling.laws.lawfit import LawFit
from scantling.laws.rows import Rows, levels, usable_rows

BUDGET = 1.2  # runs whose compute differs by less share a budget
GRID = 1500  # budgets of the envelope
FEWEST = 3  # budgets, or sizes on the envelope


@dataclass(frozen=True)
class Vertex:
    """The best size at one budget: C, N, and the rows and curvature behind it."""

    C: float
    N: float
    rows: int


def fit_frontier(
    table: pd.DataFrame,
    law: str,
    *,
    loss: str = "loss",
    params: str = "N",
    tokens: str = "D",
    clusters: str | None = None,
    conventions: dict[str, str] | None = None,
    excluded: tuple[str, ...] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> LawFit:
    """N*(C) = G C^a by `isoflop` or `envelope`, with an interval of a from redrawn noise (isoflop) or runs (envelope).

    Args:
        table: isoflop: one row per run, several sizes at each of several budgets; envelope: checkpoints of several runs.
        law: isoflop or envelope.
        loss, params, tokens: columns; C = 6 N D.
        clusters: column naming each row's run; the envelope needs it.
        conventions: how things are counted, in words.
        excluded: sentences about rows left out before.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        InputError: fewer than three budgets with a minimum inside their sizes.
    """
    if law == "envelope" and clusters is None:
        raise InputError(
            "envelope: it follows training curves; name the run of each row with clusters (--clusters COLUMN)"
        )
    rows, warnings = usable_rows(table, {"N": params, "D": tokens}, loss=loss, clusters=clusters)
    rng = np.random.default_rng(seed)
    draws: list[tuple[float, float]] = []
    if law == "isoflop":
        vertices, said, noise = _vertices(rows, rows.loss)
        if len(vertices) < FEWEST:
            raise InputError(
                f"isoflop: expected at least {FEWEST} budgets with a minimum inside their sizes, got {len(vertices)}; add runs "
                "of other sizes at the same compute", *said
            )  # fmt: skip
        for _ in range(resamples):
            redrawn, _, _ = _vertices(rows, rows.loss * np.exp(noise * rng.standard_normal(len(rows.loss))))
            if len(redrawn) >= FEWEST:
                draws.append(_line([v.C for v in redrawn], [v.N for v in redrawn]))
        points, how = vertices, f"{len(draws)} draws of noise around the parabolas (residual sd {noise:.2%})"
    else:
        points = _envelope(rows)
        said = []
        number = int(rows.run.max()) + 1
        for _ in range(resamples):
            picked = np.unique(rng.integers(0, number, number))
            some = _envelope(rows.only(np.isin(rows.run, picked)), strict=False)
            if len({v.N for v in some}) >= FEWEST:
                draws.append(_line([v.C for v in some], [v.N for v in some]))
        how = f"{len(draws)} resamples of {number} runs"
    g, a = _line([v.C for v in points], [v.N for v in points])
    if not 0 < a < 1:
        said.append(f"a = {a:.3g}: the best size or the best number of tokens would shrink with compute")
    kept = len(draws) >= max(2, resamples / 2)
    ms = np.array([v.C / (6 * v.N**2) for v in points])
    return LawFit(
        law=law,
        params={"G": g, "a": a},
        source=f"{law} fit of {len(points)} points from {len(rows.loss)} rows, columns {params}, {tokens}, {loss}",
        conventions={"N": f"column {params!r}", "D": f"column {tokens!r}", "C": "6 N D", "loss": f"column {loss!r}"}
        | (conventions or {}),
        ranges={
            "C": (min(v.C for v in points), max(v.C for v in points)),
            "N": (float(rows.N.min()), float(rows.N.max())),
            "M": (float(ms.min()), float(ms.max())),
        },
        draws=np.array(draws) if kept else None,
        bootstrap=how if kept else "most resamples gave no line: the minima are not determined",
        n=len(rows.loss),
        n_runs=int(rows.run.max()) + 1,
        fingerprint=rows.fingerprint,
        warnings=(*excluded, *warnings, *said),
        predicts="N",
    )


def _line(c: list[float], n: list[float]) -> tuple[float, float]:
    """G and a of log N = log G + a log C, by least squares."""
    x, y = np.log(c), np.log(n)
    slope = float(((x - x.mean()) @ (y - y.mean())) / max(((x - x.mean()) ** 2).sum(), 1e-300))
    return float(np.exp(y.mean() - slope * x.mean())), slope


def _vertices(rows: Rows, loss: Floats) -> tuple[list[Vertex], list[str], float]:
    """The vertex of each budget's parabola, sentences on those without one, and the residual sd of log loss."""
    compute = 6 * rows.N * rows.D
    codes = levels(compute, BUDGET)
    found, said, squares, freedom = [], [], 0.0, 0
    for code in range(int(codes.max()) + 1):
        mask = codes == code
        x, y = np.log(rows.N[mask]), loss[mask]
        sizes = int(levels(rows.N[mask], 1.05).max()) + 1
        c = float(np.exp(np.log(compute[mask]).mean()))
        if sizes < 3:
            said.append(f"budget {c:.3g}: {sizes} sizes, a parabola needs 3")
            continue
        middle = x.mean()
        two, one, zero = np.polyfit(x - middle, y, 2)
        fitted = np.polyval([two, one, zero], x - middle)
        squares += float(np.sum(np.log(y / fitted) ** 2)) if (fitted > 0).all() else 0.0
        freedom += max(len(x) - 3, 0)
        if two <= 0:
            said.append(f"budget {c:.3g}: the losses have no minimum, the parabola opens downwards")
            continue
        best = middle - one / (2 * two)
        if not x.min() < best < x.max():
            said.append(
                f"budget {c:.3g}: no interior minimum, the best size lies beyond the sampled ones; add runs there"
            )
            continue
        if x.max() - x.min() > np.log(30):
            said.append(f"budget {c:.3g}: sizes span a factor {np.exp(x.max() - x.min()):.3g}, wide for a parabola")
        found.append(Vertex(c, float(np.exp(best)), int(mask.sum())))
    return found, said, float(np.sqrt(squares / freedom)) if freedom else 0.002


def _envelope(rows: Rows, strict: bool = True) -> list[Vertex]:
    """The best run at each budget, without those where it is the smallest or the largest size."""
    compute = 6 * rows.N * rows.D
    grid = np.geomspace(compute.min(), compute.max(), GRID)
    number = int(rows.run.max()) + 1
    lowest = np.full((number, GRID), np.inf)
    sizes = np.zeros(number)
    for run in range(number):
        mask = rows.run == run
        order = np.argsort(compute[mask])
        x, y = np.log(compute[mask][order]), np.minimum.accumulate(rows.loss[mask][order])
        sizes[run] = rows.N[mask][0]
        if len(x) > 1:
            lowest[run] = np.interp(np.log(grid), x, np.log(y), left=np.inf, right=np.inf)
    best = np.argmin(lowest, axis=0)
    inside = np.isfinite(lowest.min(0)) & (sizes[best] > sizes.min() * 1.01) & (sizes[best] < sizes.max() / 1.01)
    found = [Vertex(float(c), float(sizes[run]), 1) for c, run in zip(grid[inside], best[inside], strict=True)]
    if strict and len({v.N for v in found}) < FEWEST:
        raise InputError(
            f"envelope: expected at least {FEWEST} sizes that are best somewhere between the smallest and the largest, got "
            f"{len({v.N for v in found})}; add runs, or checkpoints of the runs"
        )
    return found
