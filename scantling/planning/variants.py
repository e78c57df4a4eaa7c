"""What a family of shapes is made of: feed-forward structure, experts, width profile, heads, as layers priced as arrays.

A family is written as in a study: keys that replace those of the common model. Its sizes follow each candidate's width, so
that the code which prices one spec prices arrays of shapes. A width profile is priced by two half-stacks whose widths have
the profile's mean and mean square: every count is linear or quadratic in a layer's width, so that only the rounding of the
widths is missing, which the built spec of a candidate has.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from scantling.rows import Number, StackFFN, StackLayer
from scantling.shapes import WidthProfile, continuous, ratio_slope, structure_size
from scantling.yamlio import show

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

PLAIN = ""  # the family of a plan that names none
KEYS = ("ffn", "per_layer_config", "width", "transition", "num_attention_heads", "num_key_value_heads")
ONE_KEYS = ("kind", "gated", "hidden_act", "expansion", "multiple_of", "parameter_ratio", "rank", "num_blocks")
MOE_KEYS = ("kind", "num_local_experts", "num_experts_per_tok", "expert", "shared_expert", "router_softmax",
    "norm_topk_prob", "router_aux_loss_coef", "router_z_loss_coef")  # fmt: skip
DEPTHS = (4, 256)  # between them a profile's mean width is worked out, beyond them it hardly changes


@dataclass(frozen=True)
class One:
    """One feed-forward whose sizes follow the width.

    Attributes:
        expansion: intermediate_size / hidden_size, to the closest `multiple_of`.
        share: of the dense one's weights, from which rank or block count follow; None where those are given.
    """

    kind: str
    gated: bool
    hidden_act: str
    expansion: float
    multiple_of: int
    share: float | None = None
    rank: int | None = None
    num_blocks: int | None = None

    def inner(self, width: Array) -> Array:
        """intermediate_size: a whole multiple for whole widths, a real number for real ones."""
        return multiple(self.expansion * width, self.multiple_of) if whole(width) else self.expansion * width

    def size(self, width: Array, inner: Array) -> dict[str, Any]:
        """`rank` and `num_blocks`, as the built spec has them where the widths are whole."""
        if self.kind == "dense":
            return {}
        if self.share is None:
            return {name: value for name, value in (("rank", self.rank), ("num_blocks", self.num_blocks)) if value}
        exact = structure_size(self.kind, width, inner, self.share, self.gated, self.num_blocks or 0)
        if self.kind == "block_shuffle":
            return {"num_blocks": np.rint(exact).astype(np.int64).clip(1) if whole(width) else exact}
        step = self.num_blocks or 1
        rank = np.floor(exact / step).astype(np.int64).clip(1) * step if whole(width) else exact
        return {"rank": rank, **({"num_blocks": step} if self.kind == "block_dense" else {})}

    def divides(self, width: Array, inner: Array) -> Array:
        """Which whole widths its blocks divide."""
        blocks = self.size(width, inner).get("num_blocks", 1) if self.kind in ("block_dense", "block_shuffle") else None
        return np.ones(np.shape(width), dtype=bool) if blocks is None else (width % blocks == 0) & (inner % blocks == 0)

    def part(self, width: Array, inner: Array) -> StackFFN:
        """As `rows` prices it."""
        return Structured(inner, self.kind, self.gated, **self.size(width, inner))

    def mapping(self, width: int, inner: int, follow: bool) -> dict[str, Any]:
        """As a spec's `ffn`; with `follow` its sizes follow the width of each layer."""
        found: dict[str, Any] = {"kind": self.kind, "gated": self.gated, "hidden_act": self.hidden_act}
        if not follow:
            sizes = {name: int(value) for name, value in self.size(np.asarray(width), np.asarray(inner)).items()}
            return {**found, "intermediate_size": inner, **sizes}
        return found | self.following()

    def following(self) -> dict[str, Any]:
        """The keys whose sizes follow the width."""
        given = {"parameter_ratio": self.share, "rank": self.rank, "num_blocks": self.num_blocks}
        return {"expansion": self.expansion, **{name: value for name, value in given.items() if value}}


@dataclass(frozen=True)
class Structured(StackFFN):
    """A `StackFFN` of any structure."""

    rank: Number = None
    num_blocks: Number = None


@dataclass(frozen=True)
class Experts:
    """A `StackFFN` of routed experts."""

    num_local_experts: int
    num_experts_per_tok: int
    expert: StackFFN
    shared_expert: StackFFN | None
    kind: str = "moe"


@dataclass(frozen=True)
class Variant:
    """A family of shapes.

    Attributes:
        name: of the family, which the evidence about its loss names too.
        keys: as the file gives them.
        ffn: of a layer, or of one expert.
        moe: keys of the mixture around it, or None.
        shared: the expert that every token uses.
        first: the feed-forward of the first layer, where it differs.
        profile: of the widths.
        heads, kv_heads: where the family fixes them.
        dense_expansion: of the plan's own feed-forward: what granularity is relative to.
    """

    name: str
    keys: Mapping[str, Any]
    ffn: One
    moe: Mapping[str, Any] | None = None
    shared: One | None = None
    first: One | None = None
    profile: WidthProfile | None = None
    heads: int | None = None
    kv_heads: int | None = None
    dense_expansion: float = 8 / 3

    def columns(self) -> dict[str, float]:
        """What a law's columns may name of it."""
        moe = self.moe or {"num_local_experts": 1, "num_experts_per_tok": 1}
        return {
            "ffn_ratio": self.ffn.expansion,
            "parameter_ratio": self.ffn.share or 1.0,
            "experts": float(moe["num_local_experts"]),
            "experts_per_token": float(moe["num_experts_per_tok"]),
            "granularity": self.dense_expansion / self.ffn.expansion,
            "bottleneck_ratio": (self.profile.bottleneck_ratio or 1.0) if self.profile else 1.0,
        }

    def layers(self, sizes: Mapping[str, Array]) -> tuple[StackLayer, ...]:
        """The layers of arrays of shapes, each standing for many.

        Args:
            sizes: hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim, intermediate_size.
        """
        width, depth, inner = sizes["hidden_size"], sizes["num_hidden_layers"], sizes["intermediate_size"]

        def layer(part: Any, repeat: Any, scale: Any = 1) -> StackLayer:
            head = sizes["head_dim"] * scale
            heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
            return StackLayer(width * scale, heads, kv_heads, head, head, part, repeat=repeat)

        if self.profile is not None:
            halves = half_widths(self.profile, np.asarray(depth, dtype=np.float64))
            return tuple(layer(self._part(width * scale, inner * scale), depth / 2, scale) for scale in halves)
        rest = self._part(width, inner)
        if self.first is None:
            return (layer(rest, depth),)
        return layer(self.first.part(width, self.first.inner(width)), 1), layer(rest, depth - 1)

    def _part(self, width: Array, inner: Array) -> Any:
        one = self.ffn.part(width, inner)
        if self.moe is None:
            return one
        shared = self.shared.part(width, self.shared.inner(width)) if self.shared else None
        return Experts(self.moe["num_local_experts"], self.moe["num_experts_per_tok"], one, shared)

    def buildable(self, width: Array, depth: Array, inner: Array) -> Array:
        """Which whole sizes its blocks divide and its profile fits."""
        if self.profile is not None:
            return np.asarray(depth >= DEPTHS[0])
        parts = [(self.ffn, inner), *((one, one.inner(width)) for one in (self.shared, self.first) if one)]
        found: Array = np.logical_and.reduce([one.divides(width, size) for one, size in parts])
        return found

    def mapping(self, width: int, head_dim: int, inner: int) -> dict[str, Any]:
        """The keys of a spec that differ from the plain decoder's: `ffn`, `per_layer_config`, `width`, `transition`,
        and `head_dim` where it does not follow the width."""
        follow = self.profile is not None
        found: dict[str, Any] = {"ffn": self._mixture(lambda one, size: one.mapping(width, size, follow), width, inner)}
        if self.first is not None:
            first = self.first.mapping(width, int(self.first.inner(np.asarray(width))), False)
            found["per_layer_config"] = {0: {"ffn": first}}
        return {**found, **self._stream(), **({} if follow else {"head_dim": head_dim})}

    def study_keys(self) -> dict[str, Any]:
        """The family as a study takes it: sizes follow the width."""

        def following(one: One, _: int) -> dict[str, Any]:
            return {"kind": one.kind, "gated": one.gated, "hidden_act": one.hidden_act, **one.following()}

        found: dict[str, Any] = {"ffn": self._mixture(following, 0, 0)}
        if self.first is not None:
            found["per_layer_config"] = {0: {"ffn": following(self.first, 0)}}
        heads = {"num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads}
        return {**found, **self._stream(), **{key: value for key, value in heads.items() if value}}

    def _mixture(self, of: Callable[[One, int], dict[str, Any]], width: int, inner: int) -> dict[str, Any]:
        if self.moe is None:
            return of(self.ffn, inner)
        shared = {}
        if self.shared is not None:
            shared = {"shared_expert": of(self.shared, int(self.shared.inner(np.asarray(width))) if width else 0)}
        return {**self.moe, "kind": "moe", "expert": of(self.ffn, inner), **shared}

    def _stream(self) -> dict[str, Any]:
        return {key: self.keys[key] for key in ("width", "transition") if key in self.keys}


# --- widths of a profile -----------------------------------------------------------------------------------------------


def half_widths(profile: WidthProfile, depth: Floats) -> tuple[Floats, Floats]:
    """Two widths / hidden_size, each of half the layers, with the mean and the mean square of the profile's widths."""
    low, high = DEPTHS
    inside = np.clip(depth, low, high)
    ends = np.arange(math.floor(inside.min()), math.ceil(inside.max()) + 1)
    table = np.array([moments(profile, int(end)) for end in ends])
    mean, square = (np.interp(inside, ends, column) for column in table.T)
    spread = np.sqrt((square - mean**2).clip(0))
    return mean + spread, mean - spread


@lru_cache(maxsize=4096)
def moments(profile: WidthProfile, depth: int) -> tuple[float, float]:
    """Mean and mean square of the widths / hidden_size, unrounded, of a profile with a bottleneck ratio.

    Matched to the uniform model by the KV cache (the mean is 1) or else by the weights (the mean square is 1; exact for
    layers whose weights are all quadratic in the width).
    """
    ratio = profile.bottleneck_ratio or 1.0
    steps = np.log(continuous(profile, depth, ratio_slope(profile, depth, 0.5), 1.0)) / math.log(0.5)
    above = steps.max() - steps  # growth steps over the narrowest layer
    power = 1 if profile.match == "kv_bytes" else 2
    low, high = 0.0, 50.0 / max(1.0, float(above.max()))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.mean((ratio * np.exp(middle * above)) ** power) < 1 else (low, middle)
    widths = ratio * np.exp(low * above)
    return float(np.mean(widths)), float(np.mean(widths**2))


# --- the file form -----------------------------------------------------------------------------------------------------


def variant_from(name: str, keys: Mapping[str, Any], ffn: Any, depths: Sequence[int] | None) -> Variant:
    """A family from its keys.

    Args:
        name: of the family.
        keys: as in a study.
        ffn: the plan's own feed-forward (`FFNShape` with one expansion), whose keys a family's ffn leaves out.
        depths: the depths listed, which a turn_layer must go with.

    Raises:
        ValueError: a key that a plan cannot price over all sizes.
    """

    def wrong(key: str, message: str) -> ValueError:
        return ValueError(f"{name}.{key}: {message}")

    def one(given: object, where: str) -> One:
        if not isinstance(given, Mapping):
            raise wrong(
                where, f"expected a mapping such as {{kind: low_rank, parameter_ratio: 0.625}}, got {show(given)}"
            )
        known = given if given.get("kind") != "moe" else {}
        for key in known:
            if key not in ONE_KEYS:
                advice = "; sizes follow the width, so give expansion" if key == "intermediate_size" else ""
                raise wrong(f"{where}.{key}", f"expected one of {', '.join(ONE_KEYS)}{advice}")
        found = {"gated": ffn.gated, "hidden_act": ffn.hidden_act, "multiple_of": ffn.multiple_of, **given}
        expansion = given.get("expansion", ffn.expansion[0])
        if expansion == "eight_thirds":
            expansion = 8 / 3
        kind, share = found.get("kind", "dense"), found.get("parameter_ratio")
        sizes = {"rank": found.get("rank"), "num_blocks": found.get("num_blocks")}
        if kind not in ("dense", "low_rank", "block_dense", "block_shuffle"):
            raise wrong(
                f"{where}.kind", f"expected dense, low_rank, block_dense, block_shuffle or moe, got {show(kind)}"
            )
        for key, value in {"expansion": expansion, "parameter_ratio": share}.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
                raise wrong(f"{where}.{key}", f"expected a number above 0, got {show(value)}")
        for key, value in {**sizes, "multiple_of": found["multiple_of"]}.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise wrong(f"{where}.{key}", f"expected a whole number above 0, got {show(value)}")
        if kind in ("low_rank", "block_dense") and (share is None) == (sizes["rank"] is None):
            raise wrong(where, f"{kind} takes parameter_ratio (a share of the dense weights) or rank")
        if kind == "block_dense" and sizes["num_blocks"] is None:
            raise wrong(where, "block_dense takes num_blocks beside its parameter_ratio or rank")
        if kind == "block_shuffle" and (share is None) == (sizes["num_blocks"] is None):
            raise wrong(where, "block_shuffle takes num_blocks, or parameter_ratio")
        return One(
            kind,
            bool(found["gated"]),
            str(found["hidden_act"]),
            float(expansion),
            int(found["multiple_of"]),
            share,
            **sizes,
        )

    if not isinstance(keys, Mapping):
        raise ValueError(f"{name}: expected the keys of a family, as a study has them, got {show(keys)}")
    for key in keys:
        if key not in KEYS:
            raise wrong(str(key), f"a plan's family takes {', '.join(KEYS)}")
    given, moe, shared, first = keys.get("ffn", {}), None, None, None
    if isinstance(given, Mapping) and given.get("kind") == "moe":
        if unknown := [key for key in given if key not in MOE_KEYS]:
            raise wrong(f"ffn.{unknown[0]}", f"expected one of {', '.join(MOE_KEYS)}")
        moe = {key: value for key, value in given.items() if key not in ("kind", "expert", "shared_expert")}
        for key in ("num_local_experts", "num_experts_per_tok"):
            if not isinstance(moe.get(key), int) or isinstance(moe.get(key), bool) or moe[key] < 1:
                raise wrong(f"ffn.{key}", f"expected a whole number above 0, got {show(moe.get(key))}")
        if moe["num_experts_per_tok"] > moe["num_local_experts"]:
            raise wrong("ffn.num_experts_per_tok", f"expected at most {moe['num_local_experts']} experts")
        if given.get("shared_expert") is not None:
            shared = one(given["shared_expert"], "ffn.shared_expert")
        part = one(given.get("expert", {}), "ffn.expert")
    else:
        part = one(given, "ffn")
    layers = keys.get("per_layer_config")
    if layers is not None:
        entry = {str(key): value for key, value in layers.items()} if isinstance(layers, Mapping) else {}
        if set(entry) != {"0"} or not isinstance(entry["0"], Mapping) or set(entry["0"]) != {"ffn"}:
            raise wrong("per_layer_config", "a plan prices {0: {ffn: ...}} alone: the first layer's feed-forward")
        first = one(entry["0"]["ffn"], "per_layer_config.0.ffn")
    profile = _profile(keys["width"], depths, wrong) if keys.get("width") is not None else None
    if profile is not None and (first is not None or shared is not None):
        raise wrong("width", "a profile goes with one feed-forward for all layers in a plan")
    heads = {}
    for key, short in (("num_attention_heads", "heads"), ("num_key_value_heads", "kv_heads")):
        value = keys.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise wrong(key, f"expected a whole number above 0, got {show(value)}")
        heads[short] = value
    return Variant(name, keys, part, moe, shared, first, profile, **heads, dense_expansion=ffn.expansion[0])


def _profile(given: object, depths: Sequence[int] | None, wrong: Callable[[str, str], ValueError]) -> WidthProfile:
    if not isinstance(given, Mapping):
        raise wrong("width", f"expected {{profile: geometric, bottleneck_ratio: 0.3}}, got {show(given)}")
    try:
        profile = WidthProfile.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise wrong(".".join(("width", *map(str, first["loc"]))), first["msg"].removeprefix("Value error, ")) from None
    kept = profile.original_input_width and profile.original_output_width and not profile.fixed_residual_width
    if profile.profile != "geometric" or profile.bottleneck_ratio is None or not kept:
        raise wrong("width", "a plan prices geometric profiles with a bottleneck_ratio and the original end widths")
    if profile.turn_layer is not None and (depths is None or len(depths) != 1):
        raise wrong(
            "width.turn_layer", "goes with one num_hidden_layers; without it the profile turns at 3/4 of the depth"
        )
    if profile.turn_layer is not None and depths is not None:
        try:
            profile.steps(depths[0])
        except ValueError as error:
            raise wrong("width", str(error)) from None
    return profile


def whole(sizes: Array) -> bool:
    """Whether sizes are integers."""
    return np.asarray(sizes).dtype.kind in "iu"


def multiple(values: Array, step: int) -> Array:
    """The closest multiples of `step`, at least one step."""
    return np.rint(values / step).astype(np.int64).clip(1) * step
