"""The path from one spec to another: which expansions, in which order, or why there is none."""

import math
from collections.abc import Iterator, Sequence

from scantling.errors import InputError
from scantling.growth.attention import grow_heads, grow_key, grow_value, over_new, share_less
from scantling.growth.copies import grow_by_copies
from scantling.growth.depth import insert_layers
from scantling.growth.experts import upcycle
from scantling.growth.feedforward import PLAIN, common_parts, grow_inner, grow_rank, inside, materialise, merge_blocks
from scantling.growth.hidden import LAYER_FIELDS, MODEL_FIELDS, grow_hidden
from scantling.growth.steps import Inexact, Step
from scantling.growth.tables import add_biases, grow_positions, grow_vocabulary, untie
from scantling.lineage import USUAL, Policy
from scantling.parts import (
    FFN,
    BlockDenseFFN,
    BlockShuffleFFN,
    CarryForward,
    DenseFFN,
    ExpertFFN,
    LowRankFFN,
    MoEFFN,
    Transition,
    Zero,
)
from scantling.resolve import to_mapping
from scantling.spec import LayerSpec, ModelSpec
from scantling.yamlio import show

TRAINING_ONLY = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}


def path(spec: ModelSpec, target: ModelSpec, policy: Policy = USUAL) -> tuple[Step, ...]:
    """Expansions from `spec` to `target`, each exact but for stacked layers and `qk_noise`.

    Raises:
        InputError: a dimension cannot be reached exactly (the message names the nearest exact target), or an option does not fit.
    """
    width, snr_db, qk_noise = policy.width, policy.snr_db, policy.qk_noise
    if snr_db is not None and (width != "copies" or not math.isfinite(snr_db)):
        raise InputError(f"snr_db: expected a number of dB, with width: copies; got {snr_db:g} with width: {width}")
    if qk_noise is not None and not 0 < qk_noise < 1:
        raise InputError(f"qk_noise: expected a small fraction of the initial spread, such as 0.001, got {qk_noise:g}")
    try:
        return tuple(_path(spec, target, policy))
    except Inexact as error:
        raise InputError(f"cannot grow exactly: {error}") from None


def _path(spec: ModelSpec, target: ModelSpec, policy: Policy) -> Iterator[Step]:
    start, places = spec, matched(spec, target)
    goal = _without_new_layers(spec, target, places)
    if spec.transition is None and goal.transition is not None and len(set(goal.stream_widths)) > 1:
        yield (step := _begun(spec, goal.transition))
        spec = step.after
    if spec.tie_word_embeddings and not goal.tie_word_embeddings:
        yield (step := untie(spec))
        spec = step.after
    elif goal.tie_word_embeddings and not spec.tie_word_embeddings:
        raise Inexact("tie_word_embeddings: two tables cannot become one; expected false")
    if _biases(spec, goal):
        yield (step := add_biases(spec, goal))
        spec = step.after
    for index in range(len(spec.stacks[0])):
        for step in _structure(spec, index, goal.layers[index].ffn):
            yield step
            spec = step.after
    if policy.width == "copies" and (copies := grow_by_copies(spec, goal, policy.snr_db)) is not None:
        yield copies
        spec = copies.after
    if _hidden_differs(spec, goal):
        yield (step := grow_hidden(spec, goal))
        spec = step.after
    for index in range(len(spec.stacks[0])):
        for step in _layer(spec, index, goal.layers[index], policy.qk_noise):
            yield step
            spec = step.after
    if goal.learned_positions and goal.max_position_embeddings > spec.max_position_embeddings:
        yield (step := grow_positions(spec, goal.max_position_embeddings))
        spec = step.after
    if goal.vocab_size > spec.vocab_size:
        yield (step := grow_vocabulary(spec, goal.vocab_size))
        spec = step.after
    if len(target.layers) != len(spec.layers):
        yield (
            step := insert_layers(
                spec, target, places, policy.new_layers, widened=spec.stream_widths != start.stream_widths
            )
        )
        spec = step.after
    yield from _rest(spec, target)


def _begun(spec: ModelSpec, transition: Transition) -> Step:
    """A transition for a model of one width, which has not used any so far."""
    if not isinstance(transition, CarryForward | Zero):
        raise Inexact(
            f"transition: {transition.kind} would map the stream where it passes unchanged now; expected carry_forward or zero"
        )
    text = f"transition {transition.kind}, which equal widths do not use"
    return Step("settings", text, spec, spec.replace(transition=transition))


def matched(spec: ModelSpec, target: ModelSpec) -> list[int]:
    """For every layer of a stack its place in the target's: spread evenly, as far as layers correspond.

    Raises:
        Inexact: the target has fewer layers, other branches, or no place for one.
    """
    if spec.branches != target.branches:
        raise Inexact("branches: stacks cannot come, go or be mixed otherwise; expected branches as they are")
    old, new = spec.stacks[0], target.stacks[0]
    if len(new) < len(old):
        raise Inexact(f"num_hidden_layers {len(new)}: expected at least {len(old)}")
    fits = [[_could_become(a, b) for b in new] for a in old]
    if len(old) == len(new):
        return list(range(len(old)))
    # the cheapest ascending assignment: neighbours that grow alike, then an even spread
    ideal = [round((at + 1) * len(new) / len(old)) - 1 for at in range(len(old))]
    never, much = float("inf"), len(new) ** 2
    best: list[list[float]] = [[never] * len(new) for _ in old]
    back: list[list[int]] = [[-1] * len(new) for _ in old]
    for at in range(len(old)):
        for place in (place for place in range(at, len(new)) if fits[at][place]):
            wider = new[place].hidden_size - old[at].hidden_size
            ways = [
                (cost + much * abs(wider - new[where].hidden_size + old[at - 1].hidden_size), where)
                for where, cost in enumerate(best[at - 1][:place])
            ]
            cheapest, back[at][place] = min(ways, default=(never, -1)) if at else (0.0, -1)
            best[at][place] = cheapest + abs(place - ideal[at])
    end = min(range(len(new)), key=lambda place: best[-1][place])
    if best[-1][end] == never:
        raise Inexact(
            "the target's layers do not hold the model's in order: some layer has no place where none of its sizes shrinks"
        )
    places = [end]
    for at in range(len(old) - 1, 0, -1):
        places.append(back[at][places[-1]])
    return places[::-1]


def _could_become(old: LayerSpec, new: LayerSpec) -> bool:
    """Whether no size of a layer shrinks and its kinds stay."""
    sizes = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim")
    alike = (
        "norm_placement",
        "use_parallel_residual",
        "residual_multiplier",
        "sliding_window",
        "attn_logit_softcapping",
    )
    return (
        all(getattr(new, name) >= getattr(old, name) for name in sizes)
        and all(getattr(new, name) == getattr(old, name) for name in alike)
        and (isinstance(new.ffn, MoEFFN) or not isinstance(old.ffn, MoEFFN))
    )


def _without_new_layers(spec: ModelSpec, target: ModelSpec, places: Sequence[int]) -> ModelSpec:
    """The target with the model's own layers only."""
    layers = tuple(stack[place] for stack in target.stacks for place in places)
    return target.replace(layers=layers, transition=target.transition or spec.transition)


def _hidden_differs(spec: ModelSpec, goal: ModelSpec) -> bool:
    layers = any(
        getattr(a, name) != getattr(b, name)
        for a, b in zip(spec.layers, goal.layers, strict=True)
        for name in LAYER_FIELDS
    )
    return layers or any(getattr(spec, name) != getattr(goal, name) for name in MODEL_FIELDS)


def _biases(spec: ModelSpec, goal: ModelSpec) -> bool:
    pairs = [(spec.lm_head_bias, goal.lm_head_bias)]
    for a, b in zip(spec.layers, goal.layers, strict=True):
        pairs += [(a.attention_bias, b.attention_bias), (a.out_bias, b.out_bias)]
    if any(was and not wanted for was, wanted in pairs):
        raise Inexact(
            "biases cannot go; expected attention_bias, attention_out_bias and lm_head_bias as they are, or true"
        )
    return any(wanted and not was for was, wanted in pairs)


def _layer(spec: ModelSpec, index: int, goal: LayerSpec, qk_noise: float | None) -> Iterator[Step]:
    """Steps inside one layer: feed-forward, heads, values, keys."""
    for step in _ffn(spec, index, goal.ffn):
        yield step
        spec = step.after
    layer = spec.layers[index]
    copies = _copies(layer, goal)
    if copies > 1:
        yield (step := share_less(spec, index, layer.num_key_value_heads * copies))
        spec = step.after
        layer = spec.layers[index]
    if (layer.num_attention_heads, layer.num_key_value_heads, layer.groups) != (
        goal.num_attention_heads,
        goal.num_key_value_heads,
        goal.groups,
    ):
        yield (step := grow_heads(spec, index, goal))
        spec = step.after
        layer = spec.layers[index]
    if goal.v_head_dim != layer.v_head_dim:
        _grows(f"layers[{index}].v_head_dim", layer.v_head_dim, goal.v_head_dim)
        yield (step := grow_value(spec, index, goal.v_head_dim))
        spec = step.after
    changed = ("head_dim", "position", "attention_multiplier", "qk_norm")
    if any(getattr(layer, name) != getattr(goal, name) for name in changed):
        _grows(f"layers[{index}].head_dim", layer.head_dim, goal.head_dim)
        _same_norm(index, layer, goal)
        yield grow_key(spec, index, goal, qk_noise)


def _same_norm(index: int, layer: LayerSpec, goal: LayerSpec) -> None:
    old, new = layer.qk_norm, goal.qk_norm
    kept = old == new or (old is not None and new is not None and (old.over, old.eps) == (new.over, new.eps))
    if old is not None and new is not None and over_new(layer, goal):
        kept |= old.over == new.over and math.isclose(new.eps, old.eps * layer.head_dim / goal.head_dim, rel_tol=1e-9)
    if not kept:
        raise Inexact(f"layers[{index}].qk_norm: expected it as it is, got {show(new.model_dump() if new else None)}")


def _copies(layer: LayerSpec, goal: LayerSpec) -> int:
    """How often each key/value head is copied before heads are added: no more than the target's groups need."""
    if layer.head_to_group is not None or goal.head_to_group is not None:
        return 1
    share = layer.num_attention_heads // layer.num_key_value_heads
    wanted = goal.num_attention_heads // goal.num_key_value_heads
    for copies in range(1, share + 1):
        if (
            share % copies == 0
            and share // copies <= wanted
            and layer.num_key_value_heads * copies <= goal.num_key_value_heads
        ):
            return copies
    return 1


def _grows(name: str, old: int, new: int) -> None:
    if new < old:
        raise Inexact(f"{name}: {old} to {new} would shrink; expected at least {old}")


def _structure(spec: ModelSpec, index: int, goal: FFN) -> Iterator[Step]:
    """Steps that change how a feed-forward is factored, its sizes as they are."""
    ffn = spec.layers[index].ffn
    for part in common_parts(ffn, goal):
        old, new = inside(spec.layers[index].ffn, part), inside(goal, part)
        step = None
        if isinstance(old, BlockDenseFFN) and isinstance(new, BlockDenseFFN) and old.num_blocks != new.num_blocks:
            step = merge_blocks(spec, index, new.num_blocks, part)
        elif old.kind != new.kind and isinstance(new, DenseFFN):
            step = materialise(spec, index, _dense(old), part)
        elif isinstance(old, BlockDenseFFN) and isinstance(new, LowRankFFN):
            low_rank = {name: getattr(old, name) for name in LowRankFFN.model_fields if name != "kind"}
            step = materialise(spec, index, LowRankFFN(kind="low_rank", **low_rank), part)
        elif old.kind != new.kind:
            raise Inexact(
                f"layers[{index}].ffn: {old.kind} cannot become {new.kind} exactly; expected {old.kind}"
                + (
                    ", and self-guided training of a new model for a structured one that starts as the dense one"
                    if isinstance(old, DenseFFN)
                    else " or dense"
                )
            )
        if step is not None:
            yield step
            spec = step.after


def _dense(ffn: ExpertFFN) -> DenseFFN:
    return DenseFFN(
        kind="dense",
        gated=ffn.gated,
        hidden_act=ffn.hidden_act,
        intermediate_size=ffn.intermediate_size,
        bias=ffn.bias,
    )


def _ffn(spec: ModelSpec, index: int, goal: FFN) -> Iterator[Step]:
    """Inner width, rank, experts."""
    ffn = spec.layers[index].ffn
    where = f"layers[{index}].ffn"
    if isinstance(ffn, MoEFFN):
        _same_routing(where, ffn, goal)
    for part in common_parts(ffn, goal):
        old, new = inside(spec.layers[index].ffn, part), inside(goal, part)
        for step in _sizes(spec, index, where, part, old, new):
            yield step
            spec = step.after
    if isinstance(goal, MoEFFN) and not isinstance(ffn, MoEFFN):
        whole = goal.shared_expert if goal.shared_expert is not None else goal.expert
        if whole.intermediate_size > ffn.intermediate_size and whole.kind == ffn.kind:
            for step in _sizes(spec, index, where, PLAIN, ffn, whole):
                yield step
                spec = step.after
        yield upcycle(spec, index, goal)


def _sizes(spec: ModelSpec, index: int, where: str, part: str, old: ExpertFFN, new: ExpertFFN) -> Iterator[Step]:
    if (
        isinstance(old, LowRankFFN | BlockDenseFFN)
        and isinstance(new, LowRankFFN | BlockDenseFFN)
        and old.rank != new.rank
    ):
        _grows(f"{where}.rank", old.rank, new.rank)
        yield (step := grow_rank(spec, index, new.rank, part))
        spec = step.after
    if old.intermediate_size != new.intermediate_size:
        _grows(f"{where}.intermediate_size", old.intermediate_size, new.intermediate_size)
        yield (step := grow_inner(spec, index, new.intermediate_size, part))
        spec = step.after
    grown = inside(spec.layers[index].ffn, part)
    if grown != new:
        why = "; ".join(_differences(where, grown.model_dump(mode="json"), new.model_dump(mode="json")))
        shuffled = " (its permutation depends on the number of blocks)" if isinstance(grown, BlockShuffleFFN) else ""
        raise Inexact(why + shuffled)


def _same_routing(where: str, ffn: MoEFFN, goal: FFN) -> None:
    if not isinstance(goal, MoEFFN):
        raise Inexact(f"{where}: routed experts cannot become one feed-forward; expected experts as they are")
    if goal.num_local_experts != ffn.num_local_experts:
        raise Inexact(
            f"{where}: a new expert takes probability and places among the chosen from old ones, so num_local_experts cannot "
            f"grow exactly; expected {ffn.num_local_experts}, or wider experts"
        )
    routing = ("num_experts_per_tok", "router_softmax", "norm_topk_prob")
    for name in routing:
        if getattr(ffn, name) != getattr(goal, name):
            raise Inexact(f"{where}.{name}: expected {getattr(ffn, name)} as it is, got {getattr(goal, name)}")
    if (ffn.shared_expert is None) != (goal.shared_expert is None):
        raise Inexact(f"{where}.shared_expert: expected it as it is")


def _rest(spec: ModelSpec, target: ModelSpec) -> Iterator[Step]:
    """What remains must not touch the function: initialisation, router losses, a longer context without a table."""
    same = spec.replace(initialization=target.initialization, transition=target.transition)
    if not target.learned_positions:
        same = same.replace(max_position_embeddings=target.max_position_embeddings)
    layers = tuple(
        old.replace(ffn=_with_losses(old.ffn, new.ffn)) for old, new in zip(same.layers, target.layers, strict=True)
    )
    same = same.replace(layers=layers)
    if same.dump() != target.dump():
        found = _differences("", to_mapping(same), to_mapping(target))
        raise Inexact("; ".join(found) + " (this changes the function)")
    if same.dump() != spec.dump():
        yield Step("settings", "settings that do not touch the function", spec, target)


def _differences(where: str, ours: object, theirs: object) -> list[str]:
    """What plain data should have been, key by key."""
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return [] if ours == theirs else [f"{where}: expected {show(ours)}, got {show(theirs)}"]
    keys = dict.fromkeys([*ours, *theirs])
    return [
        each
        for key in keys
        for each in _differences(f"{where}.{key}" if where else str(key), ours.get(key), theirs.get(key))
    ]


def _with_losses(old: FFN, new: FFN) -> FFN:
    if isinstance(old, MoEFFN) and isinstance(new, MoEFFN):
        return old.replace(**{name: getattr(new, name) for name in TRAINING_ONLY})
    return old
