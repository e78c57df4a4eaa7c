"""One case and what it found: every comparison made, and the one that is furthest out of its tolerance."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass
class Checks:
    """The comparisons of one case. A deviation is bad when it exceeds its tolerance (NaN always does)."""

    results: list[tuple[str, float, float]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def close(self, what: str, got: Any, want: Any, absolute: float = 0.0, relative: float = 0.0) -> None:
        """Largest |got - want| within absolute + relative x largest |want|; shapes must agree."""
        found, wanted = _tensor(got), _tensor(want)
        if found.numel() == wanted.numel() == 1:
            found, wanted = found.reshape(()), wanted.reshape(())
        if found.shape != wanted.shape:
            self.faults.append(f"{what}: shape {tuple(found.shape)}, expected {tuple(wanted.shape)}")
            return
        if wanted.numel() == 0:
            return
        deviation = float((found - wanted).abs().max())
        self.results.append((what, deviation, absolute + relative * float(wanted.abs().max())))

    def equal(self, what: str, got: Any, want: Any) -> None:
        """Exactly equal: counts, widths, names, tokens."""
        if isinstance(got, Tensor) and isinstance(want, Tensor):
            same, got, want = torch.equal(got.cpu(), want.cpu()), got.tolist(), want.tolist()
        else:
            same = bool(got == want)
        if not same:
            shown = [text if len(text) <= 90 else text[:90] + "..." for text in (str(got), str(want))]
            self.faults.append(f"{what}: got {shown[0]}, expected {shown[1]}")
        else:
            self.results.append((what, 0.0, 0.0))

    @property
    def worst(self) -> tuple[str, float, float]:
        """The comparison furthest out, by deviation / tolerance."""
        return max(self.results, key=_excess, default=("nothing", 0.0, 0.0))

    @property
    def passed(self) -> bool:
        """Whether anything was compared, and all of it agreed."""
        return bool(self.results) and not self.faults and _excess(self.worst) <= 1

    def line(self) -> str:
        """What is wrong, in one line: the exact disagreements, then the largest deviation."""
        what, deviation, tolerance = self.worst
        parts = list(self.faults[:3])
        if len(self.faults) > 3:
            parts.append(f"{len(self.faults) - 3} more")
        if not self.results and not parts:
            return "nothing was compared"
        if _excess(self.worst) > 1 or not parts:
            parts.append(f"largest deviation {deviation:.3g} (tolerance {tolerance:.3g}) in {what}")
        return "; ".join(parts).replace("\n", " ")


def _excess(result: tuple[str, float, float]) -> float:
    _, deviation, tolerance = result
    if deviation == 0.0:
        return 0.0
    return deviation / tolerance if tolerance > 0 and not math.isnan(deviation) else math.inf


def _tensor(value: Any) -> Tensor:
    return value.detach().double().cpu() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """One case of an oracle folder: `run` makes its comparisons."""

    kind: str
    name: str
    run: Callable[[Checks], None]

    def checked(self) -> Checks:
        """Run; whatever goes wrong inside is this case's failure."""
        checks = Checks()
        try:
            self.run(checks)
        except Exception as error:
            checks.faults.append(f"{type(error).__name__}: {error}")
        return checks


Cases = Iterator[Case]


class Tensors:
    """The tensors under a prefix of a safetensors file, which is read once, when first needed."""

    _files: dict[tuple[Path, int], dict[str, Tensor]] = {}  # noqa: RUF012

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.path, self.prefix = path, prefix
        self.used: set[str] = set()

    def all(self, prefix: str = "") -> dict[str, Tensor]:
        """Name (without the prefixes) to tensor; all of them count as used."""
        found = {name.removeprefix(prefix): value for name, value in self._own().items() if name.startswith(prefix)}
        self.used |= {prefix + name for name in found}
        return found

    def check_all_used(self, checks: Checks) -> None:
        """A recorded tensor that nothing looked at is a fault: no expectation is skipped in silence."""
        checks.equal("recorded tensors that were not compared", sorted(self._own().keys() - self.used), [])

    def _own(self) -> dict[str, Tensor]:
        key = (self.path, self.path.stat().st_mtime_ns)
        if key not in self._files:
            self._files.clear()
            self._files[key] = load_file(self.path)
        start = len(self.prefix)
        return {name[start:]: value for name, value in self._files[key].items() if name.startswith(self.prefix)}

    def __getitem__(self, name: str) -> Tensor:
        self.used.add(name)
        return self._own()[name]

    def __contains__(self, name: str) -> bool:
        return name in self._own()


def copy_in(model: torch.nn.Module, tensors: dict[str, Tensor], checks: Checks) -> None:
    """Fill every parameter by name, one to one; names or shapes that do not match are faults."""
    own = dict(model.named_parameters())
    checks.equal("names of the parameters", sorted(tensors), sorted(own))
    with torch.no_grad():
        for name in own.keys() & tensors.keys():
            own[name].copy_(tensors[name].reshape(own[name].shape))
