"""Where the time of a training step goes: torch's profiler over a few steps, grouped and said in plain sentences."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

DATA = "scantling::data"  # a training loop puts torch.profiler.record_function(DATA) around making a batch

# Group -> how a sentence names it, the share of a step above which it is unusual, and what to do then.
GROUPS: dict[str, tuple[str, float, str]] = {
    "matrix_products": ("matrix products", 1.0, ""),
    "attention": ("attention", 0.35, "shorter sequences or fewer query heads would lower it"),
    "elementwise": ("normalisation and elementwise operations", 0.35, "compile: on fuses them"),
    "cross_entropy": ("cross-entropy", 0.2, "a smaller vocabulary lowers it, and its share falls as the model grows"),
    "optimizer": ("optimizer and clipping", 0.2, "more tokens per step (batch_tokens) spread it over more work"),
    "data": ("data", 0.05, "keep the token cache on a faster disk"),
    "other": (
        "everything else",
        0.3,
        "operations are small: larger micro-batches, or compile: on, would fill the device",
    ),
}
PRODUCTS = ("mm", "addmm", "linear", "matmul", "mkldnn_linear", "_mkl_linear", "addbmm", "einsum", "conv")
OPTIMIZER = ("_fused_adam", "_fused_sgd", "_foreach_", "linalg_vector_norm", "clip_grad")
LOSS = ("log_softmax", "nll_loss", "cross_entropy", "logsumexp")
ATTENTION = ("scaled_dot_product", "flash_attention", "efficient_attention", "softmax", "cudnn_attention")
REGIONS = {"Optimizer.": "optimizer", DATA: "data"}


@dataclass(frozen=True)
class Operation:
    """One torch operation of a group.

    Attributes:
        seconds: own time per step, its parts aside.
        calls: per step.
    """

    name: str
    seconds: float
    calls: float


@dataclass(frozen=True)
class Group:
    """Operations of one purpose; `share` of the profiled step, `operations` from the dearest on."""

    name: str
    share: float
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Profile:
    """What `profile_steps` found.

    Attributes:
        seconds: wall time of one step without the profiler.
        flops_per_second: achieved in it.
        ceiling: FLOP/s of matrix products, as measured.
        groups: from the dearest on; their shares sum to 1.
        vocab_size: for the sentences.
    """

    seconds: float
    flops_per_second: float
    ceiling: float
    groups: tuple[Group, ...]
    vocab_size: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data; seconds and calls are per step."""
        return {
            "seconds_per_step": self.seconds,
            "flops_per_second": self.flops_per_second,
            "ceiling_flops_per_second": self.ceiling,
            "share_of_ceiling": self.flops_per_second / self.ceiling,
            "groups": [
                {
                    "name": group.name,
                    "share": group.share,
                    "operations": [vars(operation) for operation in group.operations],
                }
                for group in self.groups
            ],
            "advice": self.advice(),
        }

    def sentences(self) -> list[str]:
        """Speed, then the share of every group that took any, then the advice if there is some."""
        achieved = self.flops_per_second
        said = [
            f"A step takes {self.seconds * 1e3:,.1f} ms: {achieved / 1e9:,.1f} GFLOP/s, {achieved / self.ceiling:.0%} of the "
            f"{self.ceiling / 1e9:,.1f} GFLOP/s that matrix products reach here."
        ]
        for group in self.groups:
            if group.share >= 0.001:
                largest = ", ".join(f"{item.name} {item.seconds * 1e3:.2f} ms" for item in group.operations[:3])
                name = self._said(group.name)
                said.append(
                    f"{name[0].upper()}{name[1:]}: {group.share:.1%} of the step{f' ({largest})' if largest else ''}."
                )
        advice = self.advice()
        return [*said, advice] if advice else said

    def advice(self) -> str | None:
        """One sentence on the group that is furthest above what is usual; None when none is."""
        unusual = [group for group in self.groups if group.share > GROUPS[group.name][1]]
        if not unusual:
            return None
        group = max(unusual, key=lambda each: each.share / GROUPS[each.name][1])
        return f"The {self._said(group.name)} takes {group.share:.0%} of the step; {GROUPS[group.name][2]}."

    def _said(self, name: str) -> str:
        text = GROUPS[name][0]
        return f"{text} over {self.vocab_size:,} ids" if name == "cross_entropy" and self.vocab_size else text


def profile_steps(
    step: Callable[[], None],
    flops_per_step: float,
    ceiling: float,
    steps: int = 5,
    vocab_size: int | None = None,
    sequence_length: int | None = None,
) -> Profile:
    """Run one step to warm up, `steps` to time, and `steps` under the profiler.

    Args:
        step: one whole optimizer step, data included.
        flops_per_step: that it performs.
        ceiling: FLOP/s, see `device.matmul_ceiling`.
        vocab_size: with it, products with the output table count as cross-entropy; None where a width of the layers is as
            large, so that shapes do not tell them apart.
        sequence_length: with it, batched products without a side of that length (block-diagonal feed-forwards) count as
            matrix products instead of attention.
    """
    step()
    seconds = _seconds(step, steps)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        wall = _seconds(step, steps)
    groups = grouped(profiler.events() or (), wall, steps, vocab_size, sequence_length)
    return Profile(seconds, flops_per_step / seconds, ceiling, groups, vocab_size)


def _seconds(step: Callable[[], None], steps: int) -> float:
    """Wall time of one of so many steps."""
    started = time.perf_counter()
    for _ in range(steps):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


def grouped(
    events: Iterable[FunctionEvent],
    wall: float,
    steps: int,
    vocab_size: int | None = None,
    sequence_length: int | None = None,
) -> tuple[Group, ...]:
    """Own times of all events by group, from the dearest on; time outside all operations is `other`.

    Args:
        events: of `steps` steps. Where they have device times those count, else the processor's.
        wall: seconds of one step.
    """
    found = list(events)
    on_device = any(event.self_device_time_total > 0 for event in found)
    totals: dict[str, dict[str, list[float]]] = {name: {} for name in GROUPS}
    for event in found:
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        group = _region(event) or group_of(event.name, event.input_shapes or (), vocab_size, sequence_length)
        if own > 0:
            entry = totals[group].setdefault(event.name.removeprefix("aten::"), [0.0, 0.0])
            entry[0] += own / 1e6 / steps
            entry[1] += 1 / steps
    spent = sum(seconds for operations in totals.values() for seconds, _ in operations.values())
    whole = max(wall, spent)
    result = []
    for name, operations in totals.items():
        rest = whole - spent if name == "other" else 0.0
        items = sorted((Operation(op, *numbers) for op, numbers in operations.items()), key=lambda item: -item.seconds)
        result.append(Group(name, (sum(item.seconds for item in items) + rest) / whole, tuple(items)))
    return tuple(sorted(result, key=lambda group: -group.share))


def _region(event: FunctionEvent) -> str | None:
    """The group of an annotated region that an event is or lies in."""
    at: FunctionEvent | None = event
    while at is not None:
        for start, group in REGIONS.items():
            if at.name.startswith(start):
                return group
        at = at.cpu_parent
    return None


def group_of(
    name: str, shapes: Sequence[Any], vocab_size: int | None = None, sequence_length: int | None = None
) -> str:
    """The group of one operation by its name and the shapes of its inputs, see `profile_steps`."""
    if not name.startswith("aten::"):
        return "other"
    short = name.removeprefix("aten::")
    sides = {side for shape in shapes if isinstance(shape, Sequence) for side in shape}
    if short.startswith(OPTIMIZER):
        return "optimizer"
    if short.startswith(LOSS) or short.lstrip("_").startswith(LOSS):
        return "cross_entropy"
    if any(word in short for word in ATTENTION):
        return "attention"
    if short.startswith(("bmm", "baddbmm")):
        return "attention" if sequence_length is None or sequence_length in sides else "matrix_products"
    if any(_of_the_vocabulary(shape, vocab_size) for shape in shapes) and not short.startswith(("embedding", "index")):
        return "cross_entropy"
    if short.startswith(PRODUCTS):
        return "matrix_products"
    return "elementwise"


def _of_the_vocabulary(shape: Any, vocab_size: int | None) -> bool:
    """Whether a tensor has logits in its rows, or is a table; a length or width in the middle may be as large."""
    if vocab_size is None or not isinstance(shape, Sequence) or not shape:
        return False
    return bool(shape[-1] == vocab_size or (len(shape) == 2 and shape[0] == vocab_size))
