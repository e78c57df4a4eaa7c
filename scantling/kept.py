"""What autograd keeps of one micro-batch for the backward pass: every tensor, by layer and component.

Each formula below counts the tensors that one kind of module in `model/` keeps, every storage once, and is checked against
torch's saved tensors. Plain arithmetic on ints and NumPy arrays alike, of a `ModelSpec` or a `Stack`.

Who keeps what, per token and layer of width d, with h query heads, g key/value heads and feed-forward size f:

- the stream: d for each norm's input and d for each sub-layer's input (4 d; sandwich 6 d; parallel 3 d);
- attention: q and k (h + g) head_dim, v g v_head_dim, the output projection's input h v_head_dim; and `block` (this
  project's kernel for a CPU) the probabilities of what each block of queries sees, about h T / 2, or `fused` the kernel's
  output h v_head_dim and one float32 statistic per head;
- feed-forward: the activation's input and output, the other factor, and the product that `down` reads (4 f gated, 2 f not).

Under bfloat16 autocast:

- the residual stream and norms are float32; every sub-layer keeps a bfloat16 copy of its input;
- everything between two matrix products is bfloat16, but for queries and keys inside their norms and block shuffles with a
  bias, which are float32.

Agreement with torch's saved tensors on a CPU, in float32 and under autocast: to the byte for every kind of layer; up to 4 %
for the rarest combinations (views shared between branches, block shuffles that need no copy). Too low where the fused kernel
gets a `v_head_dim` other than `head_dim`, and so keeps probabilities after all. Off by up to 8 % under autocast where layers of
different widths meet.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

from scantling.rows import Layered, Number, half, smaller

Attention = Literal["fused", "block"]
Kernel = Literal["fused", "plain"]
Logits = Literal["kept", "chunked"]

STATISTIC_BYTES = 4  # means, deviations, log-sum-exps and log-probabilities are float32 whatever the activations are
QUERY_BLOCK = 64  # queries of `model.block_attention` that share their range of keys
INDEX_BYTES = 8  # token ids, labels, expert choices: int64


@dataclass(frozen=True)
class Kept:
    """Bytes that one component keeps for the backward pass; `layer` None for what lies outside the layers."""

    layer: int | None
    component: str
    bytes: Number


@dataclass(frozen=True)
class Batch:
    """What every formula needs to know of a micro-batch: T, sequences, tokens n = sequences x T, bytes of a value, the kernels.

    Attributes:
        bytes: of a value between matrix products.
        stream: of a value of the residual stream.
        guides: structured linears have dense guides beside them.
    """

    length: Number
    sequences: Number
    tokens: Number
    bytes: int
    stream: int
    autocast: bool
    attention: Attention
    norm: Kernel
    logits: Logits
    guides: bool

    def values(self, per_token: Number) -> Number:
        """Bytes of so many activation values per token."""
        return per_token * self.tokens * self.bytes

    def wide(self, per_token: Number) -> Number:
        """Bytes of so many values of the residual stream per token."""
        return per_token * self.tokens * self.stream

    def copies(self, per_token: Number, count: int) -> Number:
        """Bytes of an input of which autocast makes so many copies."""
        return self.values(per_token) * (count if self.autocast else 1)

    def statistics(self, per_token: Number) -> Number:
        """Bytes of so many float32 values per token."""
        return per_token * self.tokens * STATISTIC_BYTES

    def indices(self, per_token: Number) -> Number:
        """Bytes of so many int64 values per token."""
        return per_token * self.tokens * INDEX_BYTES


# --- by component ------------------------------------------------------------------------------------------------------


def kept_rows(spec: Layered, batch: Batch) -> Iterable[Kept]:
    """Everything kept, bottom to top: ids, maps and layers of every stack, final norm, head, loss."""
    positions = batch.length * INDEX_BYTES if spec.learned_positions else 0
    yield Kept(None, "embedding", batch.indices(1) + positions)
    yield Kept(None, "rotary", _rotary_tables(spec, batch))
    if spec.branches is not None:
        yield Kept(None, "branches", _branches(spec, batch))
    for index, layer in enumerate(spec.layers):
        yield from layer_kept(layer, index, batch)
    if spec.transition is not None:
        yield from _transitions(spec, batch)
    if spec.final_norm is not None:
        yield Kept(None, "norm", batch.wide(spec.norm_width) + _norm(spec.final_norm, spec.norm_width, batch))
    capped = spec.vocab_size if getattr(spec, "final_logit_softcapping", None) is not None else 0
    if batch.logits == "kept":
        yield Kept(None, "head", batch.values(spec.unembedding_size + capped))  # its input; tanh's output
    if batch.logits == "kept":  # log-probabilities and labels
        yield Kept(None, "loss", batch.statistics(spec.vocab_size) + batch.indices(1))
    else:  # gradients of the head's input, weight and bias, made in the forward pass
        head = spec.vocab_size * (spec.unembedding_size + spec.lm_head_bias) * STATISTIC_BYTES
        yield Kept(None, "loss", batch.values(spec.unembedding_size) + head)


def layer_kept(layer: Any, index: int | None, batch: Batch) -> list[Kept]:
    """Kept bytes of one layer: `stream` (inputs of norms and sub-layers), `attention`, `ffn`, `norm` (their statistics)."""
    parallel = getattr(layer, "use_parallel_residual", False)
    norms = 4 if layer.norm_placement == "sandwich" else 2
    behind = _norms_behind(layer)
    even = layer.norm.kind == "layer_norm"  # which keeps its input as it comes; an RMSNorm makes it float32
    written = layer.hidden_size if layer.ffn_output_size is None else layer.ffn_output_size
    parts = {
        "stream": batch.wide((1 if parallel else norms) * layer.hidden_size)
        - (behind * (batch.wide(layer.hidden_size) - batch.values(layer.hidden_size)) if even else 0)
        + batch.values(layer.hidden_size)
        + batch.copies(layer.hidden_size, _copies(layer.ffn)),
        "attention": _attention(layer, batch),
        "ffn": _ffn(layer.ffn, layer.hidden_size, written, batch),
        "norm": (norms - behind) * _norm(layer.norm, layer.hidden_size, batch)
        + behind * _norm(layer.norm, layer.hidden_size, batch, narrow=True),
    }
    return [Kept(index, name, size * repeated(layer)) for name, size in parts.items()]


def _norms_behind(layer: Any) -> int:
    """Norms that read a sub-layer's output as autocast leaves it, in bfloat16."""
    if layer.norm_placement not in ("sandwich", "post_branch"):
        return 0
    return 1 if layer.ffn.kind == "moe" or _ends_wide(layer.ffn) else 2


def _ends_wide(ffn: Any) -> bool:
    """Whether a linear of this kind gives float32 under autocast: a block shuffle adds its bias after the products."""
    return bool(ffn.kind == "block_shuffle" and ffn.bias)


def _copies(ffn: Any) -> int:
    """bfloat16 copies of a feed-forward's input: one, and of a routed one's for the router and for a shared expert."""
    return 2 if ffn.kind == "moe" and ffn.shared_expert is not None else 1


def _norm(norm: Any, width: Number, batch: Batch, groups: Number = 1, narrow: bool = False) -> Number:
    """Statistics (RMSNorm 1, LayerNorm 2 per normalised vector) and, where not fused, RMSNorm's normalised input.

    The plain RMSNorm works in float32: of 16-bit activations it keeps its input, too, as float32.

    Args:
        narrow: under autocast the input comes as bfloat16, for which torch has no fused RMSNorm with float32 gains.
    """
    if norm.statistic_size not in (None, width):  # written out: the deviations, the scale, the normalised input
        centred = norm.kind == "layer_norm"
        return batch.statistics((2 if centred else 1) * groups) + batch.wide((2 if centred else 1) * width * groups)
    if norm.kind == "layer_norm":
        return batch.statistics(2 * groups)
    if batch.norm == "fused" and not (batch.autocast and narrow):
        return batch.statistics(groups)
    return batch.statistics((1 + 2 * width) * groups) - batch.wide(width * groups)


def _attention(layer: Any, batch: Batch) -> Number:
    """Scaled q, rotated k, v, the output projection's input; then what the kernel keeps; then the q/k norm's inputs."""
    heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
    read = (
        heads if getattr(layer, "head_to_group", None) is not None else kv_heads
    )  # a map gives each head its own copy
    out = heads * layer.v_head_dim
    kept = batch.values((heads + read) * layer.head_dim + read * layer.v_head_dim + out)
    softcapped = getattr(layer, "attn_logit_softcapping", None) is not None
    if softcapped:
        kept = kept + batch.values(heads * batch.length * 2)  # tanh's and softmax's outputs
    elif batch.attention == "block":
        kept = kept + heads * batch.sequences * _pairs(batch.length, layer.sliding_window) * batch.bytes
    else:
        rope = layer.position if getattr(getattr(layer, "position", None), "kind", None) == "rope" else None
        # The kernel lays its output out as it got q: head-major where only a part of each head was rotated and put together
        # with the rest, so that the output projection reads a copy.
        joined = rope is not None and rope.rotated(layer.head_dim) < layer.head_dim
        kept = kept + batch.values(out if joined else 0) + batch.statistics(heads)
        if layer.sliding_window is not None:  # a T x T additive mask, needed where the window is shorter than T
            shorter = smaller(batch.length, layer.sliding_window) < batch.length
            kept = kept + batch.length * batch.length * batch.bytes * shorter
    if layer.qk_norm is None:
        return kept
    over_all = layer.qk_norm.over == "all"
    kept = kept + batch.wide((heads + kv_heads) * layer.head_dim)
    norm = _RMSKind(statistic_size=layer.qk_norm.statistic_size)
    for count in (heads, kv_heads):
        width, groups = (count * layer.head_dim, 1) if over_all else (layer.head_dim, count)
        kept = kept + _norm(norm, width, batch, groups, narrow=True)
    return kept


def _pairs(length: Number, window: Number) -> Number:
    """Probabilities that a head keeps of one sequence: every block's queries x the keys up to its end, within the window."""
    full, rest = length // QUERY_BLOCK, length % QUERY_BLOCK
    pairs = QUERY_BLOCK * QUERY_BLOCK * half(full * (full + 1)) + rest * length
    if window is None:
        return pairs
    first = (window - 1) // QUERY_BLOCK + 1  # the first block whose earliest keys are out of sight
    count = full - smaller(full, first)
    skipped = QUERY_BLOCK * (QUERY_BLOCK * half(count * (first + full - 1)) - count * (window - 1))
    return pairs - skipped - rest * (smaller(window - 1, full * QUERY_BLOCK) * -1 + full * QUERY_BLOCK)


@dataclass(frozen=True)
class _RMSKind:
    kind: str = "rms_norm"
    statistic_size: int | None = None


def _ffn(ffn: Any, width: Number, width_out: Number, batch: Batch) -> Number:
    """Everything inside a feed-forward but its input, which the stream counts."""
    if ffn.kind != "moe":
        return _inside(ffn, width, width_out, batch)
    chosen, experts = ffn.num_experts_per_tok, ffn.num_local_experts
    # Per choice: the gathered input, the expert's inside, its output before and after weighting, and two scalars.
    kept = chosen * (
        batch.values(width)
        + _inside(ffn.expert, width, width_out, batch)
        + batch.values(width_out + 2)
        + batch.wide(width_out)
    )
    # The router: logits, and their probabilities and log-sum-exp for the auxiliary loss (float32).
    kept = kept + batch.wide(experts)
    if ffn.router_softmax == "before":
        kept = kept + batch.values(experts + (1 if ffn.norm_topk_prob else -chosen))
    if ffn.shared_expert is not None:
        kept = kept + _inside(ffn.shared_expert, width, width_out, batch)
    shares = (2 * experts + 1) * STATISTIC_BYTES  # of the balance loss, once per layer
    return kept + batch.statistics(experts + 1) + batch.indices(4 * chosen) + shares


def _inside(ffn: Any, width: Number, width_out: Number, batch: Batch) -> Number:
    """Bytes inside one feed-forward that is not routed.

    Under autocast a block shuffle with a bias ends in float32: so are the activation's input and output, and what `down`
    reads is a copy. A guide of `down` then reads another.
    """
    kept = batch.values(ffn_values(ffn, width, width_out))
    if not (batch.autocast and _ends_wide(ffn)):
        return kept
    inner = ffn.intermediate_size
    act = inner * (3 if ffn.gated else 1)  # inputs and outputs of act and product, which are not copies
    relu = inner if ffn.hidden_act == "relu" and not ffn.gated else 0
    return kept + batch.values(act + relu + (inner if batch.guides else 0))


def ffn_values(ffn: Any, width: Number, width_out: Number) -> Number:
    """Values per token kept inside one feed-forward of any structure.

    Gated: gate and up, act(gate), the product: 4 f. Not gated: act's input and output: 2 f. ReLU keeps its output only, so
    one f less where its input is a tensor of its own. Structured maps: the vector between their factors as well.
    """
    inner = ffn.intermediate_size
    relu = getattr(ffn, "hidden_act", None) == "relu"
    own_input = ffn.kind == "dense" or not ffn.gated
    body = inner * ((4 if ffn.gated else 2) - (1 if relu and own_input else 0))
    into = inner * (2 if ffn.gated else 1)
    match ffn.kind:
        case "dense":
            return body
        case "low_rank" | "block_dense":
            return body + 2 * ffn.rank
        case "block_shuffle":
            return body + smaller(width, into) + smaller(inner, width_out)
    raise AssertionError(f"no kept values for ffn kind {ffn.kind!r}")


def _rotary_tables(spec: Layered, batch: Batch) -> Number:
    """cos and sin, T x rotated/2 each, once per distinct position kind and head size."""
    tables = {
        (layer.position, layer.head_dim): layer.position.rotated(layer.head_dim)
        for layer in spec.layers
        if getattr(layer, "position", None) is not None and layer.position.kind == "rope"
    }
    return sum(tables.values()) * batch.length * batch.bytes


def _branches(spec: Any, batch: Batch) -> Number:
    """The embedding that entry maps read, and each stack's output under its mixing weight; a shared entry once."""
    count, embedding = spec.branches.count, spec.embedding_size
    first, last = spec.stacks[0][0].hidden_size, spec.stacks[0][-1].hidden_size
    entry = batch.copies(embedding, count) if spec.branches.entry == "projection" else 0
    if spec.branches.entry == "shared" and (first <= embedding or spec.transition.kind in _KEEP_INPUT):
        entry = -batch.wide((count - 1) * embedding)  # every stack's rows count it; it is one tensor
    shares = count * batch.stream if spec.branches.mixing == "softmax" else 0
    compressed = spec.transition is not None and spec.transition.kind == "compress"
    widest = max(layer.hidden_size for layer in spec.stacks[0])
    views = spec.branches.entry == "shared" and last == widest and spec.unembedding_size <= embedding
    carried = (
        0 if compressed or views else max(0, spec.unembedding_size - last)
    )  # into a wider head, mixed like the outputs
    return entry + batch.wide(count * (last + carried)) + shares


_KEEP_INPUT = ("linear", "linear_diff", "transposed_conv", "conv_diff", "gaussian", "compress")


def _transitions(spec: Any, batch: Batch) -> list[Kept]:
    found, widths = [], spec.stream_widths
    depth = len(widths) - 2
    for stack in range(len(spec.stacks)):
        for at in range(depth):
            found.append(
                Kept(stack * depth + at, "transition", _transition(spec.transition, widths[at], widths[at + 1], batch))
            )
    if (
        not (batch.autocast and widths[-1] < widths[-2]) or spec.transition.kind == "compress"
    ):  # the head's copy is narrow
        found.append(Kept(None, "transition", _transition(spec.transition, widths[-2], widths[-1], batch)))
    return [row for row in found if row.bytes]


def _transition(transition: Any, have: int, width: int, batch: Batch) -> Number:
    """What a change of width keeps beside the next layer's input.

    Narrowing is a view, so the whole wider vector stays. Learned maps keep their input; `gated` its gate, the
    gate's complement and the map's output (its input is part of a kept vector); `gaussian` also noise and its spread.
    """
    new = width - have
    if new == 0:
        return 0
    if transition.kind == "compress":
        return batch.values(have)
    if new < 0:
        return batch.wide(-new)
    kept = batch.values(have if transition.kind in _KEEP_INPUT else 0)
    match transition.kind:
        case "gated":
            return kept + batch.values((5 if batch.autocast else 3) * new)  # copies of what both maps read
        case "gaussian":
            return kept + batch.wide(new + 1)
        case "linear":
            return kept + _sinkhorn(transition.sinkhorn_iters, width, have, batch)
        case "linear_diff":
            return kept + _sinkhorn(transition.sinkhorn_iters, new, have, batch)
    return kept


def _sinkhorn(iterations: int, out: int, into: int, batch: Batch) -> Number:
    """Both quotients' numerators and the sums of every iteration, and the balanced matrix."""
    return ((2 * iterations + 1) * out * into + iterations * (out + into)) * batch.bytes if iterations else 0


# --- checkpointing -----------------------------------------------------------------------------------------------------


def checkpointed(spec: Layered, table: list[Kept], batch: Batch) -> list[Kept]:
    """Layer inputs, what lies outside the layers, and the rest of the largest layer while it is recomputed."""
    outside = [row for row in table if row.layer is None or row.component == "transition"]
    inputs, inside = [], []
    for index, layer in enumerate(spec.layers):
        own = batch.wide(layer.hidden_size)
        inputs.append(Kept(index, "input", own * repeated(layer)))
        whole = bytes_of(row for row in table if row.layer == index and row.component != "transition")
        inside.append(_one(whole, repeated(layer)) - own)
    largest = reduce(lambda a, b: a + b - smaller(a, b), inside)
    return [*outside, *inputs, Kept(None, "recompute", largest)]


def _one(whole: Number, repeat: Number) -> Number:
    return whole if isinstance(repeat, int) and repeat == 1 else whole // repeat


def repeated(layer: Any) -> Number:
    return getattr(layer, "repeat", 1)


def bytes_of(table: Iterable[Kept]) -> Number:
    return sum((row.bytes for row in table), start=0)
