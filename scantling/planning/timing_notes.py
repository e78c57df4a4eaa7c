"""What is said beside a growth schedule: what it assumes, where it does not hold, and what was published."""

import math
from collections.abc import Sequence

import numpy as np

from scantling.laws.lawfit import LawFit
from scantling.planning.schedule import Trained, shares, turns_back
from scantling.planning.stacking import operator_note
from scantling.planning.timing import Timing
from scantling.units import format_count

REALITY = (
    "A hand-over without loss saves 6 to 10 % of training at about 20 tokens per parameter and next to nothing when "
    "over-training (law of arXiv 2203.15556, four times the size). Published savings near 50 % (arXiv 2405.15319) come from "
    "how the grown model optimises, the schedule and the baseline, not from preserving its function; no law of N and D "
    "predicts them. What growth surely gives is the use of a checkpoint already paid for."
)
ASSUMED = (
    "Assumed: no loss at the hand-over, and that the grown model goes on like one trained from scratch to the same loss. Laws "
    "describe finished runs, after the learning rate's decay: growing in mid-run comes at a higher loss than they say."
)
LATE = (
    "This grows after half of the tokens. Published runs under a cosine schedule failed from there on; a constant rate with a "
    "short decay at the end held up to 80 % (arXiv 2511.04981)."
)


def sentences(answer: Timing, laws: Sequence[tuple[str, LawFit]], now: Sequence[Trained]) -> list[str]:
    source, target = answer.shapes[0].name, answer.shapes[-1].name
    said = _reuse_notes(answer)
    if answer.legs and not answer.grows:
        last = answer.shapes[answer.legs[-1].shape].name
        said.append(
            f"Do not grow for this: the loss that {target} reaches on {format_count(answer.tokens)} tokens costs less on "
            f"{last} alone. Growing pays for more tokens, or when the larger model is wanted for its lower floor."
        )
    elif answer.grows and answer.reuse is None and len(answer.legs) == 1:
        said.append(f"Train {target} from scratch: at no loss is a smaller shape cheaper under these laws.")
    said += [
        f"{shape.name} is left out: it is not the cheapest on any part of the way."
        for number, shape in enumerate(answer.shapes[:-1])
        if answer.grows and len(answer.legs) > 1 and number not in {leg.shape for leg in answer.legs}
        and not (number == 0 and answer.reuse)
    ]  # fmt: skip
    said += [
        f"In {switch.left_out:.0%} of the law's draws the best schedule has no growth from {switch.source} to {switch.target}."
        for switch in answer.switches
        if switch.left_out >= 0.05
    ]
    if any(share > 0.5 for share in shares(answer.legs)):
        said.append(LATE)
    if len(laws) > 1:
        if answer.legs and turns_back(now, answer.legs[-1].to_loss):
            said.append(
                "At some losses an earlier shape would be the cheapest again; growth cannot go back, so the schedule does not."
            )
        kinds = {fit.conventions.get("loss", "") for _, fit in laws}
        if len(kinds) > 1:
            said.append(
                f"The laws count losses differently ({'; '.join(sorted(kinds))}): compare only if they are the same."
            )
    for number, (name, fit) in enumerate(laws):
        legs = [leg for leg in answer.legs if len(laws) == 1 or leg.shape == number]
        ends = [(answer.shapes[leg.shape].parameters, leg.already + leg.tokens) for leg in legs]
        if answer.reuse and len(laws) == 1:
            ends += [(answer.shapes[0].parameters, answer.reuse.paid)]
        if ends:
            sizes, tokens = (np.asarray(column) for column in zip(*ends, strict=True))
            said += [f"Extrapolated: {each}." for each in fit.outside(sizes, tokens, f"{name}: ")]
        if fit.draws is None:
            said.append(f"No interval from {name}: {fit.bootstrap}.")
        said += [f"{name}: {warning}." for warning in fit.warnings]
    said += [ASSUMED, REALITY]
    if answer.stacking is not None:
        said += answer.stacking.notes
        said += operator_note(*(answer.shapes[place].columns for place in (0, -1)))
    if answer.saved is not None and answer.reuse is None and answer.saved.value > 0.2:
        said.append(
            f"More than a fifth saved is far from what one law of N and D gives; check the laws of {source} and {target}."
        )
    return said


def _reuse_notes(answer: Timing) -> list[str]:
    """What the checkpoint covers, or why growing it for this target is worth little."""
    old, target = answer.reuse, answer.shapes[-1].name
    if old is None:
        return []
    if not old.ahead:
        return [
            f"The checkpoint's {format_count(old.paid)} tokens cover {old.covered.value:.0%} of those that {target} needs for "
            f"its loss: they are worth {format_count(old.tokens_worth.value)} of {format_count(answer.tokens)}."
        ]
    floor, lowest = old.floors
    said = (
        f"The checkpoint's loss ({old.loss.value:.4f}) is already at or below what {target} reaches on "
        f"{format_count(answer.tokens)} tokens ({answer.target_loss.value:.4f}): growing it buys nothing by then, only a lower "
        f"floor ({lowest:.4f} against {floor:.4f})"
    )
    if math.isfinite(old.tokens_worth.value):
        return [
            f"{said}. It pays only if {target} is trained to more than {format_count(old.tokens_worth.value)} tokens' worth."
        ]
    return [f"{said}, and {target} never gets below the checkpoint's loss under this law."]
