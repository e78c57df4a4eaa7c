"""Which runs next? The small study that most lowers the expected regret of the plan's choice, for the compute there is.

The law's bootstrap draws stand for what is not known. Regret: how much worse the shape chosen on average is than the one
that would be chosen if the true draw were known. A run is worth what it takes off that regret: for each draw the losses of
the runs are simulated with noise, each shape's objective is regressed on them, and the choice is made again from what the
regression predicts with that draw left out (value of sample information by regression; Strong et al. 2015, Medical Decision
Making 35). A study is a grid: one run, or two by two, then grown by one size or column at a time, by regret
removed per FLOP and by regret removed; the grid with the lower regret at the end is the answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np

from scantling.planning.certainty import scores_by_draw
from scantling.planning.optima import family_scores
from scantling.planning.outcome import Problem, outcome
from scantling.planning.result import Candidate, NextRun, NextRuns
from scantling.planning.screen import ranked
from scantling.planning.shapes import Family, Floats, Shapes, joined
from scantling.planning.studies import ladder, study_yaml

DRAWS, FAMILY_DRAWS = 150, 150
ACTIONS = 80  # shapes the choice is between
PARTS = tuple(np.geomspace(1 / 16, 1, 9).tolist())
RATIOS = (5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
LEAST_GAIN = 0.01  # of the regret at the start, below which no more runs are added
NOISE = 0.01  # of the log loss, where neither plan nor fit says

Cell = tuple[int, int]


@dataclass(frozen=True)
class Question:
    """The choice and the runs that could inform it.

    Attributes:
        scores: (draws, actions) the objective of each choice under each draw.
        seen: (rows, columns, draws) the log loss that each run would show under each draw, with noise.
        flops: (rows, columns) of each run.
    """

    scores: Floats
    seen: Floats
    flops: Floats

    def regret(self, cells: Sequence[Cell]) -> float:
        """Expected regret of the choice after these runs, in the objective's unit."""
        draws = len(self.scores)
        columns = [np.ones(draws)]
        for row, column in cells:
            centred = self.seen[row, column] - self.seen[row, column].mean()
            columns.append(centred / (centred.std() or 1.0))
        x = np.stack(columns, axis=1)
        hat = x @ np.linalg.solve(x.T @ x + 1e-9 * draws * np.eye(x.shape[1]), x.T)
        own = np.minimum(np.diag(hat), 0.99)[:, None]
        choice = ((hat @ self.scores - own * self.scores) / (1 - own)).argmin(axis=1)
        return float(np.mean(self.scores[np.arange(draws), choice] - self.scores.min(axis=1)))


def grow(question: Question, budget: float, per_flop: bool) -> list[Cell]:
    """The grid of runs within a budget of FLOPs, one size or column added at a time."""
    rows_, columns = question.flops.shape
    start = question.regret([])
    cells: list[Cell] = []
    now = start
    while True:
        rows, cols = {row for row, _ in cells}, {column for _, column in cells}
        if cells:
            moves = [[(row, c) for c in cols] for row in range(rows_) if row not in rows]
            moves += [[(r, column) for r in rows] for column in range(columns) if column not in cols]
        else:
            moves = [[(row, column)] for row in range(rows_) for column in range(columns)]
            pairs = product(combinations(range(rows_), 2), combinations(range(columns), 2))
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
    problem: Problem, kinds: Sequence[Family], candidates: Sequence[Candidate], pool: Shapes, quote: Any
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
    scores = np.where(np.isfinite(scores), scores, 2 * np.max(scores[np.isfinite(scores)]))
    runs, ratios, families = _runs(problem, candidates[0], kinds)
    rows, columns = len(runs[0]), len(runs)
    tokens, flops, logs, sizes = _simulated(problem, runs, ratios, laws)
    noise = asked.noise or getattr(problem.law.fit, "residual_sd", None) or NOISE
    rng = np.random.default_rng(0)
    seen = logs + noise * rng.standard_normal(logs.shape)
    question = Question(scores, seen, flops)
    if flops.min() > asked.training_flops:
        raise problem.config.fault(
            ("next", "training_flops"),
            f"the smallest run takes {flops.min():.4g} FLOPs, got {asked.training_flops:.4g}; raise it to at least that",
        )
    grids = [grow(question, asked.training_flops, per_flop) for per_flop in (True, False)]
    cells = min(grids, key=lambda cells: (question.regret(cells), sum(flops[cell] for cell in cells)))
    now, after = question.regret([]), question.regret(cells)
    spent = float(sum(flops[cell] for cell in cells))
    found = tuple(
        NextRun(
            hidden_size=int(runs[c].hidden_size[r]),
            num_hidden_layers=int(runs[c].num_hidden_layers[r]),
            num_attention_heads=int(runs[c].num_attention_heads[r]),
            num_key_value_heads=int(runs[c].num_key_value_heads[r]),
            parameters=float(sizes[r, c]),
            tokens=float(tokens[r, c]),
            tokens_per_parameter=float(ratios[c]),
            training_flops=float(flops[r, c]),
        )
        for r, c in cells
    )
    study = None
    if cells:
        chosen = runs[0].take(sorted({r for r, _ in cells}))
        used = sorted({c for _, c in cells})
        why = f"The runs that lower the expected regret of the plan's choice from {now:.4g} to {after:.4g}."
        study = study_yaml(
            problem, "plan-next", why, chosen, {families[c][0]: families[c][1] for c in used} if families else {},
            sorted({ratios[c] for c in used}),
        )  # fmt: skip
    return NextRuns(
        runs=found,
        training_flops=spent,
        expected_regret=now,
        expected_regret_after=after,
        regret_removed_per_flop=(now - after) / spent if spent else 0.0,
        noise=float(noise),
        draws=len(laws),
        grid=(rows, columns),
        study=study,
    )


def _runs(
    problem: Problem, best: Candidate, kinds: Sequence[Family]
) -> tuple[list[Shapes], list[float], list[tuple[str, tuple[int, int]]]]:
    """The sizes of each column: tokens per parameter, or head configurations where the law knows those."""
    sizes = ladder(problem, best, PARTS)
    if problem.law.fit is not None and "N" in problem.law.fit.ranges:  # smaller runs tell nothing the law was fitted to
        n = np.asarray(problem.price(sizes).parameters, dtype=np.float64)
        known = n >= problem.law.fit.ranges["N"][0]
        sizes = sizes.take(known) if known.any() else sizes.take(np.s_[-1:])
    given = problem.config.next
    if problem.law.heads is None:
        ratios = list(given.tokens_per_parameter if given and given.tokens_per_parameter else RATIOS)
        return [sizes] * len(ratios), ratios, []
    pairs = list(dict.fromkeys((int(kind.heads or 1), int(kind.kv_heads or 1)) for kind in kinds))
    changed: Callable[[tuple[int, int]], Shapes] = lambda pair: Shapes(  # noqa: E731
        sizes.hidden_size, sizes.num_hidden_layers, np.full_like(sizes.hidden_size, pair[0]),
        np.full_like(sizes.hidden_size, pair[1]), sizes.head_dim, sizes.intermediate_size, sizes.family,
    )  # fmt: skip
    ratio = float(problem.law.tokens_per_parameter or 20)
    return [changed(pair) for pair in pairs], [ratio] * len(pairs), [(f"h{h}-kv{k}", (h, k)) for h, k in pairs]


def _simulated(
    problem: Problem, runs: Sequence[Shapes], ratios: Sequence[float], laws: Sequence[Any]
) -> tuple[Floats, Floats, Floats, Floats]:
    """(rows, columns) tokens and FLOPs, (rows, columns, draws) log losses, (rows, columns) N."""
    every = joined(list(runs))
    quote = problem.price(every)
    n = np.broadcast_to(np.asarray(quote.parameters, dtype=np.float64), every.hidden_size.shape)
    d = n * np.repeat(ratios, len(runs[0]))
    flops = np.asarray(quote.training_flops_per_token, dtype=np.float64) * d
    logs = np.array([np.log(law.loss(every, n, d)) for law in laws])
    form = (len(runs), len(runs[0]))
    folded = logs.reshape(len(laws), *form).transpose(2, 1, 0)
    return d.reshape(form).T, flops.reshape(form).T, folded, n.reshape(form).T
