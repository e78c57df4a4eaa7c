"""The coordinate check of muP: do activations after a few steps depend on the width of the model?

The run's model is built at several widths, trained for a few steps on the run's own batches at the full peak rate, and the
mean absolute value of every layer's attention output, feed-forward output and residual stream, and of the logits, is
recorded (arXiv 2203.03466, appendix D.1). Under a right parametrization none of them grows with width, so a learning rate
tuned at a small width serves a large one; under the standard one they do.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from scantling.config import RunConfig
from scantling.data import Dataset
from scantling.errors import InputError, RunError
from scantling.model import Decoder, build
from scantling.optim import apply, lacking_for_mup, make_optimizers, mup_logits_scaling
from scantling.parts import FFN, MoEFFN
from scantling.recipe import MuP
from scantling.resolve import plain_message
from scantling.spec import LayerSpec, ModelSpec

MULTIPLIERS = (1, 2, 4, 8)
# Slope of log2 |activation| against log2 width from which a quantity depends on width. Measured after 5 steps (LOG.md): right
# muP at most 0.17 with 4 seeds (single seeds scatter by 0.25 at width 32); logits_scaling missing 0.5; standard up to 3.
GROWS = 0.25
KINDS = ("attention", "ffn", "residual", "logits")
TITLES = {
    "attention": "attention output",
    "ffn": "feed-forward output",
    "residual": "residual stream",
    "logits": "logits",
}
Quantity = tuple[str, int | None]  # kind, layer


@dataclass(frozen=True)
class Slope:
    """How one quantity depends on width: slope of log2 mean |activation| against log2 width."""

    kind: str
    layer: int | None
    start: float
    end: float

    @property
    def name(self) -> str:
        """The quantity as a person calls it."""
        return TITLES[self.kind] + ("" if self.layer is None else f" of layer {self.layer}")


@dataclass(frozen=True)
class CoordinateCheck:
    """What a check found.

    Attributes:
        widths: the widest layer of each model, by multiplier.
        steps: optimizer steps; step s is measured after s updates, so 0 is the initial model.
        table: one row per quantity, multiplier, seed and step: kind, layer, multiplier, width, seed, step, mean_abs.
        slopes: of every quantity before the first and after the last step, over the mean of the seeds.
        warnings: what the run lacks for muP, in sentences.
    """

    name: str
    widths: dict[float, int]
    steps: int
    learning_rate: float
    table: list[dict[str, Any]]
    slopes: list[Slope]
    warnings: list[str]

    @property
    def worst(self) -> dict[str, Slope]:
        """The steepest slope after the last step among the layers, by kind."""
        return {kind: max((s for s in self.slopes if s.kind == kind), key=lambda s: s.end) for kind in KINDS}

    @property
    def grows(self) -> bool:
        """Whether anything does."""
        return any(slope.end >= GROWS for slope in self.worst.values())

    @property
    def verdict(self) -> str:
        """The finding in a sentence or two."""
        low, high = min(self.widths.values()), max(self.widths.values())
        where = f"After {self.steps} steps at widths {low} to {high}"
        growing = [slope for slope in self.worst.values() if not slope.end < GROWS]
        if growing:
            which = "; ".join(f"{slope.name} as width^{slope.end:.2f}" for slope in growing)
            return f"{where} activations grow with width: {which}. A learning rate tuned at one width is not right at another."
        steepest = max(slope.end for slope in self.slopes)
        return (
            f"{where} no activation grows with width at learning rate {self.learning_rate:g} (steepest: width^{steepest:.2f}, "
            f"growth begins at {GROWS}), as a learning rate that serves every width needs."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data: what `show.coordinates` and `reporting.coordinates_page` take, and --json prints."""
        return {
            "name": self.name,
            "verdict": self.verdict,
            "grows": self.grows,
            "threshold": GROWS,
            "widths": {f"{multiplier:g}": width for multiplier, width in self.widths.items()},
            "steps": self.steps,
            "learning_rate": self.learning_rate,
            "steepest": [{"name": slope.name, **asdict(slope)} for slope in self.worst.values()],
            "slopes": [asdict(slope) for slope in self.slopes],
            "warnings": self.warnings,
            "table": self.table,
        }


# --- models of other widths ----------------------------------------------------------------------------------------------


def scaled(
    spec: ModelSpec, multiplier: float, by: Literal["heads", "head_dim"] = "heads", mup: MuP | None = None
) -> ModelSpec:
    """The model with every width times `multiplier`: stream, attention, feed-forwards, ranks, tables.

    Depth, vocabulary, blocks and numbers of experts stay. So do numbers that a spec states outright, but for two that muP
    ties to a width: an `attention_multiplier` is divided by `multiplier` where head sizes grow (it is 1/d under muP), and
    with `mup` a `logits_scaling` that satisfies muP (`mup_logits_scaling`) is multiplied by it.

    Args:
        by: what makes attention wider: more heads of the same size, or the same heads of larger size.
        mup: the run's parametrization, if that is muP.

    Raises:
        InputError: a size times `multiplier` is not a whole number, or makes an impossible model.
    """

    def times(size: int | None) -> Any:
        if size is None:
            return None
        wide = size * multiplier
        if wide != int(wide):
            raise InputError(
                f"coordinate check: expected whole sizes, got {size} x {multiplier:g}; choose other multipliers"
            )
        return int(wide)

    def ffn(part: FFN) -> FFN:
        if isinstance(part, MoEFFN):
            shared = ffn(part.shared_expert) if part.shared_expert is not None else None
            return part.replace(expert=ffn(part.expert), shared_expert=shared)
        rank = {"rank": times(part.rank)} if hasattr(part, "rank") else {}
        return part.replace(intermediate_size=times(part.intermediate_size), **rank)

    def layer(part: LayerSpec) -> LayerSpec:
        sizes = ["hidden_size", "attention_input_size", "ffn_output_size"]
        sizes += ["num_attention_heads", "num_key_value_heads"] if by == "heads" else ["head_dim", "v_head_dim"]
        changes: dict[str, Any] = {key: times(getattr(part, key)) for key in sizes}
        if by == "head_dim" and part.attention_multiplier is not None:
            changes["attention_multiplier"] = part.attention_multiplier / multiplier
        return part.replace(ffn=ffn(part.ffn), **changes)

    changes: dict[str, Any] = {}
    if mup is not None and math.isclose(spec.logits_scaling, mup_logits_scaling(spec, mup)):
        changes["logits_scaling"] = spec.logits_scaling * multiplier
    try:
        return spec.replace(
            embedding_size=times(spec.embedding_size),
            unembedding_size=times(spec.unembedding_size),
            layers=tuple(layer(part) for part in spec.layers),
            **changes,
        )
    except ValidationError as error:
        faults = "; ".join(plain_message(item) for item in error.errors(include_url=False))
        raise InputError(f"coordinate check: the model at {multiplier:g} times its widths: {faults}") from None


# --- measuring -----------------------------------------------------------------------------------------------------------


def coordinate_check(
    config: RunConfig,
    dataset: Dataset,
    *,
    multipliers: Sequence[float] = MULTIPLIERS,
    steps: int = 5,
    seeds: Sequence[int] = (0, 1, 2, 3),
    by: Literal["heads", "head_dim"] = "heads",
    sequences: int = 8,
    device: str = "cpu",
    report: Callable[[str], None] | None = None,
) -> CoordinateCheck:
    """Train the run's model at several widths for a few steps and compare its activations.

    The schedule plays no part: every step has the full peak rate. float32 throughout.

    Args:
        config: the run; its model is multiplier 1.
        dataset: its data; all models see the same batches.
        multipliers: of the widths, at least two.
        steps: updates.
        seeds: of the initial weights; the slopes are those of their geometric mean.
        by: what makes attention wider (`scaled`).
        sequences: at most so many of the run's sequences per step.
        device: where to train.
        report: told about every width before its models are trained.

    Raises:
        InputError: fewer than two multipliers, or one that makes no whole sizes.
        RunError: an activation is not finite.
    """
    if len(set(multipliers)) < 2:
        raise InputError(f"coordinate check: expected at least two width multipliers, got {list(multipliers)}")
    train = config.train
    mup = train.parametrization if isinstance(train.parametrization, MuP) else None
    batch, table = min(train.batch_sequences, sequences), []
    specs = {multiplier: scaled(config.spec, multiplier, by, mup) for multiplier in sorted(multipliers)}
    widths = {multiplier: max(spec.widths) for multiplier, spec in specs.items()}
    batches = [
        [
            torch.from_numpy(ids).to(device)
            for ids in dataset.batch(
                seed=train.seed, step=step, batch_sequences=batch, sequence_length=train.sequence_length
            )
        ]
        for step in range(steps + 1)
    ]
    for multiplier, spec in specs.items():
        if report is not None:
            report(f"coordinate check: width {widths[multiplier]}, {len(seeds)} x {steps} steps")
        for seed in seeds:
            labels = {"multiplier": multiplier, "width": widths[multiplier], "seed": seed}
            for step, means in enumerate(_activations(config, build(spec, seed, device), batches)):
                for (kind, layer), tensor in means.items():
                    value = tensor.item()
                    if not math.isfinite(value) or value == 0:
                        where = TITLES[kind] + ("" if layer is None else f" of layer {layer}")
                        raise RunError(
                            f"coordinate check: mean |{where}| is {value} at width {widths[multiplier]} after {step} steps; "
                            f"lower the learning rate {train.optimizer.learning_rate:g}"
                        )
                    table.append({"kind": kind, "layer": layer, **labels, "step": step, "mean_abs": value})
    return CoordinateCheck(
        name=config.name,
        widths=widths,
        steps=steps,
        learning_rate=train.optimizer.learning_rate,
        table=table,
        slopes=_slopes(table, steps),
        warnings=lacking_for_mup(config.spec, train, by == "head_dim"),
    )


def _activations(config: RunConfig, model: Decoder, batches: list[list[Tensor]]) -> Iterator[dict[Quantity, Tensor]]:
    """Means of |activation| on each batch, an update after each but the last."""
    optimizers, go = make_optimizers(model, config.train), torch.zeros((), device=batches[0][0].device)
    with _measured(model) as means:
        for number, (inputs, labels) in enumerate(batches):
            logits = model(inputs)  # with gradients on the last batch too: without, layers work in place
            yield {**means, ("logits", None): logits.detach().abs().mean()}
            if number == len(batches) - 1:
                return
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)
            (loss + model.auxiliary_loss()).backward()
            if config.train.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
            for optimizer in optimizers:
                apply(optimizer, go)
                optimizer.zero_grad(set_to_none=True)


@contextmanager
def _measured(model: Decoder) -> Iterator[dict[Quantity, Tensor]]:
    """A mapping that every forward pass fills with the mean |output| of each layer and its parts."""
    means: dict[Quantity, Tensor] = {}
    parts: list[tuple[Quantity, torch.nn.Module]] = []
    for index, layer in enumerate(model.layers):
        parts += [(("attention", index), layer.self_attn), (("ffn", index), layer.mlp), (("residual", index), layer)]  # type: ignore[list-item]

    def hook(key: Quantity) -> Any:
        def note(_module: object, _inputs: object, output: Tensor) -> None:
            means[key] = output.detach().abs().mean()

        return note

    handles = [part.register_forward_hook(hook(key)) for key, part in parts]
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()


def _slopes(table: list[dict[str, Any]], steps: int) -> list[Slope]:
    """Least-squares slopes of log2 mean |activation| against log2 multiplier, at the first and the last step."""
    logs: dict[tuple[str, int | None, int, float], list[float]] = {}
    for row in table:
        key = (row["kind"], row["layer"], row["step"], row["multiplier"])
        logs.setdefault(key, []).append(math.log2(row["mean_abs"]))

    def slope(kind: str, layer: int | None, step: int) -> float:
        points = [(math.log2(at[3]), fmean(values)) for at, values in logs.items() if at[:3] == (kind, layer, step)]
        x0, y0 = (fmean(side) for side in zip(*points, strict=True))
        return sum((x - x0) * (y - y0) for x, y in points) / sum((x - x0) ** 2 for x, _ in points)

    quantities = dict.fromkeys((row["kind"], row["layer"]) for row in table)
    return [Slope(kind, layer, slope(kind, layer, 0), slope(kind, layer, steps)) for kind, layer in quantities]
