"""What is published on stacking layers while pre-training (G_stack, arXiv 2405.15319): when, how often, how much larger."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scantling.units import format_count, format_flops

FITTED_SIZES = (410e6, 3e9)  # N of the three targets behind the formula
MOST_FLOPS = 12e20  # largest budget behind it
MOST_SHARE = 10 / 97.5  # of the target's tokens: as in the source's main experiment (10B before 97.5B, figure 3)
BEST_FACTORS = (2.0, 4.0)
NEARLY = 1.01


@dataclass(frozen=True)
class Stacking:
    """The published advice for one target.

    Attributes:
        formula_tokens: tokens of the small model before it is stacked, as the formula gives them.
        tokens: the same, at most about a tenth of the target's tokens.
        share: `tokens` over those and the target's.
        factor: target over base in non-embedding parameters.
        notes: where the formula does not apply, and what else was found.
    """

    formula_tokens: float
    tokens: float
    share: float
    factor: float
    notes: tuple[str, ...]


def stacking_tokens(parameters: float, flops: float) -> float:
    """d: log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74 (arXiv 2405.15319, section 4.2).

    Args:
        parameters: N of the target, without embeddings.
        flops: C, of the whole run, 6 N D.
    """
    return float(10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74))


def stacking(sizes: Sequence[float], tokens: float, base_layers: int | None = None) -> Stacking:
    """The published timing and factor for growing through these sizes, the last the target.

    Args:
        sizes: non-embedding parameters, the base first.
        tokens: that the target would be trained on from scratch.
        base_layers: layers of the base.
    """
    n, flops, factor = sizes[-1], 6 * sizes[-1] * tokens, sizes[-1] / sizes[0]
    formula = stacking_tokens(n, flops)
    kept = min(formula, MOST_SHARE * tokens)
    outside = []
    low, high = FITTED_SIZES
    if not low / NEARLY <= n <= high * NEARLY:
        outside.append(f"N = {format_count(n)} (fitted 410M to 3B)")
    if flops > MOST_FLOPS * NEARLY:
        outside.append(f"C = {format_flops(flops)} (fitted up to {format_flops(MOST_FLOPS)})")
    if not 1 / NEARLY <= factor / BEST_FACTORS[1] <= NEARLY:
        outside.append(f"a growth factor of {factor:.3g} (fitted at 4)")
    notes = []
    if outside:
        notes.append(
            f"The stacking formula of arXiv 2405.15319 does not cover {', '.join(outside)}; "
            f"take its {format_count(formula)} tokens as an order of magnitude at most."
        )
    if kept < formula:
        notes.append(
            f"That formula asks for {format_count(formula)} tokens of the small model, {formula / tokens:.2g} times the target's "
            f"{format_count(tokens)}: too many, as it gives for small targets and budgets. Held to a tenth, as in the source's "
            "main experiment (10B before 97.5B)."
        )
    if factor > BEST_FACTORS[1] * NEARLY:
        notes.append(
            f"The target is {factor:.3g} times the base; factors of 2 to 4 were best there, and much smaller bases gained "
            "less (bases of one layer lost against training from scratch)."
        )
    elif factor < BEST_FACTORS[0] / NEARLY:
        notes.append(f"The target is {factor:.3g} times the base; factors of 2 to 4 were best there.")
    if base_layers == 1:
        notes.append("A base of one layer was worse than training from scratch there; take two or more.")
    if len(sizes) > 2:
        notes.append("One step was better there than several (+2.4 points of mean accuracy over two doublings).")
    return Stacking(formula, kept, kept / (kept + tokens), factor, tuple(notes))


def operator_note(base: Mapping[str, float], target: Mapping[str, float]) -> list[str]:
    """What the source found for growth of this kind: depth helps, width is contested (its figure 3)."""
    deeper = target.get("depth", 0) > base.get("depth", 0)
    wider = target.get("width", 0) > base.get("width", 0)
    if deeper and not wider:
        return [
            "Published for growing depth, 400M to 1.1B: 49.1 % faster than scratch to the same loss with stacked layers "
            "(`new_layers: stack`), 46.6 % with layers that add zero (arXiv 2405.15319, figure 3)."
        ]
    if wider:
        return [
            "Width growth did not pay in arXiv 2405.15319 (0.7 to 18 % slower than scratch, figure 3); arXiv 2602.02472 saves 20 "
            "to 35 % of FLOPs with better handling of the optimizer."
            if not deeper
            else "The width part of this growth did not pay in arXiv 2405.15319 (figure 3), its depth part did (46.6 to 49.1 % "
            "faster); arXiv 2602.02472 disputes the first."
        ]
    return []
