"""What is known about loss: a law fitted to any columns of a shape, or one law of parameters per head configuration.

Both answer the same questions (the loss of shapes as a function of their tokens, its interval, how far a point leaves the
fitted range), so that the search need not know which it asks. Evidence about architecture families (`evidence`) scales the
size and the tokens that a law is asked at.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from scantling.costing import param_counts
from scantling.errors import InputError
from scantling.planning.config import PlanConfig
from scantling.planning.curves import Curve, Worse, known_columns, shape_columns
from scantling.planning.evidence import Gain
from scantling.planning.price import ParameterCount, Priced, Quote
from scantling.planning.sections import ChinchillaKeys, HeadLawKeys
from scantling.planning.shapes import Shapes, families, real_shapes
from scantling.planning.space import Space
from scantling.planning.variants import Floats, Variant

if TYPE_CHECKING:  # pandas and scipy load only when a law of N and D is asked for
    from scantling.laws.lawfit import LawFit

Heads = tuple[int, int]  # query heads, key/value heads
Interval = tuple[float | None, float | None, str | None]  # low and high, or why there are none
UNCERTAIN = "the law is given by its coefficients alone, without their uncertainty"
DRAWN = 200  # draws of an interval that the law cannot give itself
PLAIN_LAWS = ("chinchilla", "overtraining")  # of N and D, with closed forms


@dataclass(frozen=True)
class FittedLaw:
    """A law as fitted or published, of N, D and any sizes of the shape.

    Attributes:
        count: which parameters are N, and `count_note` says why.
        variants: the plan's architectures, which a law fitted per family names.
        gains: of each variant over the baseline the law speaks of; empty without evidence.
    """

    name: str
    fit: "LawFit"
    count: ParameterCount
    count_note: str
    variants: tuple[Variant, ...]
    gains: tuple[Gain, ...] = ()
    tokens_per_parameter: ClassVar[None] = None

    @property
    def E(self) -> float:
        """Irreducible loss, nats per token; the lowest where groups have their own."""
        constant = self.fit.formula.constant
        if self.fit.law in PLAIN_LAWS:
            return float(self.fit.params["E"])
        values = [value for name, value in self.fit.params.items() if name.partition("[")[0] == constant]
        return float(min(values, default=0.0))

    @property
    def plain(self) -> bool:
        """Whether it knows N and D and nothing of shapes."""
        return self.fit.law in PLAIN_LAWS and not self.gains

    @property
    def columns(self) -> tuple[str, ...]:
        """What it knows, groups included."""
        return (*self.fit.formula.columns, *self.fit.groups)

    @property
    def heads(self) -> list[Heads] | None:
        """The head configurations it knows, where it is fitted per head configuration."""
        known = self.fit.groups.get("heads")
        return [_pair(value) for value in known] if known else None

    @property
    def knows_tokens(self) -> bool:
        """Whether more tokens lower its loss."""
        return bool({"D", "M", "C"} & set(self.columns))

    def curve(self, shapes: Shapes | None, priced: Priced) -> Curve | Worse:
        """The loss of shapes at these prices as a function of their tokens."""
        n = np.asarray(priced.parameters, dtype=np.float64)
        if shapes is not None:
            n = np.broadcast_to(n, shapes.hidden_size.shape)
        if not self.gains:
            columns = shape_columns(self.fit.formula, n, shapes, self.variants)
            return Curve.of(self.fit, columns, self._groups(shapes))
        assert isinstance(priced, Quote) and shapes is not None
        need = np.array([gain.log_need for gain in self.gains])[shapes.variant]
        factor = Gain().factor(priced.work_ratio * np.exp(-need))
        nominal = n * priced.size_ratio
        both = Curve.of(self.fit, {"N": nominal * factor}, {}, factor)
        size = Curve.of(self.fit, {"N": nominal * self._in_size(nominal, factor, shapes)}, {})
        return Worse(both, size)

    def _in_size(self, n: Floats, factor: Floats, shapes: Shapes) -> Floats:
        """The factor on N alone that equals `factor` on N and D alike at the tokens per parameter of the evidence."""
        form = self.fit.form
        path = np.array([gain.path or np.nan for gain in self.gains])[shapes.variant]
        data = form.B / form.A * n**form.alpha * (path * n) ** -form.beta
        power = factor**-form.alpha + data * (factor**-form.beta - 1)
        found: Floats = np.where(np.isnan(power), factor, power.clip(1e-6) ** (-1 / form.alpha))
        return found

    def _groups(self, shapes: Shapes | None) -> dict[str, tuple[tuple[str, ...], Any]]:
        """For each grouping column its values, and the place of each shape among them (-1: unknown)."""
        found: dict[str, tuple[tuple[str, ...], Any]] = {}
        for column, values in self.fit.groups.items():
            assert shapes is not None
            if column == "heads":
                place = np.full(shapes.hidden_size.shape, -1)
                for number, (h, k) in enumerate(map(_pair, values)):
                    place[(shapes.num_attention_heads == h) & (shapes.num_key_value_heads == k)] = number
            else:
                names = [values.index(v.name) if v.name in values else -1 for v in self.variants]
                place = np.array(names)[shapes.variant]
            found[column] = (tuple(values), place)
        return found

    def interval(self, shapes: Shapes, priced: Priced, d: float) -> Interval:
        """95% interval of the loss of one shape, or why there is none."""
        if self.plain:
            found = self.fit.predict(float(np.asarray(priced.parameters).item()), d)
            if found.low is None or found.high is None:
                return None, None, self.fit.bootstrap
            return float(found.low), float(found.high), None
        losses = [float(np.asarray(law.curve(shapes, priced).loss(d)).item()) for law in self.drawn(DRAWN)]
        if not losses or not np.isfinite(losses).all():
            return None, None, self.no_draws
        low, high = np.quantile(losses, [0.025, 0.975])
        return float(low), float(high), None

    def outside(self, shapes: Shapes, priced: Priced, d: float) -> tuple[str, ...]:
        """How far one shape and its tokens leave the fitted range."""
        n = float(np.asarray(priced.parameters).item())
        said = list(self.fit.outside(n, d))
        columns = shape_columns(self.fit.formula, np.asarray([n]), shapes, self.variants)
        for name, value in columns.items():
            low, high = self.fit.ranges.get(name, (0.0, np.inf))
            one = float(np.asarray(value).flat[0])
            if name != "N" and not low * (1 - 1e-9) <= one <= high * (1 + 1e-9):
                factor, side = (one / high, "above") if one > high else (low / one, "below")
                said.append(f"{name} = {one:.4g} is {factor:.3g} times {side} the fitted range {low:.4g} to {high:.4g}")
        if self.gains:
            assert isinstance(priced, Quote)
            nominal = n * float(np.asarray(priced.size_ratio).item())
            said += self.gains[int(shapes.variant.flat[0])].outside(nominal, d)
        return tuple(said)

    def drawn(self, most: int) -> list["Law"]:
        """The law at its bootstrap draws, evenly thinned, each with one draw of the evidence; unusable ones are left out."""
        draws = self.fit.draws
        uncertain = any(gain.spread for gain in self.gains)
        if draws is not None:
            chosen = draws[:: max(1, -(-len(draws) // most))]
            params = [dict(zip(self.fit.params, map(float, row), strict=True)) for row in chosen]
        else:
            params = [dict(self.fit.params)] * (most if uncertain else 0)
        normal = np.random.default_rng(0).standard_normal((len(params), len(self.gains)))
        found: list[Law] = []
        for row, shift in zip(params, normal, strict=True):
            if all(0 <= value < np.inf for value in row.values()):
                gains = tuple(gain.drawn(float(x)) for gain, x in zip(self.gains, shift, strict=True))
                found.append(replace(self, fit=replace(self.fit, params=row, draws=None), gains=gains))
        return found

    @property
    def no_draws(self) -> str:
        """Why there are no draws."""
        return self.fit.bootstrap


def _pair(heads: str) -> Heads:
    """8, 1 of "8,1"."""
    h, _, k = heads.partition(",")
    return int(h), int(k or h)


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

    def curve(self, shapes: Shapes | None, priced: Priced) -> Curve:
        """The loss of shapes; tokens do not enter."""
        assert shapes is not None
        heads, kv_heads = shapes.num_attention_heads, shapes.num_key_value_heads
        a, b = np.full(heads.shape, np.nan), np.full(heads.shape, np.nan)
        for (h, k), pair in self.coefficients.items():
            mask = (heads == h) & (kv_heads == k)
            a[mask], b[mask] = pair
        return Curve(np.asarray((a / priced.parameters) ** b + self.E, dtype=np.float64))

    def size_for_loss(self, heads: Heads, loss: float) -> float:
        """N* = a / (loss - E)^(1/b) (arXiv 2503.09579, eq. 8)."""
        a, b = self.coefficients[heads]
        return float(a / (loss - self.E) ** (1 / b))

    def interval(self, shapes: Shapes, priced: Priced, d: float) -> Interval:
        """95% interval of the loss over the draws of the fit, or why there is none."""
        if self.fit is None or self.fit.draws is None:
            return None, None, self.no_draws
        heads, n = shape_heads(shapes), float(np.asarray(priced.parameters).item())
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

    def outside(self, shapes: Shapes, priced: Priced, d: float) -> tuple[str, ...]:
        """How far N leaves the range that was trained with these heads."""
        n = float(np.asarray(priced.parameters).item())
        low, high = self.ranges.get(shape_heads(shapes), (0.0, np.inf))
        if low * (1 - 1e-9) <= n <= high * (1 + 1e-9):
            return ()
        factor, side = (n / high, "above") if n > high else (low / n, "below")
        return (f"N = {n:.4g} is {factor:.4g} times {side} the fitted range {low:.4g} to {high:.4g}",)


Law = FittedLaw | HeadLaw


def shape_heads(shapes: Shapes) -> Heads:
    """Query and key/value heads of one shape."""
    return int(shapes.num_attention_heads.flat[0]), int(shapes.num_key_value_heads.flat[0])


def read_law(config: PlanConfig) -> Law:
    """The law that the plan names; its families are the plan's.

    Raises:
        InputError: no such law, N counted as the law does not count it, or a law of something no plan has.
    """
    return _head_law(config, config.law) if isinstance(config.law, HeadLawKeys) else _fitted_law(config, config.law)


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
    heads = [_pair(value) for value in fit.groups["heads"]]
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


def _fitted_law(config: PlanConfig, keys: str | ChinchillaKeys) -> Law:
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
    if fit.predicts != "loss":
        raise config.fault(
            ("law",), f"{name} gives the best {fit.predicts} for a compute, not a loss; fit a law of the loss"
        )
    unknown = [column for column in fit.formula.columns if column not in known_columns()]
    if unknown:
        raise config.fault(
            ("law",),
            f"{name} is a law of {', '.join(unknown)}, which no plan has; known are {', '.join(known_columns())}",
        )
    said = fit.conventions.get("N", "")
    count = config.parameters or counted(fit)
    reason = (
        "as `parameters` asks" if config.parameters else f"the law says {said!r}" if said else "the law does not say"
    )
    note = f"N is `{count}` parameters ({reason}); `parameters:` changes it."
    return FittedLaw(name, fit, count, note, config.space.variants)


def counted(fit: "LawFit") -> ParameterCount:
    """Which parameters a law's N counts, by its own words; all of them where it does not say."""
    named = re.search(r"matmul_non_embedding|non_embedding|active|total", fit.conventions.get("N", ""))
    return cast(ParameterCount, named[0]) if named else "total"
