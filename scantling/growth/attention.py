"""Growing attention: heads, value width, key/query width (arXiv 2308.06103, 3.2-3.4; groups, rotary and q/k norms derived).

What a new head or value coordinate gives is read through zeros of the output projection; a new key coordinate is zero, so that
it adds nothing to any score whatever the query has there.
"""

import math

import numpy as np

from scantling.growth.axes import Dim
from scantling.growth.steps import (
    Change,
    Index,
    Inexact,
    Step,
    appended,
    in_blocks,
    in_every,
    inserted,
    twins,
    with_layer,
)
from scantling.parts import NoPosition, Rope
from scantling.spec import LayerSpec, ModelSpec

FREQUENCY_TOLERANCE = 1e-10  # relative; what exact frequencies differ by after rounding is about 1e-14


def share_less(spec: ModelSpec, index: int, kv_heads: int) -> Step:
    """More key/value heads for the same query heads: each is copied, and its query heads divided among the copies.

    The copies are read by different query heads, so their gradients differ from the first step on.
    """
    layer = spec.layers[index]
    copies = kv_heads // layer.num_key_value_heads
    heads = np.repeat(np.arange(layer.num_key_value_heads), copies)
    changes = {}
    for at in twins(spec, index):
        changes[Dim("key", at)] = Change(in_blocks(heads, layer.head_dim), "zero")
        changes[Dim("value", at)] = Change(in_blocks(heads, layer.v_head_dim), "zero")
        if layer.qk_norm is not None and layer.qk_norm.over == "all":
            changes[Dim("key_gain", at)] = Change(in_blocks(heads, layer.head_dim), "zero")
    after = with_layer(spec, index, num_key_value_heads=kv_heads)
    text = f"layer {index}: key/value heads {layer.num_key_value_heads} to {kv_heads}, each copied {copies} times"
    return Step("heads", text, spec, after, changes)


def grow_heads(spec: ModelSpec, index: int, target: LayerSpec) -> Step:
    """New query heads inside their groups, and new groups at the end (3.2).

    Raises:
        Inexact: a group would lose heads, or a q/k norm runs over all heads.
    """
    layer = spec.layers[index]
    where = f"layers[{index}]"
    if layer.qk_norm is not None and layer.qk_norm.over == "all":
        raise Inexact(
            f"{where}: qk_norm over all heads takes its statistic over new heads too, so heads cannot be added exactly; "
            "grow v_head_dim, the feed-forward, the width or the depth instead"
        )
    old, new, free = layer.groups, target.groups, list(range(target.num_attention_heads))
    heads = np.full(target.num_attention_heads, -1)
    for head, group in enumerate(old):
        place = next((at for at in free if new[at] == group), None)
        if place is None:
            share = len(old) // layer.num_key_value_heads
            raise Inexact(
                f"{where}: key/value head {group} is read by {old.count(group)} query heads, in the target by "
                f"{new.count(group)}; expected num_attention_heads of at least {share * target.num_key_value_heads} with "
                f"{target.num_key_value_heads} key/value heads, or a head_to_group that keeps every head's group"
            )
        free.remove(place)
        heads[place] = head
    groups = appended(layer.num_key_value_heads, target.num_key_value_heads)
    changes = {}
    for at in twins(spec, index):
        changes[Dim("query", at)] = Change(in_blocks(heads, layer.head_dim), "free")
        changes[Dim("context", at)] = Change(in_blocks(heads, layer.v_head_dim), "zero")
        changes[Dim("key", at)] = Change(in_blocks(groups, layer.head_dim), "free")
        changes[Dim("value", at)] = Change(in_blocks(groups, layer.v_head_dim), "free")
    after = with_layer(
        spec,
        index,
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.num_key_value_heads,
        head_to_group=target.head_to_group,
    )
    text = (
        f"layer {index}: heads {layer.num_attention_heads}/{layer.num_key_value_heads} to "
        f"{target.num_attention_heads}/{target.num_key_value_heads}"
    )
    return Step("heads", text, spec, after, changes)


def grow_value(spec: ModelSpec, index: int, size: int) -> Step:
    """Wider values (3.3): the output projection has zeros at the end of every head's block."""
    layer = spec.layers[index]
    changes = {}
    for at in twins(spec, index):
        changes[Dim("value", at)] = Change(inserted(layer.num_key_value_heads, layer.v_head_dim, size), "free")
        changes[Dim("context", at)] = Change(inserted(layer.num_attention_heads, layer.v_head_dim, size), "zero")
    text = f"layer {index}: v_head_dim {layer.v_head_dim} to {size}"
    return Step("value", text, spec, with_layer(spec, index, v_head_dim=size), changes)


def grow_key(spec: ModelSpec, index: int, target: LayerSpec, qk_noise: float | None = None) -> Step:
    """Wider keys and queries (3.4): new key coordinates are zero, old keys make up for a new score scale.

    Args:
        qk_noise: under a q/k norm whose statistic runs over new coordinates too, the spread of new query rows as a share of
            the usual. The statistic then moves by about its square, and so does the function; at zero nothing new would learn.

    Raises:
        Inexact: rotary frequencies of old pairs would change, or a q/k norm's statistic would.
    """
    layer, norm = spec.layers[index], spec.layers[index].qk_norm
    inside = head_map(index, layer, target)
    noise = qk_noise if over_new(layer, target) else None
    if noise is None:
        _norm_allows(index, layer, target, inside)
    shrunk = 1.0 if noise is None else math.sqrt(layer.head_dim / target.head_dim)
    factor = layer.scale / target.scale
    changes: dict[Dim, Change] = {}
    scales: dict[str, float] = {}
    for at in twins(spec, index):
        for kind, count in (("query", layer.num_attention_heads), ("key", layer.num_key_value_heads)):
            places = in_every(count, inside, layer.head_dim)
            changes[Dim(kind, at)] = Change(places, "free", noise or 1.0) if kind == "query" else Change(places, "zero")
            gains = places if norm is not None and norm.over == "all" else inside
            changes[Dim(f"{kind}_gain", at)] = Change(gains, "free")
        prefix = f"layers.{at}.self_attn"
        names = ["k_norm.weight"] if norm else ["k_proj.weight", *["k_proj.bias"] * layer.attention_bias]
        scales |= {f"{prefix}.{name}": factor * shrunk for name in names} | {f"{prefix}.q_norm.weight": shrunk}
    after = with_layer(
        spec,
        index,
        head_dim=target.head_dim,
        position=target.position,
        attention_multiplier=target.attention_multiplier,
        qk_norm=target.qk_norm,
    )
    text = f"layer {index}: head_dim {layer.head_dim} to {target.head_dim}"
    broken = None
    if noise is not None:
        broken = (
            "a q/k norm takes new query coordinates into its statistic, which changes the function by about the square of "
            f"their spread ({noise:g} of the usual)"
        )
        if norm is not None and target.qk_norm is not None and norm.eps == target.qk_norm.eps:
            broken += ", and by as much as the norm's eps weighs beside a head's mean square"
    return Step(
        "key", text, spec, after, changes, {name: value for name, value in scales.items() if value != 1}, broken=broken
    )


def over_new(layer: LayerSpec, target: LayerSpec) -> bool:
    """Whether a q/k norm's statistic runs over everything before and after, and there is more of it after."""
    old, new = layer.qk_norm, target.qk_norm
    whole = old is not None and old.statistic_size in (None, layer.head_dim)
    return (
        whole and new is not None and new.statistic_size in (None, target.head_dim) and target.head_dim > layer.head_dim
    )


def _norm_allows(index: int, layer: LayerSpec, target: LayerSpec, inside: Index) -> None:
    """Whether the statistic of a q/k norm stays what it was.

    Raises:
        Inexact: it does not.
    """
    old, new = layer.qk_norm, target.qk_norm
    if old is None or layer.head_dim == target.head_dim:
        return
    where, size = f"layers[{index}]", old.statistic_size or layer.head_dim
    almost = "qk_noise: 0.001 (almost exact: new queries start a thousandth of the usual size)"
    if old.over == "all":
        raise Inexact(
            f"{where}: qk_norm over all heads takes its statistic over new coordinates too, so head_dim cannot grow exactly; "
            f"grow v_head_dim instead, or ask for {almost}"
        )
    rotary = ""
    if isinstance(layer.position, Rope):
        factor = layer.position.partial_rotary_factor * layer.head_dim / target.head_dim
        rotary = f"rotary positions only there (partial_rotary_factor: {factor:.10g})"
    if new is None or new.statistic_size != size:
        raise Inexact(
            f"{where}: with qk_norm, new key and query coordinates would change its statistic (or, all zero, never learn); "
            f"expected qk_norm.statistic_size: {size}, so that it stays over the old ones"
            f"{', and ' * bool(rotary)}{rotary}; or grow v_head_dim instead, or ask for {almost}"
        )
    if not np.array_equal(inside[:size], np.arange(size)):
        raise Inexact(
            f"{where}: qk_norm.statistic_size: {size} means the first {size} coordinates of a head, but rotary pairs put new "
            f"ones between them; expected {rotary}"
        )


def head_map(index: int, layer: LayerSpec, target: LayerSpec) -> Index:
    """Where the coordinates of a query or key go, so that every old rotary pair keeps its frequency.

    Raises:
        Inexact: some pair cannot; the message names targets where all can.
    """
    old, new = layer.position, target.position
    if isinstance(old, NoPosition) and isinstance(new, NoPosition):
        return appended(layer.head_dim, target.head_dim)
    where = f"layers[{index}]"
    if not (isinstance(old, Rope) and isinstance(new, Rope)):
        raise Inexact(f"{where}: position {old.kind} to {new.kind} changes the function; expected {old.kind}")
    was, now = old.rotated(layer.head_dim) // 2, new.rotated(target.head_dim) // 2
    rest, rest_now = layer.head_dim - 2 * was, target.head_dim - 2 * now
    pairs = _pairs(old, layer.head_dim, new, target.head_dim)
    if pairs is None or rest_now < rest:
        raise Inexact(_rotary_advice(where, layer, target, old))
    places = np.full(target.head_dim, -1)
    places[pairs], places[pairs + now] = np.arange(was), np.arange(was) + was
    places[2 * now : 2 * now + rest] = np.arange(rest) + 2 * was
    return places


def _pairs(old: Rope, old_size: int, new: Rope, new_size: int) -> Index | None:
    """The new pair of every old one: appended, or spread evenly; None when frequencies differ either way."""
    from scantling.model.rotary import frequencies

    (was, stretch), (now, new_stretch) = frequencies(old, old_size), frequencies(new, new_size)
    if len(now) < len(was) or not math.isclose(stretch, new_stretch, rel_tol=FREQUENCY_TOLERANCE):
        return None
    for step in {1, len(now) // len(was)}:
        pairs = np.arange(len(was)) * step
        if bool(((now[pairs] / was - 1).abs() <= FREQUENCY_TOLERANCE).all()):
            return pairs
    return None


def _rotary_advice(where: str, layer: LayerSpec, target: LayerSpec, old: Rope) -> str:
    size = old.frequency_size or old.rotated(layer.head_dim)
    grown = target.head_dim * size / layer.head_dim
    factor = old.partial_rotary_factor * layer.head_dim / target.head_dim
    theta, twice = old.rope_theta ** (grown / size), 2 * layer.head_dim
    ways = {
        f"position.frequency_size: {size}": (old.replace(frequency_size=size), target.head_dim),
        f"rope_theta: {theta!r}": (old.replace(rope_theta=theta), target.head_dim),
        f"partial_rotary_factor: {factor:.10g}": (old.replace(partial_rotary_factor=factor), target.head_dim),
        f"head_dim {twice} with the same rope_theta": (old, twice),
    }
    exact = [way for way, (new, wide) in ways.items() if _pairs(old, layer.head_dim, new, wide) is not None]
    return (
        f"{where}: head_dim {layer.head_dim} to {target.head_dim} would change the rotary frequencies of old pairs; expected "
        f"one of {'; '.join(exact)}"
    )
