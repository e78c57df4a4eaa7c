"""How a model is trained: optimizers, schedules, guards and every other setting of one run beside model and data."""

from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from scantling.errors import InputError
from scantling.parts import Fraction, Frozen, Positive, Real, Size
from scantling.units import parse_count
from scantling.yamlio import show


def _count(value: object) -> object:
    """A count as people write it: 400000, 4e5, "300M"."""
    if isinstance(value, str):
        try:
            return parse_count(value)
        except InputError as error:
            raise ValueError(f"expected a count such as 4e5 or 300M, got {show(value)}") from error
    if isinstance(value, bool):
        raise ValueError(f"expected a count, got {show(value)}")
    return value


Count = Annotated[float, BeforeValidator(_count), Field(gt=0, allow_inf_nan=False)]


# --- optimizers ----------------------------------------------------------------------------------------------------------


Decay = Annotated[Real, Field(ge=0, lt=1)]


class AdamW(Frozen):
    """Decoupled weight decay; torch's fused implementation."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: Positive = 3e-3
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: Real = Field(default=0.1, ge=0)


class Muon(Frozen):
    """Orthogonalised momentum (torch's own) for the matrices of the layers; AdamW, as above, for all the rest.

    Attributes:
        learning_rate: peak, of the AdamW part; the schedule's factor acts on both.
        matrix_learning_rate: peak, of the Muon part.
        adjust: how the update is scaled by a matrix's shape: `original` sqrt(max(1, out/in)), or `match_rms_adamw`
            0.2 sqrt(max(out, in)), with which AdamW's learning rates can be reused.
    """

    kind: Literal["muon"]
    learning_rate: Positive = 3e-3
    matrix_learning_rate: Positive = 0.02
    momentum: Decay = 0.95
    nesterov: bool = True
    ns_steps: Size = 5
    adjust: Literal["original", "match_rms_adamw"] = "original"
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: Real = Field(default=0.1, ge=0)


class SGD(Frozen):
    """Stochastic gradient descent with momentum; torch's fused implementation."""

    kind: Literal["sgd"]
    learning_rate: Positive = 0.1
    momentum: Decay = 0.9
    nesterov: bool = False
    weight_decay: Real = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _nesterov_looks_ahead_of_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0, got 0; set nesterov: false")
        return self


def _optimizer_kind(value: Any) -> Any:
    """The kind of an optimizer; a mapping that names none means AdamW."""
    return value.get("kind", "adamw") if isinstance(value, dict) else getattr(value, "kind", None)


Optimizer = Annotated[
    Annotated[AdamW, Tag("adamw")] | Annotated[Muon, Tag("muon")] | Annotated[SGD, Tag("sgd")],
    Discriminator(_optimizer_kind),
]


# --- schedules -----------------------------------------------------------------------------------------------------------


class Cosine(Frozen):
    """Linear warm-up over `warmup` of the steps, then a cosine to `final` of the peak."""

    kind: Literal["cosine"]
    warmup: Fraction = 0.05
    final: Fraction = 0.1


class WSD(Frozen):
    """Linear warm-up, constant, then a cosine decay over the last `decay` of the steps to `final` of the peak.

    arXiv 2503.09579, appendix D (defaults are theirs).
    """

    kind: Literal["wsd"]
    warmup: Fraction = 0.1
    decay: Fraction = 0.2
    final: Fraction = 0.1


class LinearDecay(Frozen):
    """Linear warm-up over `warmup` of the steps, then a straight line to `final` of the peak."""

    kind: Literal["linear"]
    warmup: Fraction = 0.05
    final: Fraction = 0.0


class Constant(Frozen):
    """Linear warm-up over `warmup` of the steps, then constant."""

    kind: Literal["constant"]
    warmup: Fraction = 0.0


class Power(Frozen):
    """Linear warm-up over `warmup` of the steps, then min(peak, a x (tokens so far)^exponent).

    The warm-up rises to the power law's value at its end. Defaults: the authors' for batches of 524288 tokens; they take a =
    batch_tokens / 1024 (arXiv 2606.18246, section 3.1).
    """

    kind: Literal["power"]
    warmup: Fraction = 0.08
    a: Positive = 512.0
    exponent: Real = Field(default=-0.566, le=0)


Schedule = Annotated[Cosine | WSD | LinearDecay | Constant | Power, Field(discriminator="kind")]


class BatchWarmup(Frozen):
    """The batch grows in a straight line from `start_batch_tokens` to batch_tokens over the first `warmup` of the tokens.

    Whole sequences, at least as many as before at every step; the token budget stays, so there are more steps.
    """

    start_batch_tokens: Size
    warmup: Fraction = 0.1


# --- learning rates by parameter -----------------------------------------------------------------------------------------


class MuP(Frozen):
    """Learning rates of matrices by width, so that one tuned rate serves every size and every layer of a ><former.

    A layer's matrix, or a transition's, gets the rate x base_hidden_size / fan_in, fan_in being its own input width (arXiv
    2203.03466, table 8, for Adam); tables, head, gains and biases keep the full rate. The rate alone is not all of muP: the
    initial weights, logits_scaling and attention_multiplier belong to it (docs/recipes.md, `train --coord-check`).
    """

    kind: Literal["mup"]
    base_hidden_size: Size = 256


class MatrixDivisor(Frozen):
    """The ><former's recipe: the layers' matrices learn at rate / m_width at every size, the rest at the full rate.

    arXiv 2606.18246, section 4, and its released configurations (m_width is 8 at every size).
    """

    kind: Literal["matrix_divisor"]
    m_width: Positive = 8.0


Parametrization = Annotated[MuP | MatrixDivisor, Field(discriminator="kind")]


# --- what may go wrong, and guidance ---------------------------------------------------------------------------------------


class Guard(Frozen):
    """What to do when a step's loss or gradient is not finite, or its loss is a spike. Every event is recorded.

    `stop` ends the run as diverged; `skip` leaves that update out; `rollback` goes back to the last checkpoint and passes
    over the data since.

    Attributes:
        non_finite: the policy for NaN and infinity.
        spike: the policy for a loss above the median of the last 64 by more than `spike_sigmas` robust standard deviations
            (1.4826 x median absolute deviation, at least 1 % of the median).
        most: after so many events the run stops in any case.
    """

    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    spike: Literal["ignore", "stop", "skip", "rollback"] = "ignore"
    spike_sigmas: Positive = 8.0
    most: Size = 10


class SelfGuided(Frozen):
    """Dense guides for structured feed-forwards that fade out (arXiv 2406.16450, sections 2.3 and 4.4).

    Attributes:
        mode: `fixed_tokens` guides the first `ratio` of the steps at the same tokens; `fixed_flops` does too, then repeats
            the data of the guided steps at the end without guides, so that the whole costs as much as the dense model.
        ratio: share of the planned steps that are guided; default 0.5 for fixed_tokens, and for fixed_flops the one that
            makes the FLOPs equal.
        stochastic: use the guide with probability alpha (half the cost) instead of always.
        shape: of alpha from 1 to 0.
    """

    mode: Literal["fixed_tokens", "fixed_flops"] = "fixed_tokens"
    ratio: Positive | None = Field(default=None, le=1)
    stochastic: bool = True
    shape: Literal["cosine", "linear"] = "cosine"


class Parallel(Frozen):
    """How a run is spread over the processes of torchrun; one process needs none of it.

    Attributes:
        kind: `ddp` (a copy of the model each), `fsdp` (weights, gradients and optimizer state sharded).
        tensor: processes that share every wide layer (tensor parallelism); data parallelism takes the rest.
        activation_checkpointing: recompute each layer in the backward pass instead of keeping its values; also for one process.
    """

    kind: Literal["ddp", "fsdp"] = "ddp"
    tensor: Size = 1
    activation_checkpointing: bool = False


Precision = Literal["float32", "bfloat16"]
# Settings that decide nothing about the resulting weights beyond rounding, and may change between two starts of one run.
UNHASHED = frozenset({"checkpoint_every", "keep_last", "keep_best", "compile", "deterministic", "parallel", "trackers"})


class TrainConfig(Frozen):
    """One training run beside its model and data.

    Attributes:
        tokens: training budget; rounded to whole steps.
        batch_tokens: tokens per optimizer step: sequences x sequence_length.
        sequence_length: tokens per sequence.
        gradient_accumulation_steps: micro-batches that make up one step; by default the fewest that fit into memory.
        batch_warmup: begin with smaller batches.
        parametrization: learning rates of matrices by width; by default every parameter learns at the same rate.
        weight_decay_on: `matrices` (and tables), `matrices_without_tables`, or `all` parameters.
        max_grad_norm: global gradient norm is clipped to this; 0 does not clip.
        z_loss: weight of the mean squared log-normaliser of the logits (arXiv 2204.02311, section 5).
        average_decay: keep an exponential moving average of the weights with this decay per step, and evaluate that.
        document_mask: attention does not reach into an earlier document of the same sequence.
        precision: `float32`; `bfloat16` (autocast; weights and optimizer stay float32); `auto`: bfloat16 where the device
            computes in it, decided at the first start and recorded.
        compile: torch.compile; `auto` takes it for runs long enough that a measured gain pays for the compilation.
        deterministic: only algorithms that give the same bits every time; a CPU has no others, a GPU is slower with them.
        guide: self-guided training of structured feed-forwards.
        guard: what to do when a step goes wrong.
        parallel: how the processes of torchrun share the work.
        checkpoint_every: steps between checkpoints; keep_last of them stay.
        keep_best: also keep the checkpoint with the lowest validation loss (needs evaluate_every).
        evaluate_every: steps between validation losses; the final one is always taken.
        validation_tokens: at most this many tokens of the validation split per evaluation.
        trackers: besides the console and metrics.jsonl.
    """

    tokens: Count
    batch_tokens: Size = 8192
    sequence_length: Size = 256
    gradient_accumulation_steps: Size | None = None
    batch_warmup: BatchWarmup | None = None
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Cosine(kind="cosine")
    parametrization: Parametrization | None = None
    weight_decay_on: Literal["matrices", "matrices_without_tables", "all"] = "matrices"
    max_grad_norm: Real = Field(default=1.0, ge=0)
    z_loss: Real = Field(default=0.0, ge=0)
    average_decay: Real | None = Field(default=None, gt=0, lt=1)
    document_mask: bool = False
    precision: Precision | Literal["auto"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    deterministic: bool = False
    guide: SelfGuided | None = None
    guard: Guard = Guard()
    parallel: Parallel = Parallel()
    seed: int = Field(default=0, ge=0, lt=2**63)
    checkpoint_every: Size = 500
    keep_last: Size = 2
    keep_best: bool = False
    evaluate_every: Size | None = None
    validation_tokens: Count = 262144
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        unit = self.sequence_length * (self.gradient_accumulation_steps or 1)
        parts = (
            "sequence_length x gradient_accumulation_steps" if self.gradient_accumulation_steps else "sequence_length"
        )
        if self.batch_tokens % unit:
            raise ValueError(f"batch_tokens {self.batch_tokens} is not a multiple of {parts} = {unit}")
        if self.batch_warmup is not None:
            start = self.batch_warmup.start_batch_tokens
            if start > self.batch_tokens or start < self.sequence_length:
                raise ValueError(
                    f"batch_warmup.start_batch_tokens: expected {self.sequence_length} (one sequence) to {self.batch_tokens}, "
                    f"got {start}"
                )
        if self.parametrization is not None and not isinstance(self.optimizer, AdamW):
            # Under SGD muP wants other rates; Muon's orthogonal updates need none (with adjust: original).
            raise ValueError(
                f"parametrization {self.parametrization.kind} holds for adamw, got optimizer {self.optimizer.kind}; "
                "remove parametrization or use adamw"
            )
        if self.keep_best and self.evaluate_every is None:
            raise ValueError("keep_best needs evaluate_every, which says when the validation loss is taken")
        return self

    @property
    def batch_sequences(self) -> int:
        """Sequences of a full step."""
        return self.batch_tokens // self.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps through the token budget: tokens / batch_tokens, rounded, more with batch_warmup."""
        return len(self.sequences_before) - 1

    @cached_property
    def sequences_before(self) -> tuple[int, ...]:
        """Sequences that came before each step, and last the total: step s takes [before[s], before[s + 1])."""
        total = max(1, round(self.tokens / self.batch_tokens)) * self.batch_sequences
        warm = self.batch_warmup
        if warm is None:
            return tuple(range(0, total + 1, self.batch_sequences))
        before, first, ramp = [0], max(1, warm.start_batch_tokens // self.sequence_length), warm.warmup * total
        while before[-1] < total:
            done = min(1.0, before[-1] / ramp) if ramp else 1.0
            count = first + round(done * (self.batch_sequences - first))
            before.append(min(total, before[-1] + count))
        return tuple(before)
