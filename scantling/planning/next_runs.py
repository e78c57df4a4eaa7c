"""Which runs next? The small study that most lowers the expected regret of the plan's choice, for the compute there is.

The law's bootstrap draws stand for what is not known. Regret: how much worse the shape chosen on average is than the one
that would be chosen if the true draw were known. A run is worth what it takes off that regret (value of sample information).
Over the draws, the choices' objectives and the log losses that the runs would show are taken as jointly normal, so that what
runs of a known noise teach is a formula, and no noise is simulated: with f the principal coordinates of the objectives
(unit variance), the runs explain

    V = cov(f, l) (cov(l) + noise^2)^-1 cov(l, f)

of them, and the objectives expected after the runs are distributed as mean + V^1/2 z B. The same fixed z serve every set of
runs (common random numbers), so that sets are compared and not the luck of their draws. A study is a grid: one run, or two by
two, then grown by one size or column at a time, by regret removed per FLOP and by regret removed; the grid with the lower
regret at the end is the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations, product
from typing import Any

import numpy as np

from scantling.planning.certainty import scores_by_draw
from scantling.planning.loss import Law
from scantling.planning.optima import family_scores
from scantling.planning.outcome import Problem, outcome
from scantling.planning.result import Candidate, NextRun, NextRuns
from scantling.planning.screen import ranked
from scantling.planning.shapes import Family, Shapes, joined
from scantling.planning.studies import buildable_as, head_family, ladder, study_yaml, variant_families
from scantling.planning.variants import Floats

DRAWS, FAMILY_DRAWS = 500, 150
ACTIONS = 80  # shapes the choice is between
PARTS = tuple(np.geomspace(1 / 16, 1, 9).tolist())
RATIOS = (10.0, 20.0, 40.0, 80.0, 160.0)
LEAST_GAIN = 0.01  # of the regret at the start, below which no more runs are added
NOISE = 0.01  # of the log loss, where neither plan nor fit says
FAMILIES = 4  # of the plan in one study
COORDINATES, POINTS = 6, 4096  # of the objectives kept, and of z

Cell = tuple[int, int]


@dataclass(frozen=True)
class Question:
    """The choice and the runs that could inform it.

    Attributes:
        scores: (draws, actions) the objective of each choice under each draw, up to a constant of the draw.
        logs: (rows, columns, draws, runs) the log loss of the runs of each cell under each draw, without noise.
        flops: (rows, columns) of each cell.
        noise: standard deviation of a run's log loss.
        seed: of the points z.
    """

    scores: Floats
    logs: Floats
    flops: Floats
    noise: float
    seed: int = 0
    known: dict[tuple[Cell, ...], float] = field(default_factory=dict)

    @cached_property
    def _coordinates(self) -> tuple[Floats, Floats]:
        """(draws, r) principal coordinates of the objectives, unit variance, and (r, actions) their loadings."""
        centred = self.scores - self.scores.mean(axis=0)
        left, sizes, right = np.linalg.svd(centred, full_matrices=False)
        most = int(np.sum(sizes > 1e-9 * (sizes[0] if sizes.size else 1.0)))
        kept, root = min(COORDINATES, most), max(1.0, len(self.scores) - 1) ** 0.5
        return left[:, :kept] * root, sizes[:kept, None] * right[:kept] / root

    @cached_property
    def _points(self) -> Floats:
        """(points, r) standard normal, in pairs of opposite sign, with unit covariance exactly."""
        rank = self._coordinates[0].shape[1]
        half = np.random.default_rng(self.seed).standard_normal((POINTS // 2, rank))
        points = np.concatenate([half, -half])
        if not rank:
            return points
        found: Floats = points @ np.linalg.inv(np.linalg.cholesky(points.T @ points / len(points))).T
        return found

    def regret(self, cells: Sequence[Cell]) -> float:
        """Expected regret of the choice after these runs, in the objective's unit."""
        key = tuple(sorted(cells))
        if key not in self.known:
            self.known[key] = self._least(np.eye(self._coordinates[0].shape[1])) * -1 + self._least(
                self._explained(key)
            )
        return max(0.0, self.known[key])

    def _explained(self, cells: Sequence[Cell]) -> Floats:
        """(r, r) V: the share of the coordinates' variance that the runs explain."""
        f = self._coordinates[0]
        if not cells:
            return np.zeros((f.shape[1], f.shape[1]))
        logs = np.concatenate([self.logs[cell] for cell in cells], axis=1)
        logs = (logs - logs.mean(axis=0)) / self.noise
        count = max(1, len(logs) - 1)
        across = f.T @ logs / count
        found: Floats = across @ np.linalg.solve(logs.T @ logs / count + np.eye(logs.shape[1]), across.T)
        return found

    def _least(self, explained: Floats) -> float:
        """Mean over z of the least objective expected."""
        loadings = self._coordinates[1]
        values, vectors = np.linalg.eigh((explained + explained.T) / 2)
        root = (vectors * np.sqrt(values.clip(0, 1))) @ vectors.T
        means = self.scores.mean(axis=0) + self._points @ root @ loadings
        return float(means.min(axis=1).mean())


def grow(question: Question, budget: float, per_flop: bool) -> list[Cell]:
    """The grid of runs within a budget of FLOPs, one size or column added at a time."""
    rows, columns = question.flops.shape
    start = question.regret([])
    cells: list[Cell] = []
    now = start
    while True:
        mine, ours = {row for row, _ in cells}, {column for _, column in cells}
        if cells:
            moves = [[(row, c) for c in ours] for row in range(rows) if row not in mine]
            moves += [[(r, column) for r in mine] for column in range(columns) if column not in ours]
        else:
            moves = [[(row, column)] for row in range(rows) for column in range(columns)]
            pairs = product(combinations(range(rows), 2), combinations(range(columns), 2))
            moves += [list(product(two, others)) for two, others in pairs]
        spent = sum(question.flops[cell] for cell in cells)
        best: tuple[float, list[Cell], float] | None = None
        for move in moves:
            price = float(sum(question.flops[cell] for cell in move))
            if spent + price > budget:
                continue
            after = question.regret([*cells, *move])
            gain = now - after
            worth = gain / price if per_flop else gain
            if gain > LEAST_GAIN * start and (best is None or worth > best[0]):
                best = (worth, move, after)
        if best is None:
            return sorted(cells)
        cells, now = [*cells, *best[1]], best[2]


def next_runs(
    problem: Problem, kinds: Sequence[Family], candidates: Sequence[Candidate], pool: Shapes, quote: Any, seed: int = 0
) -> NextRuns | None:
    """The study to run next, or None where the plan does not ask (`next:`).

    Raises:
        InputError: the law has no draws, or no run fits the budget.
    """
    asked = problem.config.next
    if asked is None:
        return None
    heads = problem.law.heads is not None
    laws = problem.law.drawn(FAMILY_DRAWS if heads else DRAWS)
    if not laws:
        raise problem.config.fault(
            ("next",), f"needs draws of the law, to know what is not known: {problem.law.no_draws}"
        )
    if heads:
        scores, laws = family_scores(problem, kinds, laws)
    else:
        pool = pool.take(ranked(outcome(problem, pool, quote).score, 1000))
        scores = scores_by_draw(problem, pool, problem.price(pool), DRAWS)
        wins = np.bincount(scores.argmin(axis=1), minlength=len(pool))
        near = np.unique([*np.argsort(-wins, kind="stable")[: ACTIONS // 2], *range(min(ACTIONS // 2, len(pool)))])
        scores = scores[:, near]
    usable = np.flatnonzero(np.isfinite(scores).any(axis=1))
    scores, laws = scores[usable], [laws[i] for i in usable]
    least = scores.min(axis=1, keepdims=True)
    scores = np.minimum(scores - least, least)  # an impossible or hopeless choice counts as twice the best
    columns = _columns(problem, candidates, kinds)
    runs = _simulated(problem, columns, laws)
    flops = runs.flops.sum(axis=2)
    if flops.min() > asked.training_flops:
        raise problem.config.fault(
            ("next", "training_flops"),
            f"the smallest run takes {flops.min():.4g} FLOPs, got {asked.training_flops:.4g}; raise it to at least that",
        )
    noise = asked.noise or getattr(problem.law.fit, "residual_sd", None) or NOISE
    question = Question(scores, runs.logs, flops, float(noise), seed)
    grids = [grow(question, asked.training_flops, per_flop) for per_flop in (True, False)]
    cells = min(grids, key=lambda cells: (question.regret(cells), sum(flops[cell] for cell in cells)))
    return _answer(problem, columns, runs, question, cells)


@dataclass(frozen=True)
class Columns:
    """The runs to choose from: the same sizes in every column; a cell holds one run, or one of each family of the plan.

    Attributes:
        shapes: of each column, and in it of each run of a cell.
        ratios: tokens per parameter of each column.
        families: of each column's runs the study's family, name and keys; empty where the study has one family.
    """

    shapes: list[list[Shapes]]
    ratios: list[float]
    families: list[list[tuple[str, dict[str, Any]]]]


@dataclass(frozen=True)
class Simulated:
    """(rows, columns, runs) tokens, FLOPs and N, (rows, columns, draws, runs) log losses."""

    tokens: Floats
    flops: Floats
    sizes: Floats
    logs: Floats


def _columns(problem: Problem, candidates: Sequence[Candidate], kinds: Sequence[Family]) -> Columns:
    sizes = ladder(problem, candidates[0], PARTS)
    if problem.law.fit is not None and "N" in problem.law.fit.ranges:  # smaller runs tell nothing the law was fitted to
        n = np.asarray(problem.price(sizes).parameters, dtype=np.float64)
        known = n >= problem.law.fit.ranges["N"][0]
        sizes = sizes.take(known) if known.any() else sizes.take(np.s_[-1:])
    given, variants = problem.config.next, problem.config.space.variants
    ratios = list(given.tokens_per_parameter if given and given.tokens_per_parameter else RATIOS)
    if problem.law.heads is not None:
        pairs = list(dict.fromkeys((int(kind.heads or 1), int(kind.kv_heads or 1)) for kind in kinds))
        shapes = [[_changed(sizes, num_attention_heads=h, num_key_value_heads=k)] for h, k in pairs]
        one = float(problem.ratio or problem.law.tokens_per_parameter or 20)
        return Columns(shapes, [one] * len(pairs), [[head_family(pair)] for pair in pairs])
    if problem.config.space.families:
        base = [problem.evidence.baseline] if problem.evidence else []
        keys = variant_families(problem, [*base, *(item.family for item in candidates)])
        keys = dict(list(keys.items())[:FAMILIES])
        places = {name: next(i for i, variant in enumerate(variants) if variant.name == name) for name in keys}
        fits = buildable_as(problem, sizes, keys)
        if fits.any():
            like = sizes.hidden_size
            cell = [
                _changed(sizes, intermediate_size=variants[i].ffn.inner(like), variant=i).take(fits)
                for i in places.values()
            ]
            return Columns([cell] * len(ratios), ratios, [list(keys.items())] * len(ratios))
    return Columns([[sizes]] * len(ratios), ratios, [[]] * len(ratios))


def _changed(shapes: Shapes, **values: Any) -> Shapes:
    """The shapes with other values, the same for all of them or one for each."""
    like = shapes.hidden_size
    return replace(
        shapes, **{name: np.broadcast_to(value, like.shape).astype(np.int64) for name, value in values.items()}
    )


def _simulated(problem: Problem, columns: Columns, laws: Sequence[Law]) -> Simulated:
    """The tokens of all families of a size are the ratio x the N of the evidence's baseline, as in a study."""
    every = joined([shapes for cell in columns.shapes for shapes in cell])
    form = (len(columns.shapes), len(columns.shapes[0]), len(columns.shapes[0][0]))
    quote = problem.price(every)
    n = np.broadcast_to(np.asarray(quote.parameters, dtype=np.float64), every.hidden_size.shape)
    nominal = np.broadcast_to(n * quote.size_ratio, n.shape)
    d = nominal * np.repeat(columns.ratios, form[1] * form[2])
    flops = np.asarray(quote.training_flops_per_token, dtype=np.float64) * d
    logs = np.array([np.log(law.curve(every, quote).loss(d)) for law in laws])
    folded = logs.reshape(len(laws), *form).transpose(3, 1, 0, 2)
    tokens, work, sizes = (x.reshape(form).transpose(2, 0, 1) for x in (d, flops, n))
    return Simulated(tokens, work, sizes, folded)


def _answer(problem: Problem, columns: Columns, runs: Simulated, question: Question, cells: Sequence[Cell]) -> NextRuns:
    """The chosen runs, with their study."""
    now, after = question.regret([]), question.regret(cells)
    spent = float(sum(question.flops[cell] for cell in cells))
    found = tuple(
        NextRun(
            hidden_size=int(shapes.hidden_size[r]),
            num_hidden_layers=int(shapes.num_hidden_layers[r]),
            num_attention_heads=int(shapes.num_attention_heads[r]),
            num_key_value_heads=int(shapes.num_key_value_heads[r]),
            parameters=float(runs.sizes[r, c, k]),
            tokens=float(runs.tokens[r, c, k]),
            tokens_per_parameter=float(columns.ratios[c]),
            training_flops=float(runs.flops[r, c, k]),
            family=columns.families[c][k][0] if columns.families[c] else "",
        )
        for r, c in cells
        for k, shapes in enumerate(columns.shapes[c])
    )
    study = None
    if cells:
        chosen = columns.shapes[0][0].take(sorted({r for r, _ in cells}))
        used = sorted({c for _, c in cells})
        why = f"The runs that lower the expected regret of the plan's choice from {now:.4g} to {after:.4g}."
        families = {name: keys for c in used for name, keys in columns.families[c]}
        study = study_yaml(problem, "plan-next", why, chosen, families, sorted({columns.ratios[c] for c in used}))
    return NextRuns(
        runs=found,
        training_flops=spent,
        expected_regret=now,
        expected_regret_after=after,
        regret_removed_per_flop=(now - after) / spent if spent else 0.0,
        noise=question.noise,
        draws=len(question.scores),
        grid=(runs.flops.shape[0], runs.flops.shape[1]),
        study=study,
    )
