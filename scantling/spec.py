"""The resolved model: immutable, explicit, one entry per layer. Everything else is a function of it.

A file may use short forms (`resolve.py`); only this form is costed, built, stored, compared and hashed. Keys carry Hugging
Face's names. Impossible sizes are refused when the object is made.
"""

import hashlib
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from scantling.parts import (
    FFN,
    BlockDenseFFN,
    BlockShuffleFFN,
    Branches,
    Compress,
    ConvDiff,
    Count,
    FanInInit,
    Frozen,
    Init,
    MoEFFN,
    NoPosition,
    Norm,
    NTKScaling,
    Position,
    Positive,
    QKNorm,
    RMSNorm,
    Rope,
    Size,
    Transition,
)
from scantling.yamlio import canonical_json

NormPlacement = Literal["pre", "post_residual", "post_branch", "sandwich"]


class LayerSpec(Frozen):
    """One decoder layer: attention and feed-forward on a residual stream `hidden_size` wide.

    Attributes:
        head_to_group: the key/value head that each query head reads; None is j // (heads / kv_heads) for head j.
        attention_bias: biases of q, k and v; of o too unless attention_out_bias says otherwise.
        attention_multiplier: what scores are multiplied by; None is 1/sqrt(head_dim).
        attn_logit_softcapping: scores become c tanh(scores / c).
        sliding_window: positions a token attends to, itself included; None is all.
        norm_placement: `pre` x + f(norm(x)); `post_residual` norm(x + f(x)); `post_branch` x + norm(f(x)); `sandwich`
            x + norm(f(norm(x))).
        use_parallel_residual: attention and feed-forward both read the layer's input, each behind its own norm.
        residual_multiplier: what each sub-layer's output is multiplied by before it joins the stream.
        attention_input_size: q, k and v read only the first so many coordinates; None is all. Exact in a first layer wider
            than the embedding, whose other coordinates are zero.
        ffn_output_size: the feed-forward writes only the first so many coordinates; None is all.
    """

    hidden_size: Size
    num_attention_heads: Size
    head_to_group: tuple[Count, ...] | None = None
    num_key_value_heads: Size
    head_dim: Size
    v_head_dim: Size
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    attention_multiplier: Positive | None = None
    attn_logit_softcapping: Positive | None = None
    sliding_window: Size | None = None
    qk_norm: QKNorm | None = None
    position: Position = Field(default=Rope(kind="rope"), validate_default=True)
    norm: Norm = RMSNorm(kind="rms_norm")
    norm_placement: NormPlacement = "pre"
    use_parallel_residual: bool = False
    residual_multiplier: Positive = 1.0
    attention_input_size: Size | None = None
    ffn_output_size: Size | None = None
    ffn: FFN

    @field_validator("num_key_value_heads")
    @classmethod
    def _heads_share(cls, kv_heads: int, info: ValidationInfo) -> int:
        heads, groups = info.data.get("num_attention_heads"), info.data.get("head_to_group")
        if groups is not None:
            if heads is not None and len(groups) != heads:
                raise ValueError(f"head_to_group needs one entry per query head, expected {heads}, got {len(groups)}")
            if max(groups) >= kv_heads:
                raise ValueError(
                    f"head_to_group names key/value head {max(groups)}, expected 0 to {kv_heads - 1} (num_key_value_heads)"
                )
        elif heads is not None and heads % kv_heads:
            raise ValueError(
                f"{heads} query heads cannot share {kv_heads} key/value heads; expected a divisor of {heads}"
            )
        return kv_heads

    @field_validator("position")
    @classmethod
    def _rope_needs_pairs(cls, position: Rope | NoPosition, info: ValidationInfo) -> Rope | NoPosition:
        head_dim = info.data.get("head_dim")
        if isinstance(position, Rope) and head_dim is not None:
            rotated = position.rotated(head_dim)
            if rotated % 2 or rotated == 0:
                what = (
                    f"head_dim, got {head_dim}"
                    if rotated == head_dim
                    else f"number of rotated dimensions, got {rotated}"
                )
                raise ValueError(f"rotary positions need an even {what}; choose widths in multiples of 2 x heads")
            if rotated == 2 and isinstance(position.scaling, NTKScaling):
                raise ValueError("ntk scaling needs at least 4 rotated dimensions, got 2")
        return position

    @field_validator("use_parallel_residual")
    @classmethod
    def _parallel_is_pre_norm(cls, parallel: bool, info: ValidationInfo) -> bool:
        if parallel and info.data.get("norm_placement", "pre") != "pre":
            raise ValueError("use_parallel_residual goes with norm_placement: pre")
        return parallel

    @field_validator("qk_norm", "norm")
    @classmethod
    def _statistic_within(cls, norm: Norm | QKNorm | None, info: ValidationInfo) -> Norm | QKNorm | None:
        key = "head_dim" if isinstance(norm, QKNorm) else "hidden_size"
        most, size = info.data.get(key), norm.statistic_size if norm is not None else None
        if size is not None and most is not None and size > most:
            raise ValueError(f"expected statistic_size of at most {key} {most}, got {size}")
        return norm

    @field_validator("attention_input_size", "ffn_output_size")
    @classmethod
    def _within_the_stream(cls, size: int | None, info: ValidationInfo) -> int | None:
        width = info.data.get("hidden_size")
        if size is not None and width is not None and size > width:
            raise ValueError(f"expected at most hidden_size {width}, got {size}")
        if (
            size is not None
            and info.data.get("norm_placement", "pre") != "pre"
            and info.field_name == "ffn_output_size"
        ):
            raise ValueError("ffn_output_size goes with norm_placement: pre")
        return size

    @field_validator("ffn")
    @classmethod
    def _blocks_divide(cls, ffn: FFN, info: ValidationInfo) -> FFN:
        width = info.data.get("hidden_size")
        inners = [ffn.expert, ffn.shared_expert] if isinstance(ffn, MoEFFN) else [ffn]
        for inner in inners:
            if width is None or not isinstance(inner, BlockShuffleFFN | BlockDenseFFN):
                continue
            into = inner.intermediate_size * (2 if inner.gated else 1)
            sizes = [("hidden_size", width), ("intermediate_size", inner.intermediate_size)]
            if isinstance(inner, BlockShuffleFFN) and info.data.get("ffn_output_size"):
                sizes.append(("ffn_output_size", info.data["ffn_output_size"]))
            if isinstance(inner, BlockShuffleFFN) and inner.gated:
                sizes.append(("2 x intermediate_size", into))
            for name, size in sizes:
                if size % inner.num_blocks:
                    raise ValueError(f"num_blocks {inner.num_blocks} must divide {name} {size}")
        return ffn

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by: `attention_multiplier`, or 1/sqrt(head_dim)."""
        return self.attention_multiplier if self.attention_multiplier is not None else float(self.head_dim) ** -0.5

    @property
    def groups(self) -> tuple[int, ...]:
        """The key/value head that each query head reads."""
        if self.head_to_group is not None:
            return self.head_to_group
        return tuple(
            head * self.num_key_value_heads // self.num_attention_heads for head in range(self.num_attention_heads)
        )

    @property
    def out_bias(self) -> bool:
        """Whether the output projection has a bias."""
        return self.attention_bias if self.attention_out_bias is None else self.attention_out_bias


class ModelSpec(Frozen):
    """A decoder-only language model, resolved: `layers` is the whole truth about its depth and widths.

    Attributes:
        embedding_size, unembedding_size: widths of the input table and of the output head.
        learned_positions: a learned table of max_position_embeddings positions is added to the embedding.
        embedding_multiplier: what embeddings are multiplied by; logits_scaling: what logits are divided by;
            final_logit_softcapping: then c tanh(logits / c).
        final_norm: before the head; None for none.
        lm_head_bias: a bias per vocabulary entry.
        branches: the layers are equal stacks side by side, in their order, mixed before the final norm.
        initialization: how weights are drawn.
    """

    vocab_size: Size
    max_position_embeddings: Size = 2048
    embedding_size: Size
    unembedding_size: Size
    tie_word_embeddings: bool = False
    learned_positions: bool = False
    embedding_multiplier: Positive = 1.0
    logits_scaling: Positive = 1.0
    final_logit_softcapping: Positive | None = None
    lm_head_bias: bool = False
    transition: Transition | None = None
    final_norm: Norm | None = RMSNorm(kind="rms_norm")
    branches: Branches | None = None
    initialization: Init = FanInInit(kind="fan_in")
    layers: tuple[LayerSpec, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _widths_connect(self) -> Self:
        if self.tie_word_embeddings and self.embedding_size != self.unembedding_size:
            raise ValueError(
                f"tied embeddings need one width, got embedding_size {self.embedding_size} and "
                f"unembedding_size {self.unembedding_size}; set tie_word_embeddings: false"
            )
        if self.branches is not None:
            self._check_branches(self.branches)
        if self.final_norm is not None and (self.final_norm.statistic_size or 0) > self.norm_width:
            raise ValueError(
                f"final_norm: expected statistic_size of at most {self.norm_width}, got {self.final_norm.statistic_size}"
            )
        widths = self.stream_widths
        changes = [at for at in range(1, len(widths)) if widths[at] != widths[at - 1]]
        places = {at: f"layers[{at - 1}]" if at < len(widths) - 1 else "the unembedding" for at in changes}
        if self.transition is None and changes:
            at = changes[0]
            raise ValueError(
                f"the width changes from {widths[at - 1]} to {widths[at]} at {places[at]}; "
                "say how, for example transition: carry_forward"
            )
        if isinstance(self.transition, ConvDiff):
            for at in changes:
                if widths[at] > 2 * widths[at - 1]:
                    raise ValueError(
                        f"conv_diff can at most double the width, got {widths[at - 1]} to {widths[at]} at {places[at]}"
                    )
        return self

    def _check_branches(self, branches: Branches) -> None:
        if len(self.layers) % branches.count:
            depth = len(self.layers) // branches.count
            raise ValueError(
                f"{len(self.layers)} layers do not divide into {branches.count} branches; "
                f"use {depth * branches.count} or {(depth + 1) * branches.count}"
            )
        stacks = self.stacks
        if any(stack != stacks[0] for stack in stacks[1:]):
            raise ValueError("the branches must be equal stacks of layers; layer i of each must have the same sizes")
        if branches.entry == "split" and self.embedding_size % branches.count:
            raise ValueError(f"an embedding of {self.embedding_size} does not split into {branches.count} branches")

    @property
    def stacks(self) -> tuple[tuple[LayerSpec, ...], ...]:
        """The layers of each branch; one stack without branches."""
        count = self.branches.count if self.branches else 1
        depth = len(self.layers) // count
        return tuple(self.layers[start * depth : (start + 1) * depth] for start in range(count))

    @property
    def stream_widths(self) -> tuple[int, ...]:
        """Widths of one residual stream from its entry (after a branch's own map of the embedding) to the head."""
        widths = tuple(layer.hidden_size for layer in self.stacks[0])
        entry = self.embedding_size
        if self.branches is not None and self.branches.entry == "split":
            entry //= self.branches.count
        elif self.branches is not None and self.branches.entry == "projection":
            entry = widths[0]
        return (entry, *widths, self.unembedding_size)

    @property
    def norm_width(self) -> int:
        """Width of the final norm: the last layer's, or the unembedding's when the last map comes before it."""
        return self.unembedding_size if isinstance(self.transition, Compress) else self.layers[-1].hidden_size

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
