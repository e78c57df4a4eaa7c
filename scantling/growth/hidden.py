"""Growing the residual stream (arXiv 2308.06103, 3.5; exact for norms with an epsilon, LayerNorm, scales and widths: derived).

RMSNorm: new coordinates of the stream are zero. LayerNorm: they carry the mean of the old ones, so that the mean stays. Either
way the mean square (or variance) shrinks by d/d', which one of three forms undoes; the target says which, norm by norm:

- gain: eps x d/d', gains x sqrt(d/d');
- writer: eps unchanged, whatever writes into the stream x sqrt(d'/d), gains of norms that read it x sqrt(d/d');
- statistic: `statistic_size` d, so that the statistic stays over the old coordinates and no weight changes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from scantling.growth.axes import Dim, axes
from scantling.growth.feedforward import rank_changes
from scantling.growth.steps import Change, Fill, Index, Inexact, Step, twins
from scantling.growth.stream import Streams, streams
from scantling.parts import BlockShuffleFFN, Compress, LayerNorm, MoEFFN, Norm
from scantling.spec import LayerSpec, ModelSpec

Form = Literal["same", "gain", "writer", "statistic"]
LAYER_FIELDS = ("hidden_size", "attention_input_size", "ffn_output_size", "norm")
MODEL_FIELDS = ("embedding_size", "unembedding_size", "final_norm", "embedding_multiplier", "logits_scaling")
AFTER = {"sandwich": ("post_attention_layernorm", "post_feedforward_layernorm")}  # norms of what a sub-layer wrote
BARE = ("post_branch", "post_residual")  # placements whose sub-layers read the stream without a norm


def grow_hidden(spec: ModelSpec, target: ModelSpec) -> Step:
    """A wider stream, and other constants of embedding and head, from layers that correspond one to one.

    Raises:
        Inexact: no exact construction; the message names the nearest target that has one.
    """
    after = _after(spec, target)
    forms = _forms(spec, target)
    kept = {at: size for at, size in _kept(spec, target).items() if forms[at] == "statistic"}
    maps = streams(spec, target, kept)
    grows = any(form != "same" for form in forms.values()) or spec.stream_widths != target.stream_widths
    centred = any(isinstance(norm, LayerNorm) for _, norm, _, _ in _norms(spec, target))
    if grows:
        _refuse(spec, target, forms, centred)
    work = _Work(spec, after, maps, forms, centred, _factor(spec, target, forms))
    work.stream_changes(kept)
    work.norm_scales()
    work.writer_scales()
    for name, factor in constant_scales(spec, target, work.factor).items():
        work.scales[name] = work.scales.get(name, 1.0) * factor
    for index in range(len(spec.stacks[0])):
        work.changes |= rank_changes(spec, after, index)
    widths = ", ".join(f"{a} to {b}" for a, b in dict.fromkeys(zip(spec.widths, after.widths, strict=True)) if a != b)
    used = sorted({form for form in forms.values() if form != "same"})
    text = f"hidden_size {widths} ({' and '.join(used)} form)" if widths else "constants of embedding and head"
    return Step("hidden", text, spec, after, work.changes, {k: v for k, v in work.scales.items() if v != 1})


def _after(spec: ModelSpec, target: ModelSpec) -> ModelSpec:
    layers = tuple(
        old.replace(**{name: getattr(new, name) for name in LAYER_FIELDS})
        for old, new in zip(spec.layers, target.layers, strict=True)
    )
    return spec.replace(layers=layers, **{name: getattr(target, name) for name in MODEL_FIELDS})


def _norms(spec: ModelSpec, target: ModelSpec) -> Iterator[tuple[int | None, Norm, Norm, tuple[int, int]]]:
    """Every norm before and after, and its widths; layers of the first stack, then the final one as None."""
    for index, (old, new) in enumerate(zip(spec.stacks[0], target.stacks[0], strict=True)):
        yield index, old.norm, new.norm, (old.hidden_size, new.hidden_size)
    if spec.final_norm is not None and target.final_norm is not None:
        yield None, spec.final_norm, target.final_norm, (spec.norm_width, target.norm_width)


def _kept(spec: ModelSpec, target: ModelSpec) -> dict[int | None, int]:
    return {index: old.statistic_size or widths[0] for index, old, _, widths in _norms(spec, target)}


def _forms(spec: ModelSpec, target: ModelSpec) -> dict[int | None, Form]:
    """The form of every layer's norms, and of the final norm under None.

    Raises:
        Inexact: a norm's new eps and statistic fit no form.
    """
    if (spec.final_norm is None) != (target.final_norm is None):
        raise Inexact("final_norm: a final norm cannot come or go; expected it as it is")
    forms: dict[int | None, Form] = {}
    for index, old, new, (was, now) in _norms(spec, target):
        where = "final_norm" if index is None else f"layers[{index}].norm"
        if old.replace(eps=1.0, statistic_size=None) != new.replace(eps=1.0, statistic_size=None):
            raise Inexact(f"{where}: {old.kind} cannot become {new.kind}; expected the norm as it is")
        size, new_size, exact = old.statistic_size or was, new.statistic_size or now, old.eps * was / now
        if size == new_size and new.eps == old.eps:
            forms[index] = "same" if was == now else "statistic"
        elif size == was and new_size == now and math.isclose(new.eps, exact, rel_tol=1e-9):
            forms[index] = "gain"
        elif size == was and new_size == now and new.eps == old.eps:
            forms[index] = "writer"
        else:
            raise Inexact(
                f"{where}: eps {old.eps:g} with a statistic over {size} of {was} coordinates cannot become eps {new.eps:g} over "
                f"{new_size} of {now}; expected eps {exact!r} (gain form), eps {old.eps!r} everywhere (writer form), or "
                f"eps {old.eps!r} and statistic_size: {size}"
            )
    return forms


def _refuse(spec: ModelSpec, target: ModelSpec, forms: dict[int | None, Form], centred: bool) -> None:
    """Combinations that have no exact construction.

    Raises:
        Inexact: this is one.
    """
    if centred and any(not isinstance(norm, LayerNorm) for _, norm, _, _ in _norms(spec, target)):
        raise Inexact(
            "RMSNorm and LayerNorm in one model want different new coordinates; the stream cannot grow exactly but by copies "
            "(width: copies)"
        )
    placements = {layer.norm_placement for layer in spec.layers}
    if centred and placements != {"pre"}:
        raise Inexact(
            f"layer_norm with norm_placement {', '.join(sorted(placements - {'pre'}))}: the mean of what it leaves in the "
            "stream depends on the data, so no padded width grows exactly; expected copies (width: copies) at a whole multiple "
            f"such as hidden_size {2 * spec.layers[0].hidden_size}, or grow the feed-forward, heads or head sizes instead"
        )
    if centred and len(set(spec.stream_widths)) > 1 and not isinstance(spec.transition, Compress):
        raise Inexact(
            "layer_norm over layers of different widths on one stream: new coordinates cannot carry the mean of each layer's "
            "own; expected copies (width: copies), equal widths, or transition: compress"
        )
    if centred and any(isinstance(ffn, BlockShuffleFFN) for layer in spec.layers for ffn in _inner(layer)):
        raise Inexact(
            "layer_norm needs new coordinates that carry the mean of the old ones, which a block_shuffle feed-forward cannot "
            "write; materialise it as dense first"
        )
    if "writer" in forms.values():
        others = {form for form in forms.values() if form != "writer"}
        ratios = {round(now / was, 12) for _, _, _, (was, now) in _norms(spec, target)}
        carried = spec.unembedding_size > spec.norm_width and not isinstance(spec.transition, Compress)
        if others or len(ratios) > 1 or spec.final_norm is None or carried:
            index, old, _, (was, now) = next(item for item in _norms(spec, target) if forms[item[0]] == "writer")
            where = "final_norm" if index is None else f"layers[{index}].norm"
            why = (
                "the model has no final norm"
                if spec.final_norm is None
                else "the head reads coordinates no norm has seen"
                if carried
                else "not every norm keeps its eps and grows by the same ratio"
            )
            raise Inexact(
                f"{where}: eps {old.eps:g} can stay (writer form) only if all of the stream is scaled alike, but {why}; "
                f"expected eps {old.eps * was / now!r} (gain form) or statistic_size: {old.statistic_size or was}"
            )


def _inner(layer: LayerSpec) -> list[object]:
    return [layer.ffn.expert, layer.ffn.shared_expert] if isinstance(layer.ffn, MoEFFN) else [layer.ffn]


def _factor(spec: ModelSpec, target: ModelSpec, forms: dict[int | None, Form]) -> float:
    """What the whole stream is multiplied by: sqrt(d'/d) in writer form, else 1."""
    for index, _, _, (was, now) in _norms(spec, target):
        if forms[index] == "writer":
            return math.sqrt(now / was)
    return 1.0


@dataclass
class _Work:
    """Changes and scales of one step, gathered part by part."""

    spec: ModelSpec
    after: ModelSpec
    maps: Streams
    forms: dict[int | None, Form]
    centred: bool
    factor: float
    changes: dict[Dim, Change] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)

    @property
    def written(self) -> Fill:
        return "mean" if self.centred else "zero"

    def change(self, dim: Dim, places: Index, fill: Fill) -> None:
        if (len(places) and (places < 0).any()) or not np.array_equal(places, np.arange(len(places))):
            self.changes[dim] = Change(places, fill)

    def stream_changes(self, kept: dict[int | None, int]) -> None:
        """New coordinates of everything that writes, reads or normalises the stream."""
        spec, stretches = self.spec, self.maps.stretches
        bare: Fill = "zero" if self.centred else "free"  # for readers that no norm comes before
        self.change(Dim("write", None, "embedding"), self.maps.embedding, self.written)
        count = spec.branches.count if spec.branches else 1
        for branch in range(count):
            self.change(Dim("write", None, f"entry {branch}"), stretches[0].of(spec.stream_widths[0]), self.written)
            self.change(Dim("read", None, f"entry {branch}"), self.maps.embedding, bare)
        for index, layer in enumerate(spec.stacks[0]):
            new, stretch = self.after.stacks[0][index], stretches[index + 1]
            width = layer.hidden_size
            sizes = {
                "attention": (layer.attention_input_size or width, new.attention_input_size or new.hidden_size),
                "norm": (width, new.hidden_size),
                "ffn": (width, new.hidden_size),
                "written": (layer.ffn_output_size or width, new.ffn_output_size or new.hidden_size),
            }
            outside = stretch.widths.get(width) != new.hidden_size  # reaches into coordinates that others use
            if outside and index not in kept:
                raise Inexact(
                    f"layers[{index}].hidden_size {width} to {new.hidden_size}: expected {stretch.widths.get(width)}, or "
                    f"norm.statistic_size: {width}"
                )
            maps = {
                name: _extended(stretch.of(old), size) if outside else stretch.of(old)
                for name, (old, size) in sizes.items()
            }
            if index in kept and not np.array_equal(maps["norm"][: kept[index]], np.arange(kept[index])):
                raise Inexact(
                    f"layers[{index}].norm.statistic_size: {kept[index]}: new coordinates come before these; expected the gain "
                    f"form: eps {layer.norm.eps * width / new.hidden_size!r}"
                )
            read: Fill = "zero" if outside else bare if layer.norm_placement in BARE else "free"
            written: Fill = "zero" if outside else self.written
            for at in twins(spec, index):
                for name in axes_of_norms(layer):
                    self.change(Dim("norm", at, name), maps["norm"], "free")
                self.change(Dim("read", at, "attention"), maps["attention"], read)
                self.change(Dim("read", at, "ffn"), maps["ffn"], read)
                self.change(Dim("write", at, "attention"), maps["norm"], written)
                self.change(Dim("write", at, "ffn"), maps["written"], written)
                depth = len(spec.stacks[0])
                resize = at // depth * depth + index  # the map into this layer
                self.change(Dim("write", resize, "resize"), maps["norm"], written)
                before = stretches[index].of(spec.stream_widths[index])
                self.change(Dim("read", resize, "resize"), before, bare)
        last = stretches[-1].of(spec.unembedding_size)
        if spec.tie_word_embeddings and not np.array_equal(last, self.maps.embedding):
            raise Inexact(
                "tie_word_embeddings: new coordinates of the one table lie elsewhere for its stacks' input than for the head; "
                "expected tie_word_embeddings: false"
            )
        self.change(Dim("write", None, "resize"), last, self.written)
        self.change(Dim("read", None, "resize"), stretches[-2].of(spec.stream_widths[-2]), bare)
        normed = stretches[-1] if isinstance(spec.transition, Compress) else stretches[-2]
        self.change(Dim("norm", None, "norm"), normed.of(spec.norm_width), "free")
        self.change(Dim("read", None, "head"), last, bare if spec.final_norm is None else "free")

    def norm_scales(self) -> None:
        """Gains of the gain and writer forms."""
        for index, _, _, (was, now) in _norms(self.spec, self.after):
            form, shrunk = self.forms[index], math.sqrt(was / now)
            if index is None:
                self.scales["norm.weight"] = shrunk if form in ("gain", "writer") else 1.0
                continue
            layer = self.spec.stacks[0][index]
            for at in twins(self.spec, index):
                for name in axes_of_norms(layer):
                    behind = layer.norm_placement in BARE or name in AFTER.get(layer.norm_placement, ())
                    if form == "gain" or (form == "writer" and not behind):
                        self.scales[f"layers.{at}.{name}.weight"] = shrunk

    def writer_scales(self) -> None:
        """The writer form: whatever writes x factor, whatever reads without a norm / factor."""
        if self.factor == 1:
            return
        for name, each in axes(self.spec).items():
            dims = [axis.dim for axis in each if axis.dim is not None]
            if any(dim.kind == "write" and dim.part != "embedding" for dim in dims):
                self.scales[name] = self.scales.get(name, 1.0) * self.factor
            for dim in dims:
                layer = self.spec.layers[dim.layer] if dim.layer is not None else None
                inside = layer is not None and dim.part in ("attention", "ffn") and layer.norm_placement in BARE
                between = dim.part == "resize" or dim.part.startswith("entry")
                if dim.kind == "read" and (inside or between):
                    self.scales[name] = self.scales.get(name, 1.0) / self.factor


def constant_scales(spec: ModelSpec, target: ModelSpec, factor: float = 1.0, copies: int = 1) -> dict[str, float]:
    """What tables, final gain and head are multiplied by, so that other constants of embedding and head change nothing.

    Args:
        factor: what the stream is multiplied by.
        copies: of every coordinate that the head reads. A head of its own shares its weights out; a tied one cannot, and the
            final norm's gain (and shift) takes the factor.

    Raises:
        Inexact: a tied table without a final norm, or with coordinates that no norm has seen.
    """
    table = factor * spec.embedding_multiplier / target.embedding_multiplier
    logits = target.logits_scaling / spec.logits_scaling
    names = ["embed_tokens.weight", *["embed_positions.weight"] * spec.learned_positions]
    scales = dict.fromkeys(names, table)
    if spec.lm_head_bias:
        scales["lm_head.bias"] = logits
    if not spec.tie_word_embeddings:
        return scales | {"lm_head.weight": logits / (factor if spec.final_norm is None else 1.0)}
    left = logits / (table * copies)
    if math.isclose(left, 1.0, rel_tol=1e-12):
        return scales
    carried = spec.unembedding_size > spec.norm_width and not isinstance(spec.transition, Compress)
    if spec.final_norm is None or carried:
        raise Inexact(
            f"tied embeddings without a final norm over all of the head's input: embedding_multiplier "
            f"{target.embedding_multiplier:g} and logits_scaling {target.logits_scaling:g} leave a factor of {left:g} on "
            f"the logits; expected logits_scaling: {target.logits_scaling / left!r}, or tie_word_embeddings: false"
        )
    scales["norm.weight"] = left
    if isinstance(spec.final_norm, LayerNorm) and spec.final_norm.bias:
        scales["norm.bias"] = left
    return scales


def axes_of_norms(layer: LayerSpec) -> list[str]:
    """The norms along a layer's stream."""
    names = ["input_layernorm", "post_attention_layernorm"]
    more = ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    return names + (more if layer.norm_placement == "sandwich" else [])


def _extended(places: Index, size: int) -> Index:
    return np.concatenate([places, np.full(size - len(places), -1)])
