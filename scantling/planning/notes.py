"""What a plan says in words: why nothing will do and what would, what was held fixed, and what decided the winner."""

import math
from collections.abc import Sequence

import numpy as np

from scantling.errors import InputError
from scantling.planning.config import HeadLawKeys
from scantling.planning.loss import HeadLaw
from scantling.planning.outcome import Outcome, Problem
from scantling.planning.price import CONVENTIONS, Priced
from scantling.planning.result import Candidate
from scantling.planning.shapes import MAX_SHAPES

NEAR_TIE = 0.5  # percent


# --- refusals ----------------------------------------------------------------------------------------------------------


def no_heads(problem: Problem) -> InputError:
    """No head configuration divides, or the law knows none of them."""
    known = problem.law.heads
    listed = f"; the law has {', '.join(f'{h},{k}' for h, k in known)}" if known else ""
    return problem.config.fault(
        ("space", "num_key_value_heads"),
        f"no head configuration is left; key/value heads must divide query heads{listed}",
    )


def wrong_number(problem: Problem, shapes: int) -> InputError:
    """No shape can be built, or too many."""
    advice = "narrow the lists" if shapes else "heads must divide, and aspect is hidden_size / num_hidden_layers"
    return problem.config.fault(("space",), f"expected 1 to {MAX_SHAPES:,} shapes, got {shapes:,}; {advice}")


def impossible(problem: Problem, priced: Priced, found: Outcome) -> InputError:
    """Why no shape will do, and the nearest change that would."""
    config = problem.config
    if config.space.real_valued:
        return config.fault(problem.goal_path, "no real-valued shape of this space meets it; raise it")
    if found.possible.any():
        least = float(np.min(np.asarray(priced.memory_bytes)[found.possible]))
        return config.fault(
            ("budget", "memory_bytes"),
            f"the smallest shape that meets the rest takes {_up(least)} bytes, got {problem.memory:.4g}; raise it to that",
        )
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
    return config.fault(
        problem.goal_path,
        f"the cheapest shape of the space needs {needed} FLOPs for {ratio or 'one sequence of training'}{serving}, got "
        f"{problem.goal:.4g}; raise the budget to at least that, or let space hold smaller shapes",
    )


def _up(value: float) -> str:
    """Five digits, rounded up, so that the number printed is enough."""
    step = 10.0 ** (math.floor(math.log10(value)) - 4)
    return f"{math.ceil(value / step) * step:.5g}"


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
    found += [*_about_law(problem), *_held(problem), *_overshoot(problem, best, real), *_edges(problem, best)]
    if config.space.real_valued:
        found.append("Depth and width are left real numbers; real_valued: false gives buildable shapes.")
    found += [f"The best candidate is extrapolated: {sentence}." for sentence in best.extrapolation]
    if best.no_interval:
        found.append(f"No interval of the loss: {best.no_interval}.")
    return (*found, *_ties(problem, candidates))


def _about_law(problem: Problem) -> list[str]:
    """What the law knows, and over which range."""
    law = problem.law
    if not isinstance(law, HeadLaw):
        unknown = [] if law.fit.ranges else ["The law states no fitted range, so extrapolation cannot be judged."]
        return ["The law knows N and D only.", *unknown, *(f"{law.name}: {said}." for said in law.fit.warnings)]
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


def _held(problem: Problem) -> list[str]:
    """How each size was held that the law has no evidence about."""
    space, (low, high) = problem.config.space, problem.config.space.aspects
    listed = space.hidden_size is not None and space.num_hidden_layers is not None
    axes: dict[str, tuple[object, ...]] = {
        "hidden_size / num_hidden_layers": (low, high) if listed or low != high else (f"{low:g}",),
        "head_dim": space.head_dim,
        "intermediate_size / hidden_size": (f"{space.ffn.expansion:.4g}",),
    }
    if not isinstance(problem.law, HeadLaw):
        axes["num_attention_heads"] = space.num_attention_heads or ("hidden_size / head_dim",)
        axes["num_key_value_heads"] = space.num_key_value_heads or ("as many as query heads",)
    held = [f"{name}: {values[0]}" for name, values in axes.items() if len(values) == 1]
    many = [name for name, values in axes.items() if len(values) > 1]
    found = [f"Held fixed, because the law has no evidence about them: {'; '.join(held)}."]
    if many:
        found.append(
            f"Several values of {' and of '.join(many)} are ranked by cost alone: the law has no evidence about their "
            "effect on the loss."
        )
    return found


def _overshoot(problem: Problem, best: Candidate, real: Candidate) -> list[str]:
    """Where whole sizes, not the law, decided the winning heads."""
    first, winner = (f"{item.num_attention_heads},{item.num_key_value_heads}" for item in (real, best))
    if not isinstance(problem.law, HeadLaw) or first == winner:
        return []
    return [
        "Whole sizes overshoot the target by different amounts, which decides this ranking: with real-valued sizes "
        f"{first} comes before {winner}."
    ]


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
