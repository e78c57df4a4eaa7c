"""How the parameters of a formula sit in the fitter's vector: what is free, fixed, tied, and where columns are centred.

Prefactors are stated at the mean log of the columns of their term: without that, log A and alpha correlate above 0.999
(arXiv 2404.10102's data), and with it Newton steps see a well-conditioned problem.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scantling.laws.descent import Design
from scantling.laws.forms import Floats
from scantling.laws.formula import Formula, Power, Term, base_of, group_of


@dataclass(frozen=True, eq=False)
class Layout:
    """How the parameters of a formula sit in the fitter's vector.

    Attributes:
        formula: the law.
        names: every parameter, groups expanded.
        fixed: those held at a value.
        tied: those that copy another.
        middle: mean log of each column, where prefactors are centred.
        centred: prefactors stated at the centre of the columns of their one term.
    """

    formula: Formula
    names: tuple[str, ...]
    fixed: Mapping[str, float]
    tied: Mapping[str, str]
    middle: Mapping[str, float]
    centred: Mapping[str, Term]

    @property
    def free(self) -> tuple[str, ...]:
        """The parameters fitted."""
        return tuple(name for name in self.names if name not in self.fixed and name not in self.tied)

    def values(self, theta: Floats) -> Floats:
        """(S, parameters) from (S, free): log prefactor = centred value - sum sign x exponent x mean log column."""
        column = dict(zip(self.free, theta.T, strict=True))
        full = {name: np.full(len(theta), value) for name, value in self.fixed.items()}
        exponents = set(self.formula.exponents)
        for name in self.free:
            if base_of(name) in exponents:
                full[name] = column[name]
        for name, other in self.tied.items():
            if base_of(name) in exponents:
                full[name] = full[other]
        with np.errstate(over="ignore"):
            for name in self.free:
                if base_of(name) not in exponents:
                    log = column[name]
                    for power in self.centred[name].powers if name in self.centred else ():
                        size = self._exponent(power, name, full)
                        log = log - power.sign * size * self.middle[power.column]
                    full[name] = np.exp(log)
            for name, other in self.tied.items():
                full[name] = full[other]
        return np.stack([full[name] for name in self.names], axis=1)

    def _exponent(self, power: Power, prefactor: str, full: Mapping[str, Floats]) -> Floats | float:
        if not isinstance(power.exponent, str):
            return power.exponent
        if power.exponent not in self.formula.by:
            return full[power.exponent]
        return full[f"{power.exponent}[{group_of(prefactor)}]"]

    def design(self, columns: Mapping[str, Floats], groups: Mapping[str, list[str]]) -> Design:
        """The terms on given rows, in the fitter's vector."""
        rows = len(next(iter(columns.values())))
        free = self.free
        place = {name: i for i, name in enumerate(free)}
        terms, offset = np.zeros((len(self.formula.terms), rows, len(free))), np.zeros((len(self.formula.terms), rows))
        for k, term in enumerate(self.formula.terms):
            for name, mask in self._members(term.prefactor, groups, rows):
                if isinstance(name, float):
                    offset[k, mask] += np.log(name) if name > 0 else -np.inf
                elif self.tied.get(name, name) in place:
                    terms[k, mask, place[self.tied.get(name, name)]] = 1.0
                else:
                    value = self.fixed[self.tied.get(name, name)]
                    offset[k, mask] += np.log(value) if value > 0 else -np.inf
                shift = isinstance(name, str) and name in self.centred
                for power in term.powers:
                    z = np.log(columns[power.column][mask]) - (self.middle[power.column] if shift else 0.0)
                    for exponent, also in self._members(power.exponent, groups, rows):
                        inside = also[mask]
                        chosen = np.flatnonzero(mask)[inside]
                        if isinstance(exponent, float):
                            offset[k, chosen] += power.sign * exponent * z[inside]
                        elif self.tied.get(exponent, exponent) in place:
                            terms[k, chosen, place[self.tied.get(exponent, exponent)]] += power.sign * z[inside]
                        else:
                            held = self.fixed[self.tied.get(exponent, exponent)]
                            offset[k, chosen] += power.sign * held * z[inside]
        exponents = set(self.formula.exponents)
        bases = [base_of(name) for name in free]
        kin = tuple(sorted(set(bases)).index(base) for base in bases)
        return Design(free, tuple(base in exponents for base in bases), terms, offset, kin)

    def _members(
        self, name: str | float, groups: Mapping[str, list[str]], rows: int
    ) -> list[tuple[str | float, npt.NDArray[np.bool_]]]:
        if not isinstance(name, str) or name not in self.formula.by:
            return [(name, np.ones(rows, dtype=np.bool_))]
        values = np.array(groups[self.formula.by[name]])
        return [(f"{name}[{value}]", values == value) for value in dict.fromkeys(groups[self.formula.by[name]])]


def layout(
    formula: Formula,
    columns: Mapping[str, Floats],
    groups: Mapping[str, list[str]],
    fixed: Mapping[str, float],
    tied: Mapping[str, str],
    *,
    centre: bool = True,
) -> Layout:
    """The fitter's vector for a formula on given rows; `fixed` and `tied` name parameters with their groups."""
    names = formula.parameters({column: sorted(set(values)) for column, values in groups.items()})
    middle = {column: float(np.log(values).mean()) for column, values in columns.items()}
    uses = [t.prefactor for t in formula.terms]
    copied = set(tied.values())
    centred = {
        name: term
        for term in formula.terms
        for name in names
        if isinstance(term.prefactor, str) and base_of(name) == term.prefactor and term.powers and centre
        and uses.count(term.prefactor) == 1 and name not in fixed and name not in tied and name not in copied
        and all(formula.by.get(str(p.exponent)) in (None, formula.by.get(term.prefactor)) for p in term.powers)
    }  # fmt: skip
    return Layout(formula, names, dict(fixed), dict(tied), middle, centred)
