"""Where the minimiser begins: a grid of exponents with the prefactors solved by non-negative least squares.

(Variable projection: at given exponents a sum of power laws is linear in its prefactors.)
"""

import numpy as np
import numpy.typing as npt

from scantling.laws.descent import Design
from scantling.laws.forms import Floats

EXPONENTS = (0.05, 1.2)  # the range of exponents searched for starts
GRID = 576  # pairs (or triples, ...) of exponents tried for starts
COARSE = 144  # the same where many problems share them
APART = 0.1  # exponents of two starts differ by at least this


def starting_points(design: Design, loss: Floats, weights: Floats, count: int = 6) -> list[Floats]:
    """(count, P) spread-out starts for each of V problems that differ in their weights, (V, n)."""
    exponent = np.array(design.exponent)
    few, grid = _grid(design, exponent, GRID if len(weights) == 1 else COARSE)
    members = design.terms[:, :, ~exponent]
    columns = np.zeros((members.shape[-1], len(grid), len(loss)))
    rest = np.zeros(1)  # what terms without a free prefactor add
    for k, (terms, offset) in enumerate(zip(design.terms, design.offset, strict=True)):
        powers = terms[:, exponent]
        size = np.exp(grid @ powers.T + offset) if powers.any() else np.exp(offset)[None]
        for q in np.flatnonzero(members[k].any(0)):
            columns[q] += size * members[k, :, q]
        alone = 1 - members[k].sum(-1)
        if alone.any():
            rest = rest + size * alone
    typical = columns.mean(-1).T
    columns /= loss
    goal = 1 - rest / loss
    wide = weights.T
    number = len(columns)
    gram = np.empty((len(grid), len(weights), number, number))
    right = np.empty((len(grid), len(weights), number))
    for i in range(number):
        right[:, :, i] = (columns[i] * goal) @ wide
        for j in range(i + 1):
            gram[:, :, i, j] = gram[:, :, j, i] = (columns[i] * columns[j]) @ wide
    ridge = 1e-12 * np.trace(gram, axis1=2, axis2=3)[..., None, None] * np.eye(number)
    solved = _non_negative((gram + ridge + 1e-300).reshape(-1, number, number), right.reshape(-1, number))
    solved = solved.reshape(right.shape)
    smallest = 1e-4 / np.maximum(typical, 1e-300) * loss.mean()
    solved = np.maximum(
        solved, smallest[:, None]
    )  # a prefactor must be positive: such starts rank by what they then miss
    missed = np.einsum("gvi,gvij,gvj->gv", solved, gram, solved) - 2 * np.einsum("gvi,gvi->gv", solved, right)
    missed += (goal**2) @ wide  # (G, V), or (1, V) where every term has its prefactor

    found = []
    for v in range(len(weights)):
        chosen = _spread_out(few, missed[:, v], count)
        theta = np.empty((len(chosen), len(exponent)))
        theta[:, exponent], theta[:, ~exponent] = grid[chosen], np.log(solved[chosen, v])
        found.append(theta)
    return found


def _grid(design: Design, exponent: npt.NDArray[np.bool_], points: int) -> tuple[Floats, Floats]:
    """(G, dims) exponents tried, one for each set of kin, and (G, exponents) the same for every exponent."""
    kin = np.array(design.kin or range(len(exponent)))[exponent]
    _, member_of = np.unique(kin, return_inverse=True)
    dims = int(member_of.max()) + 1 if len(kin) else 0
    if dims == 0:
        return np.zeros((1, 0)), np.zeros((1, 0))
    if dims <= 3:
        axis = np.linspace(*EXPONENTS, max(2, round(points ** (1 / dims))) if dims > 1 else 48)
        few = np.stack(np.meshgrid(*[axis] * dims, indexing="ij"), -1).reshape(-1, dims)
    else:
        few = np.random.default_rng(0).uniform(*EXPONENTS, (points, dims))
    return few, few[:, member_of]


def _spread_out(grid: Floats, missed: Floats, count: int) -> list[int]:
    """The best grid points that lie apart from each other."""
    chosen: list[int] = []
    left = np.where(np.isnan(missed), np.inf, missed)
    while len(chosen) < count and np.isfinite(left).any():
        chosen.append(int(np.argmin(left)))
        near = np.abs(grid - grid[chosen[-1]]).max(1, initial=0.0) < APART
        left = np.where(near, np.inf, left)
    return chosen


def _non_negative(gram: Floats, right: Floats) -> Floats:
    """Least squares with the columns that come out negative taken away, one round after another; (G, Q, Q), (G, Q)."""
    solved = np.linalg.solve(gram, right[..., None])[..., 0]
    gone = solved < 0
    open_ = np.flatnonzero(gone.any(1))
    eye = np.eye(right.shape[-1])
    for _ in range(right.shape[-1] - 1):
        if not len(open_):
            break
        kept = (~gone[open_]).astype(np.float64)
        masked = gram[open_] * kept[:, :, None] * kept[:, None, :] + eye * gone[open_][:, :, None]
        fresh = np.linalg.solve(masked, (right[open_] * kept)[..., None])[..., 0]
        solved[open_] = fresh
        gone[open_] |= fresh < 0
        open_ = open_[(fresh < 0).any(1)]
    return np.asarray(np.maximum(solved, 0.0), dtype=np.float64)
