"""What shapes cost, in a named convention: sums over the rows of `scantling.costing`, for one spec or for arrays of shapes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scantling.costing import flops_per_token, param_counts, total
from scantling.rows import Number, Row

Convention = Literal["full", "causal", "6nd", "paper-figure-2"]
ParameterCount = Literal["total", "non_embedding", "matmul_non_embedding", "active"]

CONVENTIONS: dict[Convention, str] = {
    "full": "training 3 x forward with every token charged sequence_length positions, serving charged context positions "
    "per token, output head included; memory is every stored weight plus the KV cache",
    "causal": "as full, with the causal average of (T + 1)/2 positions per token in training and in serving",
    "6nd": "6 N D for training and 2 N per served token with the law's N, no attention; memory is every stored weight "
    "plus the KV cache",
    "paper-figure-2": "weights without embeddings, head and norms; serving 2 N + 4 T L d_h n_h per token, `flops` of T "
    "tokens each charged the full T, training charged T/2; memory in bytes (arXiv 2503.09579, figure 2)",
}


@dataclass(frozen=True)
class Priced:
    """Costs of shapes in one convention; numbers or arrays.

    Attributes:
        parameters: N in the law's count.
        training_flops_per_token: forward and backward.
        serving_flops_per_token: one token at the serving context.
        weight_bytes, kv_cache_bytes: at the serving context, batch and dtype; their sum is `memory_bytes`.
        flops: all tokens of one context, C of the combined cost Z.
    """

    parameters: Number
    training_flops_per_token: Number
    serving_flops_per_token: Number
    weight_bytes: Number = 0
    kv_cache_bytes: Number = 0
    flops: Number = 0

    @property
    def memory_bytes(self) -> Number:
        """Weights and KV cache."""
        return self.weight_bytes + self.kv_cache_bytes


@dataclass(frozen=True)
class Quote(Priced):
    """Prices together with what only some plans ask for.

    Attributes:
        served: what serving moves and how long it takes (`costs.Served`).
        size_ratio, work_ratio: against the same sizes in the evidence's baseline architecture: that one's N over this one's,
            and this one's training FLOPs per token over that one's; 1 without evidence about families.
    """

    served: Any = None
    size_ratio: Number = 1
    work_ratio: Number = 1


def price(
    table: Sequence[Row],
    convention: Convention,
    count: ParameterCount,
    *,
    sequence_length: int,
    context: int,
    shares: Mapping[int, float] | None = None,
    batch: int,
    bytes_per_value: int,
) -> Priced:
    """The costs of a model, or of arrays of shapes, from its rows: named sums only.

    Args:
        table: `costing.rows` of a spec or of `Shapes`.
        convention: how FLOPs and memory are counted, see `CONVENTIONS`.
        count: which parameters are the law's N.
        sequence_length: of training.
        context, batch, bytes_per_value: of serving; memory is at this context.
        shares: of the served tokens by context, for the mean FLOPs per served token; default all at `context`.
    """
    shares = shares or {context: 1.0}
    counts = param_counts(table)
    parameters, weights = counts[count], counts["total"]
    if convention == "paper-figure-2":
        # training: 6 D (N + 2 L Tbar d_h n_h) with Tbar = sequence_length / 2 (appendix C)
        weights, scores = counts["matmul_non_embedding"], total(table, "score_flops")
        train, serve = (
            3 * (2 * weights + scores * sequence_length / 2),
            _mean(shares, lambda length: 2 * weights + scores * length),
        )
    elif convention == "6nd":
        train, serve = 6 * parameters, 2 * parameters
    else:
        names = ("train", "decode") if convention == "full" else ("train_causal", "forward_causal")
        train = flops_per_token(table, sequence_length)[names[0]]
        serve = _mean(shares, lambda length: flops_per_token(table, length)[names[1]])
    return Priced(
        parameters=parameters,
        training_flops_per_token=train,
        serving_flops_per_token=serve,
        weight_bytes=weights * bytes_per_value,
        kv_cache_bytes=total(table, "kv_elements") * bytes_per_value * context * batch,
        flops=serve * context,
    )


def _mean(shares: Mapping[int, float], at: Callable[[int], Number]) -> Number:
    """The mean over the contexts; of a single one exactly its value."""
    if len(shares) == 1:
        return at(next(iter(shares)))
    return sum(share * at(length) for length, share in shares.items())
