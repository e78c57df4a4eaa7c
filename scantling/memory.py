"""What training a model keeps in memory: weights, gradients, optimizer state, and every tensor kept for the backward pass.

Each formula below counts the tensors that autograd keeps for one kind of module in `model/`, every storage once, and is
checked against torch's saved tensors. Plain arithmetic on ints and NumPy arrays alike, of a `ModelSpec` or a `Stack`.

Who keeps what, per token and layer of width d, with h query heads, g key/value heads and feed-forward size f:

- the stream: d for each norm's input and d for each sub-layer's input (4 d; sandwich 6 d; parallel 3 d);
- attention: q and k (h + g) head_dim, v g v_head_dim, the output projection's input h v_head_dim; and `plain` the
  probabilities h T, or `fused` the kernel's output h v_head_dim and one float32 statistic per head;
- feed-forward: the activation's input and output, the other factor, and the product that `down` reads (4 f gated, 2 f not).

Agreement with torch's saved tensors on a CPU: to the byte for every kind of layer; up to 4 % for the rarest combinations
(views shared between branches, block shuffles that need no copy). Too low where the fused kernel gets a `v_head_dim` other
than `head_dim`, and so keeps probabilities after all.

Not counted: temporary buffers inside an operation, the allocator's rounding, and what `torch.autocast` adds (16-bit copies of
the weights and of each linear's input, a residual stream that stays float32): activations then take about 1.4 times as much
(measured on a CPU, 4 layers of width 128). `activation_bytes=2` is a model wholly in 16 bits.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

from scantling.rows import Layered, Number, half, rows, smaller

Kernel = Literal["fused", "plain"]

STATISTIC_BYTES = 4  # means, deviations, log-sum-exps and log-probabilities are float32 whatever the activations are
INDEX_BYTES = 8  # token ids, labels, expert choices: int64
OPTIMIZER_BYTES = {"adamw": 8, "sgd": 0, "momentum": 4, "muon": 4}  # float32 moments per parameter

CONVENTIONS = {
    "activations": "tensors kept for the backward pass, each storage once; no temporary buffers, no allocator rounding",
    "checkpointing": "each layer's input, and everything kept inside the largest layer while it is recomputed",
    "fused": "attention keeps q, k, v, its output and one float32 per head and token; a norm keeps its input and statistics",
    "plain": "attention keeps its probabilities (heads x T per token); an RMSNorm keeps its normalised input as well",
    "logits": "float32 log-probabilities of every position; the loss's own backward pass briefly holds two more (peak)",
    "total": "weights + gradients + optimizer + activations + logits",
    "peak": "total + the two gradients of logits size that the loss's backward pass holds",
}


@dataclass(frozen=True)
class Kept:
    """Bytes that one component keeps for the backward pass; `layer` None for what lies outside the layers."""

    layer: int | None
    component: str
    bytes: Number


@dataclass(frozen=True)
class Memory:
    """Bytes held while training one micro-batch; see `CONVENTIONS`.

    Attributes:
        activations: all kept tensors but the log-probabilities, the sum of `rows` outside `loss`.
        logits: the rows of component `loss`.
        peak: at the start of the backward pass, with gradients of earlier micro-batches in place.
        rows: kept bytes by layer and component.
    """

    weights: Number
    gradients: Number
    optimizer: Number
    activations: Number
    logits: Number
    peak: Number
    rows: tuple[Kept, ...]

    @property
    def state(self) -> Number:
        """What does not depend on the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def kept(self) -> Number:
        """What the backward pass needs."""
        return self.activations + self.logits

    @property
    def total(self) -> Number:
        return self.state + self.kept


@dataclass(frozen=True)
class _Batch:
    """What every formula needs to know of a micro-batch: T, tokens n = sequences x T, bytes of a value, the kernels."""

    length: Number
    tokens: Number
    bytes: int
    attention: Kernel
    norm: Kernel

    def values(self, per_token: Number) -> Number:
        """Bytes of so many activation values per token."""
        return per_token * self.tokens * self.bytes

    def statistics(self, per_token: Number) -> Number:
        """Bytes of so many float32 values per token."""
        return per_token * self.tokens * STATISTIC_BYTES

    def indices(self, per_token: Number) -> Number:
        """Bytes of so many int64 values per token."""
        return per_token * self.tokens * INDEX_BYTES


def training_memory(
    spec: Layered,
    sequence_length: Number,
    micro_batch_sequences: Number = 1,
    weight_bytes: int = 4,
    gradient_bytes: int = 4,
    optimizer_bytes: int = OPTIMIZER_BYTES["adamw"],
    activation_bytes: int = 4,
    checkpointing: bool = False,
    attention: Kernel = "fused",
    norm: Kernel = "fused",
) -> Memory:
    """Bytes that training holds on one device.

    Args:
        spec: a `ModelSpec`, or a `Stack` of arrays.
        sequence_length: T, tokens of a sequence.
        micro_batch_sequences: sequences of one forward and backward pass.
        weight_bytes, gradient_bytes: of one parameter and its gradient.
        optimizer_bytes: state of one parameter, see `OPTIMIZER_BYTES` (Muon: of its matrices; tables and norms use AdamW).
        activation_bytes: of one kept value; 4 for float32, 2 for a model wholly in 16 bits.
        checkpointing: keep only layer inputs and recompute a layer at a time.
        attention: `fused` (SDPA's flash kernels) or `plain` (what this project runs on a CPU up to T = 512). Soft-capped
            scores are always plain.
        norm: `fused` (CUDA) or `plain` (the CPU's RMSNorm, which keeps the normalised input); a LayerNorm is always fused.
    """
    batch = _Batch(sequence_length, micro_batch_sequences * sequence_length, activation_bytes, attention, norm)
    table = list(kept_rows(spec, batch))
    if checkpointing:
        table = _checkpointed(spec, table, batch)
    logits = _sum(row for row in table if row.component == "loss")
    params = sum((row.params for row in rows(spec)), start=0)
    memory = Memory(
        weights=params * weight_bytes,
        gradients=params * gradient_bytes,
        optimizer=params * optimizer_bytes,
        activations=_sum(row for row in table if row.component != "loss"),
        logits=logits,
        peak=0,
        rows=tuple(table),
    )
    workspace = 2 * batch.statistics(spec.vocab_size)
    return Memory(**{**vars(memory), "peak": memory.total + workspace})


def paper_training_values(spec: Layered, sequence_length: Number) -> Number:
    """M_train = 4 N + T d L values: weights, gradients, two moments, one activation per token, layer and channel.

    Convention of arXiv 2503.09579 (appendix C, table 8): N counts matrix weights outside the tables; widths are summed
    over the layers. One sequence; multiply by the bytes of a value.
    """
    n = half(sum((row.matmul_flops for row in rows(spec) if row.component != "head"), start=0))
    channels = sum((layer.hidden_size * _repeat(layer) for layer in spec.layers), start=0)
    return 4 * n + sequence_length * channels


# --- kept tensors, by component ----------------------------------------------------------------------------------------


def kept_rows(spec: Layered, batch: _Batch) -> Iterable[Kept]:
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
        yield Kept(None, "norm", batch.values(spec.norm_width) + _norm(spec.final_norm, spec.norm_width, batch))
    capped = spec.vocab_size if getattr(spec, "final_logit_softcapping", None) is not None else 0
    yield Kept(None, "head", batch.values(spec.unembedding_size + capped))  # its input; tanh's output
    yield Kept(None, "loss", batch.statistics(spec.vocab_size) + batch.indices(1))  # log-probabilities and labels


def layer_kept(layer: Any, index: int | None, batch: _Batch) -> list[Kept]:
    """Kept bytes of one layer: `stream` (inputs of norms and sub-layers), `attention`, `ffn`, `norm` (their statistics)."""
    parallel = getattr(layer, "use_parallel_residual", False)
    norms = 4 if layer.norm_placement == "sandwich" else 2
    streams = 3 if parallel else norms + 2
    written = layer.hidden_size if layer.ffn_output_size is None else layer.ffn_output_size
    parts = {
        "stream": batch.values(streams * layer.hidden_size),
        "attention": _attention(layer, batch),
        "ffn": _ffn(layer.ffn, layer.hidden_size, written, batch),
        "norm": norms * _norm(layer.norm, layer.hidden_size, batch),
    }
    return [Kept(index, name, size * _repeat(layer)) for name, size in parts.items()]


def _norm(norm: Any, width: Number, batch: _Batch, groups: Number = 1) -> Number:
    """Statistics (RMSNorm 1, LayerNorm 2 per normalised vector) and, where not fused, RMSNorm's normalised input.

    The plain RMSNorm works in float32: of 16-bit activations it keeps its input, too, as float32.
    """
    if norm.kind == "layer_norm":
        return batch.statistics(2 * groups)
    if batch.norm == "fused":
        return batch.statistics(groups)
    return batch.statistics((1 + 2 * width) * groups) - batch.values(width * groups)


def _attention(layer: Any, batch: _Batch) -> Number:
    """Scaled q, rotated k, v, the output projection's input; then what the kernel keeps; then the q/k norm's inputs."""
    heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
    out = heads * layer.v_head_dim
    kept = batch.values((heads + kv_heads) * layer.head_dim + kv_heads * layer.v_head_dim + out)
    softcapped = getattr(layer, "attn_logit_softcapping", None) is not None
    if batch.attention == "plain" or softcapped:
        # softmax's output; tanh's output where scores are capped
        kept = kept + batch.values(heads * batch.length * (2 if softcapped else 1))
    else:
        rotated = getattr(getattr(layer, "position", None), "kind", "rope") == "rope"
        # The kernel lays its output out as it got q: head-major after rotation, so the output projection reads a copy.
        kept = kept + batch.values(out if rotated else 0) + batch.statistics(heads)
        if layer.sliding_window is not None:  # a T x T additive mask, needed where the window is shorter than T
            shorter = smaller(batch.length, layer.sliding_window) < batch.length
            kept = kept + batch.length * batch.length * batch.bytes * shorter
    if layer.qk_norm is None:
        return kept
    over_all = layer.qk_norm.over == "all"
    kept = kept + batch.values((heads + kv_heads) * layer.head_dim)
    for count in (heads, kv_heads):
        width, groups = (count * layer.head_dim, 1) if over_all else (layer.head_dim, count)
        kept = kept + _norm(_RMS, width, batch, groups)
    return kept


@dataclass(frozen=True)
class _RMSKind:
    kind: str = "rms_norm"


_RMS = _RMSKind()


def _ffn(ffn: Any, width: Number, width_out: Number, batch: _Batch) -> Number:
    """Everything inside a feed-forward but its input, which the stream counts."""
    if ffn.kind != "moe":
        return batch.values(ffn_values(ffn, width, width_out))
    chosen, experts = ffn.num_experts_per_tok, ffn.num_local_experts
    # Per choice: the gathered input, the expert's inside, its output before and after weighting, and two scalars.
    values = chosen * (width + ffn_values(ffn.expert, width, width_out) + 2 * width_out + 2)
    # The router: logits, and their probabilities and log-sum-exp for the auxiliary loss (float32).
    values = values + experts
    if ffn.router_softmax == "before":
        values = values + experts + (1 if ffn.norm_topk_prob else -chosen)
    if ffn.shared_expert is not None:
        values = values + ffn_values(ffn.shared_expert, width, width_out)
    shares = (2 * experts + 1) * STATISTIC_BYTES  # of the balance loss, once per layer
    return batch.values(values) + batch.statistics(experts + 1) + batch.indices(4 * chosen) + shares


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


def _rotary_tables(spec: Layered, batch: _Batch) -> Number:
    """cos and sin, T x rotated/2 each, once per distinct position kind and head size."""
    tables = {
        (layer.position, layer.head_dim): layer.position.rotated(layer.head_dim)
        for layer in spec.layers
        if getattr(layer, "position", None) is not None and layer.position.kind == "rope"
    }
    return sum(tables.values()) * batch.length * batch.bytes


def _branches(spec: Any, batch: _Batch) -> Number:
    """The embedding that entry maps read, and each stack's output under its mixing weight; a shared entry once."""
    count, embedding = spec.branches.count, spec.embedding_size
    first, last = spec.stacks[0][0].hidden_size, spec.stacks[0][-1].hidden_size
    entry = embedding if spec.branches.entry == "projection" else 0
    if spec.branches.entry == "shared" and (first <= embedding or spec.transition.kind in _KEEP_INPUT):
        entry = -(count - 1) * embedding  # every stack's rows count it; it is one tensor
    shares = count * batch.bytes if spec.branches.mixing == "softmax" else 0
    compressed = spec.transition is not None and spec.transition.kind == "compress"
    carried = 0 if compressed else max(0, spec.unembedding_size - last)  # into a wider head, mixed like the outputs
    return batch.values(entry + count * (last + carried)) + shares


_KEEP_INPUT = ("linear", "linear_diff", "transposed_conv", "conv_diff", "gaussian", "compress")


def _transitions(spec: Any, batch: _Batch) -> list[Kept]:
    found, widths = [], spec.stream_widths
    depth = len(widths) - 2
    for stack in range(len(spec.stacks)):
        for at in range(depth):
            found.append(
                Kept(stack * depth + at, "transition", _transition(spec.transition, widths[at], widths[at + 1], batch))
            )
    found.append(Kept(None, "transition", _transition(spec.transition, widths[-2], widths[-1], batch)))
    return [row for row in found if row.bytes]


def _transition(transition: Any, have: int, width: int, batch: _Batch) -> Number:
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
        return batch.values(-new)
    kept = batch.values(have if transition.kind in _KEEP_INPUT else 0)
    match transition.kind:
        case "gated":
            return kept + batch.values(3 * new)
        case "gaussian":
            return kept + batch.values(new + 1)
        case "linear":
            return kept + _sinkhorn(transition.sinkhorn_iters, width, have, batch)
        case "linear_diff":
            return kept + _sinkhorn(transition.sinkhorn_iters, new, have, batch)
    return kept


def _sinkhorn(iterations: int, out: int, into: int, batch: _Batch) -> Number:
    """Both quotients' numerators and the sums of every iteration, and the balanced matrix."""
    return ((2 * iterations + 1) * out * into + iterations * (out + into)) * batch.bytes if iterations else 0


# --- checkpointing -----------------------------------------------------------------------------------------------------


def _checkpointed(spec: Layered, table: list[Kept], batch: _Batch) -> list[Kept]:
    """Layer inputs, what lies outside the layers, and the rest of the largest layer while it is recomputed."""
    outside = [row for row in table if row.layer is None or row.component == "transition"]
    inputs, inside = [], []
    for index, layer in enumerate(spec.layers):
        own = batch.values(layer.hidden_size)
        inputs.append(Kept(index, "input", own * _repeat(layer)))
        whole = _sum(row for row in table if row.layer == index and row.component != "transition")
        inside.append(_one(whole, _repeat(layer)) - own)
    largest = reduce(lambda a, b: a + b - smaller(a, b), inside)
    return [*outside, *inputs, Kept(None, "recompute", largest)]


def _one(whole: Number, repeat: Number) -> Number:
    return whole if isinstance(repeat, int) and repeat == 1 else whole // repeat


def _repeat(layer: Any) -> Number:
    return getattr(layer, "repeat", 1)


def _sum(table: Iterable[Kept]) -> Number:
    return sum((row.bytes for row in table), start=0)
