"""The loss of shapes as a function of their tokens, from a law's equation at everything else.

A law is a constant plus products of powers; N, width, depth, heads and the like are known of a shape, and what is left is a
sum of powers of D (M = D/N and C = 6 N D are turned into it). Kaplan's law is a power of such a sum.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scantling.planning.shapes import Shapes
from scantling.planning.variants import Floats, Variant

if TYPE_CHECKING:
    from scantling.laws.formula import Formula
    from scantling.laws.lawfit import LawFit

TOKENS = (0.0, math.log(1e40))  # of log D, searched where the equation has no closed inverse
SIZES = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
}
ARRAYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size")  # fmt: skip
OF_VARIANTS = ("ffn_ratio", "parameter_ratio", "experts", "experts_per_token", "granularity", "bottleneck_ratio")


def known_columns() -> tuple[str, ...]:
    """The columns of a law that every shape of a plan has."""
    return ("N", "D", "M", "C", *SIZES, *ARRAYS, "aspect", *OF_VARIANTS)


def shape_columns(
    formula: "Formula", n: Floats, shapes: Shapes | None, variants: tuple[Variant, ...]
) -> dict[str, Any]:
    """The values of the formula's columns, except those of tokens."""
    found: dict[str, Any] = {"N": n}
    for name in formula.columns:
        if name in ("N", "D", "M", "C"):
            continue
        assert shapes is not None
        if name in OF_VARIANTS:
            found[name] = np.array([variant.columns()[name] for variant in variants])[shapes.variant]
        elif name == "aspect":
            found[name] = shapes.hidden_size / shapes.num_hidden_layers
        else:
            found[name] = getattr(shapes, SIZES.get(name, name))
    return found


@dataclass(frozen=True)
class Curve:
    """(floor + sum of size_k D^-power_k)^outer, nats per token, for arrays of shapes."""

    floor: Any
    terms: tuple[tuple[Any, Any], ...] = ()
    outer: Any = 1.0

    @classmethod
    def of(
        cls,
        fit: "LawFit",
        columns: Mapping[str, Any],
        groups: Mapping[str, tuple[tuple[str, ...], Any]],
        factor: Any = 1.0,
    ) -> "Curve":
        """The curve of a law.

        Args:
            fit: the law.
            columns: every column but those of tokens.
            groups: of each grouping column its values and the place of each shape among them.
            factor: by which D counts for more.
        """
        formula, params = fit.formula, fit.params
        n = np.asarray(columns["N"], dtype=np.float64)
        if formula.is_kaplan:
            q, p = params["alpha_D"], params["alpha_N"] / params["alpha_D"]
            return cls((params["Nc"] / n) ** p, ((params["Dc"] / factor, 1.0),), q)

        def value(name: str | float) -> Any:
            if not isinstance(name, str):
                return name
            if name not in formula.by:
                return params[name]
            values, place = groups[formula.by[name]]
            return np.array([*(params[f"{name}[{group}]"] for group in values), np.nan])[place]

        logs: dict[str, Any] = {}

        def log(name: str) -> Any:
            if name not in logs:
                logs[name] = np.log(np.asarray(columns[name], dtype=np.float64))
            return logs[name]

        floor: Any = np.zeros(n.shape)
        terms: list[tuple[Any, Any]] = []
        for term in formula.terms:
            size, power, shift = value(term.prefactor), 0.0, 0.0
            for one in term.powers:
                exponent = one.sign * value(one.exponent)
                if one.column in ("D", "M", "C"):
                    power = power - exponent
                if one.column == "M":
                    shift = shift - exponent * log("N")
                elif one.column == "C":
                    shift = shift + exponent * (log("N") + math.log(6))
                elif one.column != "D":
                    shift = shift + exponent * log(one.column)
            if np.any(shift):
                size = size * np.exp(shift)
            if np.any(np.abs(power) > 1e-12):
                terms.append((size if np.all(factor == 1.0) else size * factor**-power, power))
            else:
                floor = floor + size
        return cls(floor, tuple(terms))

    def loss(self, d: Any) -> Floats:
        """At D tokens, which may be infinite."""
        found = self.floor
        with np.errstate(all="ignore"):
            for size, power in self.terms:
                found = found + size * np.asarray(d, dtype=np.float64) ** -power
        return np.asarray(found if self.outer == 1.0 else found**self.outer, dtype=np.float64)

    def tokens(self, loss: float | Floats) -> Floats:
        """The fewest D that reach a loss, infinite where none do."""
        with np.errstate(all="ignore"):
            left = loss ** (1 / self.outer) - self.floor
            if len(self.terms) == 1:
                size, power = self.terms[0]
                reachable = left > 0
                found = (np.where(reachable, left, 1.0) / size) ** (-1 / power)
                return np.asarray(np.where(reachable, found, np.inf), dtype=np.float64)
            low, high = np.full(np.shape(left), TOKENS[0]), np.full(np.shape(left), TOKENS[1])
            for _ in range(70):
                middle = (low + high) / 2
                over = self.loss(np.exp(middle)) > loss
                low, high = np.where(over, middle, low), np.where(over, high, middle)
            return np.where(self.loss(np.exp(high)) <= loss * (1 + 1e-12), np.exp(high), np.inf)


@dataclass(frozen=True)
class Worse:
    """At every D the higher of two curves."""

    one: Curve
    other: Curve

    def loss(self, d: Any) -> Floats:
        """At D tokens, which may be infinite."""
        return np.maximum(self.one.loss(d), self.other.loss(d))

    def tokens(self, loss: float) -> Floats:
        """The fewest D at which both reach a loss."""
        return np.maximum(self.one.tokens(loss), self.other.tokens(loss))
