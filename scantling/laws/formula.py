"""Laws written as equations: a constant plus products of a prefactor and powers, over any columns of a table.

    E + A*N^-alpha + B*D^-beta                          Hoffmann et al. 2022 (arXiv 2203.15556), approach 3
    E + a*C^-eta*M^eta + b*C^-eta*M^-eta                over-training, Gadre et al. 2024 (2403.08540), eq. 4
    E + A*width^-alpha + B*depth^-beta + K*D^-gamma     width and depth apart (2502.06857)
    E + A[family]*N^-alpha[family]                      one A and alpha for each value of the column `family`, one E

What is raised to a power is a column; the other names are parameters. The same name twice is one parameter; a number in
place of a name is held. The logarithm of each term is linear in (log prefactor, exponents), which is what the fitter needs.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from scantling.errors import InputError, suggest
from scantling.laws.forms import Floats, as_floats

LAWS = {
    "chinchilla": "E + A*N^-alpha + B*D^-beta",
    "overtraining": "E + a*C^-eta*M^eta + b*C^-eta*M^-eta",
    "frontier": "E + A*C^-eta",
    "sizes": "E + A*N^-alpha",
    "tokens": "E + B*D^-beta",
    "head-count": "E + a*heads^-b",
    "head-configurations": "E + A[heads]*N^-alpha[heads]",
    "width-depth": "E + A*width^-alpha + B*depth^-beta + K*D^-gamma",
    "width-depth-size": "E + A*width^-alpha + B*depth^-beta + P*N^-delta + K*D^-gamma",
    "two-architectures": "E + A[family]*N^-alpha + B[family]*D^-beta",
    "kaplan": "((Nc/N)^(alpha_N/alpha_D) + Dc/D)^alpha_D",
    "isoflop": "G*C^a",
    "envelope": "G*C^a",
}
_FACTOR = re.compile(
    r"^(?P<name>[A-Za-z_]\w*)(\[(?P<group>\w+)\])?"
    r"(\^\(?(?P<sign>[+-]?)(?:(?P<number>\d*\.?\d+(?:[eE][+-]?\d+)?)|(?P<power>[A-Za-z_]\w*)(\[(?P<by>\w+)\])?)\)?)?$"
)
_NUMBER = re.compile(r"^\d*\.?\d+(?:[eE][+-]?\d+)?$")


@dataclass(frozen=True)
class Power:
    """A column raised to sign x exponent; the exponent is a parameter's name or a number."""

    column: str
    sign: float
    exponent: str | float


@dataclass(frozen=True)
class Term:
    """prefactor x product of powers; a term without powers is the irreducible constant."""

    prefactor: str | float
    powers: tuple[Power, ...]


@dataclass(frozen=True)
class Formula:
    """A parsed equation.

    Attributes:
        text: the equation.
        terms: its terms in the order written.
        by: for each parameter that differs between groups of rows, the column that names the group.
    """

    text: str
    terms: tuple[Term, ...]
    by: Mapping[str, str]

    @property
    def is_kaplan(self) -> bool:
        """Whether it is the one law that is a power of a sum."""
        return self.text == LAWS["kaplan"]

    @property
    def columns(self) -> tuple[str, ...]:
        """The numeric columns it needs, in the order they appear."""
        return tuple(dict.fromkeys(power.column for term in self.terms for power in term.powers))

    @property
    def constant(self) -> str | None:
        """The name of the irreducible constant, if it is a parameter."""
        return next((t.prefactor for t in self.terms if not t.powers and isinstance(t.prefactor, str)), None)

    @property
    def exponents(self) -> tuple[str, ...]:
        """The names of the exponents, without groups."""
        if self.is_kaplan:
            return ("alpha_N", "alpha_D")
        every = [p.exponent for term in self.terms for p in term.powers]
        return tuple(dict.fromkeys(name for name in every if isinstance(name, str)))

    @property
    def bases(self) -> tuple[str, ...]:
        """All parameters without groups: prefactors of powers, the constant, exponents."""
        if self.is_kaplan:
            return ("Nc", "Dc", "alpha_N", "alpha_D")
        prefactors = [t.prefactor for t in self.terms if t.powers and isinstance(t.prefactor, str)]
        return tuple(dict.fromkeys([*prefactors, *([self.constant] if self.constant else []), *self.exponents]))

    def parameters(self, groups: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
        """All parameters; `groups` gives the values of each grouping column, so that A becomes A[x], A[y], ..."""
        names: list[str] = []
        for base in self.bases:
            names += [f"{base}[{value}]" for value in groups[self.by[base]]] if base in self.by else [base]
        return tuple(names)

    def owner(self, base: str, column: str) -> bool:
        """Whether a parameter belongs to terms of this one column alone."""
        mine = [t for t in self.terms if base == t.prefactor or base in [p.exponent for p in t.powers]]
        return bool(mine) and all({p.column for p in t.powers} == {column} for t in mine)

    def predict(
        self, params: Mapping[str, Floats | float], columns: Mapping[str, Floats], groups: Mapping[str, list[str]]
    ) -> Floats:
        """The prediction at values of the columns.

        Args:
            params: every parameter, each a number or (R, 1) draws.
            columns: the numeric columns.
            groups: for each grouping column the group of each row, shaped like the columns' last axis.
        """
        if self.is_kaplan:
            n, d = as_floats(columns["N"]), as_floats(columns["D"])
            q = as_floats(params["alpha_D"])
            with np.errstate(over="ignore"):
                log_n = as_floats(params["alpha_N"]) / q * np.log(as_floats(params["Nc"]) / n)
                return as_floats(np.exp(q * np.logaddexp(log_n, np.log(as_floats(params["Dc"]) / d))))
        found: Floats = as_floats(0.0)
        with np.errstate(over="ignore", invalid="ignore"):
            for term in self.terms:
                log: Floats = as_floats(0.0)
                for power in term.powers:
                    size = self._value(power.exponent, params, groups)
                    log = log + power.sign * size * np.log(as_floats(columns[power.column]))
                found = found + self._value(term.prefactor, params, groups) * np.exp(log)
        return as_floats(found)

    def _value(
        self, name: str | float, params: Mapping[str, Floats | float], groups: Mapping[str, list[str]]
    ) -> Floats:
        if not isinstance(name, str):
            return as_floats(name)
        if name not in self.by:
            return as_floats(params[name])
        each = [np.atleast_1d(as_floats(params[f"{name}[{value}]"])) for value in groups[self.by[name]]]
        return np.concatenate(each, axis=-1)


@cache
def parse_law(law: str) -> Formula:
    """A law by name, or an equation.

    Raises:
        InputError: not a known name, and not an equation that can be read.
    """
    text = LAWS.get(law, law)
    if text == LAWS["kaplan"]:
        terms = (Term("Nc", (Power("N", -1.0, "alpha_N"),)), Term("Dc", (Power("D", -1.0, "alpha_D"),)))
        return Formula(text, terms, {})
    if law not in LAWS and not any(sign in law for sign in "+*^"):
        raise InputError(
            f"law: unknown {law!r}{suggest(law, LAWS)}; or an equation such as 'E + A*N^-alpha + B*D^-beta'"
        )
    found_terms: list[Term] = []
    by: dict[str, str] = {}
    for part in _split(text):
        prefactor: str | float | None = None
        powers: list[Power] = []
        for factor in map(str.strip, part.split("*")):
            if _NUMBER.match(factor):
                prefactor = _one(prefactor, float(factor), law, part)
                continue
            found = _FACTOR.match(factor.replace(" ", ""))
            if found is None:
                raise InputError(
                    f"law {law!r}: cannot read {factor!r} in the term {part.strip()!r}; write terms as A*N^-alpha, joined by +"
                )
            if "^" in factor:
                if found["group"]:
                    raise InputError(f"law {law!r}: {factor!r} groups a column; group the prefactor or the exponent")
                exponent: str | float = found["power"] if found["power"] else float(found["number"])
                powers.append(Power(found["name"], -1.0 if found["sign"] == "-" else 1.0, exponent))
                if found["by"]:
                    by[str(exponent)] = found["by"]
            else:
                prefactor = _one(prefactor, found["name"], law, part)
                if found["group"]:
                    by[found["name"]] = found["group"]
        if prefactor is None:
            prefactor = 1.0
        found_terms.append(Term(prefactor, tuple(powers)))
    formula = Formula(text, tuple(found_terms), by)
    _check(formula, law)
    return formula


def base_of(name: str) -> str:
    """`A` of `A[x]`."""
    return name.partition("[")[0]


def group_of(name: str) -> str:
    """`x` of `A[x]`, or nothing."""
    return name.partition("[")[2].removesuffix("]")


def _split(text: str) -> list[str]:
    """Terms between plus signs that are not part of an exponent or a number."""
    return [part for part in re.split(r"(?<!\d[eE])(?<![\^(])\+", text) if part.strip()]


def _one(before: str | float | None, name: str | float, law: str, part: str) -> str | float:
    if before is not None:
        raise InputError(
            f"law {law!r}: the term {part.strip()!r} has two prefactors, {before} and {name}; columns are raised to a power"
        )
    return name


def _check(formula: Formula, law: str) -> None:
    if sum(1 for term in formula.terms if not term.powers) > 1:
        raise InputError(f"law {law!r}: expected at most one constant term, got more")
    if not formula.columns:
        raise InputError(f"law {law!r}: expected a term with a column raised to a power, such as A*N^-alpha")
    both = set(formula.columns) & set(formula.bases)
    if both:
        raise InputError(f"law {law!r}: {min(both)!r} is both a column and a parameter; rename one")
    mixed = set(formula.exponents) & {str(t.prefactor) for t in formula.terms}
    if mixed:
        raise InputError(f"law {law!r}: {min(mixed)!r} is both a prefactor and an exponent; rename one")
