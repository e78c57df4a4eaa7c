"""Approaches 1 and 2 of arXiv 2203.15556: the compute-optimal size straight from runs, N*(C) = G C^a, without a law of loss.

isoflop: at each budget a parabola of loss in log N, its vertex, and a line through the vertices in log-log.
envelope: at each of 1,500 budgets the run of lowest loss along its training curve, and a line through their sizes.

The parabola is a local expansion: it biases the vertex where the curve is asymmetric or the grid wide or off-centre
(arXiv 2603.22339). A vertex at the edge of its grid is no minimum and is left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from scantling.errors import InputError
from scantling.laws.checks import fitted_rows
from scantling.laws.evidence import HoldOut, Sensitivity
from scantling.laws.forms import Floats
from scantling.laws.lawfit import LawFit
from scantling.laws.rows import Rows, levels, usable_rows

BUDGET = 1.2  # runs whose compute differs by less share a budget
GRID = 1500  # budgets of the envelope
FEWEST = 3  # budgets, or sizes on the envelope
NARROW = 3.0  # factor about the vertex within which sizes are kept, in the sensitivity table
SCATTER = 2.0  # times the noise's own, beyond which the vertices' scatter about the line is doubted
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Vertex:
    """The best size at one budget."""

    C: float
    N: float


@dataclass(frozen=True, eq=False)
class Vertices:
    """What parabolas of degree 2 or 3 found.

    Attributes:
        points: the vertex of each budget that has one.
        said: a sentence for each budget without one, or with sizes too wide for a parabola.
        noise: residual sd of log loss.
    """

    points: list[Vertex]
    said: list[str]
    noise: float


@dataclass(frozen=True, eq=False)
class Curves:
    """Training curves on one grid of budgets: (GRID,) C, (runs, GRID) lowest loss so far, (runs,) sizes."""

    grid: Floats
    lowest: Floats
    sizes: Floats

    def best(self, runs: npt.NDArray[np.intp] | Mask | None = None, inside: Mask | None = None) -> list[Vertex]:
        """The best run at each budget, without those where it is the smallest or the largest size."""
        lowest, sizes = (self.lowest, self.sizes) if runs is None else (self.lowest[runs], self.sizes[runs])
        if not len(sizes):
            return []
        best = np.argmin(lowest, axis=0)
        kept = np.isfinite(lowest.min(0)) & (sizes[best] > sizes.min() * 1.01) & (sizes[best] < sizes.max() / 1.01)
        kept &= True if inside is None else inside
        return [Vertex(float(c), float(n)) for c, n in zip(self.grid[kept], sizes[best][kept], strict=True)]


def fit_frontier(
    table: pd.DataFrame,
    law: str,
    *,
    loss: str = "loss",
    params: str = "N",
    tokens: str = "D",
    clusters: str | None = None,
    also: dict[str, str] | None = None,
    conventions: dict[str, str] | None = None,
    excluded: tuple[str, ...] = (),
    resamples: int = 1000,
    seed: int = 0,
    checks: bool = True,
) -> LawFit:
    """N*(C) = G C^a by `isoflop` or `envelope`, with an interval of a from redrawn noise (isoflop) or runs (envelope).

    There is no profile: two fits follow each other, and no one objective is minimised. In its place stands the range without any
    one budget (isoflop) or size (envelope).

    Args:
        table: isoflop: one row per run, several sizes at each of several budgets; envelope: checkpoints of several runs.
        law: isoflop or envelope.
        loss, params, tokens: columns; C = 6 N D.
        clusters: column naming each row's run; the envelope needs it.
        also: other columns of parameter counts for the sensitivity table, by what they are called.
        conventions: how things are counted, in words.
        excluded: sentences about rows left out before.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        checks: also make hold-outs, sensitivity and the ranges with something left out.

    Raises:
        InputError: fewer than three budgets with a minimum inside their sizes.
    """
    if law == "envelope" and clusters is None:
        raise InputError(
            "envelope: it follows training curves; name the run of each row with clusters (--clusters COLUMN)"
        )
    rows, warnings = usable_rows(table, {"N": params, "D": tokens}, loss=loss, clusters=clusters)
    rng = np.random.default_rng(seed)
    if law == "isoflop":
        points, draws, how, said = _isoflop(rows, resamples, rng)
    else:
        points, draws, how, said = _envelope(rows, resamples, rng)
    g, a = _line(points)
    if not 0 < a < 1:
        said.append(f"a = {a:.3g}: the best size or the best number of tokens would shrink with compute")
    kept = len(draws) >= max(2, resamples / 2)
    ms = np.array([v.C / (6 * v.N**2) for v in points])
    said += _scatter(points, np.array(draws) if kept else None) if law == "isoflop" else []
    budgets = np.array([v.C for v in points])
    held, missing = _hold_outs(law, rows, points) if checks else ((), [])
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
        holdouts=held,
        sensitivity=_sensitivity(law, rows, points, table, (params, tokens, loss, clusters), also) if checks else (),
        left_out=_left_out(points) if checks else {},
        warnings=(*excluded, *warnings, *said, *missing),
        rows=fitted_rows({"C": budgets}, np.array([v.N for v in points]), g * budgets**a),
        predicts="N",
    )


def _isoflop(
    rows: Rows, resamples: int, rng: np.random.Generator
) -> tuple[list[Vertex], list[tuple[float, float]], str, list[str]]:
    found = vertices(rows, rows.loss)
    if len(found.points) < FEWEST:
        raise InputError(
            f"isoflop: expected at least {FEWEST} budgets with a minimum inside their sizes, got {len(found.points)}; add runs "
            "of other sizes at the same compute", *found.said
        )  # fmt: skip
    draws = []
    for _ in range(resamples):
        redrawn = vertices(rows, rows.loss * np.exp(found.noise * rng.standard_normal(len(rows.loss)))).points
        if len(redrawn) >= FEWEST:
            draws.append(_line(redrawn))
    how = f"{len(draws)} draws of noise around the parabolas (residual sd {found.noise:.2%})"
    return found.points, draws, how, found.said


def _envelope(
    rows: Rows, resamples: int, rng: np.random.Generator
) -> tuple[list[Vertex], list[tuple[float, float]], str, list[str]]:
    followed = curves(rows)
    points = followed.best()
    if _sizes(points) < FEWEST:
        raise InputError(
            f"envelope: expected at least {FEWEST} sizes that are best somewhere between the smallest and the largest, got "
            f"{_sizes(points)}; add runs, or checkpoints of the runs"
        )
    number, draws = len(followed.sizes), []
    for _ in range(resamples):
        some = followed.best(np.unique(rng.integers(0, number, number)))
        if _sizes(some) >= FEWEST:
            draws.append(_line(some))
    return points, draws, f"{len(draws)} resamples of {number} runs", []


def vertices(rows: Rows, loss: Floats, *, degree: int = 2, within: float | None = None) -> Vertices:
    """The lowest point of each budget's polynomial of loss in log N.

    Args:
        rows: the runs.
        loss: (n,) their losses.
        degree: 2, or 3 for a curve that may be steeper on one side.
        within: keep only sizes within this factor of the lowest loss of their budget.
    """
    compute = 6 * rows.N * rows.D
    codes = levels(compute, BUDGET)
    found, said, squares, freedom = [], [], 0.0, 0
    for code in range(int(codes.max()) + 1):
        mask = codes == code
        if within is not None:
            centre = rows.N[mask][np.argmin(loss[mask])]
            mask &= np.abs(np.log(rows.N / centre)) <= np.log(within) + 1e-9
        x, y = np.log(rows.N[mask]), loss[mask]
        sizes = int(levels(rows.N[mask], 1.05).max()) + 1
        c = float(np.exp(np.log(compute[mask]).mean()))
        if sizes < degree + 1:
            said.append(f"budget {c:.3g}: {sizes} sizes, a {'parabola' if degree == 2 else 'cubic'} needs {degree + 1}")
            continue
        middle = x.mean()
        shape = np.polyfit(x - middle, y, degree)
        fitted = np.polyval(shape, x - middle)
        squares += float(np.sum(np.log(y / fitted) ** 2)) if (fitted > 0).all() else 0.0
        freedom += max(len(x) - degree - 1, 0)
        flat = np.roots(np.polyder(shape))
        lowest = [float(r.real) for r in flat if abs(r.imag) < 1e-9 and np.polyval(np.polyder(shape, 2), r.real) > 0]
        if not lowest:
            said.append(f"budget {c:.3g}: the losses have no minimum, the parabola opens downwards")
            continue
        best = middle + min(lowest, key=abs)
        if not x.min() < best < x.max():
            said.append(
                f"budget {c:.3g}: no interior minimum, the best size lies beyond the sampled ones; add runs there"
            )
            continue
        if x.max() - x.min() > np.log(30):
            said.append(f"budget {c:.3g}: sizes span a factor {np.exp(x.max() - x.min()):.3g}, wide for a parabola")
        found.append(Vertex(c, float(np.exp(best))))
    return Vertices(found, said, float(np.sqrt(squares / freedom)) if freedom else 0.002)


def curves(rows: Rows) -> Curves:
    """Every run's lowest loss so far, interpolated in log-log between its checkpoints; infinite outside them."""
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
    return Curves(grid, lowest, sizes)


def _line(points: Sequence[Vertex]) -> tuple[float, float]:
    """G and a of log N = log G + a log C, by least squares."""
    x, y = np.log([v.C for v in points]), np.log([v.N for v in points])
    slope = float(((x - x.mean()) @ (y - y.mean())) / max(((x - x.mean()) ** 2).sum(), 1e-300))
    return float(np.exp(y.mean() - slope * x.mean())), slope


def _sizes(points: Sequence[Vertex]) -> int:
    return len({v.N for v in points})


def _scatter(points: Sequence[Vertex], draws: Floats | None) -> list[str]:
    """Whether the vertices scatter about their line as the noise in the losses says: the slope's error both ways."""
    if draws is None or len(points) <= FEWEST:
        return []
    x = np.log([v.C for v in points])
    g, a = _line(points)
    left = np.log([v.N for v in points]) - np.log(g) - a * x
    seen = float(np.sqrt(left @ left / (len(x) - 2) / ((x - x.mean()) ** 2).sum()))
    said = float(draws[:, 1].std())
    if seen <= SCATTER * said:
        return []
    return [
        f"the best sizes scatter {seen / said:.1f} times as much about the line as noise in the losses explains: the interval "
        f"of a is too narrow, its standard error from the scatter is {seen:.2g}"
    ]


def _left_out(points: Sequence[Vertex]) -> dict[str, tuple[float, float]]:
    """The ranges of G and a without any one budget, or, where many budgets share one, without any one size."""
    names = [v.N if len(points) > 2 * _sizes(points) else v.C for v in points]
    found = []
    for name in sorted(set(names)):
        some = [v for v, own in zip(points, names, strict=True) if own != name]
        if _sizes(some) > 1:
            found.append(_line(some))
    if len(found) < FEWEST:
        return {}
    return {key: (min(one[i] for one in found), max(one[i] for one in found)) for i, key in enumerate(("G", "a"))}


def _hold_outs(law: str, rows: Rows, points: list[Vertex]) -> tuple[tuple[HoldOut, ...], list[str]]:
    """The best sizes of the dearest budgets, from a line through the cheaper ones; the score is of N, not of the loss."""
    compute = 6 * rows.N * rows.D
    if law == "isoflop":
        budgets = sorted(v.C for v in points)
        edges = {"best size of the dearest budget": budgets[-1]}
        edges |= {"best sizes of the dearest half of the budgets": budgets[(len(budgets) + 1) // 2]}
    else:
        top = max(v.C for v in points)
        edges = {f"best sizes of the dearest {words}": top / k for words, k in (("factor 3", 3.0), ("decade", 10.0))}
    found, missing = [], []
    for rule, start in edges.items():
        edge = start * (1 - 1e-9)
        if law == "isoflop":
            cheap, dear = ([v for v in points if (edge <= v.C) == late] for late in (False, True))
            keep = compute < edge / BUDGET**0.5
        else:  # what a person would have seen who stopped every run there
            keep = compute < edge
            some = rows.only(keep)
            cheap = curves(some).best() if len(some.loss) else []
            dear = [v for v in points if edge <= v.C]
        if len({v.C for v in cheap}) < FEWEST or _sizes(cheap) < FEWEST or not dear:
            what = "budgets with a minimum" if law == "isoflop" else "sizes that are best somewhere"
            missing.append(f"no hold-out of the {rule}: {_sizes(cheap)} {what} are left, a line needs {FEWEST}")
            continue
        g, a = _line(cheap)
        measured = np.array([v.N for v in dear])
        error = g * np.array([v.C for v in dear]) ** a / measured - 1
        last = max(cheap, key=lambda v: v.C).N
        found.append(
            HoldOut(
                rule=rule,
                n_fit=int(keep.sum()),
                n_held=int((~keep).sum()),
                are=float(np.mean(np.abs(error))),
                bias=float(np.mean(error)),
                baseline_are=float(np.mean(np.abs(last / measured - 1))),
                compute_ratio=float(max(v.C for v in dear) / np.sum(compute[keep])),
            )
        )
    return tuple(found), missing


def _sensitivity(
    law: str,
    rows: Rows,
    points: list[Vertex],
    table: pd.DataFrame,
    names: tuple[str, str, str, str | None],
    also: dict[str, str] | None,
) -> tuple[Sensitivity, ...]:
    """Other windows, degrees, cut-offs and counts; `ahead` is the best size at ten times the dearest budget."""
    top = max(v.C for v in points)
    every = np.ones(len(rows.loss), dtype=np.bool_)
    ways: dict[str, tuple[Callable[[Rows], list[Vertex]], Mask]]
    if law == "isoflop":
        plain: Callable[[Rows], list[Vertex]] = lambda some: vertices(some, some.loss).points  # noqa: E731
        ways = {
            "a cubic instead of a parabola": (lambda some: vertices(some, some.loss, degree=3).points, every),
            f"only sizes within {NARROW:g} times of the lowest loss": (
                lambda some: vertices(some, some.loss, within=NARROW).points, every),
            "the size of the lowest loss instead of the vertex": (_lowest, every),
        }  # fmt: skip
        codes = levels(6 * rows.N * rows.D, BUDGET)
        ways["without the cheapest budget"] = (plain, codes > 0)
        ways["without the dearest budget"] = (plain, codes < codes.max())
    else:
        plain = lambda some: curves(some).best()  # noqa: E731
        longest = np.zeros(int(rows.run.max()) + 1)
        np.maximum.at(longest, rows.run, rows.D)
        ways = {
            "without the first tenth of every run": (plain, 0.1 * longest[rows.run] <= rows.D),
            "one point for each size, midway in its budgets": (lambda some: _middles(curves(some).best()), every),
        }
        codes = levels(rows.N, 1.05)
        ways["without the smallest size"] = (plain, codes > 0)
        ways["without the largest size"] = (plain, codes < codes.max())
    for least in (5, 10):
        ways[f"only D/N of {least} and more"] = (plain, least * (1 - 1e-6) <= rows.D / rows.N)
    found = [_varied("as fitted", points, len(rows.loss), top)]
    for change, (way, keep) in ways.items():
        if keep.any() and not (keep.all() and way is plain):
            found.append(_varied(change, way(rows.only(keep)), int(keep.sum()), top))
    _, tokens, loss, clusters = names
    for name, column in (also or {}).items():
        other = usable_rows(table, {"N": column, "D": tokens}, loss=loss, clusters=clusters)[0]
        found.append(_varied(f"N counted as {name}", plain(other), len(other.loss), top))
    return tuple(found)


def _lowest(rows: Rows) -> list[Vertex]:
    """The size of the lowest loss at each budget, where it is not at the edge of the sizes."""
    compute = 6 * rows.N * rows.D
    codes = levels(compute, BUDGET)
    found = []
    for code in range(int(codes.max()) + 1):
        mask = codes == code
        best = rows.N[mask][np.argmin(rows.loss[mask])]
        if rows.N[mask].min() < best < rows.N[mask].max():
            found.append(Vertex(float(np.exp(np.log(compute[mask]).mean())), float(best)))
    return found


def _middles(points: Sequence[Vertex]) -> list[Vertex]:
    return [
        Vertex(float(np.exp(np.mean([np.log(v.C) for v in points if n == v.N]))), n)
        for n in sorted({v.N for v in points})
    ]


def _varied(change: str, points: Sequence[Vertex], rows: int, top: float) -> Sensitivity:
    if len(points) < FEWEST or _sizes(points) < FEWEST:
        return Sensitivity(change, {}, rows, None, None, f"{len(points)} best sizes are left, a line needs {FEWEST}")
    g, a = _line(points)
    return Sensitivity(change, {"G": g, "a": a}, rows, g * (10 * top) ** a, top / (6 * (g * top**a) ** 2))
