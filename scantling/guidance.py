"""The plan of a self-guided run: which steps have dense guides, what data each step trains on, and what it all costs.

Self-guided training (arXiv 2406.16450, sections 2.3 and 4.4) gives every structured linear of the feed-forwards a dense
guide W while it trains, whose weight alpha falls from 1 to 0 over the first T_g of S planned steps. `fixed_tokens` stops at
S; `fixed_flops` repeats the data of the guided steps after S, unguided, so that the whole costs what the dense model would:

    (1 + ratio) F_s + c ratio F_g = F_d    hence    ratio = (F_d - F_s) / (F_s + c F_g)

with F_s, F_d, F_g the forward FLOPs of the structured model, of its twin with dense feed-forwards, and of the guides, and c
the share of calls that use a guide: 1, or 1/2 (the mean of alpha) in the stochastic form.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, Literal

from scantling.costing import flops_per_token
from scantling.errors import InputError
from scantling.parts import FFN, DenseFFN, ExpertFFN, MoEFFN
from scantling.recipe import SelfGuided, TrainConfig
from scantling.rows import ffn_weights, rows
from scantling.spec import LayerSpec, ModelSpec

FIXED_TOKENS_RATIO = 0.5  # the authors' choice at equal tokens


@dataclass(frozen=True)
class Guidance:
    """What `guidance` planned. Steps are 0-based and count optimizer steps; FLOPs are per token, forward.

    Attributes:
        ratio: share of the planned steps that are guided, before rounding down to `guided_steps`.
        guided_steps: T_g.
        repeated_steps: steps after the planned ones, which repeat the data of the first: T_g in `fixed_flops`, else 0.
        stochastic: a guide is used with probability alpha instead of always.
        shape: of alpha.
        forward_flops: of the structured model, full attention.
        guide_flops: of all guides together.
        sequences_before, sequence_length: as in the run's `TrainConfig`.
    """

    ratio: float
    guided_steps: int
    repeated_steps: int
    stochastic: bool
    shape: Literal["cosine", "linear"]
    forward_flops: float
    guide_flops: float
    sequences_before: tuple[int, ...]
    sequence_length: int

    @property
    def planned_steps(self) -> int:
        """S: the steps through the token budget."""
        return len(self.sequences_before) - 1

    @property
    def steps(self) -> int:
        """All steps; learning-rate schedules span these."""
        return self.planned_steps + self.repeated_steps

    def alpha(self, step: int) -> float | None:
        """The guides' weight in a step; None once they are gone."""
        return guide_weight(step, self.guided_steps, self.shape) if step < self.guided_steps else None

    def sequences(self, step: int) -> tuple[int, int]:
        """The numbered sequences a step trains on: (first, count). A repeated step has those of its guided one."""
        at = step if step < self.planned_steps else step - self.planned_steps
        before = self.sequences_before
        return before[at], before[at + 1] - before[at]

    def tokens(self, steps: int | None = None) -> int:
        """Tokens trained on, repeats included, in the first `steps` steps; in all of them by default."""
        done = self.steps if steps is None else steps
        repeated = max(0, done - self.planned_steps)
        before = self.sequences_before
        return (before[done - repeated] + before[repeated]) * self.sequence_length

    def train_flops(self, steps: int | None = None) -> float:
        """FLOPs performed in the first `steps` steps, in all by default: 3 x forward, guides included (their mean, if drawn)."""
        done = self.steps if steps is None else steps
        guided = self.sequences_before[min(done, self.guided_steps)] * self.sequence_length
        return guided_training_flops(self.forward_flops, self.guide_flops, self.tokens(done), guided, self.stochastic)


def guidance(spec: ModelSpec, train: TrainConfig) -> Guidance | None:
    """The plan of a run whose recipe has `guide`; None for one without.

    With batch_warmup the ratio that equals FLOPs is a share of the tokens, and T_g the most steps within it.

    Raises:
        InputError: nothing to guide, equal FLOPs are impossible, or the run is too short for one guided step.
    """
    guide = train.guide
    if guide is None:
        return None
    guided = guide_flops_per_token(spec)
    if guided == 0:
        raise InputError(
            "guide: expected a model with structured feed-forwards (low_rank, block_shuffle or block_dense), "
            "this one has none; leave guide out or choose such an ffn"
        )
    before = train.sequences_before
    if guide.mode == "fixed_flops" and guide.ratio is None:
        ratio = equal_flops_ratio(spec, train.sequence_length, guide)
        steps = bisect_right(before, ratio * before[-1]) - 1
    else:
        ratio = FIXED_TOKENS_RATIO if guide.ratio is None else guide.ratio
        steps = math.floor(ratio * train.steps)
    if steps == 0:
        raise InputError(
            f"guide: a ratio of {ratio:.3g} of {train.steps} steps guides not even one; "
            "train on more tokens, use a smaller batch, or leave guide out"
        )
    return Guidance(
        ratio=ratio,
        guided_steps=steps,
        repeated_steps=steps if guide.mode == "fixed_flops" else 0,
        stochastic=guide.stochastic,
        shape=guide.shape,
        forward_flops=_forward(spec, train.sequence_length),
        guide_flops=guided,
        sequences_before=before,
        sequence_length=train.sequence_length,
    )


def equal_flops_ratio(spec: ModelSpec, sequence_length: int, guide: SelfGuided) -> float:
    """The closed form above: with it a `fixed_flops` run costs what the dense twin costs on the planned tokens.

    Raises:
        InputError: the structured model is not cheaper than its twin, or so cheap that more than all data would repeat.
    """
    structured, dense = _forward(spec, sequence_length), _forward(dense_twin(spec), sequence_length)
    share = 0.5 if guide.stochastic else 1.0
    ratio = (dense - structured) / (structured + share * guide_flops_per_token(spec))
    if ratio <= 0:
        raise InputError(
            f"guide: fixed_flops needs a model cheaper than with dense feed-forwards ({dense:.4g} forward FLOPs per token), "
            f"this one has {structured:.4g}; use a smaller rank or more blocks, or mode: fixed_tokens"
        )
    if ratio > 1:
        raise InputError(
            f"guide: equal FLOPs would take {ratio:.3g} times the planned steps as guided ones, expected at most 1; "
            "use a larger rank or fewer blocks, set ratio, or mode: fixed_tokens"
        )
    return ratio


def guide_flops_per_token(spec: ModelSpec) -> float:
    """Forward FLOPs per token of all guides: 2 x the sum of out x in over the structured linears that one token uses."""
    return float(sum(2 * _guide_weights(layer) for layer in spec.layers))


def guide_params(spec: ModelSpec) -> int:
    """Parameters of all guides: the sum of out x in over the structured linears, every expert's included."""
    return int(sum(_guide_weights(layer, stored=True) for layer in spec.layers))


def dense_twin(spec: ModelSpec) -> ModelSpec:
    """The same model with dense feed-forwards of the same sizes."""
    return spec.replace(layers=tuple(layer.replace(ffn=_dense(layer.ffn)) for layer in spec.layers))


def guide_weight(step: int, guided_steps: int, shape: Literal["cosine", "linear"] = "cosine") -> float:
    """alpha at 0-based `step`: from 1 down to 0 at `guided_steps`, 0 from there on."""
    if step >= guided_steps:
        return 0.0
    done = step / guided_steps
    return 0.5 * (1 + math.cos(math.pi * done)) if shape == "cosine" else 1 - done


def guided_training_flops(forward: float, guide: float, steps: int, guided_steps: int, stochastic: bool) -> float:
    """Training FLOPs, 3 x forward, with guides during the first steps: all of them, or half of them when stochastic.

    Half is the mean of alpha over steps of equal batches (short of half a step).

    Args:
        forward: forward FLOPs of one step without guides.
        guide: forward FLOPs of one step of all guides: 2 x tokens x sum of out x in.
        steps: all optimizer steps, repeated ones included; or all tokens, with FLOPs per token.
        guided_steps: steps, or tokens, of the guided phase.
        stochastic: the guide is used with probability alpha, whose mean is 1/2.
    """
    return 3 * (forward * steps + guide * guided_steps * (0.5 if stochastic else 1.0))


def _forward(spec: ModelSpec, sequence_length: int) -> float:
    return float(flops_per_token(rows(spec), sequence_length)["forward"])


def _dense(ffn: FFN) -> FFN:
    """The feed-forward with every structured part made dense."""
    if isinstance(ffn, MoEFFN):
        shared = None if ffn.shared_expert is None else _dense(ffn.shared_expert)
        return ffn.replace(expert=_dense(ffn.expert), shared_expert=shared)
    keys: dict[str, Any] = {name: getattr(ffn, name) for name in DenseFFN.model_fields}
    return DenseFFN(**{**keys, "kind": "dense"})


def _guide_weights(layer: LayerSpec, stored: bool = False) -> int:
    """Entries of one layer's guides: those that a token uses, or all stored ones."""

    def one(ffn: ExpertFFN | None) -> int:
        if ffn is None or isinstance(ffn, DenseFFN):
            return 0
        return int(ffn_weights(_dense(ffn), layer.hidden_size, layer.ffn_output_size))

    ffn = layer.ffn
    if not isinstance(ffn, MoEFFN):
        return one(ffn)
    return one(ffn.shared_expert) + (ffn.num_local_experts if stored else ffn.num_experts_per_tok) * one(ffn.expert)
