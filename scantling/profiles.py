"""A width profile solved for one model: by the authors' accounting, or exactly against the model's own rows."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from scantling.costing import total
from scantling.parts import MoEFFN, Transition
from scantling.rows import Row, ffn_weights, layer_rows, transition_row
from scantling.shapes import Accounting, WidthProfile, matched_widths, published_widths, stage_widths
from scantling.spec import LayerSpec


@dataclass(frozen=True)
class Baseline:
    """The uniform model a profile is matched to, and what stays when the widths change.

    Attributes:
        layer: the explicit layer at an index and width; raises ValueError when there is none.
        context: tokens that FLOPs are counted at.
    """

    depth: int
    width: int
    vocab_size: int
    tied: bool
    context: int
    transition: Transition | None
    layer: Callable[[int, int], LayerSpec]


def solve(profile: WidthProfile, base: Baseline) -> list[int]:
    """One width per layer, matched as the profile asks.

    Raises:
        ValueError: no profile of this form reaches the baseline, or a layer cannot have the width.
    """
    if profile.profile == "stages":
        return stage_widths(profile, base.depth, base.width)[0]
    uniform = [base.layer(index, base.width) for index in range(base.depth)]
    step = profile.quantize_to or math.lcm(*(2 * layer.num_attention_heads for layer in uniform))
    if profile.match in ("published", "none"):
        return published_widths(profile, accounting(profile, uniform[0], base), step).widths
    return matched_widths(profile, base.depth, base.width, step, measure(profile, base))


def end_widths(profile: WidthProfile, base: int, widths: list[int]) -> tuple[int, int]:
    """Widths of the embedding and of the unembedding."""
    if profile.profile == "stages":
        return base, stage_widths(profile, len(widths), base)[1]
    if profile.fixed_residual_width:
        return base, base
    width_in = base if profile.original_input_width else widths[0]
    width_out = base if profile.original_output_width else max(widths) if profile.wide_unembedding else widths[-1]
    return width_in, width_out


def accounting(profile: WidthProfile, layer: LayerSpec, base: Baseline) -> Accounting:
    """The authors' counts for a baseline layer."""
    width, ffn, experts, chosen = base.width, layer.ffn, 0, 0
    inner = ffn
    if isinstance(ffn, MoEFFN):
        inner, experts, chosen = ffn.expert, ffn.num_local_experts, ffn.num_experts_per_tok
    assert not isinstance(inner, MoEFFN)
    return Accounting(
        base.vocab_size,
        width,
        base.depth,
        ffn=max(1, experts) * ffn_weights(inner, width) / width**2,
        down=max(1, experts) * inner.intermediate_size / width,
        experts=experts,
        chosen=chosen,
        fixed_residual=profile.fixed_residual_width,
    )


def measure(profile: WidthProfile, base: Baseline) -> Callable[[list[int]], float]:
    """The exact count that `match` names, as a function of the widths: layers, maps between them, tables, final norm."""

    def count(table: list[Row]) -> float:
        if profile.match == "kv_bytes":
            return float(total(table, "kv_elements"))
        if profile.match == "flops":
            return float(total(table, "matmul_flops") + base.context * total(table, "score_flops"))
        return float(total(table, "params"))

    @cache
    def of_layer(index: int, width: int) -> float:
        return count(layer_rows(base.layer(index, width), index))

    @cache
    def of_change(have: int, width: int) -> float:
        row = transition_row(base.transition, None, have, width)
        return count([row]) if row else 0.0

    def of_model(widths: list[int]) -> float:
        width_in, width_out = end_widths(profile, base.width, widths)
        final = base.width if profile.fixed_residual_width else widths[-1]
        ends = {
            "allocated": base.vocab_size * (width_in + (0 if base.tied else width_out)) + final,
            "flops": 2 * base.vocab_size * width_out,
            "kv_bytes": 0,
        }
        stream = [width_in, *widths, width_out]
        maps = 0.0 if profile.fixed_residual_width else sum(of_change(a, b) for a, b in pairwise(stream))
        return ends[profile.match] + maps + sum(of_layer(index, width) for index, width in enumerate(widths))

    return of_model
