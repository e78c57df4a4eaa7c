"""Width profiles: from a few numbers to one width per layer, matched to a uniform baseline.

The "><former" family of arXiv 2606.18246: widths fall geometrically (or arithmetically) to a turn layer and rise again.
A profile fixes the *relative* widths; matching fixes the scale, either with the authors' own accounting (`published`) or
exactly, against any measured quantity of the resolved model (`resolve.py` passes it in as a function of the widths).
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from scantling.parts import Fraction, Frozen, Positive, Real, Size
from scantling.rows import Number, smaller

Match = Literal["allocated", "flops", "kv_bytes", "published", "none"]


class WidthProfile(Frozen):
    """One width per layer from a turn layer and a ratio.

    Attributes:
        profile: `geometric` (each width is a multiple of the one before), `arithmetic` (each adds a share of the first), or
            `stages` (lc- and cc-gpt, arXiv 2404.14462: blocks_per_stage layers of one width, then stage_ratio times it).
        blocks_per_stage, stage_ratio: of `stages`; the first stage has hidden_size.
        map_after_last: of `stages`: the head reads one more stage's width (as published); else the last stage's.
        bottleneck_ratio: narrowest width / hidden_size, in (0, 1]; geometric only.
        expansion_factor, reduction_factor: the multiples before and after the turn; a missing one follows from the other.
        delta, delta_neg: the added shares before and after the turn; a missing one follows from the other.
        turn_layer: 1-based layer where the profile turns; default 3/4 of the depth.
        symmetric: the last layer is as wide as the first.
        duplicate_turn_layer: the layer after the turn repeats its width.
        quantize_to: widths are multiples of this; default 2 x num_attention_heads (even heads, as RoPE needs).
        match: what stays equal to the uniform baseline of width hidden_size: `allocated` parameters, `flops`, `kv_bytes`,
            the authors' `published` accounting, or `none` (then give base_width).
        round_base: published matching only; true rounds the base width first, as the released code; false as the paper.
        base_width: the first width, when it is not to be solved.
        permute: shuffle the widths with this seed, or "sort" / "rsort"; ends stay unless permute_all.
        no_waste: the first layer's q, k, v skip the coordinates that no embedding fills (the same function), and the last
            feed-forward does not write those that the head cuts off (another function: they count in the final norm).
        fixed_residual_width: the stream keeps hidden_size; the profile sets head sizes and feed-forward sizes only.
        original_input_width, original_output_width: embedding / unembedding keep hidden_size (else the width of the
            first / last layer); wide_unembedding: the unembedding has the widest layer's width.
    """

    profile: Literal["geometric", "arithmetic", "stages"] = "geometric"
    blocks_per_stage: Size | None = None
    stage_ratio: Fraction = 0.5
    map_after_last: bool = True
    bottleneck_ratio: Real | None = Field(default=None, gt=0, le=1)
    expansion_factor: Positive | None = None
    reduction_factor: Positive | None = None
    delta: Real | None = None
    delta_neg: Real | None = None
    turn_layer: Size | None = None
    symmetric: bool = True
    duplicate_turn_layer: bool = False
    quantize_to: Size | None = None
    match: Match = "allocated"
    round_base: bool = True
    base_width: Size | None = None
    permute: int | Literal["sort", "rsort"] | None = None
    permute_all: bool = False
    original_input_width: bool = True
    original_output_width: bool = True
    wide_unembedding: bool = False
    no_waste: bool = False
    fixed_residual_width: bool = False

    @model_validator(mode="after")
    def _one_schedule(self) -> Self:
        geometric = [self.bottleneck_ratio, self.expansion_factor, self.reduction_factor]
        arithmetic = [self.delta, self.delta_neg]
        if self.profile == "stages":
            if self.blocks_per_stage is None or any(value is not None for value in (*geometric, *arithmetic)):
                raise ValueError("a stages profile takes blocks_per_stage and stage_ratio, and needs the first")
            return self
        wanted, other = (geometric, arithmetic) if self.profile == "geometric" else (arithmetic, geometric)
        names = {
            "geometric": "bottleneck_ratio, or expansion_factor and/or reduction_factor",
            "arithmetic": "delta and/or delta_neg",
        }
        if all(value is None for value in wanted):
            raise ValueError(f"a {self.profile} profile needs {names[self.profile]}")
        if any(value is not None for value in other):
            raise ValueError(f"a {self.profile} profile takes {names[self.profile]}, not the other family's keys")
        if self.bottleneck_ratio is not None and (self.expansion_factor or self.reduction_factor or self.base_width):
            raise ValueError("bottleneck_ratio is solved for; give it alone, without factors or base_width")
        if self.match == "none" and self.base_width is None:
            raise ValueError("match: none needs a base_width")
        if self.wide_unembedding and self.original_output_width:
            raise ValueError("wide_unembedding needs original_output_width: false")
        keeps_ends = self.original_input_width and self.original_output_width and not self.wide_unembedding
        if self.fixed_residual_width and (not keeps_ends or self.no_waste):
            raise ValueError("fixed_residual_width keeps hidden_size at both ends and has no waste to skip")
        if self.permute_all and not (self.original_input_width and self.original_output_width):
            raise ValueError("permute_all needs original_input_width and original_output_width")
        return self

    def steps(self, depth: int) -> tuple[int, int, int]:
        """Turn layer k, growth-side steps G = k - 1 and second-side steps S.

        Raises:
            ValueError: the turn layer does not fit into the depth.
        """
        turn = self.turn_layer if self.turn_layer is not None else max(1, round(0.75 * depth))
        second = depth - turn - (1 if self.duplicate_turn_layer else 0)
        if turn > depth or second < 0:
            raise ValueError(f"turn_layer {turn} does not fit into {depth} layers")
        return turn, turn - 1, second


def stage_widths(profile: WidthProfile, depth: int, width: int) -> tuple[list[int], int]:
    """Widths of every layer of a `stages` profile, and of the head: floor(ratio x) from stage to stage.

    Raises:
        ValueError: the blocks do not divide the depth (a remainder would be dropped silently), or a width reaches 0.
    """
    blocks = profile.blocks_per_stage or 1
    if depth % blocks:
        raise ValueError(
            f"{blocks} blocks per stage do not divide {depth} layers; use {depth // blocks * blocks or blocks}"
        )
    widths = [width]
    for _ in range(depth // blocks):
        widths.append(int(widths[-1] * profile.stage_ratio))
    if widths[-1] < 1:
        raise ValueError(f"{depth // blocks} stages shrink a width of {width} to nothing; use fewer stages")
    head = widths[-1] if profile.map_after_last else widths[-2]
    return [size for size in widths[:-1] for _ in range(blocks)], head


@dataclass(frozen=True)
class Slope:
    """Resolved relative change per step before and after the turn (a factor, or a share of the base width)."""

    before: float
    after: float


def slope_of(profile: WidthProfile, depth: int) -> Slope:
    """The given slopes, a missing partner filled in: symmetric ends if asked and possible, else reciprocal / negative."""
    _, growth, second = profile.steps(depth)
    if profile.profile == "geometric":
        first, last = profile.expansion_factor, profile.reduction_factor
        if first is None and last is not None:
            first = last ** (-second / growth) if profile.symmetric and growth else 1 / last
        if last is None and first is not None:
            last = first ** (-growth / second) if profile.symmetric and second else 1 / first
    else:
        first, last = profile.delta, profile.delta_neg
        if first is None and last is not None:
            first = -last * second / growth if profile.symmetric and growth else -last
        if last is None and first is not None:
            last = -first * growth / second if profile.symmetric and second else -first
    assert first is not None and last is not None
    return Slope(first, last)


def ratio_slope(profile: WidthProfile, depth: int, x: float) -> Slope:
    """The geometric slopes that one unknown x in (0, 1] stands for while a bottleneck ratio is solved (sheet 1.4)."""
    _, growth, second = profile.steps(depth)
    if growth == 0:
        return Slope(1.0, 1 / x if second else 1.0)
    if second == 0:
        return Slope(x, 1.0)
    return Slope(x, x ** (-growth / second) if profile.symmetric else 1 / x)


def continuous(profile: WidthProfile, depth: int, slope: Slope, base: float) -> list[float]:
    """Unrounded widths, by repeated multiplication or addition from `base`."""
    turn, _, _ = profile.steps(depth)
    widths = [float(base)]
    for layer in range(2, depth + 1):
        if profile.duplicate_turn_layer and layer == turn + 1:
            widths.append(widths[-1])
        else:
            step = slope.before if layer <= turn else slope.after
            widths.append(widths[-1] * step if profile.profile == "geometric" else widths[-1] + base * step)
    return widths


def quantize(widths: list[float], step: int) -> list[int]:
    """Multiples of `step`, half to even, at least one step."""
    return [max(1, round(width / step)) * step for width in widths]


def permuted(profile: WidthProfile, widths: list[int]) -> list[int]:
    """The widths in their final order."""
    if profile.permute is None:
        return widths
    ends = not profile.permute_all and len(widths) > 2
    middle = widths[1:-1] if ends else list(widths)
    if profile.permute == "sort":
        middle.sort()
    elif profile.permute == "rsort":
        middle.sort(reverse=True)
    else:
        random.Random(profile.permute).shuffle(middle)
    return [widths[0], *middle, widths[-1]] if ends else middle


# --- matching with the authors' accounting (sheet 1.2 - 1.4) -----------------------------------------------------------


@dataclass(frozen=True)
class Accounting:
    """What the authors' solver counts: untied tables, 4 d^2 attention, gated FFN of `expansion` x d (or experts), no norms.

    Attributes:
        vocab_size, hidden_size, depth: of the uniform baseline.
        ffn: feed-forward parameters of a layer / d^2 (12 for a gated FFN of expansion 4).
        down: the part of it in the down-projections / d^2 (4, or experts x expert ratio).
        experts: number of routed experts, 0 for dense (the router adds experts x d per layer).
        chosen: experts that one token uses.
        fixed_residual: the stream keeps hidden_size; a layer's width is that of its heads, and 1/4 of its FFN's.
    """

    vocab_size: int
    hidden_size: int
    depth: int
    ffn: float
    down: float
    experts: int = 0
    chosen: int = 0
    fixed_residual: bool = False

    @property
    def per_width_squared(self) -> float:
        return 4 + self.ffn

    @property
    def baseline(self) -> float:
        """P_base = 2 v h + K L h^2 (+ experts L h)."""
        width, depth = self.hidden_size, self.depth
        body = self.per_width_squared * depth * width**2 + self.experts * depth * width
        return 2 * self.vocab_size * width + body

    def params(self, profile: WidthProfile, widths: Sequence[float], active: bool = False) -> float:
        """What the authors count for these widths (sheet 1.2): no norms, no endpoint waste; one token's if `active`."""
        use = self.chosen / self.experts if active and self.experts else 1.0
        tables, per_width = self.vocab_size * sum(self.ends(profile, widths)), 4 + self.ffn * use
        if self.fixed_residual:
            return tables + self.hidden_size * (per_width * sum(widths) + self.experts * self.depth)
        waste_in, waste_out = self.waste(profile, widths)
        body = per_width * sum(width * width for width in widths) + self.experts * sum(widths)
        return tables + body - 3 * waste_in - self.down * waste_out

    def forward_flops(self, profile: WidthProfile, widths: Sequence[float], sequence: int) -> float:
        """The authors' forward FLOPs of one sequence (sheet 5.2): full scores, endpoint waste left out."""
        use = self.chosen / self.experts if self.experts else 1.0
        per_width, total = 2 * (4 + self.ffn * use), sum(widths)
        head = 2 * sequence * self.ends(profile, widths)[1] * self.vocab_size
        router = 2 * sequence * self.experts * total
        if self.fixed_residual:
            return head + sequence * (per_width * self.hidden_size + 4 * sequence) * total + router
        waste_in, waste_out = self.waste(profile, widths)
        body = sequence * per_width * sum(width * width for width in widths) + 4 * sequence**2 * total
        return head + body + router - 2 * sequence * (3 * waste_in + self.down * use * waste_out)

    def ends(self, profile: WidthProfile, widths: Sequence[float]) -> tuple[float, float]:
        """Widths of the embedding and the unembedding."""
        h, wide = self.hidden_size, profile.wide_unembedding
        width_out = h if profile.original_output_width else max(widths) if wide else widths[-1]
        return h if profile.original_input_width else widths[0], width_out

    def waste(self, profile: WidthProfile, widths: Sequence[float]) -> tuple[float, float]:
        """d (d - h) at each end that is wider than an embedding of width h, else 0."""
        first, last, h = widths[0], widths[-1], self.hidden_size
        waste_in = first * (first - h) if profile.original_input_width and first > h else 0.0
        return waste_in, last * (last - h) if profile.original_output_width and last > h else 0.0


def solve_base(profile: WidthProfile, account: Accounting, relative: list[float], legacy: bool) -> float:
    """The base width b that makes the authors' count of the profile equal to the baseline (sheet 1.3).

    Solves A b^2 + B b + C = 0 under each hypothesis about endpoint waste and takes the first root that agrees with it.
    `legacy`: the released code's older rule for explicit factors (waste only when both ends are wider).
    """
    width, vocab = account.hidden_size, account.vocab_size
    keep_in, keep_out = profile.original_input_width, profile.original_output_width
    first_sum, square_sum = sum(relative), sum(c * c for c in relative)
    end, widest = relative[-1], max(relative)
    if account.fixed_residual:  # every matrix is h x d: linear in the widths, and no waste
        body = account.baseline - 2 * vocab * width - account.experts * account.depth * width
        return body / (account.per_width_squared * width * first_sum)
    out = 0.0 if keep_out else widest if profile.wide_unembedding else end

    def roots(waste_in: bool, waste_out: bool) -> Iterator[float]:
        a = account.per_width_squared * square_sum - 3 * waste_in - account.down * end**2 * waste_out
        b = vocab * ((not keep_in) + out) + account.experts * first_sum
        b += 3 * width * waste_in + account.down * width * end * waste_out
        c = vocab * width * (keep_in + keep_out) - account.baseline
        inside = b * b - 4 * a * c
        if inside >= 0 and a:
            yield (-b + math.sqrt(inside)) / (2 * a)
            yield (-b - math.sqrt(inside)) / (2 * a)

    hypotheses = [(i, o) for i in (False, True) for o in (False, True) if (keep_in or not i) and (keep_out or not o)]
    if legacy:
        hypotheses = [(True, True)] if keep_in and keep_out else []
    for waste_in, waste_out in hypotheses:
        for base in roots(waste_in, waste_out):
            agrees_in = not keep_in or (base > width) == waste_in
            agrees_out = not keep_out or (base * end > width) == waste_out
            if base > 0 and agrees_in and agrees_out:
                return base
    return next(roots(False, False))


def published_slope(profile: WidthProfile, account: Accounting) -> Slope:
    """The slopes for a bottleneck ratio, with the authors' bisection (sheet 1.4): at most 80 steps, 1e-6 relative."""
    depth, target = account.depth, (profile.bottleneck_ratio or 1.0) * account.hidden_size
    tolerance = 1e-6 * max(1.0, target)

    def error(x: float) -> float:
        relative = continuous(profile, depth, ratio_slope(profile, depth, x), 1.0)
        return solve_base(profile, account, relative, legacy=False) * min(relative) - target

    if abs(error(1.0)) <= tolerance:
        return Slope(1.0, 1.0)
    low, high = 0.5, 1.0
    while error(low) > 0:
        low /= 2
        if low < 1e-6:
            raise ValueError(f"no profile reaches bottleneck_ratio {profile.bottleneck_ratio}; choose one nearer to 1")
    for _ in range(80):
        middle = (low + high) / 2
        miss = error(middle)
        if abs(miss) <= tolerance:
            return ratio_slope(profile, depth, middle)
        low, high = (low, middle) if miss > 0 else (middle, high)
    return ratio_slope(profile, depth, (low + high) / 2)


@dataclass(frozen=True)
class PublishedWidths:
    """Every stage of the authors' schedule, as their oracle records it."""

    slope: Slope
    base_continuous: float
    base: int
    unrounded: list[float]
    widths: list[int]


def published_widths(profile: WidthProfile, account: Accounting, step: int) -> PublishedWidths:
    """Widths by the authors' accounting; the base width is rounded first as in their code, or not, as in the paper."""
    depth = account.depth
    both_ends = profile.original_input_width and profile.original_output_width
    if account.fixed_residual and (account.experts or not both_ends):
        raise ValueError("a fixed residual width goes with dense layers and both original widths")
    solved = profile.bottleneck_ratio is not None
    slope = published_slope(profile, account) if solved else slope_of(profile, depth)
    relative = continuous(profile, depth, slope, 1.0)
    base = (
        float(profile.base_width) if profile.base_width else solve_base(profile, account, relative, legacy=not solved)
    )
    start = round(base) if profile.round_base else base
    unrounded = continuous(profile, depth, slope, start)
    widths = permuted(profile, quantize(unrounded, step))
    return PublishedWidths(slope, base, round(base), unrounded, widths)


# --- exact matching ----------------------------------------------------------------------------------------------------


def matched_widths(
    profile: WidthProfile, depth: int, width: int, step: int, measure: Callable[[list[int]], float]
) -> list[int]:
    """Quantised widths whose `measure` is as near as possible to that of `depth` layers of `width`.

    One unknown scales the profile (with a bottleneck ratio, the steepness; the narrowest width then is the ratio x width
    by construction); the measure only grows with it, so a bisection brackets the target. The nearer side is then refined
    by moving single layers one step while that helps, keeping the ends equal and the narrowest layer narrowest.

    Args:
        measure: an exact count of the model with these widths (parameters, FLOPs, KV bytes).
    """
    target = measure([width] * depth)

    def at(x: float) -> list[int]:
        if profile.bottleneck_ratio is None:
            slope, base = slope_of(profile, depth), x * width
        else:
            slope = ratio_slope(profile, depth, 1 / x)
            base = profile.bottleneck_ratio * width / min(continuous(profile, depth, slope, 1.0))
        # equal ends must round alike, whatever the last bit of the repeated multiplication is
        return quantize([round(unrounded, 6) for unrounded in continuous(profile, depth, slope, base)], step)

    low, high = (1.0, 2.0) if profile.bottleneck_ratio is not None else (0.01, 1.0)
    while measure(at(high)) < target:
        low, high = high, high * 1.5
        if high > 1e4:
            raise ValueError("no width profile of this form reaches the baseline's size")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if measure(at(middle)) < target else (low, middle)
    best = min((at(low), at(high)), key=lambda widths: abs(measure(widths) - target))
    return permuted(profile, _refined(best, step, lambda widths: abs(measure(widths) - target)))


def _refined(widths: list[int], step: int, miss: Callable[[list[int]], float]) -> list[int]:
    """Greedy single-layer moves of one step that lower `miss`; inner layers only, profile order kept."""
    best, best_miss = widths, miss(widths)
    for _ in range(4 * len(widths)):
        moves = []
        for index in range(1, len(best) - 1):
            for change in (step, -step):
                moved = [*best[:index], best[index] + change, *best[index + 1 :]]
                if moved[index] >= min(best) and _same_order(best, moved):
                    moves.append(moved)
        if not moves:
            return best
        candidate = min(moves, key=miss)
        if miss(candidate) >= best_miss:
            return best
        best, best_miss = candidate, miss(candidate)
    return best


def _same_order(before: list[int], after: list[int]) -> bool:
    """No rise became a fall or a fall a rise between neighbours."""
    pairs = zip(pairwise(before), pairwise(after), strict=True)
    return all((b - a) * (d - c) >= 0 for (a, b), (c, d) in pairs)


# --- structured feed-forward -------------------------------------------------------------------------------------------


def structure_size(
    kind: str, width: Number, inner: Number, ratio: float, gated: bool, num_blocks: Number = 0
) -> Number:
    """The real-valued rank or block count for a share `ratio` of the weights of a dense FFN; numbers or arrays.

    With both linears structured alike, R or B solves structured weights = ratio x dense weights: for an ungated FFN of
    h and f, low_rank 2 R (h + f) = ratio 2 h f; block_dense R (h + f)(1 + 1/B) = ratio 2 h f; block_shuffle
    2 min(h, f)(h + f)/B = ratio 2 h f (arXiv 2406.16450; sheet 1.5).

    Raises:
        ValueError: the kind takes no ratio, or block_dense lacks num_blocks.
    """
    into = inner * (2 if gated else 1)
    dense = width * into + inner * width
    if kind == "low_rank":
        return ratio * dense / (width + into + inner + width)
    if kind == "block_dense":
        if np.ndim(num_blocks) == 0 and not num_blocks:
            raise ValueError("block_dense needs num_blocks beside parameter_ratio")
        return ratio * dense / (into + width / num_blocks + width + inner / num_blocks)
    if kind == "block_shuffle":
        whole = smaller(width, into) * (width + into) + smaller(inner, width) * (inner + width)  # with one block
        return whole / (ratio * dense)
    raise ValueError(f"{kind} has no rank or blocks to choose; use low_rank, block_shuffle or block_dense")


def structure_for(kind: str, width: int, inner: int, ratio: float, gated: bool, num_blocks: int = 0) -> dict[str, int]:
    """The rank or block count that `structure_size` says, as can be built.

    Ranks are rounded down, those of block_dense to a multiple of B; of block counts only divisors of both widths can be
    reached.

    Raises:
        ValueError: as `structure_size`, or no block count gives the share.
    """
    exact = structure_size(kind, width, inner, ratio, gated, num_blocks)
    if kind == "low_rank":
        return {"rank": max(1, int(exact))}
    if kind == "block_dense":
        return {"rank": max(1, int(exact / num_blocks)) * num_blocks}
    counts = [count for count in range(1, min(width, inner) + 1) if width % count == 0 == inner % count]
    best = min(counts, key=lambda count: abs(exact / count - 1))
    if abs(exact / best - 1) > 0.05:
        reached = ratio * exact / best
        raise ValueError(f"block counts that divide {width} and {inner} give {reached:.3g} at best, not {ratio:.3g}")
    return {"num_blocks": best}
