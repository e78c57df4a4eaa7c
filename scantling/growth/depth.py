"""New layers (arXiv 2308.06103, 3.6): anywhere in the stack, with an output of zero that learns at once.

Where a norm follows the sub-layer, its gain is zero instead of what it normalises: dividing a zero by its own size would throw
the model off at the first update (growth of sandwich norms; derived and measured).
"""

from collections.abc import Sequence

from scantling.growth.axes import axes
from scantling.growth.experts import writes
from scantling.growth.steps import Inexact, Made, Moved, Source, Step
from scantling.parts import CarryForward
from scantling.spec import ModelSpec

AFTER = {
    "sandwich": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "post_branch": ("input_layernorm", "post_attention_layernorm"),
}


def insert_layers(
    spec: ModelSpec, target: ModelSpec, places: Sequence[int], fill: str = "copy", widened: bool = False
) -> Step:
    """The layers of `target` that are none of the model's.

    Args:
        places: for each layer of a stack of `spec` its place in a stack of `target`, ascending.
        fill: `copy` (of the old layer before it where shapes agree, its output zeroed), `random` (output zeroed), or `stack`
            (a verbatim copy of layer j mod depth: not the same function).
        widened: whether the old layers have grown along the stream, and may write zeros there. Behind a norm that starts at
            zero a copy of these would never learn, so new layers with such norms then have writers of their own.

    Raises:
        Inexact: a layer there cannot start as the identity.
    """
    old_depth, depth = len(spec.stacks[0]), len(target.stacks[0])
    after = spec.replace(layers=target.layers, transition=target.transition)
    if after.stream_widths[0] != spec.stream_widths[0]:
        raise Inexact(
            f"layers[0].hidden_size {after.stream_widths[0]}: branches map their input to the first layer's width, "
            f"{spec.stream_widths[0]} so far; expected {spec.stream_widths[0]}, or the new layer further up"
        )
    if spec.final_norm is not None and after.norm_width != spec.norm_width:
        raise Inexact(
            f"layers[{depth - 1}].hidden_size {after.norm_width}: the final norm is over the last layer's width, "
            f"{spec.norm_width} so far; expected {spec.norm_width}, or the new layer further down"
        )
    shapes, old_shapes = axes(after), axes(spec)
    sources: dict[str, Source] = {}
    texts = []
    for place, layer in enumerate(target.stacks[0]):
        origin = places.index(place) if place in places else None
        twin = _ancestor(spec, target, places, place, fill)
        if origin is None:
            texts.append(str(place))
            if fill != "stack":
                _starts_as_identity(spec, after, place)
        for branch in range(len(target.stacks)):
            name = f"layers.{branch * depth + place}."
            for full in [each for each in shapes if each.startswith(name)]:
                tail = full.removeprefix(name)
                source = origin if origin is not None else twin
                old = f"layers.{branch * old_depth + source}.{tail}" if source is not None else None
                if origin is not None:
                    assert old is not None
                    sources[full] = Moved(old)
                elif fill != "stack" and _silent(tail, layer.norm_placement):
                    sources[full] = Made("zero")
                elif fill != "stack" and widened and layer.norm_placement in AFTER and _silent(tail, "pre"):
                    sources[full] = Made("free")
                elif old is not None and _sizes(shapes[full]) == _sizes(old_shapes.get(old, ())):
                    sources[full] = Moved(old)
                else:
                    sources[full] = Made("free")
    sources |= _resizes(spec, after, places)
    what = f"layers {', '.join(texts)}" if len(texts) > 1 else f"layer {texts[0]}"
    text = f"num_hidden_layers {spec.num_hidden_layers} to {target.num_hidden_layers}: new {what} ({fill})"
    broken = "layers are repeated verbatim" if fill == "stack" else None
    return Step("layer", text, spec, after, sources=sources, broken=broken)


def _sizes(each: object) -> list[int]:
    return [axis.size for axis in each]  # type: ignore[attr-defined]


def _ancestor(spec: ModelSpec, target: ModelSpec, places: Sequence[int], place: int, fill: str) -> int | None:
    """The old layer that a new one copies: the nearest before it, or layer j mod depth of a stack."""
    if fill == "random":
        return None
    if fill == "stack":
        return place % len(spec.stacks[0])
    before = [index for index, at in enumerate(places) if at < place]
    return before[-1] if before else 0


def _silent(tail: str, placement: str) -> bool:
    """Whether a new layer's parameter is zero, so that the layer adds nothing."""
    if placement in AFTER:
        return tail.split(".", maxsplit=1)[0] in AFTER[placement]
    if tail.startswith("self_attn.o_proj."):
        return True
    inner = tail.removeprefix("mlp.")
    parts = inner.split(".")
    inner = ".".join(parts[2:]) if parts[0] == "experts" else inner.removeprefix("shared_expert.")
    return tail.startswith("mlp.") and writes(inner)


def _starts_as_identity(spec: ModelSpec, after: ModelSpec, place: int) -> None:
    layer = after.stacks[0][place]
    if layer.norm_placement == "post_residual":
        raise Inexact(
            f"layers[{place}]: with norm_placement post_residual the norm is on the stream itself, so no layer is the identity; "
            "grow the feed-forward, heads or head sizes instead"
        )
    widths = after.stream_widths
    if isinstance(after.transition, CarryForward) or len(set(widths)) == 1:
        return
    if widths[place + 1] not in (widths[place], widths[place + 2]):
        raise Inexact(
            f"layers[{place}]: transition {after.transition.kind if after.transition else None} would map the stream once more "
            f"for a layer of width {widths[place + 1]}; expected its neighbours' width {widths[place]} or {widths[place + 2]}"
        )


def _resizes(spec: ModelSpec, after: ModelSpec, places: Sequence[int]) -> dict[str, Source]:
    """Learned changes of width keep their places between the layers they join."""
    old = [name for name in axes(spec) if name.startswith(("resize.", "resize_last."))]
    new = [name for name in axes(after) if name.startswith(("resize.", "resize_last."))]
    if len(old) != len(new):
        raise Inexact("new layers would add changes of width; expected layers as wide as one of their neighbours")
    return {made: Moved(name) for made, name in zip(new, old, strict=True) if made != name}
