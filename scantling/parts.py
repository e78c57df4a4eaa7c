"""The parts a layer or a model is made of: closed unions of small frozen classes, each told apart by its `kind`.

To add a kind: its class here, its rows in `costing.py`, its module in `model/`, a line in `tests/strategies.py`.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from scantling.yamlio import show


def _whole(value: object) -> object:
    """Reject what pydantic would silently read as a number: `True`, `"12"`, `1.5`."""
    wrong = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong or not math.isfinite(value) or int(value) != value:  # type: ignore[arg-type, call-overload]
        raise ValueError(f"expected a whole number, got {show(value)}")
    return int(value)  # type: ignore[call-overload]


def _real(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, got {show(value)}")
    return value


Size = Annotated[int, BeforeValidator(_whole), Field(gt=0)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Real = Annotated[float, BeforeValidator(_real), Field(allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(_real), Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, BeforeValidator(_real), Field(ge=0, le=1)]
Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"]


class Frozen(BaseModel):
    """Base of every configuration object: immutable, unknown keys are errors, changed only by rebuilding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again (pydantic's `model_copy` does not validate)."""
        return type(self).model_validate({**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


# --- norms -------------------------------------------------------------------------------------------------------------


class RMSNorm(Frozen):
    """x / sqrt(mean(x^2) + eps) * gain; the mean is over the first `statistic_size` coordinates, None is all."""

    kind: Literal["rms_norm"]
    eps: Positive = 1e-6
    statistic_size: Size | None = None


class LayerNorm(Frozen):
    """(x - mean) / sqrt(var + eps) * gain (+ shift); mean and var are over the first `statistic_size` coordinates."""

    kind: Literal["layer_norm"]
    eps: Positive = 1e-5
    bias: bool = True
    statistic_size: Size | None = None


Norm = Annotated[RMSNorm | LayerNorm, Field(discriminator="kind")]


class QKNorm(Frozen):
    """RMSNorm of queries and keys before rotation, over each head (Qwen3) or over all heads at once (OLMo 2).

    Attributes:
        statistic_size: the mean is over the first so many coordinates of each head; None is all. Only with over: head.
    """

    over: Literal["head", "all"] = "head"
    eps: Positive = 1e-6
    statistic_size: Size | None = None

    @field_validator("statistic_size")
    @classmethod
    def _of_a_head(cls, size: int | None, info: ValidationInfo) -> int | None:
        if size is not None and info.data.get("over") == "all":
            raise ValueError("statistic_size goes with over: head")
        return size


# --- positions ---------------------------------------------------------------------------------------------------------


class LinearScaling(Frozen):
    """Positions divided by `factor`."""

    kind: Literal["linear"]
    factor: Positive


class NTKScaling(Frozen):
    """theta scaled to theta x factor^(d/(d-2)): NTK-aware interpolation at a fixed factor."""

    kind: Literal["ntk"]
    factor: Positive


class YarnScaling(Frozen):
    """YaRN (arXiv 2309.00071): low frequencies interpolated, high ones kept, a ramp between, cos and sin x 0.1 ln(factor) + 1."""

    kind: Literal["yarn"]
    factor: Positive
    original_max_position_embeddings: Size
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Positive | None = None


class Llama3Scaling(Frozen):
    """Llama 3.1: wavelengths beyond the original context divided by `factor`, a smooth ramp between two bounds."""

    kind: Literal["llama3"]
    factor: Positive
    original_max_position_embeddings: Size
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0


RopeScaling = Annotated[LinearScaling | NTKScaling | YarnScaling | Llama3Scaling, Field(discriminator="kind")]


class Rope(Frozen):
    """Rotary positions, rotate-half pairing, frequencies rope_theta^(-2i/d) over the first partial_rotary_factor of a head.

    Attributes:
        frequency_size: d in rope_theta^(-2i/d); None is the number of rotated dimensions. A head that grew keeps the d it
            had, so that its old pairs keep their frequencies.
    """

    kind: Literal["rope"]
    rope_theta: Positive = 10000.0
    partial_rotary_factor: Fraction = 1.0
    scaling: RopeScaling | None = None
    frequency_size: Size | None = None

    def rotated(self, head_dim: int) -> int:
        """Dimensions of a head that rotate."""
        return int(head_dim * self.partial_rotary_factor + 1e-6)  # 2/3 of 96 is 64


class NoPosition(Frozen):
    """No position information in this layer's attention (positions may still enter at the embedding)."""

    kind: Literal["none"]


Position = Annotated[Rope | NoPosition, Field(discriminator="kind")]


# --- feed-forward ------------------------------------------------------------------------------------------------------


class DenseFFN(Frozen):
    """down(act(gate(x)) * up(x)) when gated, else down(act(up(x)))."""

    kind: Literal["dense"]
    gated: bool = True
    hidden_act: Activation = "silu"
    intermediate_size: Size
    bias: bool = False


class LowRankFFN(Frozen):
    """Every linear W is U V with V: rank x in, U: out x rank; gate and up share V (arXiv 2406.16450, 2.1)."""

    kind: Literal["low_rank"]
    gated: bool = True
    hidden_act: Activation = "silu"
    intermediate_size: Size
    bias: bool = False
    rank: Size


class BlockShuffleFFN(Frozen):
    """Two block-diagonal factors with a shuffle between them (Monarch; arXiv 2406.16450, 2.1)."""

    kind: Literal["block_shuffle"]
    gated: bool = True
    hidden_act: Activation = "silu"
    intermediate_size: Size
    bias: bool = False
    num_blocks: Size


class BlockDenseFFN(Frozen):
    """A block-diagonal factor into `rank`, then a dense one out of it (arXiv 2406.16450, 2.1)."""

    kind: Literal["block_dense"]
    gated: bool = True
    hidden_act: Activation = "silu"
    intermediate_size: Size
    bias: bool = False
    rank: Size
    num_blocks: Size

    @field_validator("num_blocks")
    @classmethod
    def _blocks_divide_rank(cls, blocks: int, info: ValidationInfo) -> int:
        rank = info.data.get("rank")
        if rank is not None and rank % blocks:
            raise ValueError(f"expected a divisor of rank {rank}, got {blocks}")
        return blocks


ExpertFFN = Annotated[DenseFFN | LowRankFFN | BlockShuffleFFN | BlockDenseFFN, Field(discriminator="kind")]


class MoEFFN(Frozen):
    """Top-k routed experts, each an FFN of any other kind, and optionally one shared expert that every token uses.

    Attributes:
        router_softmax: over the chosen k logits (`after`: Mixtral, the ><former) or over all before choosing (`before`).
        norm_topk_prob: with `before`, divide the chosen weights by their sum.
        shared_expert: added to the routed sum for every token, without a gate.
        router_aux_loss_coef: weight of the load-balance loss, experts x sum_e p_e f_e, per layer (training only).
        router_z_loss_coef: weight of mean(logsumexp(logits)^2) inside the auxiliary loss.
    """

    kind: Literal["moe"]
    num_local_experts: Size
    num_experts_per_tok: Size
    expert: ExpertFFN
    shared_expert: ExpertFFN | None = None
    router_softmax: Literal["after", "before"] = "after"
    norm_topk_prob: bool = True
    router_aux_loss_coef: Real = Field(default=0.01, ge=0)
    router_z_loss_coef: Real = Field(default=0.0, ge=0)

    @field_validator("num_experts_per_tok")
    @classmethod
    def _at_most_all(cls, chosen: int, info: ValidationInfo) -> int:
        experts = info.data.get("num_local_experts")
        if experts is not None and chosen > experts:
            raise ValueError(f"expected at most num_local_experts = {experts}, got {chosen}")
        return chosen


FFN = Annotated[DenseFFN | LowRankFFN | BlockShuffleFFN | BlockDenseFFN | MoEFFN, Field(discriminator="kind")]


# --- the change of width between layers (arXiv 2606.18246, section 2; compress: arXiv 2404.14462) ------------------------


class CarryForward(Frozen):
    """Narrower: keep the first coordinates. Wider: each new coordinate comes from the latest state that had it, else 0.

    Equivalently one stream as wide as the widest layer, of which each layer reads and overwrites its first `hidden_size`
    coordinates.
    """

    kind: Literal["carry_forward"]


class Zero(Frozen):
    """Wider: pad with zeros; the unembedding carries forward."""

    kind: Literal["zero"]


class Gated(Frozen):
    """Wider: g (W m + b) + (1 - g) m with m the carried coordinates and g = sigmoid(V m + c); b and c with `bias`."""

    kind: Literal["gated"]
    bias: bool = False


class Linear(Frozen):
    """Wider: W x (+ b) replaces the vector; with sinkhorn_iters, exp(W) is first balanced that often."""

    kind: Literal["linear"]
    bias: bool = False
    sinkhorn_iters: Count = 0


class LinearDiff(Frozen):
    """Wider: W x (+ b) predicts only the missing coordinates."""

    kind: Literal["linear_diff"]
    bias: bool = False
    sinkhorn_iters: Count = 0


class TransposedConv(Frozen):
    """Wider: a one-channel transposed convolution along the features, kernel d - current + 1, replaces the vector."""

    kind: Literal["transposed_conv"]


class ConvDiff(Frozen):
    """Wider: a one-channel convolution along the features, kernel 2 current - d + 1, predicts the missing coordinates."""

    kind: Literal["conv_diff"]


class Interpolate(Frozen):
    """Wider: linear interpolation of the feature axis."""

    kind: Literal["interpolate"]
    align_corners: bool = False


class Gaussian(Frozen):
    """Wider: append fresh normal noise with each token's own mean and standard deviation."""

    kind: Literal["gaussian"]


class Compress(Frozen):
    """Every change of width, up or down, is a learned map with bias; the final norm follows the last one.

    As a kernel-1 convolution (cc-gpt) or a dense layer (lc-gpt): the same function.
    """

    kind: Literal["compress"]
    bias: bool = True


Transition = Annotated[
    CarryForward | Zero | Gated | Linear | LinearDiff | TransposedConv | ConvDiff | Interpolate | Gaussian | Compress,
    Field(discriminator="kind"),
]


# --- parallel stacks (arXiv 2404.14462) ----------------------------------------------------------------------------------


class Branches(Frozen):
    """The layers as `count` equal stacks side by side, which read the same embedding and are mixed by learned weights.

    Attributes:
        entry: how a stack gets its input: its own part of the embedding (`split`: the table is `count` times as wide), its
            own dense map of it (`projection`), or all of it (`shared`).
        mixing: `raw` (two stacks: w and 1 - w, w learned and unbounded), `sigmoid` (the same with sigmoid(w)), or `softmax`
            over `count` learned logits.
        single_branch: how a single stack is used at inference: `normed` (its output through the final norm, no
            multiplier), `scaled` (multiplied by its weight, as family a), or `bare` (no norm, as released in family b).
    """

    count: Size
    entry: Literal["projection", "split", "shared"] = "projection"
    mixing: Literal["softmax", "sigmoid", "raw"] = "softmax"
    single_branch: Literal["normed", "scaled", "bare"] = "normed"

    @field_validator("mixing")
    @classmethod
    def _two_for_a_scalar(cls, mixing: str, info: ValidationInfo) -> str:
        if mixing != "softmax" and info.data.get("count", 2) != 2:
            raise ValueError(f"{mixing} mixes two branches by one scalar; for {info.data['count']} use softmax")
        return mixing


# --- initial weights -----------------------------------------------------------------------------------------------------


class FanInInit(Frozen):
    """Matrices N(0, 1/fan_in), writers into the stream also / sqrt(2 layers), embeddings N(0, 1/width)."""

    kind: Literal["fan_in"]


class NormalInit(Frozen):
    """Every matrix and table N(0, std^2); with `depth_scaled`, writers into the stream also / sqrt(2 layers)."""

    kind: Literal["normal"]
    std: Positive = 0.02
    depth_scaled: bool = False


class MuPInit(Frozen):
    """The ><former's: tables N(0, std^2); matrices std sqrt(h/d_l)/sqrt(m_width), writers also / sqrt(2 layers).

    d_l is the layer's width for matrices that read the stream, heads x v_head_dim for those that write it (the same, but
    where a stream of fixed width has layers of varying inner width). h is base_width, by default the embedding's width.
    `variable` false drops the sqrt(h/d_l) (arXiv 2606.18246, section 4).
    """

    kind: Literal["mup"]
    std: Positive = 0.1
    m_width: Positive = 8.0
    variable: bool = True
    base_width: Size | None = None


Init = Annotated[FanInInit | NormalInit | MuPInit, Field(discriminator="kind")]
