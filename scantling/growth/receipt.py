"""The receipt of a growth: what was done, and measured proof that the function is the same and the new part can learn."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from scantling.checkpoint import weights_of
from scantling.costing import param_counts
from scantling.device import available_memory
from scantling.growth.layerwise import largest_part, layerwise_logits
from scantling.growth.steps import Step, notes
from scantling.growth.weights import applied
from scantling.hf_folder import load_weights
from scantling.hf_weights import cast
from scantling.lineage import Policy
from scantling.rows import rows
from scantling.spec import ModelSpec
from scantling.tensor_files import Held, Tensors

CHECKED_TOKENS = 32
STEP_SIZE = 1e-4  # of the sign-sized update after which logits are compared again
PRECISIONS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Receipt:
    """What a growth did.

    Attributes:
        steps: the expansions, in order.
        exact: False when a step is no function-preserving one.
        notes: why it is none, and what else to know before training.
        logit_difference: by precision, the largest absolute difference between logits of old tokens before and after, on
            random ids and on the given text; None with a reason in `not_measured`. Of models that do not fit into memory
            in float32 alone, and what follows but `largest_logit` is None.
        largest_logit: for scale.
        rounding: by precision, the largest difference of the *unchanged* model from itself in float64: what to expect.
        liveness: share of new parameters that a gradient reaches within two steps (rows of tokens not seen left out).
        one_step: largest change of a logit after one sign-sized update of STEP_SIZE.
    """

    source: str
    out: str
    steps: list[dict[str, str]]
    exact: bool
    params_before: int
    params_after: int
    logit_difference: dict[str, float] | None
    text_logit_difference: dict[str, float] | None
    largest_logit: float | None
    rounding: dict[str, float] | None
    liveness: float | None
    one_step: float | None
    not_measured: str | None
    optimizer: str | None = None
    format: str = "scantling"
    why_own_format: str | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `max_abs_logit_difference` is the float64 one, or the float32 one where it is the only one."""
        difference = self.logit_difference or {}
        largest = difference.get("float64", difference.get("float32"))
        return {**asdict(self), "max_abs_logit_difference": largest}


def receipt_of(
    source: str, out: str, before: ModelSpec, steps: Sequence[Step], proof: Mapping[str, Any], **more: Any
) -> Receipt:
    """The receipt of steps.

    Args:
        proof: what `measured` found.
        more: what else the receipt holds.
    """
    after = steps[-1].after if steps else before
    return Receipt(
        source,
        out,
        [{"rule": step.rule, "text": step.text} for step in steps],
        all(step.broken is None for step in steps),
        _parameters(before),
        _parameters(after),
        **proof,
        notes=notes(steps),
        **more,
    )


def _parameters(spec: ModelSpec) -> int:
    return int(param_counts(rows(spec))["total"])


def measured(
    before: ModelSpec, steps: Sequence[Step], weights: Tensors, policy: Policy, text: Tensor | None = None
) -> dict[str, Any]:
    """The measured half of a receipt; for each precision the old weights are cast to it and grown in it.

    Args:
        text: token ids (1, seq) to compare on beside random ones.
    """
    after = steps[-1].after if steps else before
    length = min(CHECKED_TOKENS, before.max_position_embeddings)
    ids = torch.randint(before.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    if (obstacle := _obstacle(before, after)) is not None:
        return _layerwise(before, steps, weights, policy, ids, text, obstacle)
    differences: dict[str, float] = {}
    on_text: dict[str, float] = {}
    rounding: dict[str, float] = {}
    largest, exact = 0.0, None
    for name, dtype in PRECISIONS.items():
        with torch.no_grad():
            given = cast(weights, dtype)
            old = load_weights(before, given, dtype)
            logits, words = old(ids).double(), None if text is None else old(text).double()
            del old
            new = load_weights(after, applied(given, list(steps), policy), dtype)
            differences[name] = _largest(new(ids)[..., : before.vocab_size].double() - logits)
            if text is not None and words is not None:
                on_text[name] = _largest(new(text)[..., : before.vocab_size].double() - words)
        exact = logits if exact is None else exact
        rounding[name] = _largest(logits - exact)
        largest = max(largest, _largest(logits))
    liveness, moved = _alive(after, steps, weights, applied(cast(weights, torch.float64), list(steps), policy), ids)
    return {
        "logit_difference": differences,
        "text_logit_difference": on_text or None,
        "largest_logit": largest,
        "rounding": rounding,
        "liveness": liveness,
        "one_step": moved,
        "not_measured": None,
    }


def not_measured(reason: str) -> dict[str, Any]:
    """The measured half of a receipt, empty."""
    names = ("logit_difference", "text_logit_difference", "largest_logit", "rounding", "liveness", "one_step")
    return {**dict.fromkeys(names), "not_measured": reason}


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _layerwise(
    before: ModelSpec,
    steps: Sequence[Step],
    weights: Tensors,
    policy: Policy,
    ids: Tensor,
    text: Tensor | None,
    why: str,
) -> dict[str, Any]:
    """Logits compared in float32, a part of a model in memory at a time; the rest of the measured half is empty."""
    after = steps[-1].after if steps else before
    wanted = 12 * max(largest_part(before), largest_part(after))  # a part, what it is made of, and what it computes
    if wanted > (free := available_memory()):
        return not_measured(f"{why}; part by part it needs {wanted:,}, {free:,} are free")
    given = cast(weights, torch.float32)
    grown = applied(given, list(steps), policy)
    differences, largest = [], 0.0
    for tokens in (ids,) if text is None else (ids, text):
        old = layerwise_logits(before, given, tokens)
        differences.append(_largest(layerwise_logits(after, grown, tokens)[..., : before.vocab_size] - old))
        largest = max(largest, _largest(old))
    on_text = None if text is None else {"float32": differences[1]}
    found = {
        "logit_difference": {"float32": differences[0]},
        "text_logit_difference": on_text,
        "largest_logit": largest,
    }
    return not_measured(f"{why}, so logits were compared part by part and only in float32") | found


def _obstacle(before: ModelSpec, after: ModelSpec) -> str | None:
    """Why the models cannot be measured in memory."""
    wanted, free = 8 * (_parameters(before) + 3 * _parameters(after)), available_memory()
    return None if wanted <= free else f"measuring needs {wanted:,} bytes of memory, {free:,} are free"


def new_entries(steps: Sequence[Step], weights: Tensors) -> dict[str, Tensor]:
    """Of every grown tensor which entries are new, as booleans."""
    ones = Held({name: torch.ones(weights.shape(name)) for name in weights.names})
    old = applied(ones, list(steps), Policy(moments="zero"), "first")
    have = set(old.names)
    after = held_shapes(steps, weights)
    return {
        name: old.tensor(name) == 0 if name in have else torch.ones(shape, dtype=torch.bool)
        for name, shape in after.items()
    }


def held_shapes(steps: Sequence[Step], weights: Tensors) -> dict[str, tuple[int, ...]]:
    """Shapes of the grown tensors."""
    grown = applied(weights, list(steps))
    return {name: grown.shape(name) for name in grown.names}


def _alive(
    spec: ModelSpec, steps: Sequence[Step], weights: Tensors, grown: Tensors, ids: Tensor
) -> tuple[float | None, float]:
    """The share of new entries a gradient reaches within two steps, and how far one step moves logits."""
    new = new_entries(steps, weights)
    model = load_weights(spec, grown, torch.float64).train()
    found, _ = weights_of(model)
    named = {name: parameter for name, parameter in model.named_parameters() if name in found}
    for table in ("embed_tokens.weight", "embed_positions.weight"):
        if table in new:  # rows that this batch does not look up have no gradient whatever they hold
            seen = torch.zeros(len(new[table]), dtype=torch.bool)
            seen[ids.flatten() if table.startswith("embed_tokens") else torch.arange(ids.shape[1])] = True
            new[table] = new[table] & seen.view(-1, *[1] * (new[table].ndim - 1))
    reached = {name: torch.zeros_like(flags) for name, flags in new.items()}
    before, moved = model(ids).detach(), 0.0
    for step in range(2):
        torch.autograd.backward(model.loss(ids, ids.roll(-1, 1)))
        with torch.no_grad():
            for name, parameter in named.items():
                if parameter.grad is not None:
                    reached[name] |= parameter.grad != 0
                    parameter.sub_(STEP_SIZE * parameter.grad.sign())
                    parameter.grad = None
            if step == 0:
                moved = _largest(model(ids) - before)
    total = sum(int(flags.sum()) for flags in new.values())
    alive = sum(int((reached[name] & flags).sum()) for name, flags in new.items())
    return (alive / total if total else None), moved
