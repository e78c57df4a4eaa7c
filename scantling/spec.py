"""The resolved model: immutable, explicit, one entry per layer. Everything else is a function of it.

A file may use short forms (`resolve.py`); only this form is costed, built, stored, compared and hashed. Keys carry Hugging
Face's names. Impossible sizes are refused when the object is made.
"""

import hashlib
import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from scantling.yamlio import canonical_json, show


def _whole(value: object) -> object:
    """Reject what pydantic would silently read as a number: `True`, `"12"`, `1.5`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or int(value) != value:
        raise ValueError(f"expected a whole number, got {show(value)}")
    return int(value)


def _real(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, got {show(value)}")
    return value


Size = Annotated[int, BeforeValidator(_whole), Field(gt=0)]
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


# --- norms and positions -----------------------------------------------------------------------------------------------


class RMSNorm(Frozen):
    """x / sqrt(mean(x^2) + eps) * gain."""

    kind: Literal["rms_norm"]
    eps: Positive = 1e-6


Norm = RMSNorm


class Rope(Frozen):
    """Rotary positions over the whole head, rotate-half pairing, frequencies rope_theta^(-2i/head_dim)."""

    kind: Literal["rope"]
    rope_theta: Positive = 10000.0


class NoPosition(Frozen):
    """No position information in this layer's attention."""

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
    """Top-k routed experts, each an FFN of any other kind; router without bias, softmax over the selected experts."""

    kind: Literal["moe"]
    num_local_experts: Size
    num_experts_per_tok: Size
    expert: ExpertFFN

    @field_validator("num_experts_per_tok")
    @classmethod
    def _at_most_all(cls, chosen: int, info: ValidationInfo) -> int:
        experts = info.data.get("num_local_experts")
        if experts is not None and chosen > experts:
            raise ValueError(f"expected at most num_local_experts = {experts}, got {chosen}")
        return chosen


FFN = Annotated[DenseFFN | LowRankFFN | BlockShuffleFFN | BlockDenseFFN | MoEFFN, Field(discriminator="kind")]


# --- the change of width between layers --------------------------------------------------------------------------------


class CarryForward(Frozen):
    """Narrower: keep the first coordinates. Wider: each new coordinate comes from the latest state that had it, else 0.

    Equivalently one stream as wide as the widest layer, of which each layer reads and overwrites its first `hidden_size`
    coordinates (arXiv 2606.18246, section 2).
    """

    kind: Literal["carry_forward"]


class Zero(Frozen):
    """Narrower: keep the first coordinates. Wider: pad with zeros; the unembedding carries forward (arXiv 2606.18246)."""

    kind: Literal["zero"]


Transition = Annotated[CarryForward | Zero, Field(discriminator="kind")]


# --- layers and models -------------------------------------------------------------------------------------------------


class LayerSpec(Frozen):
    """One decoder layer: attention then feed-forward, each behind its norm, on a residual stream `hidden_size` wide."""

    hidden_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    v_head_dim: Size
    attention_bias: bool = False
    attention_multiplier: Positive | None = None
    position: Position = Field(default=Rope(kind="rope"), validate_default=True)
    norm: Norm = RMSNorm(kind="rms_norm")
    ffn: FFN

    @field_validator("num_key_value_heads")
    @classmethod
    def _heads_share(cls, kv_heads: int, info: ValidationInfo) -> int:
        heads = info.data.get("num_attention_heads")
        if heads is not None and heads % kv_heads:
            raise ValueError(
                f"{heads} query heads cannot share {kv_heads} key/value heads; expected a divisor of {heads}"
            )
        return kv_heads

    @field_validator("position")
    @classmethod
    def _rope_needs_pairs(cls, position: Rope | NoPosition, info: ValidationInfo) -> Rope | NoPosition:
        head_dim = info.data.get("head_dim")
        if isinstance(position, Rope) and head_dim is not None and head_dim % 2:
            raise ValueError(
                f"rotary positions need an even head_dim, got {head_dim}; choose widths in multiples of 2 x heads"
            )
        return position

    @field_validator("ffn")
    @classmethod
    def _blocks_divide(cls, ffn: FFN, info: ValidationInfo) -> FFN:
        width = info.data.get("hidden_size")
        inner = ffn.expert if isinstance(ffn, MoEFFN) else ffn
        if width is not None and isinstance(inner, BlockShuffleFFN | BlockDenseFFN):
            for name, size in (("hidden_size", width), ("intermediate_size", inner.intermediate_size)):
                if size % inner.num_blocks:
                    raise ValueError(f"num_blocks {inner.num_blocks} must divide {name} {size}")
        return ffn

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by: `attention_multiplier`, or 1/sqrt(head_dim)."""
        return self.attention_multiplier if self.attention_multiplier is not None else float(self.head_dim) ** -0.5


class ModelSpec(Frozen):
    """A decoder-only language model, resolved: `layers` is the whole truth about its depth and widths."""

    vocab_size: Size
    max_position_embeddings: Size = 2048
    embedding_size: Size
    unembedding_size: Size
    tie_word_embeddings: bool = False
    transition: Transition | None = None
    final_norm: Norm = RMSNorm(kind="rms_norm")
    layers: tuple[LayerSpec, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _widths_connect(self) -> Self:
        if self.tie_word_embeddings and self.embedding_size != self.unembedding_size:
            raise ValueError(
                f"tied embeddings need one width, got embedding_size {self.embedding_size} and "
                f"unembedding_size {self.unembedding_size}; set tie_word_embeddings: false"
            )
        widths = (self.embedding_size, *(layer.hidden_size for layer in self.layers), self.unembedding_size)
        if self.transition is None and len(set(widths)) > 1:
            at = next(i for i in range(1, len(widths)) if widths[i] != widths[i - 1])
            where = f"layers[{at - 1}]" if at <= len(self.layers) else "the unembedding"
            raise ValueError(
                f"the width changes from {widths[at - 1]} to {widths[at]} at {where}; "
                "say how, for example transition: carry_forward"
            )
        return self

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(layer.hidden_size for layer in self.layers)

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON. Defaults are left out, so a field added later changes no old identity."""
        return hashlib.sha256(canonical_json(self.dump()).encode()).hexdigest()

    def dump(self) -> dict[str, Any]:
        """Plain data of the resolved form, defaults left out; `ModelSpec.model_validate` reads it back."""
        return self.model_dump(mode="json", exclude_defaults=True)
