"""When to grow, from fitted laws: the schedule of shapes, what it saves, and what a checkpoint already paid for is worth.

Assumes a hand-over without loss: a grown model at a loss goes on like one that was trained from scratch to that loss.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from scantling.costing import flops_per_token, param_counts
from scantling.errors import InputError
from scantling.laws.evidence import Estimate
from scantling.laws.lawfit import LawFit
from scantling.planning.curves import Curve
from scantling.planning.loss import DRAWN, PLAIN_LAWS, counted
from scantling.planning.price import ParameterCount
from scantling.planning.schedule import Leg, Trained, cheapest, shares, spent_holding, switching_loss
from scantling.planning.stacking import stacking
from scantling.planning.timing import Reuse, Shape, SixND, Switch, Timing
from scantling.planning.timing_notes import sentences
from scantling.rows import rows
from scantling.spec import ModelSpec
from scantling.units import format_count

FORMS = (
    "laws that work: chinchilla, overtraining, kaplan, width-depth, width-depth-size, or an equation of N and D; or one law "
    "for each shape, in their order, that knows its tokens (fit --law tokens)"
)
TOKEN_COLUMNS = {"D", "M", "C"}


def shape_of(spec: ModelSpec, name: str, count: ParameterCount, context: int) -> Shape:
    """A spec as laws and the schedule see it: exact training FLOPs per token at sequences of `context` tokens."""
    table = rows(spec)
    counts = param_counts(table)
    columns: dict[str, float] = {"depth": spec.num_hidden_layers, "num_hidden_layers": spec.num_hidden_layers}
    if len(set(spec.widths)) == 1:
        width = spec.widths[0]
        columns |= {"width": width, "hidden_size": width, "aspect": width / spec.num_hidden_layers}
    train = float(flops_per_token(table, context)["train"])
    return Shape(name, float(counts[count]), train, columns, float(counts["non_embedding"]))


def shapes_of(
    specs: Sequence[tuple[str, ModelSpec]],
    laws: Sequence[LawFit],
    count: ParameterCount | None = None,
    context: int | None = None,
) -> tuple[Shape, ...]:
    """Specs by name as shapes: N counted as each one's law says (or as `count`), at the last one's longest context."""
    context = context or specs[-1][1].max_position_embeddings
    each = laws if len(laws) == len(specs) else [laws[0]] * len(specs)
    return tuple(
        shape_of(spec, name, count or counted(law), context) for (name, spec), law in zip(specs, each, strict=True)
    )


def timing(
    laws: Sequence[tuple[str, LawFit]],
    shapes: Sequence[Shape],
    tokens: float,
    paid: float | None = None,
) -> Timing:
    """When to grow from the first shape through the others into the last.

    Args:
        laws: by name: one of all shapes, or one for each.
        shapes: smallest first; those between are used where they help.
        tokens: that the last one would be trained on from scratch.
        paid: tokens that the first was trained on already.

    Raises:
        InputError: a law that cannot tell, or shapes that shrink.
    """
    fits = tuple(fit for _, fit in laws)
    _check(laws, shapes, tokens, paid)
    now = _trained(fits, shapes)
    goal = float(now[-1].curve.loss(tokens))
    start = math.inf if paid is None else float(now[0].curve.loss(paid))
    found = tuple(cheapest(now, goal, start)) if start > goal else ()
    grows = bool(found) and found[-1].shape == len(shapes) - 1
    drawn = [_trained(each, shapes) for each in _drawn(fits)]
    scratch, spent = now[-1].flops * tokens, sum(leg.flops for leg in found)
    saved = None
    if grows:
        held = [1 - spent_holding(each, found, tokens, paid or 0.0) / (each[-1].flops * tokens) for each in drawn]
        saved = _estimate(1 - spent / scratch, held)
    best = [_redone(each, tokens, paid) for each in drawn]
    pairs = list(pairwise(found))
    after = None if not grows else float(now[-1].curve.loss(tokens + max(0.0, scratch - spent) / now[-1].flops))
    sizes = [shape.non_embedding for shape in shapes if shape.non_embedding is not None]
    published = stacking(sizes, tokens, int(shapes[0].columns["depth"])) if len(sizes) == len(shapes) else None
    answer = Timing(
        laws=tuple(name for name, _ in laws),
        shapes=tuple(shapes),
        tokens=tokens,
        target_loss=_estimate(goal, [float(each[-1].curve.loss(tokens)) for each in drawn]),
        from_scratch_flops=scratch,
        legs=found,
        switches=tuple(
            _switch(shapes, found, place, best) for place, _ in enumerate(pairs)
        ) if grows else (),
        grows=grows,
        flops=spent,
        saved=saved,
        loss_at_same_flops=after,
        six_nd=_six_nd(fits, shapes, tokens, paid),
        reuse=None if paid is None else _reuse(now, drawn, tokens, paid),
        stacking=published,
        notes=(),
    )  # fmt: skip
    return replace(answer, notes=tuple(dict.fromkeys(sentences(answer, laws, now))))


def _check(laws: Sequence[tuple[str, LawFit]], shapes: Sequence[Shape], tokens: float, paid: float | None) -> None:
    faults = []
    if len(shapes) < 2:
        faults.append(f"expected a shape to grow from and at least one to grow to, got {len(shapes)}")
    if len(laws) not in (1, len(shapes)):
        faults.append(f"law: expected one law, or one for each of the {len(shapes)} shapes, got {len(laws)}; {FORMS}")
    for what, value in (("tokens", tokens), ("paid", 1.0 if paid is None else paid)):
        if not (math.isfinite(value) and value > 0):
            faults.append(f"{what}: expected a positive finite number of tokens, got {value}")
    for name, fit in laws:
        columns = set(fit.formula.columns)
        sized = columns - TOKEN_COLUMNS or len(columns) > 1
        absent = [
            c for c in fit.formula.columns if c not in ("N", *TOKEN_COLUMNS) and any(c not in s.columns for s in shapes)
        ]
        if fit.predicts != "loss":
            faults.append(f"law: {name} gives the best {fit.predicts} for a compute, not a loss; {FORMS}")
        elif fit.groups:
            faults.append(
                f"law: {name} is fitted per {', '.join(fit.groups)}, which a shape here does not name; {FORMS}"
            )
        elif not columns & TOKEN_COLUMNS:
            faults.append(f"law: {name} ({fit.formula.text}) does not know tokens; {FORMS}")
        elif len(laws) == 1 and not sized:
            faults.append(f"law: {name} ({fit.formula.text}) cannot tell shapes apart; {FORMS}")
        elif absent:
            faults.append(f"law: {name} is a law of {', '.join(absent)}, which not every shape here has; {FORMS}")
    alike = len(laws) == 1 and not any(set(fit.formula.columns) - {"N", *TOKEN_COLUMNS} for _, fit in laws)
    for small, large in pairwise(shapes):
        if large.parameters < small.parameters or (alike and large.parameters == small.parameters):
            faults.append(
                f"{large.name}: expected more than the {format_count(small.parameters, 4)} parameters of {small.name}, got "
                f"{format_count(large.parameters, 4)}; give shapes from small to large, for growth only enlarges"
            )
    if faults:
        raise InputError(*faults)


def _trained(fits: Sequence[LawFit], shapes: Sequence[Shape], six_nd: bool = False) -> list[Trained]:
    each = fits if len(fits) == len(shapes) else [fits[0]] * len(shapes)
    return [
        Trained(
            Curve.of(fit, {"N": shape.parameters, **shape.columns}, {}),
            6 * shape.parameters if six_nd else shape.flops_per_token,
        )
        for fit, shape in zip(each, shapes, strict=True)
    ]


def _drawn(fits: Sequence[LawFit]) -> list[tuple[LawFit, ...]]:
    """The laws at their bootstrap draws, evenly thinned; a law without draws keeps its estimate."""
    counts = [len(fit.draws) for fit in fits if fit.draws is not None]
    if not counts:
        return []
    found = []
    for place in range(0, min(counts), -(-min(counts) // DRAWN)):
        each = tuple(
            fit
            if fit.draws is None
            else replace(fit, params=dict(zip(fit.params, map(float, fit.draws[place]), strict=True)), draws=None)
            for fit in fits
        )
        if all(0 <= value < math.inf for fit in each for value in fit.params.values()):
            found.append(each)
    return found


def _redone(shapes: Sequence[Trained], tokens: float, paid: float | None) -> list[Leg]:
    """The best schedule under other parameters; nothing where the target does not get below the start."""
    goal = float(shapes[-1].curve.loss(tokens))
    start = math.inf if paid is None else float(shapes[0].curve.loss(paid))
    return cheapest(shapes, goal, start) if math.isfinite(goal) and start > goal else []


def _switch(shapes: Sequence[Shape], found: Sequence[Leg], place: int, best: list[list[Leg]]) -> Switch:
    before, after = found[place], found[place + 1]
    matches = []
    for each in best:
        for number, (one, next_) in enumerate(pairwise(each)):
            if (one.shape, next_.shape) == (before.shape, after.shape):
                matches.append((one.to_loss, one.already + one.tokens, next_.already, shares(each)[number]))
    values = (before.to_loss, before.already + before.tokens, after.already, shares(found)[place])
    drawn = list(zip(*matches, strict=True)) or [()] * 4
    loss, tokens, worth, share = (_estimate(value, list(each)) for value, each in zip(values, drawn, strict=True))
    left_out = 1 - len(matches) / len(best) if best else 0.0
    return Switch(shapes[before.shape].name, shapes[after.shape].name, loss, tokens, worth, share, left_out)


def _estimate(value: float, drawn: Sequence[float]) -> Estimate:
    """With a 95% percentile interval; none from fewer than 20 draws, or where many have no value."""
    values = np.asarray([x for x in drawn if not math.isnan(x)])
    if len(values) < 20 or len(values) < 0.9 * len(drawn):
        return Estimate(value, None, None)
    low, high = np.quantile(values, 0.025, method="lower"), np.quantile(values, 0.975, method="higher")
    return Estimate(value, float(low), float(high))


def _six_nd(fits: Sequence[LawFit], shapes: Sequence[Shape], tokens: float, paid: float | None) -> SixND | None:
    plain = _trained(fits, shapes, six_nd=True)
    found = _redone(plain, tokens, paid)
    if not found or found[-1].shape != len(shapes) - 1:
        return None
    closed = None
    if len(fits) == 1 and len(shapes) == 2 and fits[0].law in PLAIN_LAWS:
        closed = switching_loss(fits[0].form, (shapes[0].parameters, shapes[1].parameters))
    saved = 1 - sum(leg.flops for leg in found) / (plain[-1].flops * tokens)
    return SixND(tuple(leg.to_loss for leg in found[:-1]), saved, closed)


def _reuse(now: Sequence[Trained], drawn: Sequence[Sequence[Trained]], tokens: float, paid: float) -> Reuse:
    def worth(shapes: Sequence[Trained]) -> tuple[float, float]:
        loss = float(shapes[0].curve.loss(paid))
        return loss, float(shapes[-1].curve.tokens(loss))

    (loss, own), each = worth(now), [worth(one) for one in drawn]
    floors = float(now[0].curve.loss(math.inf)), float(now[-1].curve.loss(math.inf))
    return Reuse(
        paid,
        _estimate(loss, [one for one, _ in each]),
        _estimate(own, [one for _, one in each]),
        _estimate(own / tokens, [one / tokens for _, one in each]),
        loss <= float(now[-1].curve.loss(tokens)),
        floors,
    )
