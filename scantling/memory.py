"""What training a model holds in memory: weights, gradients, optimizer state, and what the backward pass needs (`kept.py`).

Under bfloat16 autocast weights, gradients and optimizer stay float32, and every matrix has a bfloat16 copy from its first use
to the end of the backward pass. Not counted: temporary buffers inside an operation, and the allocator's rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from scantling.errors import InputError
from scantling.guidance import guide_params
from scantling.kept import (
    STATISTIC_BYTES,
    Attention,
    Batch,
    Kept,
    Kernel,
    Logits,
    bytes_of,
    checkpointed,
    kept_rows,
    repeated,
)
from scantling.recipe import SGD, TrainConfig
from scantling.rows import Layered, Number, attention_weights, ffn_weights, half, rows, smaller
from scantling.spec import ModelSpec
from scantling.units import format_bytes

OptimizerKind = Literal["adamw", "muon", "sgd", "momentum"]

COPY_BYTES = 2  # of autocast's bfloat16 weights
OPTIMIZER_BYTES = {"adamw": 8, "sgd": 0, "momentum": 4, "muon": 4}  # float32 moments per parameter
MARGIN = 0.1  # of the free memory, left to others
# What allocators make of tensors that come and go. glibc's: 1.29 to 1.87 measured as peak resident memory over prediction, both
# without the state (widths 256 and 512, float32 and autocast; 0.92 to 0.98 with every tensor mapped on its own).
FRAGMENTATION = {"cpu": 2.0, "cuda": 1.1}
BLOCK_LENGTH = 1024  # longest sequence for which a CPU keeps attention's probabilities, unless a run measured otherwise
CHUNKED_VOCABULARY = 4096  # with fewer ids the logits are kept and plain cross-entropy is used
CHUNK_BYTES = 512 * 2**20  # gradients of logits that a chunked loss holds at a time

CONVENTIONS = {
    "activations": "tensors kept for the backward pass, each storage once; no temporary buffers, no allocator rounding",
    "checkpointing": "each layer's input, and everything kept inside the largest layer while it is recomputed",
    "fused": "attention keeps q, k, v, its output and one float32 per head and token; a norm keeps its input and statistics",
    "block": "attention keeps the probabilities of each block of queries (heads x about T / 2 per token)",
    "plain": "an RMSNorm keeps its normalised input as well",
    "logits": "float32 log-probabilities of every position; the loss's own backward pass briefly holds two more (peak)",
    "chunked": "the head's gradients instead of logits; peak holds one part of the logits' gradient as well",
    "total": "weights + gradients + optimizer + activations + logits (+ average and copies where there are any)",
    "peak": "total + the two gradients of logits size that the loss's backward pass holds",
}


@dataclass(frozen=True)
class Memory:
    """Bytes held while training one micro-batch; see `CONVENTIONS`.

    Attributes:
        activations: all kept tensors but the log-probabilities, the sum of `rows` outside `loss`.
        logits: the rows of component `loss`.
        peak: at the start of the backward pass, with gradients of earlier micro-batches in place.
        rows: kept bytes by layer and component.
        average: a moving average of the weights.
        copies: autocast's bfloat16 weights.
    """

    weights: Number
    gradients: Number
    optimizer: Number
    activations: Number
    logits: Number
    peak: Number
    rows: tuple[Kept, ...]
    average: Number = 0
    copies: Number = 0

    @property
    def state(self) -> Number:
        """What does not depend on the batch and stays between steps."""
        return self.weights + self.gradients + self.optimizer + self.average

    @property
    def kept(self) -> Number:
        """What the backward pass needs."""
        return self.activations + self.logits

    @property
    def total(self) -> Number:
        return self.state + self.copies + self.kept


def training_memory(
    spec: Layered,
    sequence_length: Number,
    micro_batch_sequences: Number = 1,
    weight_bytes: int = 4,
    gradient_bytes: int = 4,
    optimizer: OptimizerKind = "adamw",
    activation_bytes: int = 4,
    checkpointing: bool = False,
    attention: Attention = "fused",
    norm: Kernel = "fused",
    autocast: bool = False,
    logits: Logits = "kept",
    average: bool = False,
    guides: bool = False,
) -> Memory:
    """Bytes that training holds on one device.

    Args:
        spec: a `ModelSpec`, or (without guides and Muon) a `Stack` of arrays.
        sequence_length: T, tokens of a sequence.
        micro_batch_sequences: sequences of one forward and backward pass.
        weight_bytes, gradient_bytes: of one parameter and its gradient.
        optimizer: `sgd` is without momentum; `muon` uses AdamW for all but the layers' 2-D matrices.
        activation_bytes: of one kept value; 4 for float32, 2 for a model wholly in 16 bits. Autocast decides for itself.
        checkpointing: keep only layer inputs and recompute a layer at a time.
        attention: `fused` (SDPA's flash kernels) or `block` (`model.block_attention`, on a CPU). Soft-capped scores are plain
            matrix products, kept whole.
        norm: `fused`, or `plain` (torch's RMSNorm of 16-bit models on a CPU, which keeps the normalised input).
        autocast: bfloat16 autocast over float32 weights, by the CPU's rules; CUDA's were not measured.
        logits: `kept` for the backward pass, or `chunked` (`model.loss`): turned into gradients a few positions at a time.
        average: a moving average of the weights beside them.
        guides: the guided phase of self-guided training, every guide in use.
    """
    batch = Batch(
        length=sequence_length,
        sequences=micro_batch_sequences,
        tokens=micro_batch_sequences * sequence_length,
        bytes=COPY_BYTES if autocast else activation_bytes,
        stream=STATISTIC_BYTES if autocast else activation_bytes,
        autocast=autocast,
        attention=attention,
        norm=norm,
        logits=logits,
        guides=guides,
    )
    table = list(kept_rows(spec, batch))
    if checkpointing:
        table = checkpointed(spec, table, batch)
    params = sum((row.params for row in rows(spec)), start=0)
    extra = guide_params(spec) if guides and isinstance(spec, ModelSpec) else 0
    memory = Memory(
        weights=(params + extra) * weight_bytes,
        gradients=(params + extra) * gradient_bytes,
        optimizer=_optimizer(spec, params, extra, optimizer),
        activations=bytes_of(row for row in table if row.component != "loss"),
        logits=bytes_of(row for row in table if row.component == "loss"),
        peak=0,
        rows=tuple(table),
        average=params * weight_bytes if average else 0,
        copies=(matrix_params(spec) + extra) * COPY_BYTES if autocast else 0,
    )
    one = batch.tokens * spec.vocab_size
    if logits == "kept":
        workspace = 2 * STATISTIC_BYTES * one
    else:  # one part of the gradient, and its product with the inputs
        workspace = smaller(batch.bytes * one, CHUNK_BYTES) + batch.bytes * spec.vocab_size * spec.unembedding_size
    return Memory(**{**vars(memory), "peak": memory.total + workspace})


def matrix_params(spec: Layered) -> Number:
    """Parameters that matrix products read, every expert's included; a tied table counts as the head."""
    active = half(sum((row.matmul_flops for row in rows(spec)), start=0))
    idle = 0
    for layer in spec.layers:
        if layer.ffn.kind == "moe":
            one = ffn_weights(layer.ffn.expert, layer.hidden_size, layer.ffn_output_size)
            idle += (layer.ffn.num_local_experts - layer.ffn.num_experts_per_tok) * one
    return active + idle


def _optimizer(spec: Layered, params: Number, guides: Number, kind: OptimizerKind) -> Number:
    """Bytes of the moments. Muon holds one per 2-D matrix of the layers, guides included, and AdamW's two of the rest."""
    if kind != "muon":
        return (params + guides) * OPTIMIZER_BYTES[kind]
    matrices = guides + sum(_flat_matrices(layer) * repeated(layer) for layer in spec.layers)
    return matrices * OPTIMIZER_BYTES["muon"] + (params + guides - matrices) * OPTIMIZER_BYTES["adamw"]


def _flat_matrices(layer: Any) -> Number:
    """Entries of one layer's 2-D matrices: block-diagonal factors are 3-D."""
    width = layer.hidden_size
    out = width if layer.ffn_output_size is None else layer.ffn_output_size

    def flat(ffn: Any) -> Number:
        blocked = 0
        if ffn.kind == "block_shuffle":
            return 0
        if ffn.kind == "block_dense":
            blocked = ffn.rank * (width + ffn.intermediate_size) // ffn.num_blocks
        return ffn_weights(ffn, width, out) - blocked

    ffn = layer.ffn
    if ffn.kind != "moe":
        return attention_weights(layer) + flat(ffn)
    shared = flat(ffn.shared_expert) if ffn.shared_expert is not None else 0
    return attention_weights(layer) + width * ffn.num_local_experts + shared + ffn.num_local_experts * flat(ffn.expert)


def paper_training_values(spec: Layered, sequence_length: Number) -> Number:
    """M_train = 4 N + T d L values: weights, gradients, two moments, one activation per token, layer and channel.

    Convention of arXiv 2503.09579 (appendix C, table 8): N counts matrix weights outside the tables; widths are summed
    over the layers. One sequence; multiply by the bytes of a value.
    """
    n = half(sum((row.matmul_flops for row in rows(spec) if row.component != "head"), start=0))
    channels = sum((layer.hidden_size * repeated(layer) for layer in spec.layers), start=0)
    return 4 * n + sequence_length * channels


# --- what fits -----------------------------------------------------------------------------------------------------------


def memory_settings(
    vocab_size: int, train: TrainConfig, precision: str, device: str, guides: bool = False
) -> dict[str, Any]:
    """The keyword arguments of `training_memory` and `fit_micro_batch` for a run.

    Args:
        vocab_size: decides whether the loss is `chunked`.
        train: the recipe.
        precision: `float32` or `bfloat16` (autocast), as decided.
        device: `cpu` or `cuda`, whose attention kernel is assumed; a caller that has measured otherwise says so.
        guides: during the guided phase.
    """
    optimizer: OptimizerKind = train.optimizer.kind
    if isinstance(train.optimizer, SGD) and train.optimizer.momentum:
        optimizer = "momentum"
    return {
        "attention": "block" if device == "cpu" and train.sequence_length <= BLOCK_LENGTH else "fused",
        "logits": "chunked" if vocab_size >= CHUNKED_VOCABULARY else "kept",
        "optimizer": optimizer,
        "checkpointing": train.parallel.activation_checkpointing,
        "autocast": precision == "bfloat16",
        "average": train.average_decay is not None,
        "guides": guides,
    }


def fit_micro_batch(
    spec: ModelSpec,
    sequence_length: int,
    sequences: int,
    available_bytes: int,
    shards: int = 1,
    device: Literal["cpu", "cuda"] = "cpu",
    **settings: Any,
) -> int:
    """How many sequences one forward and backward pass can hold, before the first step is tried.

    The step is split into as few parts as fit; into equal ones where that takes less than twice as many.

    Args:
        spec: the model.
        sequence_length: tokens of a sequence.
        sequences: of one step on this device.
        available_bytes: free before model and optimizer are made; a tenth of it is left to others.
        shards: processes that share weights, gradients, optimizer and average (fsdp).
        device: whose allocator; see `FRAGMENTATION`.
        settings: of `training_memory`; see `memory_settings`.

    Raises:
        InputError: not even one sequence fits; says what it needs and what would help.
    """
    usable = int(available_bytes * (1 - MARGIN))

    def need(count: int, length: int = sequence_length, over: int = shards, exact: bool = False, **changes: Any) -> int:
        memory = training_memory(spec, length, count, **{**settings, **changes})
        return int((memory.peak - memory.state) * (1 if exact else FRAGMENTATION[device])) + int(memory.state // over)

    if need(1) > usable:
        memory = training_memory(spec, sequence_length, 1, **settings)
        raise InputError(_too_large(memory, need, usable, shards, sequence_length, settings))
    fits, limit = 1, sequences + 1
    while limit - fits > 1:
        middle = (fits + limit) // 2
        fits, limit = (middle, limit) if need(middle) <= usable else (fits, middle)
    fewest = -(-sequences // fits)
    for parts in range(fewest, 2 * fewest):
        if sequences % parts == 0:
            return sequences // parts
    return -(-sequences // fewest)


def _too_large(
    memory: Memory, need: Callable[..., int], usable: int, shards: int, length: int, settings: dict[str, Any]
) -> str:
    """One sentence: what one sequence needs, part by part, what there is, and every single change that would make it fit."""
    parts = {
        "weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer,
        "average": memory.average, "bfloat16 copies": memory.copies, "activations": memory.activations,
        "logits": memory.logits + memory.peak - memory.total, "lost to the allocator": need(1) - need(1, exact=True),
    }  # fmt: skip
    said = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
    helps = []
    shorter = length // 2
    while shorter and need(1, shorter) > usable:
        shorter //= 2
    if shorter:
        helps.append(f"sequence_length: {shorter}")
    if not settings.get("checkpointing") and need(1, checkpointing=True) <= usable:
        helps.append("parallel.activation_checkpointing: true")
    more = next((k for k in (2 * shards, 4 * shards, 8 * shards, 64 * shards) if need(1, over=k) <= usable), None)
    if more:
        helps.append(f"parallel.kind: fsdp over {more} processes")
    change = " or ".join(helps) if helps else "a smaller model, or a device with more memory"
    held = f" (state shared by {shards})" if shards > 1 else ""
    return (
        f"one sequence of {length} tokens needs {format_bytes(need(1))} to train{held}: {said}; "
        f"{format_bytes(usable)} are usable here; use {change}"
    )
