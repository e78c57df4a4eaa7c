"""What a model costs: exact counts per layer and component, in plain arithmetic.

Every formula below is written once and works on Python ints (a `ModelSpec`) and on NumPy arrays alike (millions of
candidate shapes: see `Stack`). Published totals are named sums over the rows. One multiply-add is 2 FLOPs; embedding
look-ups, norms, rotary and activations count 0 FLOPs, as in the literature and in torch's FlopCounterMode.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from scantling.spec import ModelSpec

Number = Any  # int, float, or a NumPy array of either; the same arithmetic serves all


@dataclass(frozen=True)
class Row:
    """One component of one layer. All counts are for the whole component.

    Attributes:
        layer: 0-based layer, or None for embeddings, final norm and head.
        component: `embedding`, `attention`, `ffn`, `norm`, `transition` or `head`.
        params: stored parameters.
        active_params: parameters that one token uses (differs from `params` for experts).
        matmul_flops: forward FLOPs per token of the weight matrices.
        score_flops: forward FLOPs per token and per attended position (scores and values).
        kv_elements: cached values per token.
    """

    layer: int | None
    component: str
    params: Number = 0
    active_params: Number = 0
    matmul_flops: Number = 0
    score_flops: Number = 0
    kv_elements: Number = 0


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
            return _smaller(width_in, width_out) * (width_in + width_out) // ffn.num_blocks
        case "block_dense":
            return ffn.rank * (width_out + width_in // ffn.num_blocks)
    raise AssertionError(f"no cost for ffn kind {ffn.kind!r}")


def _smaller(a: Number, b: Number) -> Number:
    return (a + b - abs(a - b)) // 2


def ffn_weights(ffn: Any, width: Number) -> Number:
    """Matrix weights of one (expert's) feed-forward. A gated structured FFN shares its first factor: one linear to 2 f."""
    inner = ffn.intermediate_size
    into = inner * (2 if ffn.gated else 1)
    return linear_params(ffn, width, into) + linear_params(ffn, inner, width)


def ffn_biases(ffn: Any, width: Number) -> Number:
    """Bias entries of one feed-forward: every output of its linears."""
    return (ffn.intermediate_size * (2 if ffn.gated else 1) + width) if ffn.bias else 0


def attention_weights(layer: Any) -> Number:
    """Matrix weights of q, k, v, o with free head sizes: d (n_h + n_kv) d_k + d (n_kv + n_h) d_v."""
    heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
    return layer.hidden_size * (heads + kv_heads) * (layer.head_dim + layer.v_head_dim)


def attention_biases(layer: Any) -> Number:
    """Bias entries of q, k, v, o."""
    if not layer.attention_bias:
        return 0
    heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
    return (heads + kv_heads) * layer.head_dim + kv_heads * layer.v_head_dim + layer.hidden_size


def layer_rows(layer: Any, index: int | None) -> list[Row]:
    """The rows of one decoder layer."""
    weights = attention_weights(layer)
    attention_params = weights + attention_biases(layer)
    attention = Row(
        index,
        "attention",
        params=attention_params,
        active_params=attention_params,
        matmul_flops=2 * weights,
        score_flops=2 * layer.num_attention_heads * (layer.head_dim + layer.v_head_dim),
        kv_elements=layer.num_key_value_heads * (layer.head_dim + layer.v_head_dim),
    )
    gains = 2 * layer.hidden_size
    return [attention, _ffn_row(layer, index), Row(index, "norm", params=gains, active_params=gains)]


def _ffn_row(layer: Any, index: int | None) -> Row:
    ffn, width = layer.ffn, layer.hidden_size
    if ffn.kind != "moe":
        weights = ffn_weights(ffn, width)
        params = weights + ffn_biases(ffn, width)
        return Row(index, "ffn", params=params, active_params=params, matmul_flops=2 * weights)
    router = width * ffn.num_local_experts
    weights = ffn_weights(ffn.expert, width)
    one = weights + ffn_biases(ffn.expert, width)
    return Row(
        index,
        "ffn",
        params=router + ffn.num_local_experts * one,
        active_params=router + ffn.num_experts_per_tok * one,
        matmul_flops=2 * (router + ffn.num_experts_per_tok * weights),
    )


def rows(model: Layered) -> list[Row]:
    """Every row of a model, bottom to top: embedding, layers, final norm, head."""
    table = model.vocab_size * model.embedding_size
    head = model.vocab_size * model.unembedding_size
    final = model.layers[-1].hidden_size
    result = [Row(None, "embedding", params=table, active_params=table)]
    for index, layer in enumerate(model.layers):
        repeat = getattr(layer, "repeat", 1)
        result += [_scaled(row, repeat) for row in layer_rows(layer, index)]
    result.append(Row(None, "norm", params=final, active_params=final))
    stored = head * (1 - model.tie_word_embeddings)
    result.append(Row(None, "head", params=stored, active_params=stored, matmul_flops=2 * head))
    return result


def _scaled(row: Row, repeat: Number) -> Row:
    if isinstance(repeat, int) and repeat == 1:
        return row
    values = {field.name: getattr(row, field.name) for field in fields(Row)[2:]}
    return Row(row.layer, row.component, **{name: value * repeat for name, value in values.items()})


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
    repeat: Number = 1


# --- totals: named sums over the rows ----------------------------------------------------------------------------------


def total(table: Iterable[Row], measure: str, where: Callable[[Row], bool] | None = None) -> Number:
    """Sum of one measure over the rows that `where` keeps."""
    return sum((getattr(row, measure) for row in table if where is None or where(row)), start=0)


def half(count: Number) -> Number:
    """Half of a count of FLOPs, which is even (2 per multiply-add): exact for integers, true division for real sizes."""
    exact = isinstance(count, int) or getattr(getattr(count, "dtype", None), "kind", "f") in "iu"
    return count // 2 if exact else count / 2


def param_counts(table: Sequence[Row]) -> dict[str, Number]:
    """The parameter counts people mean, by name.

    `total` every stored weight; `embedding` input and output tables (a tied table once); `input_embedding` the input
    table; `head` the untied output table; `non_embedding` total less embedding; `matmul_non_embedding` non_embedding
    less norm gains and biases (the N of cost-optimal GQA and of 2N FLOP rules); `active` what one token uses.
    """
    everything = total(table, "params")
    table_in = total(table, "params", lambda row: row.component == "embedding")
    head = total(table, "params", lambda row: row.component == "head")
    return {
        "total": everything,
        "embedding": table_in + head,
        "non_embedding": everything - table_in - head,
        "active": total(table, "active_params"),
        "input_embedding": table_in,
        "head": head,
        "matmul_non_embedding": half(total(table, "matmul_flops", lambda row: row.component != "head")),
    }


def flops_per_token(table: Sequence[Row], context: Number) -> dict[str, Number]:
    """FLOPs per token at a context of `context` tokens (T), by named convention.

    `forward`: every token is charged T attended positions, head included (= FlopCounterMode / tokens); `forward_causal`:
    the average over a causal sequence, (T + 1)/2 positions; `train` = 3 x forward, `train_causal` = 3 x forward_causal;
    `decode`: one new token attending to T positions, head included; `prefill`: causal average, logits of the last
    position only; `chinchilla_6nd`: 6 x all parameters but the input table, no attention.
    """
    body = total(table, "matmul_flops", lambda row: row.component != "head")
    head = total(table, "matmul_flops", lambda row: row.component == "head")
    scores = total(table, "score_flops")
    causal = half(scores) * (context + 1)
    full = scores * context
    counts = param_counts(table)
    return {
        "forward": body + head + full,
        "train": 3 * (body + head + full),
        "decode": body + head + full,
        "prefill": body + causal + head / context,
        "forward_causal": body + head + causal,
        "train_causal": 3 * (body + head + causal),
        "chinchilla_6nd": 6 * (counts["total"] - counts["input_embedding"]),
    }


@dataclass(frozen=True)
class Cost:
    """The cost of one model at a context length, batch and dtype. All fields are exact; bytes are of the stated dtype."""

    rows: tuple[Row, ...]
    context: int
    batch: int
    bytes_per_value: int
    params: dict[str, int]
    flops_per_token: dict[str, float]
    kv_cache_bytes_per_token: int
    kv_cache_bytes: int
    weight_bytes: int
    decode_bytes_per_token: int

    def layers(self) -> list[dict[str, int | str | None]]:
        """One plain mapping per row, for tables and JSON."""
        return [
            {
                "layer": row.layer,
                "component": row.component,
                "params": row.params,
                "active_params": row.active_params,
                "forward_flops": row.matmul_flops + row.score_flops * self.context,
                "kv_cache_bytes_per_token": row.kv_elements * self.bytes_per_value,
                "weight_bytes": row.params * self.bytes_per_value,
            }
            for row in self.rows
        ]


def cost(spec: ModelSpec, context: int | None = None, batch: int = 1, bytes_per_value: int = 2) -> Cost:
    """Price a spec.

    Args:
        spec: the resolved model.
        context: T, the tokens that one token attends to; default `max_position_embeddings`.
        batch: sequences served together; the KV cache grows with it, the weights do not.
        bytes_per_value: bytes of one weight and one cached value (2 for bf16).

    Returns:
        Exact counts. `decode_bytes_per_token`: bytes read to decode one token of each sequence, per sequence x batch:
        the weights in use once, and the whole cache of every sequence.
    """
    length = spec.max_position_embeddings if context is None else context
    table = rows(spec)
    kv = total(table, "kv_elements") * bytes_per_value
    counts = param_counts(table)
    read = total(table, "active_params", lambda row: row.component != "embedding")
    if spec.tie_word_embeddings:
        read += spec.vocab_size * spec.unembedding_size
    return Cost(
        rows=tuple(table),
        context=length,
        batch=batch,
        bytes_per_value=bytes_per_value,
        params=counts,
        flops_per_token=flops_per_token(table, length),
        kv_cache_bytes_per_token=kv,
        kv_cache_bytes=kv * length * batch,
        weight_bytes=counts["total"] * bytes_per_value,
        decode_bytes_per_token=read * bytes_per_value + kv * length * batch,
    )


def train_flops(spec: ModelSpec, sequence_length: int, tokens: float) -> float:
    """Training FLOPs actually performed: 3 x forward with full attention at the training length (no causal halving)."""
    return float(flops_per_token(rows(spec), sequence_length)["train"]) * tokens


CONVENTIONS = {
    "flop": "one multiply-add is 2 FLOPs; norms, rotary, activations and look-ups are not counted",
    "forward": "full attention: every token is charged `context` positions; output head included",
    "forward_causal": "causal average: (context + 1)/2 positions; output head included",
    "train": "3 x forward",
    "decode": "one token attending to `context` positions; output head included",
    "prefill": "causal average; logits of the last position only",
    "chinchilla_6nd": "6 x (total - input embedding); no attention",
    "embedding": "input and output tables; a tied table counts once",
    "kv_cache_bytes": "keys and values of every layer x context x batch",
    "weight_bytes": "every stored parameter once",
}
