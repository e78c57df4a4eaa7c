"""Evidence about architecture families: how many FLOPs each needs for the loss of a baseline, own comparison or published.

A saving S says that a family reaches the baseline's loss with 1 - S of its compute, both on the path of the study: the same
number of tokens for the same nominal size. With r the family's training FLOPs per token over the baseline's at one nominal
size, the family at nominal size N and D tokens is then worth the baseline at k N and k D,

    k = sqrt(r / (1 - S)),

because on the path the compute of both grows with the square of the size. Off the path that is only one reading of S; another
puts all of it into the size, so that tokens count alike for every family, and agrees on the path:

    A (k_N N)^-alpha + B D^-beta = A (k N)^-alpha + B (k D)^-beta    at the measured D = M N.

The plan takes whichever is less favourable to the family (`curves.Worse`). That S holds for the plan's own law and data and
beyond the sizes measured is assumed, and said.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from scantling.errors import InputError, suggest
from scantling.planning.variants import Floats
from scantling.rows import Number

COMPARISON = "scantling.compare/1"
TWO_SIDED = 2 * 1.959964  # widths of a standard deviation in a 95 % interval


@dataclass(frozen=True)
class Gain:
    """What a family needs of the baseline's compute for the same loss.

    Attributes:
        log_need: log(1 - S).
        spread: its standard deviation, from the interval of S; 0 where there is none.
        ranges: of the baseline's N and M = D/N measured.
        said: the saving in words.
    """

    log_need: float = 0.0
    spread: float = 0.0
    ranges: Mapping[str, tuple[float, float]] | None = None
    said: str = ""

    def factor(self, work_ratio: Number) -> Floats:
        """k: what size and tokens count for, by the FLOPs per token over the baseline's."""
        found: Floats = (work_ratio * math.exp(-self.log_need)) ** 0.5
        return found

    @property
    def path(self) -> float | None:
        """M = D/N at which it was measured, where known."""
        low, high = (self.ranges or {}).get("M", (0.0, 0.0))
        return math.sqrt(low * high) or None

    def drawn(self, normal: float) -> "Gain":
        """The gain at one standard normal draw."""
        return replace(self, log_need=self.log_need + self.spread * normal)

    def outside(self, n: float, d: float) -> tuple[str, ...]:
        """How far the baseline's N and D/N leave what the evidence measured."""
        said = []
        for name, value in {"N": n, "M": d / n}.items():
            low, high = (self.ranges or {}).get(name, (0.0, math.inf))
            if not low * (1 - 1e-6) <= value <= high * (1 + 1e-6):
                factor, side = (value / high, "above") if value > high else (low / value, "below")
                said.append(
                    f"{name} = {value:.4g} is {factor:.3g} times {side} the {low:.4g} to {high:.4g} measured for this family"
                )
        return tuple(said)


@dataclass(frozen=True)
class Evidence:
    """Savings of families over a baseline.

    Attributes:
        name: as the plan gives it.
        source: where it comes from.
        baseline: the family that the others are compared with.
        gains: of every other family.
        families: their keys, where the evidence defines them.
        remarks: what weakens it.
    """

    name: str
    source: str
    baseline: str
    gains: Mapping[str, Gain]
    families: Mapping[str, Mapping[str, Any]]
    remarks: tuple[str, ...] = ()

    @property
    def known(self) -> tuple[str, ...]:
        """Every family it knows."""
        return (self.baseline, *self.gains)


def evidence_names() -> tuple[str, ...]:
    """The evidence that is shipped."""
    return tuple(published_evidence())


def published_evidence() -> dict[str, dict[str, Any]]:
    """The shipped evidence as data: sources, measured rows, families and the savings fitted to the rows."""
    found: dict[str, dict[str, Any]] = json.loads((files("scantling.planning") / "evidence.json").read_text("utf-8"))
    return found


def load_evidence(name: str, folder: Path) -> Evidence:
    """Shipped evidence by name, or the JSON that `scantling fit --compare ... --out` wrote.

    Raises:
        InputError: neither, or not a comparison.
    """
    shipped = published_evidence()
    if name in shipped:
        plain = shipped[name]
        ranges = {key: (float(low), float(high)) for key, (low, high) in plain["ranges"].items()}
        gains = {family: _gain(found, ranges) for family, found in plain["savings"].items()}
        return Evidence(name, plain["source"], plain["baseline"], gains, plain["families"], tuple(plain["remarks"]))
    path = folder / name
    if path.suffix != ".json":
        near = suggest(name, shipped) or f"; shipped are {', '.join(shipped)}"
        raise InputError(f"{name!r} is neither a comparison's .json file nor shipped evidence{near}")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give what fit --compare --out wrote") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); give what fit --compare --out wrote") from None
    if not isinstance(plain, dict) or plain.get("schema") != COMPARISON:
        got = plain.get("schema") if isinstance(plain, dict) else type(plain).__name__
        raise InputError(
            f"{path}: expected a comparison ({COMPARISON}), got {got!r}; give what fit --compare --out wrote"
        )
    try:
        savings = [item for item in plain["savings"] if isinstance(item.get("value"), int | float)]
        baselines = {item["baseline"] for item in savings}
        law = plain["families"][next(iter(baselines))]
        ranges = {
            key: (float(law["ranges"][key][0]), float(law["ranges"][key][1]))
            for key in ("N", "M")
            if key in law["ranges"]
        }
        gains = {str(item["candidate"]): _gain(item, ranges) for item in savings}
        remarks = tuple(str(note) for item in savings for note in item.get("notes", ()))
    except (KeyError, TypeError, ValueError, StopIteration, IndexError) as error:
        raise InputError(f"{path}: not a comparison as scantling writes it ({error!r}); compare again") from None
    return Evidence(name, f"the comparison {path.name}", str(min(baselines)), gains, {}, remarks)


def _gain(found: Mapping[str, Any], ranges: Mapping[str, tuple[float, float]]) -> Gain:
    value, low, high = found["value"], found.get("low"), found.get("high")
    if not value < 1:
        raise ValueError(f"a saving of {value}")
    said = f"{abs(value):.1%} {'fewer' if value >= 0 else 'more'} training FLOPs for the same loss"
    if high is None:
        return Gain(math.log(1 - value), 0.0, ranges, f"{said}, without an interval")
    if low is None:  # some resamples never reach the loss
        return Gain(math.log(1 - value), math.log((1 - value) / (1 - high)) / (TWO_SIDED / 2), ranges, said)
    spread = math.log((1 - low) / (1 - high)) / TWO_SIDED
    return Gain(math.log(1 - value), spread, ranges, f"{said} (95 % interval of the saving {low:.1%} to {high:.1%})")
