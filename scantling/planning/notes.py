"""What a plan says in words: why nothing will do and what would, what was held fixed, and what decided the winner."""

import math
from collections.abc import Sequence

import numpy as np

from scantling.errors import InputError
from scantling.planning.costs import CONVENTION, UNITS
from scantling.planning.limits import heads_sentence
from scantling.planning.loss import PLAIN_LAWS, FittedLaw, HeadLaw
from scantling.planning.outcome import Outcome, Problem, blocked_by
from scantling.planning.posing import SHAPE_COLUMNS
from scantling.planning.price import CONVENTIONS, Priced
from scantling.planning.result import Candidate, Sensitivity
from scantling.planning.screen import POOL, Screened
from scantling.planning.sections import HeadLawKeys
from scantling.planning.shapes import Shapes
from scantling.planning.space import MAX_SHAPES, Space
from scantling.yamlio import dotted

NEAR_TIE = 0.5  # percent
AXES = (  # columns of a law that are evidence about an axis
    (SHAPE_COLUMNS, "hidden_size / num_hidden_layers"),
    (("head_dim",), "head_dim"),
    (("ffn_ratio", "intermediate_size"), "intermediate_size / hidden_size"),
    (("heads", "num_attention_heads"), "num_attention_heads"),
    (("kv_heads", "num_key_value_heads"), "num_key_value_heads"),
)


# --- refusals ----------------------------------------------------------------------------------------------------------


def no_heads(problem: Problem) -> InputError:
    """No head configuration divides, or the law knows none of them."""
    known = problem.law.heads
    asked = heads_sentence(problem.config.constraints, problem.config.serving.devices)
    listed = f"; {asked}" if asked else ""
    if known:
        listed += f"; the law has {', '.join(f'{h},{k}' for h, k in known)}"
    return problem.config.fault(
        ("space", "num_key_value_heads"),
        f"no head configuration is left; key/value heads must divide query heads{listed}",
    )


def wrong_number(problem: Problem, shapes: int) -> InputError:
    """No shape can be built, or too many."""
    advice = "narrow the lists" if shapes else "heads must divide, and aspect is hidden_size / num_hidden_layers"
    if not shapes and (asked := heads_sentence(problem.config.constraints, problem.config.serving.devices)):
        advice += f"; {asked}"
    return problem.config.fault(("space",), f"expected 1 to {MAX_SHAPES:,} shapes, got {shapes:,}; {advice}")


def impossible(problem: Problem, found: Outcome, shapes: Shapes | None, priced: Priced) -> InputError:
    """Why no shape will do, and the nearest change that would."""
    config = problem.config
    if found.possible.any():
        return _limited(problem, found, shapes, priced)
    needed, ratio = (
        _up(float(np.nanmin(found.needs))),
        f"{problem.ratio:g} tokens per parameter" if problem.ratio else "",
    )
    if problem.limit is None:
        tokens = f"at {ratio}" if ratio else "with unlimited tokens"
        return config.fault(
            problem.goal_path,
            f"no shape of the space reaches {problem.goal:.6g}: the best comes to {needed} {tokens}; raise the target "
            "above that, or let space hold larger shapes",
        )
    serving = " after serving" if problem.limit == "lifetime_flops" else ""
    unit = UNITS.get(problem.limit, "")
    return config.fault(
        problem.goal_path,
        f"the cheapest shape of the space needs {needed} {unit} for {ratio or 'one sequence of training'}{serving}, got "
        f"{problem.goal:.4g}; raise the budget to at least that, or let space hold smaller shapes",
    )


def _limited(problem: Problem, found: Outcome, shapes: Shapes | None, priced: Priced) -> InputError:
    """Which limit no shape keeps: the single change nearest to what was asked, or the limits that contradict each other."""
    config, limits = problem.config, problem.limits
    kept = {i: least <= limits[i].most * (1 + 1e-12) for i, least in found.least.items()}
    changes: list[tuple[float, int, float]] = []
    for i, least in found.least.items():
        others = np.logical_and.reduce([found.possible, *(kept[j] for j in kept if j != i)])
        if others.any():
            value = float(np.min(least[others]))
            if value > limits[i].most:
                changes.append((value / limits[i].most, i, value))
    advice = _reachable(problem, shapes, priced)
    if not changes:
        return _together(problem, found, advice)
    _, i, value = min(changes)
    limit, unit, share = limits[i], UNITS.get(limits[i].name, ""), 1.0
    if limit.path[-1] == "unique_tokens":
        unit, share = "unique tokens", config.constraints.max_epochs
    value, asked = value / share, limit.most / share
    others_said = [
        f"{dotted(limits[j].path)} to {_up(other)}"
        for _, j, other in sorted(changes)[1:]
        if limits[j].path[-1] != "unique_tokens"
    ]
    or_others = f" (or {' or '.join(others_said)})" if others_said else ""
    return config.fault(
        limit.path,
        f"the smallest shape that meets the rest takes {_up(value)} {unit}, got {asked:.4g}; raise it to that"
        f"{or_others}{advice}",
    )


def _together(problem: Problem, found: Outcome, advice: str) -> InputError:
    """Limits that contradict each other: the shape that asks least of all of them together, and what it would take."""
    limits, config = problem.limits, problem.config
    ratios = {i: np.where(found.possible, least / limits[i].most, np.inf) for i, least in found.least.items()}
    best = int(np.argmin(sum(np.log(ratio.clip(1)) for ratio in ratios.values())))
    said = []
    for i, ratio in ratios.items():
        if ratio[best] > 1 + 1e-12:
            share = config.constraints.max_epochs if limits[i].path[-1] == "unique_tokens" else 1.0
            value, asked = float(found.least[i][best]) / share, limits[i].most / share
            said.append(f"{dotted(limits[i].path)} to {_up(value)} {UNITS.get(limits[i].name, '')} (got {asked:.4g})")
    first = next(i for i, ratio in ratios.items() if ratio[best] > 1 + 1e-12)
    return config.fault(
        limits[first].path,
        f"no shape keeps all limits, whichever one is lifted; the nearest change raises {_and(said)}{advice}",
    )


def _reachable(problem: Problem, shapes: Shapes | None, priced: Priced) -> str:
    """The loss that the limits leave within reach, where a target could be raised instead."""
    if problem.limit is not None or problem.ratio is not None or shapes is None:
        return ""
    caps = []
    for limit in problem.limits:
        a, b = problem.parts(limit.name, priced)
        fixed = np.where(a <= limit.most, np.inf, -np.inf)
        with np.errstate(all="ignore"):
            caps.append(np.where(b > 0, (limit.most - a) / b, fixed))
    tokens = np.min(np.stack(np.broadcast_arrays(*caps, np.zeros(len(shapes))))[:-1], axis=0)
    usable = tokens > 0
    if not usable.any():
        return ""
    losses = problem.law.curve(shapes, priced).loss(np.where(usable, tokens, np.nan))
    best = float(np.nanmin(losses))
    return f", or target.loss to {_up(best)}"


def _up(value: float) -> str:
    """Five digits, rounded up, so that the number printed is enough."""
    step = 10.0 ** (math.floor(math.log10(value)) - 4)
    return f"{math.ceil(value / step * (1 - 1e-12)) * step:.5g}"


# --- notes -------------------------------------------------------------------------------------------------------------


def notes(problem: Problem, candidates: Sequence[Candidate], real: Candidate) -> tuple[str, ...]:
    """The notes of a plan.

    Args:
        problem: the plan and its law.
        candidates: best first.
        real: the best real-valued shape.
    """
    config, law, best = problem.config, problem.law, candidates[0]
    found = [law.count_note, f"Costs ({config.convention}): {CONVENTIONS[config.convention]}."]
    if site := config.site:
        found.append(f"{site.device.name}, mfu {site.mfu:g}, mbu {site.mbu:g}: {CONVENTION}.")
    found += _split(problem, best)
    found += [*_about_law(problem), *_held(problem), *_overshoot(problem, best, real), *_edges(problem, best)]
    found += _repeats(problem, best)
    if config.space.real_valued:
        found.append("Depth and width are left real numbers; real_valued: false gives buildable shapes.")
    found += [f"The best candidate is extrapolated: {sentence}." for sentence in best.extrapolation]
    if best.no_interval:
        found.append(f"No interval of the loss: {best.no_interval}.")
    return (*found, *_ties(problem, candidates))


def _split(problem: Problem, best: Candidate) -> list[str]:
    """What an ideal split over the serving devices leaves out."""
    site, devices = problem.config.site, problem.config.serving.devices
    if site is None or devices < 2:
        return []
    values = best.hidden_size * problem.config.serving.batch * problem.config.serving.bytes_per_value
    return [
        f"Seconds and money of serving divide by {devices} devices ideally. Not modelled: a tensor-parallel step also waits for "
        f"two all-reduces per layer ({2 * best.num_hidden_layers:.4g} of {values / 1e3:.4g} kB per decoded step), so measure "
        "before relying on a latency."
    ]


def _about_law(problem: Problem) -> list[str]:
    """What the law knows, and over which range."""
    law = problem.law
    if not isinstance(law, HeadLaw):
        unknown = [] if law.fit.ranges else ["The law states no fitted range, so extrapolation cannot be judged."]
        known = "N and D only" if law.fit.law in PLAIN_LAWS else _and(law.columns)
        about = [f"The law knows {known}.", *unknown, *(f"{law.name}: {said}." for said in law.fit.warnings)]
        return [*about, *_about_families(problem, law)]
    found = [
        f"The law knows N and the head configuration, at {law.tokens_per_parameter:g} tokens per parameter; context "
        "enters the cost only (arXiv 2503.09579, section 5.7)."
    ]
    if problem.ratio != law.tokens_per_parameter:
        found.append(f"{problem.ratio:g} tokens per parameter change the training cost only: the law has no D.")
    if not law.ranges:
        found.append("The law states no fitted range (law.ranges), so extrapolation cannot be judged.")
    elif isinstance(problem.config.law, HeadLawKeys) and not problem.config.law.ranges:
        found.append(
            "The law states no range of N; taken is the ladder behind figure 2 of arXiv 2503.09579 "
            "(6 to 16 layers, hidden_size = 128 x layers)."
        )
    return found


def _about_families(problem: Problem, law: FittedLaw) -> list[str]:
    """What is known of the families, from where, and what is assumed with it."""
    evidence = problem.evidence
    if evidence is None:
        return []
    names = [variant.name for variant in law.variants]
    said = [f"{name} needs {gain.said}" for name, gain in zip(names, law.gains, strict=True) if gain.said]
    remarks = "".join(f"; {remark}" for remark in evidence.remarks)
    found = (
        [f"Evidence {evidence.name} ({evidence.source}{remarks}), against {evidence.baseline}: {'; '.join(said)}."]
        if said
        else []
    )
    found.append(
        f"Assumed: a saving measured there holds for {law.name} and with this plan's heads, context and feed-forward; at other "
        "tokens per parameter than measured the less favourable of two readings counts (all of it in the size, or in size and "
        "tokens alike). `study` puts it to the test."
    )
    if law.fit.draws is None and any(gain.spread for gain in law.gains):
        found.append("Intervals and probabilities count the uncertainty of the evidence about families alone.")
    if any(variant.profile for variant in law.variants):
        found.append(
            "Shapes with a width profile are screened with unrounded widths; the candidates are built and exact."
        )
    return found


def _and(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _held(problem: Problem) -> list[str]:
    """How each size was held that the law has no evidence about."""
    space, (low, high) = problem.config.space, problem.config.space.aspects
    known = set(problem.law.columns) if isinstance(problem.law, FittedLaw) else set()
    listed = len(space.hidden_size or ()) * len(space.num_hidden_layers or ()) > 1
    axes: dict[str, tuple[object, ...]] = {
        "hidden_size / num_hidden_layers": (low, high) if listed or low != high else (_held_aspect(space),),
        "head_dim": space.head_dim,
        "intermediate_size / hidden_size": tuple(f"{ratio:.4g}" for ratio in space.ffn.expansion),
    }
    if problem.law.heads is None:
        axes["num_attention_heads"] = space.num_attention_heads or ("hidden_size / head_dim",)
        axes["num_key_value_heads"] = space.num_key_value_heads or ("as many as query heads",)
    for columns, name in AXES:
        if known & set(columns):
            axes.pop(name, None)
    if not space.families:
        axes["architecture"] = ("one dense feed-forward, one width for all layers, no experts",)
    held = [f"{name}: {values[0]}" for name, values in axes.items() if len(values) == 1]
    many = [name for name, values in axes.items() if len(values) > 1]
    found = [f"Held fixed, because the law has no evidence about them: {'; '.join(held)}."] if held else []
    if many:
        found.append(
            f"Several values of {' and of '.join(many)} are ranked by cost alone: the law has no evidence about their "
            "effect on the loss."
        )
    return found


def _held_aspect(space: Space) -> str:
    if space.hidden_size is not None and space.num_hidden_layers is not None:
        return f"{space.hidden_size[0]} / {space.num_hidden_layers[0]}"
    return f"{space.aspects[0]:g}"


def _overshoot(problem: Problem, best: Candidate, real: Candidate) -> list[str]:
    """Where whole sizes, not the law, decided the winning heads or family."""
    heads = isinstance(problem.law, HeadLaw)
    first, winner = (
        f"{item.num_attention_heads},{item.num_key_value_heads}" if heads else item.family for item in (real, best)
    )
    if first == winner or problem.config.space.real_valued:
        return []
    how = "overshoot the target by different amounts" if heads else "come in steps"
    return [f"Whole sizes {how}, which decides this ranking: with real-valued sizes {first} comes before {winner}."]


def _edges(problem: Problem, best: Candidate) -> list[str]:
    """Where the ends of the listed sizes decided the winner."""
    found = []
    for name in ("hidden_size", "num_hidden_layers"):
        listed, value = getattr(problem.config.space, name), getattr(best, name)
        if listed is not None and len(listed) > 1 and value in (min(listed), max(listed)):
            which = "smallest" if value == min(listed) else "largest"
            found.append(
                f"The best shape has the {which} {name} of the space ({value}): a wider space may hold a better one."
            )
    return found


def _repeats(problem: Problem, best: Candidate) -> list[str]:
    """How often the data is repeated."""
    unique = problem.config.constraints.unique_tokens
    if unique is None or best.tokens <= unique:
        return []
    return [
        f"The best candidate repeats the data {best.tokens / unique:.3g} times: the law was fitted to tokens seen once; up to "
        "about 4 epochs lose little (arXiv 2305.16264)."
    ]


def _ties(problem: Problem, candidates: Sequence[Candidate]) -> list[str]:
    """How many candidates are as good as the best."""
    objective = problem.config.objective
    what, floor = ("loss above E", problem.law.E) if objective == "loss" else (objective, 0.0)
    limit = (candidates[0].objective - floor) * (1 + NEAR_TIE / 100)
    ties = sum(item.objective - floor <= limit for item in candidates[1:])
    if not ties:
        return []
    return [
        f"{ties} more candidate{'s are' if ties > 1 else ' is'} within {NEAR_TIE:g} % of the best {what}: choose among "
        "them by what is not modelled."
    ]


def about_limits(
    problem: Problem, screened: Screened | None, best: Candidate, turned: Sequence[Sensitivity]
) -> list[str]:
    """What the binding limit costs, and how firmly the choice stands when the plan's numbers change."""
    said = []
    if screened is not None and (binding := blocked_by(problem, screened.found, best.objective)):
        place, least = binding
        gain = 100 * (best.objective / least - 1)
        said.append(
            f"Without {dotted(problem.limits[place].path)} the best {problem.config.objective} would be {gain:.3g} % better."
        )
    if screened is not None and screened.stride > 1:
        said.append(f"The front and the sensitivity use every {screened.stride}th shape and the best {POOL} of all.")
    heads = f"{best.num_attention_heads:g}/{best.num_key_value_heads:g}"
    for item in turned:
        if not item.same_heads and problem.law.heads is not None:
            there = f"{item.num_attention_heads:g}/{item.num_key_value_heads:g}"
            said.append(f"At {item.factor:g} times {item.key} the heads {there} come first instead of {heads}.")
    return said
