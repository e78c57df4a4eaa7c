"""Synthetic runs with known laws."""

import numpy as np
import pandas as pd

from scantling.laws import Chinchilla

TRUE = Chinchilla(A=482.0, B=2085.0, E=1.82, alpha=0.348, beta=0.366)
TIED = Chinchilla(A=120.0, B=190.0, E=1.7, alpha=0.25, beta=0.25)


def grid(
    law: Chinchilla,
    sizes: tuple[float, ...],
    multipliers: tuple[float, ...],
    *,
    noise: float = 0.0,
    seed: int = 0,
    repeats: int = 1,
) -> pd.DataFrame:
    """Every size with every multiplier, losses with multiplicative Gaussian noise."""
    rng = np.random.default_rng(seed)
    n, m, _ = (x.ravel() for x in np.meshgrid(sizes, multipliers, np.arange(repeats), indexing="ij"))
    loss = law.loss(n, n * m) * np.exp(noise * rng.standard_normal(len(n)))
    return pd.DataFrame({"N": n, "D": n * m, "loss": loss, "run": [f"run{i}" for i in range(len(n))]})


SIZES = (1e7, 4e7, 1.5e8, 6e8)
MULTIPLIERS = (10.0, 20.0, 80.0, 320.0)


def two_families(
    saving: float,
    *,
    noise: float,
    seed: int,
    multipliers: tuple[float, ...] = (20.0,),
    budgets: int = 5,
    seeds: int = 1,
) -> pd.DataFrame:
    """L = 1.8 + 1.7 (C/1e19)^-0.13 at M = 20 for `plain`; `thrifty` needs (1 - saving) of that compute."""
    rng = np.random.default_rng(seed)
    rows = []
    for family in ("plain", "thrifty"):
        for m in multipliers:
            size = 0.9 * (m / 20) ** 0.13 + 0.8 * (m / 20) ** -0.13
            for rung, c in enumerate(np.geomspace(1e17, 1e20, budgets)):
                for repeat in range(seeds):
                    worth = c / (1 - saving) if family == "thrifty" else c
                    loss = (1.8 + size * (worth / 1e19) ** -0.13) * np.exp(noise * rng.standard_normal())
                    rows.append((family, c, m, loss, f"{rung}-{m:g}-{repeat}"))
    return pd.DataFrame(rows, columns=["family", "C", "M", "loss", "run"])
