"""What each part of a model costs: one row per layer and component, in plain arithmetic.

Every formula below is written once and works on Python ints (a `ModelSpec`) and on NumPy arrays alike (millions of
candidate shapes: see `Stack`). One multiply-add is 2 FLOPs; embedding look-ups, norms, rotary and activations count 0
FLOPs, as in the literature and in torch's FlopCounterMode.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from scantling.parts import RMSNorm

Number = Any  # int, float, or a NumPy array of either; the same arithmetic serves all


@dataclass(frozen=True)
class Row:
    """One component of one layer. All counts are for the whole component.

    Attributes:
        layer: 0-based layer, or None for embeddings, final norm and head.
        component: `embedding`, `positions`, `branches`, `transition`, `attention`, `ffn`, `norm` or `head`.
        params: stored parameters.
        active_params: parameters that one token uses (differs from `params` for experts).
        matmul_flops: forward FLOPs per token of the weight matrices.
        score_flops: forward FLOPs per token and per attended position (scores and values).
        kv_elements: cached values per token.
        window: most positions attended to and cached; None for no bound.
    """

    layer: int | None
    component: str
    params: Number = 0
    active_params: Number = 0
    matmul_flops: Number = 0
    score_flops: Number = 0
    kv_elements: Number = 0
    window: Number = None

    def attended(self, context: Number) -> Number:
        """Positions that one token attends to, and whose keys and values stay cached, at a context length."""
        return context if self.window is None else smaller(context, self.window)


PLAIN_NORM = RMSNorm(kind="rms_norm")
MEASURES = ("params", "active_params", "matmul_flops", "score_flops", "kv_elements")


class Layered(Protocol):
    """What a cost needs to know of a model: `ModelSpec` has it, and so has `Stack`."""

    @property
    def vocab_size(self) -> Any: ...
    @property
    def embedding_size(self) -> Any: ...
    @property
    def unembedding_size(self) -> Any: ...
    @property
    def tie_word_embeddings(self) -> Any: ...
    @property
    def layers(self) -> Sequence[Any]: ...
    @property
    def learned_positions(self) -> bool: ...
    @property
    def max_position_embeddings(self) -> Any: ...
    @property
    def lm_head_bias(self) -> bool: ...
    @property
    def transition(self) -> Any: ...
    @property
    def branches(self) -> Any: ...
    @property
    def final_norm(self) -> Any: ...
    @property
    def norm_width(self) -> Any: ...


# --- formulas: one home each -------------------------------------------------------------------------------------------


def linear_params(ffn: Any, width_in: Number, width_out: Number) -> Number:
    """Weights of one feed-forward linear, width_in -> width_out; equal to its multiply-adds per token.

    dense M N; low_rank R (M + N); block_shuffle K (M + N)/B with K = min(M, N); block_dense R (M + N/B)
    (arXiv 2406.16450, 2.1).
    """
    match ffn.kind:
        case "dense":
            return width_in * width_out
        case "low_rank":
            return ffn.rank * (width_in + width_out)
        case "block_shuffle":
            return smaller(width_in, width_out) * (width_in + width_out) // ffn.num_blocks
        case "block_dense":
            return ffn.rank * (width_out + width_in // ffn.num_blocks)
    raise AssertionError(f"no cost for ffn kind {ffn.kind!r}")


def smaller(a: Number, b: Number) -> Number:
    """The smaller of two numbers or arrays."""
    return half(a + b - abs(a - b))


def half(count: Number) -> Number:
    """Half of an even count: exact for integers, true division for real sizes."""
    exact = isinstance(count, int) or getattr(getattr(count, "dtype", None), "kind", "f") in "iu"
    return count // 2 if exact else count / 2


def ffn_weights(ffn: Any, width: Number, width_out: Number = None) -> Number:
    """Matrix weights of one (expert's) feed-forward. A gated structured FFN shares its first factor: one linear to 2 f."""
    inner = ffn.intermediate_size
    into = inner * (2 if ffn.gated else 1)
    return linear_params(ffn, width, into) + linear_params(ffn, inner, width if width_out is None else width_out)


def ffn_biases(ffn: Any, width_out: Number) -> Number:
    """Bias entries of one feed-forward: every output of its linears."""
    return (ffn.intermediate_size * (2 if ffn.gated else 1) + width_out) if ffn.bias else 0


def attention_weights(layer: Any) -> Number:
    """Matrix weights of q, k, v, o with free head sizes: d (n_h + n_kv) d_k + d (n_kv + n_h) d_v, when all d are read."""
    heads, kv_heads, width = layer.num_attention_heads, layer.num_key_value_heads, layer.hidden_size
    read = width if layer.attention_input_size is None else layer.attention_input_size
    return read * ((heads + kv_heads) * layer.head_dim + kv_heads * layer.v_head_dim) + heads * layer.v_head_dim * width


def attention_extras(layer: Any) -> Number:
    """Biases of q, k, v and o, and gains of the query/key norm."""
    heads, kv_heads, extra = layer.num_attention_heads, layer.num_key_value_heads, 0
    if layer.attention_bias:
        extra = (heads + kv_heads) * layer.head_dim + kv_heads * layer.v_head_dim
    if layer.out_bias:
        extra = extra + layer.hidden_size
    if layer.qk_norm is not None:
        extra = extra + (2 * layer.head_dim if layer.qk_norm.over == "head" else (heads + kv_heads) * layer.head_dim)
    return extra


def norm_params(norm: Any, width: Number) -> Number:
    """Gains, and shifts where the norm has them."""
    return width * (2 if norm.kind == "layer_norm" and norm.bias else 1)


def layer_rows(layer: Any, index: int | None) -> list[Row]:
    """The rows of one decoder layer."""
    weights = attention_weights(layer)
    attention_params = weights + attention_extras(layer)
    attention = Row(
        index,
        "attention",
        params=attention_params,
        active_params=attention_params,
        matmul_flops=2 * weights,
        score_flops=2 * layer.num_attention_heads * (layer.head_dim + layer.v_head_dim),
        kv_elements=layer.num_key_value_heads * (layer.head_dim + layer.v_head_dim),
        window=layer.sliding_window,
    )
    norms = (4 if layer.norm_placement == "sandwich" else 2) * norm_params(layer.norm, layer.hidden_size)
    return [attention, _ffn_row(layer, index), Row(index, "norm", params=norms, active_params=norms)]


def _ffn_row(layer: Any, index: int | None) -> Row:
    ffn, width = layer.ffn, layer.hidden_size
    out = width if layer.ffn_output_size is None else layer.ffn_output_size
    if ffn.kind != "moe":
        weights = ffn_weights(ffn, width, out)
        params = weights + ffn_biases(ffn, out)
        return Row(index, "ffn", params=params, active_params=params, matmul_flops=2 * weights)
    router = width * ffn.num_local_experts
    weights = ffn_weights(ffn.expert, width, out)
    one = weights + ffn_biases(ffn.expert, out)
    shared_weights = shared = 0
    if ffn.shared_expert is not None:
        shared_weights = ffn_weights(ffn.shared_expert, width, out)
        shared = shared_weights + ffn_biases(ffn.shared_expert, out)
    return Row(
        index,
        "ffn",
        params=router + shared + ffn.num_local_experts * one,
        active_params=router + shared + ffn.num_experts_per_tok * one,
        matmul_flops=2 * (router + shared_weights + ffn.num_experts_per_tok * weights),
    )


def transition_row(transition: Any, index: int | None, have: Number, width: Number) -> Row | None:
    """The learned map that a change of width needs, or None; for sizes that are known numbers.

    gated: two square maps on the d - c new coordinates; linear d c; linear_diff (d - c) c; transposed_conv
    kernel d - c + 1 over c inputs; conv_diff kernel 2 c - d + 1 over d - c outputs; compress d c at any change.
    """
    if transition is None or have == width or (width < have and transition.kind != "compress"):
        return None
    new, bias = width - have, getattr(transition, "bias", False)
    match transition.kind:
        case "gated":
            params, macs = 2 * (new * new + new * bias), 2 * new * new
        case "linear" | "compress":
            params, macs = width * have + width * bias, width * have
        case "linear_diff":
            params, macs = new * have + new * bias, new * have
        case "transposed_conv":
            params, macs = new + 1, (new + 1) * have
        case "conv_diff":
            params, macs = have - new + 1, (have - new + 1) * new
        case _:
            return None
    return Row(index, "transition", params=params, active_params=params, matmul_flops=2 * macs)


def rows(model: Layered) -> list[Row]:
    """Every row of a model, bottom to top: embedding, layers with the maps into them, final norm, head."""
    table = model.vocab_size * model.embedding_size
    head = model.vocab_size * model.unembedding_size
    result = [Row(None, "embedding", params=table, active_params=table)]
    if model.learned_positions:
        positions = model.max_position_embeddings * model.embedding_size
        result.append(Row(None, "positions", params=positions, active_params=positions))
    if model.branches is not None:
        result.append(_branch_row(model))
    for index, layer in enumerate(model.layers):
        repeat = getattr(layer, "repeat", 1)
        result += [_scaled(row, repeat) for row in layer_rows(layer, index)]
    if model.transition is not None:
        result += _transition_rows(model)
    if model.final_norm is not None:
        final = norm_params(model.final_norm, model.norm_width)
        result.append(Row(None, "norm", params=final, active_params=final))
    stored = head * (1 - model.tie_word_embeddings) + (model.vocab_size if model.lm_head_bias else 0)
    result.append(Row(None, "head", params=stored, active_params=stored, matmul_flops=2 * head))
    return result


def _branch_row(model: Any) -> Row:
    """Entry maps with biases, and the mixing weights."""
    branches, width = model.branches, model.layers[0].hidden_size
    mixing = branches.count if branches.mixing == "softmax" else 1
    maps = branches.count * model.embedding_size * width if branches.entry == "projection" else 0
    params = maps + mixing + (branches.count * width if branches.entry == "projection" else 0)
    return Row(None, "branches", params=params, active_params=params, matmul_flops=2 * maps)


def _transition_rows(model: Any) -> list[Row]:
    """Maps between layers of every stack; the one into the unembedding is shared by all stacks."""
    found, widths = [], model.stream_widths
    depth, index = len(widths) - 2, 0
    for _ in model.stacks:
        for at in range(depth):
            found.append(transition_row(model.transition, index, widths[at], widths[at + 1]))
            index += 1
    found.append(transition_row(model.transition, None, widths[-2], widths[-1]))
    return [row for row in found if row is not None]


def _scaled(row: Row, repeat: Number) -> Row:
    if isinstance(repeat, int) and repeat == 1:
        return row
    values = {name: getattr(row, name) * repeat for name in MEASURES}
    return Row(row.layer, row.component, window=row.window, **values)


@dataclass(frozen=True)
class Stack:
    """A model given by layers that each stand for `repeat` equal ones, with sizes that may be NumPy arrays.

    The planner's view of candidate shapes: the same rows, priced by the same formulas as a `ModelSpec`.
    """

    vocab_size: Number
    embedding_size: Number
    unembedding_size: Number
    tie_word_embeddings: Number
    layers: tuple[Any, ...]
    final_norm: Any = PLAIN_NORM
    learned_positions: bool = False
    max_position_embeddings: Number = 0
    lm_head_bias: bool = False
    transition: None = None
    branches: None = None

    @property
    def norm_width(self) -> Number:
        return self.layers[-1].hidden_size


@dataclass(frozen=True)
class StackFFN:
    """The feed-forward of a `StackLayer`, its size a number or an array."""

    intermediate_size: Number
    kind: str = "dense"
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True)
class StackLayer:
    """One layer of a `Stack`, standing for `repeat` equal layers."""

    hidden_size: Number
    num_attention_heads: Number
    num_key_value_heads: Number
    head_dim: Number
    v_head_dim: Number
    ffn: Any
    attention_bias: bool = False
    out_bias: bool = False
    qk_norm: Any = None
    sliding_window: Number = None
    norm: Any = PLAIN_NORM
    norm_placement: str = "pre"
    attention_input_size: Number = None
    ffn_output_size: Number = None
    repeat: Number = 1
