"""Dense feed-forwards into routed experts: upcycling (arXiv 2410.07524; exactness derived).

Copies of one feed-forward give its output whatever the router says, as long as the weights of the chosen ones sum to 1. Or the
old feed-forward becomes the shared expert, and the routed ones start at zero: exact for every router.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from scantling.growth.axes import axes
from scantling.growth.steps import Computed, Inexact, Made, Moved, Source, Step, twins, with_layer
from scantling.parts import DenseFFN, ExpertFFN, MoEFFN
from scantling.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor


def upcycle(spec: ModelSpec, index: int, target: MoEFFN) -> Step:
    """Routed experts instead of a dense (or structured) feed-forward.

    Experts of a fraction of its width are shards, `shards` of them a whole copy. The router then has equal rows for the shards
    of a copy, so that all of them are chosen together, and what they write is multiplied by their number.

    Raises:
        Inexact: no exact start; the message names one.
    """
    ffn = spec.layers[index].ffn
    assert not isinstance(ffn, MoEFFN)
    after = with_layer(spec, index, ffn=target)
    shared = target.shared_expert == ffn
    shards = 1 if shared else _shards(index, ffn, target)
    sources: dict[str, Source] = {}
    scales: dict[str, float] = {}
    for at in twins(spec, index):
        prefix = f"layers.{at}.mlp."
        tails = [name.removeprefix(prefix) for name in axes(spec) if name.startswith(prefix)]
        sources[f"{prefix}gate.weight"] = Made("free", repeats=shards)
        sources |= {f"{prefix}shared_expert.{tail}": Moved(prefix + tail) for tail in tails if shared}
        for expert in range(target.num_local_experts):
            made = f"{prefix}experts.{expert}."
            if shared:
                ours = [name.removeprefix(made) for name in axes(after) if name.startswith(made)]
                sources |= {made + tail: Made("zero" if writes(tail) else "free") for tail in ours}
            elif shards == 1:
                sources |= {made + tail: Moved(prefix + tail) for tail in tails}
            else:
                sources |= {
                    made + tail: Computed((prefix + tail,), _shard(tail, expert % shards, shards), True)
                    for tail in tails
                }
                scales[f"{made}down_proj.weight"] = float(shards)
    how = "the old layer is the shared one" if shared else f"{shards} shards a copy" if shards > 1 else "copies"
    text = (
        f"layer {index}: {ffn.kind} to {target.num_local_experts} experts, {target.num_experts_per_tok} chosen; {how}"
    )
    warning = None
    if shards > 1:
        warning = (
            f"layer {index}: an update of the router parts the {shards} shards of a copy, so the first steps of training change "
            "the function far more than those of a model with whole copies"
        )
    return Step("upcycle", text, spec, after, scales=scales, sources=sources, warning=warning)


def writes(tail: str) -> bool:
    """Whether a feed-forward's parameter is the last thing before the residual stream."""
    return tail.startswith("down_proj.") and tail != "down_proj.down.weight"


def _shard(tail: str, shard: int, shards: int) -> "Callable[[Sequence[Tensor]], Tensor]":
    """A shard's rows of gate and up, its columns of down."""
    axis = 1 if tail == "down_proj.weight" else 0
    return lambda given: given[0].chunk(shards, axis)[shard].contiguous()


def _shards(index: int, ffn: ExpertFFN, target: MoEFFN) -> int:
    """Experts that make up one copy of the feed-forward.

    Raises:
        Inexact: the target's experts do not add up to it.
    """
    where = f"layers[{index}].ffn"
    if target.shared_expert is not None:
        raise Inexact(
            f"{where}: a shared expert other than the old feed-forward changes the function; expected shared_expert equal to "
            "it (the routed experts then start at zero), or none"
        )
    if target.router_softmax == "before" and not target.norm_topk_prob:
        raise Inexact(
            f"{where}: router_softmax: before with norm_topk_prob: false multiplies the output by the chosen probabilities' "
            "sum; expected norm_topk_prob: true, router_softmax: after, or a shared_expert equal to the old feed-forward"
        )
    inner, each = ffn.intermediate_size, target.expert.intermediate_size
    if target.expert.kind != ffn.kind or target.expert.replace(intermediate_size=inner) != ffn:
        raise Inexact(
            f"{where}: expected experts of the old feed-forward's kind ({ffn.kind}), activation, gate and biases"
        )
    if inner % each:
        raise Inexact(f"{where}: experts of {each} are no equal shards of {inner}; expected a divisor of {inner}")
    shards = inner // each
    if shards > 1 and (not isinstance(ffn, DenseFFN) or ffn.bias):
        raise Inexact(
            f"{where}: only dense feed-forwards without biases split into shards; expected experts of {inner}"
        )
    if target.num_experts_per_tok % shards or target.num_local_experts % shards:
        raise Inexact(
            f"{where}: a copy is {shards} experts of {each}: expected num_local_experts and num_experts_per_tok as multiples "
            f"of {shards}, got {target.num_local_experts} and {target.num_experts_per_tok}"
        )
    return shards
