"""What a model costs: named sums over its rows. Every published "N" or "C" is one of them; conventions have names."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from scantling.parts import MoEFFN
from scantling.rows import Number, Row, ffn_weights, half, rows
from scantling.spec import ModelSpec


def total(table: Iterable[Row], measure: str, where: Callable[[Row], bool] | None = None) -> Number:
    """Sum of one measure over the rows that `where` keeps."""
    return sum((getattr(row, measure) for row in table if where is None or where(row)), start=0)


def param_counts(table: Sequence[Row]) -> dict[str, Number]:
    """The parameter counts people mean, by name.

    `total` every stored weight; `embedding` input, position and output tables (a tied table once); `input_embedding` the
    input table; `head` the untied output table and its bias; `non_embedding` total less embedding;
    `matmul_non_embedding` the weights one token is multiplied by, less the head (the N of cost-optimal GQA and of 2N
    FLOP rules); `active` what one token uses.
    """
    everything = total(table, "params")
    table_in = total(table, "params", lambda row: row.component == "embedding")
    positions = total(table, "params", lambda row: row.component == "positions")
    head = total(table, "params", lambda row: row.component == "head")
    return {
        "total": everything,
        "embedding": table_in + positions + head,
        "non_embedding": everything - table_in - positions - head,
        "active": total(table, "active_params"),
        "input_embedding": table_in,
        "head": head,
        "matmul_non_embedding": half(total(table, "matmul_flops", lambda row: row.component != "head")),
    }


def flops_per_token(table: Sequence[Row], context: Number) -> dict[str, Number]:
    """FLOPs per token at a context of `context` tokens (T), by named convention.

    `forward`: every token is charged T attended positions, windows not discounted, head included (= FlopCounterMode /
    tokens); `forward_causal`: the average over a causal sequence, (T + 1)/2 positions, windows discounted; `train` = 3 x
    forward, `train_causal` = 3 x forward_causal; `decode`: one new token attending to T positions or its window, head
    included; `prefill`: causal average, logits of the last
    position only; `chinchilla_6nd`: 6 x all parameters but the input table, no attention.
    """
    body = total(table, "matmul_flops", lambda row: row.component != "head")
    head = total(table, "matmul_flops", lambda row: row.component == "head")
    full = total(table, "score_flops") * context
    decode = sum((row.score_flops * row.attended(context) for row in table), start=0)
    causal = sum((_causal_scores(row, context) for row in table), start=0)
    counts = param_counts(table)
    return {
        "forward": body + head + full,
        "train": 3 * (body + head + full),
        "decode": body + head + decode,
        "prefill": body + causal + head / context,
        "forward_causal": body + head + causal,
        "train_causal": 3 * (body + head + causal),
        "chinchilla_6nd": 6 * (counts["total"] - counts["input_embedding"]),
    }


def _causal_scores(row: Row, context: Number) -> Number:
    """Score FLOPs per token averaged over a causal sequence: positions 1, 2, ... up to the window or the end."""
    if row.window is None:
        return half(row.score_flops) * (context + 1)
    reach = row.attended(context)
    return half(row.score_flops) * reach * (2 * context - reach + 1) / context


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
    cache = sum((row.kv_elements * row.attended(length) for row in table), start=0) * bytes_per_value * batch
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
        kv_cache_bytes=cache,
        weight_bytes=counts["total"] * bytes_per_value,
        decode_bytes_per_token=read * bytes_per_value + cache,
    )


def endpoint_waste(spec: ModelSpec) -> dict[str, int]:
    """What a wide first and last layer allocate and perform without use (arXiv 2606.18246; sheet 1.2, 5.2).

    The first attention reads d_1 - w_in coordinates that are always zero; the last feed-forward writes d_L - w_out that the
    head cuts off (they still count in the final norm). The authors' "matched" parameters and FLOPs leave both out.

    Returns:
        `params`, and `flops` per token (forward).
    """
    first, last = spec.layers[0], spec.layers[-1]
    reads = first.attention_input_size or first.hidden_size
    columns = max(0, reads - spec.stream_widths[0])
    heads, kv_heads = first.num_attention_heads, first.num_key_value_heads
    attention = columns * ((heads + kv_heads) * first.head_dim + kv_heads * first.v_head_dim)
    writes = last.ffn_output_size or last.hidden_size
    cut = max(0, writes - spec.unembedding_size)
    moe = last.ffn if isinstance(last.ffn, MoEFFN) else None
    ffn = moe.expert if moe else last.ffn
    stored, active = (moe.num_local_experts, moe.num_experts_per_tok) if moe else (1, 1)
    one = ffn_weights(ffn, last.hidden_size, writes) - ffn_weights(ffn, last.hidden_size, writes - cut)
    return {"params": attention + stored * one, "flops": 2 * (attention + active * one)}


def train_flops(spec: ModelSpec, sequence_length: int, tokens: float) -> float:
    """Training FLOPs actually performed: 3 x forward with full attention at the training length (no causal halving)."""
    return float(flops_per_token(rows(spec), sequence_length)["train"]) * tokens


CONVENTIONS = {
    "flop": "one multiply-add is 2 FLOPs; norms, rotary, activations and look-ups are not counted",
    "forward": "full attention: every token is charged `context` positions, windows not discounted; output head included",
    "forward_causal": "causal average: (context + 1)/2 positions; output head included",
    "train": "3 x forward",
    "decode": "one token attending to `context` positions; output head included",
    "prefill": "causal average; logits of the last position only",
    "chinchilla_6nd": "6 x (total - input embedding); no attention",
    "embedding": "input and output tables; a tied table counts once",
    "kv_cache_bytes": "keys and values of every layer x context (or its sliding window, if shorter) x batch",
    "weight_bytes": "every stored parameter once",
}
