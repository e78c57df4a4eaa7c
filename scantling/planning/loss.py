"""What is known about loss: a law of parameters and tokens, or one law of parameters per head configuration.

Both answer the same questions (the loss of shapes, its interval, how far a point leaves the fitted range), so that the
search need not know which it asks.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from scantling.costing import param_counts
from scantling.errors import InputError
from scantling.planning.config import PlanConfig
from scantling.planning.price import ParameterCount
from scantling.planning.sections import ChinchillaKeys, HeadLawKeys
from scantling.planning.shapes import Floats, Shapes, Space, families, real_shapes
from scantling.rows import Number

if TYPE_CHECKING:  # pandas and scipy load only when a law of N and D is asked for
    from scantling.laws.lawfit import LawFit

Heads = tuple[int, int]  # query heads, key/value heads
Interval = tuple[float | None, float | None, str | None]  # low and high, or why there are none
UNCERTAIN = "the law is given by its coefficients alone, without their uncertainty"


@dataclass(frozen=True)
class TokenLaw:
    """L(N, D), as fitted or published: it knows parameters and tokens, and nothing of shapes.

    Attributes:
        count: which parameters are N, and `count_note` says why.
    """

    name: str
    fit: "LawFit"
    count: ParameterCount
    count_note: str
    heads: ClassVar[None] = None
    tokens_per_parameter: ClassVar[None] = None

    @property
    def E(self) -> float:
        """Irreducible loss, nats per token."""
        return self.fit.form.E

    def loss(self, shapes: Shapes | None, n: Number, d: Number) -> Floats:
        """E + A N^-alpha + B D^-beta; D may be infinite."""
        return self.fit.form.loss(n, d)

    def tokens(self, n: Number, loss: float) -> Floats:
        """The D that reaches a loss, infinite where none does."""
        return self.fit.form.tokens_for_loss(n, loss)

    def interval(self, n: float, d: float) -> Interval:
        """95% interval of the loss, or why there is none."""
        found = self.fit.predict(n, d)
        if found.low is None or found.high is None:
            return None, None, self.fit.bootstrap
        return float(found.low), float(found.high), None

    def outside(self, heads: tuple[float, float], n: float, d: float) -> tuple[str, ...]:
        """How far N, D and D/N leave the fitted range."""
        return self.fit.outside(n, d)

    def drawn(self, most: int) -> list["Law"]:
        """The law at its bootstrap draws, evenly thinned; those that are no law are left out."""
        draws = self.fit.draws
        found: list[Law] = []
        for row in () if draws is None else draws[:: max(1, -(-len(draws) // most))]:
            params = dict(zip(self.fit.params, map(float, row), strict=True))
            fit = replace(self.fit, params=params, draws=None)
            try:
                _ = fit.form
            except InputError:
                continue
            found.append(replace(self, fit=fit))
        return found

    @property
    def no_draws(self) -> str:
        """Why there are no draws."""
        return self.fit.bootstrap


@dataclass(frozen=True)
class HeadLaw:
    """loss(N; n_h, n_kv) = (a / N)^b + E, one a and b per head configuration (arXiv 2503.09579, eq. 7).

    N counts weights without embeddings, head and norms. Every fit is at 20 tokens per parameter: D does not enter.

    Attributes:
        E: irreducible loss, nats per token.
        coefficients: (a, b) by heads.
        ranges: lowest and highest N trained, by heads, where known.
        fit: the fit it comes from, where it does: its draws give intervals.
    """

    E: float
    coefficients: Mapping[Heads, tuple[float, float]]
    ranges: Mapping[Heads, tuple[float, float]]
    fit: "LawFit | None" = None
    name: str = "loss_per_head_configuration"
    count: ClassVar[ParameterCount] = "matmul_non_embedding"
    count_note: ClassVar[str] = "N is `matmul_non_embedding`: weights without embeddings, output head and norms."
    tokens_per_parameter: ClassVar[float] = 20.0

    @property
    def heads(self) -> list[Heads]:
        """The head configurations it knows."""
        return list(self.coefficients)

    def loss(self, shapes: Shapes | None, n: Number, d: Number) -> Floats:
        """The loss of shapes of N parameters; D does not enter."""
        assert shapes is not None
        heads, kv_heads = shapes.num_attention_heads, shapes.num_key_value_heads
        a, b = np.full(heads.shape, np.nan), np.full(heads.shape, np.nan)
        for (h, k), pair in self.coefficients.items():
            mask = (heads == h) & (kv_heads == k)
            a[mask], b[mask] = pair
        return np.asarray((a / n) ** b + self.E, dtype=np.float64)

    def size_for_loss(self, heads: Heads, loss: float) -> float:
        """N* = a / (loss - E)^(1/b) (arXiv 2503.09579, eq. 8)."""
        a, b = self.coefficients[heads]
        return float(a / (loss - self.E) ** (1 / b))

    def interval(self, n: float, d: float) -> Interval:
        """None: the heads are needed; see `interval_at`."""
        return None, None, self.no_draws

    def interval_at(self, heads: Heads, n: float) -> Interval:
        """95% interval of the loss over the draws of the fit, or why there is none."""
        if self.fit is None or self.fit.draws is None:
            return None, None, self.no_draws
        found = self.fit.predict_at({"N": n}, {"heads": f"{heads[0]},{heads[1]}"})
        assert found.low is not None and found.high is not None
        return float(found.low), float(found.high), None

    @property
    def no_draws(self) -> str:
        """Why there are no draws."""
        return UNCERTAIN if self.fit is None else self.fit.bootstrap

    def drawn(self, most: int) -> list["Law"]:
        """The law at its bootstrap draws, evenly thinned."""
        fit = self.fit
        if fit is None or fit.draws is None:
            return []
        thinned = fit.draws[:: max(1, -(-len(fit.draws) // most))]
        each = (dict(zip(fit.params, map(float, row), strict=True)) for row in thinned)
        return [replace(self, E=params["E"], coefficients=_scales(params, list(self.coefficients))) for params in each]

    def outside(self, heads: tuple[float, float], n: float, d: float) -> tuple[str, ...]:
        """How far N leaves the range that was trained with these heads."""
        low, high = self.ranges.get((int(heads[0]), int(heads[1])), (0.0, np.inf))
        if low * (1 - 1e-9) <= n <= high * (1 + 1e-9):
            return ()
        factor, side = (n / high, "above") if n > high else (low / n, "below")
        return (f"N = {n:.4g} is {factor:.4g} times {side} the fitted range {low:.4g} to {high:.4g}",)


Law = TokenLaw | HeadLaw


def read_law(config: PlanConfig) -> Law:
    """The evidence about loss that the plan names.

    Raises:
        InputError: no such law, or N counted as the law does not count it.
    """
    return _head_law(config, config.law) if isinstance(config.law, HeadLawKeys) else _token_law(config, config.law)


def _head_law(config: PlanConfig, keys: HeadLawKeys) -> HeadLaw:
    if config.parameters not in (None, HeadLaw.count):
        raise config.fault(("parameters",), f"a law per head configuration counts {HeadLaw.count}; remove this key")
    if "N" in keys.ranges:
        ranges = dict.fromkeys(keys.by_heads, keys.ranges["N"])
    else:
        ranges = _ladder(keys.by_heads) if config.convention == "paper-figure-2" else {}
    return HeadLaw(keys.E, keys.by_heads, ranges)


def _scales(params: Mapping[str, float], heads: Collection[Heads]) -> dict[Heads, tuple[float, float]]:
    """(a, b) of (a / N)^b from A N^-alpha: a = A^(1/alpha), b = alpha."""
    found = {}
    for h, k in heads:
        size, power = params[f"A[{h},{k}]"], params[f"alpha[{h},{k}]"]
        found[h, k] = (float(size ** (1 / power)), float(power))
    return found


def _fitted_heads(config: PlanConfig, name: str, fit: "LawFit") -> HeadLaw:
    """A law of `scantling fit --law head-configurations`, or a published one."""
    heads = [(int(h), int(k)) for h, k in (value.split(",") for value in fit.groups["heads"])]
    if config.parameters not in (None, HeadLaw.count):
        raise config.fault(("parameters",), f"a law per head configuration counts {HeadLaw.count}; remove this key")
    ranges = dict.fromkeys(heads, fit.ranges["N"]) if "N" in fit.ranges else {}
    return HeadLaw(float(fit.params["E"]), _scales(fit.params, heads), ranges, fit, name)


def _ladder(heads: Collection[Heads]) -> dict[Heads, tuple[float, float]]:
    """N of the smallest and largest model behind figure 2 of arXiv 2503.09579: L = 6 and 16, d = 128 L, d_h = 64."""
    space = Space(head_dim=(64,), aspect=(128.0, 128.0))
    shapes = real_shapes(space, families(space, list(heads)), np.tile([6.0, 16.0], (len(heads), 1)))
    sizes = param_counts(shapes.rows(space))["matmul_non_embedding"]
    return {pair: (float(low), float(high)) for pair, (low, high) in zip(heads, sizes, strict=True)}


def _token_law(config: PlanConfig, keys: str | ChinchillaKeys) -> Law:
    from scantling.laws.lawfit import LawFit
    from scantling.laws.published import load_law

    if isinstance(keys, ChinchillaKeys):
        name = "chinchilla (inline)"
        fit = LawFit(
            law="chinchilla",
            params={key: getattr(keys, key) for key in ("A", "B", "E", "alpha", "beta")},
            source="the plan file",
            conventions={},
            ranges={str(key): pair for key, pair in keys.ranges.items()},
            bootstrap=UNCERTAIN,
        )
    else:
        name = keys
        try:
            fit = load_law(config.folder / keys if Path(keys).suffix else keys)
        except InputError as error:
            raise config.fault(("law",), "; ".join(fault.removeprefix("law: ") for fault in error.faults)) from None
    if fit.law == "head-configurations":
        return _fitted_heads(config, name, fit)
    if fit.law not in ("chinchilla", "overtraining"):
        raise config.fault(
            ("law",),
            f"{name} is a law of {', '.join(fit.formula.columns)}; the planner reads laws of N and D (chinchilla, "
            "overtraining) and of N by head configuration (head-configurations)",
        )
    said = fit.conventions.get("N", "")
    named = re.search(r"matmul_non_embedding|non_embedding|active|total", said)
    count: Any = config.parameters or (named[0] if named else "total")
    reason = (
        "as `parameters` asks" if config.parameters else f"the law says {said!r}" if said else "the law does not say"
    )
    return TokenLaw(name, fit, count, f"N is `{count}` parameters ({reason}); `parameters:` changes it.")
