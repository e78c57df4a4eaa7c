"""The extrapolation rule on ladders that had no part in choosing it, beside its first version and what else people fit.

Every ladder is fitted on its cheap runs and scored by mean |predicted / measured - 1| over the dear ones:
- the over-training testbed (arXiv 2403.08540) on seven validation sets other than the one of the hold-outs that were known,
  N <= 0.411B fitted, N >= 1.4B predicted, three families (training sets): sets of web text, and the others;
- its shape search of 435 runs at one D/N, the dearest tenth and third of compute held out;
- Figure 2 of arXiv 2503.09579 (digitised): seven head configurations, 20 tokens per parameter, the two largest sizes held out;
- synthetic ladders of random laws, sizes, multipliers, noise, and outliers, predicting the truth at 10 and 100 times the compute.

`python benchmarks/laws_extrapolation.py 200` (number of synthetic ladders) takes some minutes.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import harness
import numpy as np
import pandas as pd

from scantling.errors import InputError
from scantling.laws import Chinchilla, LawFit, clean, extrapolate, fit

DATA = Path(__file__).parents[1] / "tests" / "data" / "scaling"
OTHERS = {
    "web text": ("openlm", "paloma_c4", "paloma_refinedweb"),
    "other text": ("c4_german", "paloma_redpajama", "paloma_100pl", "paloma_ptb"),
}
HEADS: dict[str, tuple[float | None, ...]] = {  # losses of L = 6, 8, .., 16 with d = 128 L, by (n_h, n_kv)
    "8,8": (3.1187, 2.9519, 2.8457, 2.7601, 2.7039, 2.6526), "8,4": (3.1257, 2.9656, 2.8512, 2.7729, 2.7174, 2.6675),
    "8,2": (3.1470, 2.9819, 2.8669, 2.7830, 2.7226, 2.6800), "8,1": (3.1626, 2.9967, 2.8813, 2.7953, 2.7336, 2.6881),
    "4,1": (None, 3.0255, 2.9156, 2.8163, 2.7557, 2.7062), "2,1": (None, 3.0655, 2.9502, 2.8614, 2.7917, 2.7428),
    "1,1": (None, 3.1074, 2.9846, 2.8962, 2.8269, 2.7709),
}  # fmt: skip
RESAMPLES = 200
Fitter = Callable[[pd.DataFrame], LawFit]


def first_version(table: pd.DataFrame) -> LawFit:
    with patch("scantling.laws.rule.DELTAS", (1e-2, 1e-2)):
        return extrapolate(table, resamples=0, checks=False)


def papers_recipe(table: pd.DataFrame) -> LawFit:
    """Five runs and squares of the raw loss (arXiv 2403.08540); only the testbed says which five."""
    if "in_loss_fit" not in table:
        raise InputError("no five runs are named")
    return fit(table[table.in_loss_fit == 1], tied=True, objective="ols_raw", resamples=0, checks=False)


SIDES: dict[str, Fitter] = {
    "the rule": lambda t: extrapolate(t, resamples=RESAMPLES, checks=False),
    "its first version": first_version,
    "the paper's five runs": papers_recipe,
    "equal exponents, squares": lambda t: fit(t, tied=True, objective="ols", resamples=0, checks=False),
    "free exponents, Huber 0.001": lambda t: fit(t, resamples=0, checks=False),
}


def public() -> Iterator[tuple[str, str, pd.DataFrame, pd.DataFrame]]:
    """Kind of ladder, its name, the runs to fit and the runs to predict."""
    testbed = pd.read_csv(DATA / "overtrain.csv")
    for kind, names in OTHERS.items():
        for name in names:
            for family, every in testbed.groupby("train_set"):
                rows = every.assign(loss=every[f"loss_{name}"])[["N", "D", "loss", "in_loss_fit"]]
                yield f"testbed, {kind}", f"{family} on {name}", rows[rows.N < 1e9], rows[rows.N > 1e9]
    grid = pd.read_csv(DATA / "overtrain_grid.csv").rename(columns={"loss_openlm": "loss"})[["N", "D", "loss"]]
    grid, _ = clean(grid)
    for share in (0.1, 0.33):
        cheap = (grid.N * grid.D).quantile(1 - share) >= grid.N * grid.D
        yield "shape search", f"dearest {share:.0%}", grid[cheap], grid[~cheap]
    for heads, losses in HEADS.items():
        n_h, n_kv = map(int, heads.split(","))
        layers = np.array([6, 8, 10, 12, 14, 16])
        size = 8 * layers * (128 * layers) ** 2 + 2 * layers * 128 * layers * 64 * (n_h + n_kv)
        rows = pd.DataFrame({"N": size, "D": 20 * size, "loss": losses}).dropna()
        yield "head configurations", heads, rows[:-2], rows[-2:]


def synthetic(seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A random ladder and the truth at 10 and 100 times its largest compute."""
    draw = np.random.default_rng(seed)
    law = Chinchilla(A=float(np.exp(draw.uniform(4.5, 7))), B=float(np.exp(draw.uniform(5, 8))), E=float(draw.uniform(1.4, 2)),
                     alpha=float(draw.uniform(0.25, 0.42)), beta=float(draw.uniform(0.25, 0.42)))  # fmt: skip
    sizes = np.geomspace(10 ** draw.uniform(6.7, 7.5), 10 ** draw.uniform(8.5, 9.3), draw.integers(3, 8))
    multipliers = np.geomspace(draw.choice([2, 5, 10, 20]), draw.choice([40, 160, 320]), draw.integers(2, 7))
    n, m = (x.ravel() for x in np.meshgrid(sizes, multipliers, indexing="ij"))
    noise = 10 ** draw.uniform(-3, -2) * draw.standard_normal(len(n))
    noise += np.where(draw.random(len(n)) < 0.05, draw.uniform(0.02, 0.08, len(n)), 0.0)
    rows = pd.DataFrame({"N": n, "D": n * m, "loss": law.loss(n, n * m) * np.exp(noise)})
    grown = sizes[-1] * 10 ** np.array([0.5, 1.0])
    ahead = pd.DataFrame({"N": grown, "D": grown * multipliers[-1]})
    return rows, ahead.assign(loss=law.loss(ahead.N, ahead.D))


def answers(law: LawFit, dear: pd.DataFrame) -> tuple[np.ndarray, np.ndarray | None]:
    """(n,) predictions and (2, n) ends of the law's 95% interval."""
    n, d = dear.N.to_numpy(float), dear.D.to_numpy(float)
    given = {"N": n, "D": d, "C": 6 * n * d}
    found = law.predict_at({name: given[name] for name in law.formula.columns})
    return found.value, None if found.low is None or found.high is None else np.stack([found.low, found.high])


def score(ladders: list[tuple[pd.DataFrame, pd.DataFrame]], truth: bool) -> dict[str, Any]:
    """Mean errors of every side, and how often the rule's 95% interval holds what it predicts."""
    errors: dict[str, list[float]] = {name: [] for name in SIDES}
    inside: list[bool] = []
    failed = {name: 0 for name in SIDES}
    bias: list[float] = []
    for cheap, dear in ladders:
        for name, side in SIDES.items():
            try:
                law = side(cheap)
            except InputError:
                failed[name] += 1
                continue
            value, ends = answers(law, dear)
            errors[name] += list(np.abs(value / dear.loss.to_numpy() - 1))
            if name == "the rule":
                bias += list(value / dear.loss.to_numpy() - 1)
                if ends is not None:
                    noise = 0.0 if truth else 1.96 * (law.residual_sd or 0.0)
                    y = dear.loss.to_numpy()
                    half = np.hypot(np.log(ends[1] / ends[0]) / 2, noise)
                    middle = np.log(ends[0] * ends[1]) / 2
                    inside += list(np.abs(np.log(y) - middle) <= half)
    return {
        "ladders": len(ladders),
        "runs predicted": sum(len(dear) for _, dear in ladders),
        **{name: f"{np.mean(values):.2%}" if values else "-" for name, values in errors.items()},
        "bias of the rule": f"{np.mean(bias):+.2%}",
        "within its 95% interval": f"{np.mean(inside):.0%}" if inside else "-",
        "refused": ", ".join(f"{name} {count}" for name, count in failed.items() if count) or "-",
    }


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    kinds: dict[str, list[tuple[pd.DataFrame, pd.DataFrame]]] = {}
    for kind, _, cheap, dear in public():
        kinds.setdefault(kind, []).append((cheap, dear))
    lines = [{"ladders of": kind} | score(ladders, truth=False) for kind, ladders in kinds.items()]
    made = [synthetic(seed) for seed in range(count)]
    lines.append({"ladders of": "synthetic, 10 and 100 times the compute"} | score(made, truth=True))
    few = [(cheap, dear) for cheap, dear in made if len(cheap) < 20]
    lines.append({"ladders of": "of these, fewer than 20 runs"} | score(few, truth=True))
    harness.report(
        "laws_extrapolation",
        "Predicting larger runs from smaller ones",
        {"Mean |predicted / measured - 1|": lines},
        ["Public ladders: the interval is widened by the scatter of single runs. Synthetic ones: the truth without noise.",
         "A side that refuses a ladder is scored on the others; the count is in the last column."],
    )  # fmt: skip


if __name__ == "__main__":
    main()
