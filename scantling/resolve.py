"""From a file's short forms to the one explicit form: `load_spec` gives a `ModelSpec` or every fault at once.

Short forms: any per-layer key as one value or a list of one value per layer; `per_layer_config` (Hugging Face's sparse
overrides); a `width` profile; `expansion` instead of `intermediate_size`; head sizes that follow the width. Each resolved
value remembers the key it came from, so an error points at the line a person wrote.
"""

import json
import math
import os
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from scantling import hf_config, parts
from scantling.errors import InputError, suggest
from scantling.parts import Transition
from scantling.profiles import Baseline, end_widths, solve
from scantling.shapes import WidthProfile, structure_for
from scantling.spec import LayerSpec, ModelSpec
from scantling.yamlio import Document, KeyPath, dumps, from_mapping, load, show

SPEC_KEYS = (
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
    "embedding_size",
    "unembedding_size",
    "learned_positions",
    "embedding_multiplier",
    "logits_scaling",
    "final_logit_softcapping",
    "lm_head_bias",
    "branches",
    "initialization",
)
LAYER_KEYS = (
    "hidden_size",
    "num_attention_heads",
    "head_to_group",
    "num_key_value_heads",
    "head_dim",
    "v_head_dim",
    "attention_bias",
    "attention_out_bias",
    "attention_multiplier",
    "attn_logit_softcapping",
    "sliding_window",
    "qk_norm",
    "position",
    "norm",
    "norm_placement",
    "use_parallel_residual",
    "residual_multiplier",
    "attention_input_size",
    "ffn_output_size",
    "ffn",
)
LAYER_SHORT_FORMS = ("intermediate_size", "hidden_act", "mlp_bias", "rope_theta", "rms_norm_eps", "layer_norm_eps")
MODEL_SHORT_FORMS = ("num_hidden_layers", "per_layer_config", "width", "transition", "final_norm")
KNOWN = (*SPEC_KEYS, *LAYER_KEYS, *LAYER_SHORT_FORMS, *MODEL_SHORT_FORMS)
MAX_LAYERS = 4096
UNION_TAGS = frozenset(
    str(kind.model_fields["kind"].annotation.__args__[0])  # type: ignore[union-attr]
    for kind in vars(parts).values()
    if isinstance(kind, type) and issubclass(kind, parts.Frozen) and "kind" in kind.model_fields
)

Model = TypeVar("Model", bound=BaseModel)


def load_spec(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ModelSpec:
    """The model a YAML file or a Hugging Face `config.json` describes.

    Args:
        path: the file. A file with a `model:` section (a run) gives that section's model.
        overrides: `key=value` texts, as `--set` takes them.

    Raises:
        InputError: every fault found, each with file, line, key, what was expected and what came.
    """
    document = load(path, overrides)
    if "vocab_size" not in document.value and isinstance(document.value.get("model"), dict):
        document = document.section("model")
    return resolve(document)


def spec_from(mapping: dict[str, Any], source: str = "<mapping>") -> ModelSpec:
    """As `load_spec`, from a mapping made in Python."""
    return resolve(from_mapping(mapping, source))


def resolve(document: Document) -> ModelSpec:
    """The explicit form of a loaded document."""
    return _Resolver(hf_config.translate(document)).model()


class _Resolver:
    """One document on its way to a spec: collects faults instead of stopping at the first."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.value = document.value
        self.faults: list[str] = []
        self.depth = 0
        self.profile: WidthProfile | None = None

    # --- the whole model -------------------------------------------------------------------------------------------

    def model(self) -> ModelSpec:
        for key in self.value:
            if key not in KNOWN:
                self.fault((key,), f"unknown key{suggest(str(key), KNOWN)}")
        self.depth = self.layer_count()
        overrides = self.layer_overrides()
        for key in (*LAYER_KEYS, *LAYER_SHORT_FORMS):
            self.check_lengths(self.value.get(key), (key,))
        profile = self.profile = self.width_profile()
        widths = self.profile_widths(profile, overrides) if profile and not self.faults else None
        layers = [self.layer(index, overrides, widths[index] if widths else None) for index in range(self.depth)]
        fields: dict[str, Any] = {key: self.value[key] for key in SPEC_KEYS if self.value.get(key) is not None}
        sources: dict[str, KeyPath] = {key: (key,) for key in fields}
        for key in ("transition", "initialization"):
            if self.value.get(key) is not None:
                fields[key] = _kind(self.value[key])
        if "final_norm" in self.value:
            final = self.value["final_norm"]
            fields["final_norm"] = None if final in (None, "none") else _kind(final)
        else:
            self.fill_final_norm(fields, sources)
        resolved = [layer for layer in layers if layer is not None]
        if len(resolved) == len(layers) > 0:
            self.end_widths(fields, profile, widths, resolved)
            fields["layers"] = resolved
        else:
            # the layers are wrong; check the rest around a stand-in so that all faults show at once
            fields |= {"layers": [_STAND_IN], "embedding_size": 2, "unembedding_size": 2, "transition": None}
        spec = self.validate(ModelSpec, fields, sources)
        if self.faults or spec is None:
            raise InputError(*dict.fromkeys(self.faults))
        return spec

    def fill_final_norm(self, fields: dict[str, Any], sources: dict[str, KeyPath]) -> None:
        """Without `final_norm`, the kind and eps that all layers share."""
        norm, key = self.value.get("norm"), "norm"
        if norm is None:
            key = next((name for name in ("rms_norm_eps", "layer_norm_eps") if name in self.value), "norm")
            norm = _norm_short_form(key, self.value.get(key))
        if isinstance(norm, dict | str) and not isinstance(norm, list):
            fields["final_norm"] = _at_layer(_kind(norm), self.depth - 1, self.depth)
            sources["final_norm"] = (key,)

    def end_widths(
        self, fields: dict[str, Any], profile: WidthProfile | None, widths: list[int] | None, layers: list[LayerSpec]
    ) -> None:
        """Embedding and unembedding widths, where the file does not give them."""
        width_in, width_out = layers[0].hidden_size, layers[-1].hidden_size
        if profile is not None and widths is not None and not self.faults:
            width_in, width_out = end_widths(profile, self.value["hidden_size"], widths)
        fields.setdefault("embedding_size", width_in)
        fields.setdefault("unembedding_size", width_out)

    def layer_count(self) -> int:
        count = self.value.get("num_hidden_layers")
        if count is None:
            self.fault((), "required key num_hidden_layers is missing")
            return 0
        if isinstance(count, bool) or not isinstance(count, int | float) or count != int(count) or count < 1:
            self.fault(("num_hidden_layers",), f"expected a whole number above 0, got {show(count)}")
            return 0
        if count > MAX_LAYERS:
            self.fault(("num_hidden_layers",), f"expected at most {MAX_LAYERS} layers, got {show(count)}")
            return 0
        return int(count)

    def layer_overrides(self) -> dict[int, dict[str, Any]]:
        """`per_layer_config`: {layer index: {key: value}}, indices checked."""
        given = self.value.get("per_layer_config")
        if given is None:
            return {}
        if not isinstance(given, dict):
            self.fault(("per_layer_config",), f"expected a mapping from layer index to keys, got {show(given)}")
            return {}
        known = (*LAYER_KEYS, *LAYER_SHORT_FORMS)
        result: dict[int, dict[str, Any]] = {}
        for key, changes in given.items():
            path: KeyPath = ("per_layer_config", key)
            index = int(key) if isinstance(key, str) and key.isdigit() else key
            if not isinstance(index, int) or not 0 <= index < self.depth:
                if self.depth:
                    self.fault(path, f"expected a layer index from 0 to {self.depth - 1}, got {show(key)}")
            elif not isinstance(changes, dict):
                self.fault(path, f"expected a mapping of this layer's keys, got {show(changes)}")
            else:
                for name in changes:
                    if name not in known:
                        self.fault((*path, name), f"unknown key{suggest(str(name), known)}")
                result[index] = {name: (value, (*path, name)) for name, value in changes.items()}
        return result

    def check_lengths(self, value: Any, path: KeyPath) -> None:
        """Every list under a per-layer key holds one value per layer."""
        if _per_layer(path[-1], value) and self.depth and len(value) != self.depth:
            self.fault(path, f"expected one value or one per layer ({self.depth}), got {len(value)} values")
        if isinstance(value, dict):
            for key, item in value.items():
                self.check_lengths(item, (*path, key))

    # --- one layer -------------------------------------------------------------------------------------------------

    def layer(self, index: int, overrides: dict[int, dict[str, Any]], width: int | None = None) -> LayerSpec | None:
        """Layer `index` in explicit form; None (with faults noted) when it cannot be."""
        raw: dict[str, Any] = {}
        sources: dict[str, KeyPath] = {}
        unusable: set[str] = set()
        for key in (*LAYER_KEYS, *LAYER_SHORT_FORMS):
            value, path = overrides.get(index, {}).get(key, (self.value.get(key), (key,)))
            if path == (key,):
                if _per_layer(key, value) and len(value) != self.depth:
                    unusable.add(key)  # its length is already a fault
                    continue
                if _per_layer(key, value):
                    value, path = value[index], (key, index)
                elif isinstance(value, dict):
                    value = _at_layer(value, index, self.depth)
            if value is not None:
                raw[key], sources[key] = value, path
        stream = raw.get("hidden_size")
        if width is not None and sources.get("hidden_size") == ("hidden_size",):
            raw["hidden_size"] = width
        self.fill_heads(raw, sources, unusable)
        self.fill_ffn(raw, sources, unusable)
        if raw.get("attention_multiplier") == "1/head_dim" and _size(raw.get("head_dim")):
            raw["attention_multiplier"] = 1 / raw["head_dim"]
        if self.profile is not None and width is not None and _size(stream):
            self.apply_profile(raw, index, width, _size(stream))
        if "rope_theta" in raw:
            raw.setdefault("position", {"kind": "rope", "rope_theta": raw["rope_theta"]})
            sources.setdefault("position", sources["rope_theta"])
        for key in ("rms_norm_eps", "layer_norm_eps"):
            if key in raw:
                raw.setdefault("norm", _norm_short_form(key, raw[key]))
                sources.setdefault("norm", sources[key])
        for key in ("position", "norm"):
            if key in raw:
                raw[key] = _kind(raw[key])
        fields = {key: raw[key] for key in LAYER_KEYS if key in raw}
        return self.validate(LayerSpec, fields, sources, unusable)

    def apply_profile(self, raw: dict[str, Any], index: int, width: int, stream: int) -> None:
        """What a profile changes beside the width: a fixed stream, or ends that skip what the tables do not hold."""
        profile = self.profile
        assert profile is not None
        if profile.fixed_residual_width:
            raw["hidden_size"] = stream
        elif profile.no_waste and width > stream:
            if index == 0 and profile.original_input_width:
                raw.setdefault("attention_input_size", stream)
            if index == self.depth - 1 and profile.original_output_width:
                raw.setdefault("ffn_output_size", stream)

    def fill_heads(self, raw: dict[str, Any], sources: dict[str, KeyPath], unusable: set[str]) -> None:
        """num_key_value_heads = num_attention_heads; head_dim = hidden_size / heads; v_head_dim = head_dim."""
        width, heads = _size(raw.get("hidden_size")), _size(raw.get("num_attention_heads"))
        if heads and "num_key_value_heads" not in unusable:
            raw.setdefault("num_key_value_heads", heads)
            sources.setdefault("num_key_value_heads", sources["num_attention_heads"])
        if "head_dim" not in raw:
            if width and heads and width % heads == 0:
                raw["head_dim"], sources["head_dim"] = width // heads, sources["hidden_size"]
            else:
                unusable.add("head_dim")
                if width and heads:
                    self.fault(
                        sources["hidden_size"],
                        f"hidden_size {width} is not a multiple of {heads} heads; give head_dim or another width",
                    )
        if _size(raw.get("head_dim")):
            raw.setdefault("v_head_dim", raw["head_dim"])
            sources.setdefault("v_head_dim", sources["head_dim"])
        else:
            unusable.add("v_head_dim")
        unusable |= {key for key in ("num_attention_heads", "num_key_value_heads") if key in raw and not heads}

    def fill_ffn(self, raw: dict[str, Any], sources: dict[str, KeyPath], unusable: set[str]) -> None:
        """The explicit feed-forward from `ffn` and the short forms around it."""
        given = raw.get("ffn")
        if given is None:
            if "intermediate_size" not in raw:
                if "intermediate_size" not in unusable:
                    self.fault((), "required key intermediate_size (or ffn) is missing")
                unusable.add("ffn")
                return
            sources["ffn"] = sources["intermediate_size"]
            raw["ffn"] = {"kind": "dense", **self.ffn_short_forms(raw)}
        elif isinstance(given, dict):
            raw["ffn"] = self.explicit_ffn(given, raw, sources["ffn"], unusable)

    @staticmethod
    def ffn_short_forms(raw: dict[str, Any]) -> dict[str, Any]:
        names = {"intermediate_size": "intermediate_size", "hidden_act": "hidden_act", "mlp_bias": "bias"}
        return {name: raw[key] for key, name in names.items() if key in raw}

    def explicit_ffn(
        self, given: dict[str, Any], raw: dict[str, Any], path: KeyPath, unusable: set[str]
    ) -> dict[str, Any]:
        """`expansion` x width becomes intermediate_size; the short forms beside `ffn` fill what it leaves out."""
        if given.get("kind") == "moe":
            expert = given.get("expert")
            if not isinstance(expert, dict):
                return given
            return {**given, "expert": self.explicit_ffn(expert, raw, (*path, "expert"), unusable)}
        ffn = {**self.ffn_short_forms(raw), **given}
        expansion = ffn.pop("expansion", None)
        width = _size(raw.get("hidden_size"))
        if "intermediate_size" in given and expansion is not None:
            self.fault((*path, "expansion"), "give expansion or intermediate_size, not both")
        elif expansion is not None:
            if isinstance(expansion, bool) or not isinstance(expansion, int | float) or not expansion > 0:
                self.fault((*path, "expansion"), f"expected a number above 0, got {show(expansion)}")
                unusable.add("ffn")
            elif width:
                ffn["intermediate_size"] = max(1, round(expansion * width))
            else:
                unusable.add("ffn")
        if "parameter_ratio" in ffn and not unusable & {"ffn"}:
            self.fill_structure(ffn, width, path)
        return ffn

    def fill_structure(self, ffn: dict[str, Any], width: int, path: KeyPath) -> None:
        """Rank or blocks from the share of a dense linear's parameters (arXiv 2406.16450; see `structure_for`)."""
        ratio, inner = ffn.pop("parameter_ratio"), _size(ffn.get("intermediate_size"))
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            self.fault((*path, "parameter_ratio"), f"expected a share above 0 and up to 1, got {show(ratio)}")
        elif width and inner:
            try:
                gated = bool(ffn.get("gated", True))
                ffn |= structure_for(str(ffn.get("kind")), width, inner, ratio, gated, _size(ffn.get("num_blocks")))
            except ValueError as error:
                self.fault((*path, "parameter_ratio"), str(error))

    # --- width profiles --------------------------------------------------------------------------------------------

    def width_profile(self) -> WidthProfile | None:
        given = self.value.get("width")
        if given is None:
            return None
        if not isinstance(given, dict):
            self.fault(
                ("width",),
                f"expected a mapping such as {{profile: geometric, bottleneck_ratio: 0.3}}, got {show(given)}",
            )
            return None
        if isinstance(self.value.get("hidden_size"), list):
            self.fault(("width",), "with a width profile, hidden_size is one number: the width of the uniform baseline")
        profile = self.validate(WidthProfile, given, {key: ("width", key) for key in given}, where=("width",))
        if profile and self.depth and profile.profile != "stages":
            try:
                profile.steps(self.depth)
            except ValueError as error:
                self.fault(("width",), str(error))
        return profile

    def profile_widths(self, profile: WidthProfile, overrides: dict[int, dict[str, Any]]) -> list[int]:
        """One width per layer, matched as the profile asks."""
        base, vocab = _size(self.value.get("hidden_size")), _size(self.value.get("vocab_size"))
        if not base:
            self.fault(("hidden_size",), f"expected a whole number, got {show(self.value.get('hidden_size'))}")
        transition = TypeAdapter(Transition | None)
        try:
            moves = transition.validate_python(_kind(self.value.get("transition")))
        except ValidationError:
            moves = None  # noted when the model is made
        if not base or not vocab:
            return [2] * self.depth

        def layer(index: int, width: int) -> LayerSpec:
            found = self.layer(index, overrides, width)
            if found is None:
                raise ValueError(
                    f"no valid layer of width {width}; see the other faults, or choose another quantize_to"
                )
            return found

        default = ModelSpec.model_fields["max_position_embeddings"].default
        context = _size(self.value.get("max_position_embeddings")) or default
        tied = bool(self.value.get("tie_word_embeddings", False))
        try:
            return solve(profile, Baseline(self.depth, base, vocab, tied, context, moves, layer))
        except ValueError as error:
            self.fault(("width",), str(error))
            return [base] * self.depth

    # --- faults ----------------------------------------------------------------------------------------------------

    def fault(self, path: KeyPath, message: str) -> None:
        self.faults.append(self.document.fault(path, message))

    def validate(
        self,
        model: type[Model],
        fields: dict[str, Any],
        sources: dict[str, KeyPath],
        unusable: AbstractSet[str] = frozenset(),
        where: KeyPath = (),
    ) -> Model | None:
        """Validate; on error note one fault per complaint, at the line its value was written in.

        Fields in `unusable` are missing because of a fault already noted; their absence is not another one.
        """
        try:
            return model.model_validate(fields)
        except ValidationError as error:
            for item in error.errors(include_url=False):
                loc = item["loc"]
                field = str(loc[0]) if loc else ""
                if item["type"] == "missing" and field in unusable:
                    continue
                path = (*sources.get(field, (*where, field)), *_written(loc[1:])) if field else where
                self.fault(path, plain_message(item))
            return None


def plain_message(error: Any) -> str:
    """pydantic's complaint in our words: what was expected, what came."""
    kind, context, value = error["type"], error.get("ctx", {}), error.get("input")
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing":
        return "required key is missing"
    if kind == "extra_forbidden":
        return "unknown key"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        expected = context.get("expected_tags") or "one of the documented kinds"
        return f"unknown kind, expected one of {expected}, got {show(context.get('tag', value))}"
    if kind == "literal_error":
        return f"expected {context['expected']}, got {show(value)}"
    return f"{error['msg'].replace('Input should be', 'expected')}, got {show(value)}"


def _kind(value: Any) -> Any:
    """`rope` for `{kind: rope}`."""
    return {"kind": value} if isinstance(value, str) else value


def _norm_short_form(key: str, eps: Any) -> dict[str, Any] | None:
    if eps is None or isinstance(eps, list):
        return None
    return {"kind": "rms_norm" if key == "rms_norm_eps" else "layer_norm", "eps": eps}


def _written(loc: tuple[int | str, ...]) -> KeyPath:
    """Drop the union tags that pydantic puts into a location; they are not keys of the file."""
    return tuple(part for part in loc if part not in UNION_TAGS)


def _per_layer(key: object, value: Any) -> bool:
    """Whether a value is a list of one value per layer; a `head_to_group` of whole numbers is one value, for every layer."""
    one = key == "head_to_group" and isinstance(value, list) and all(isinstance(item, int) for item in value)
    return isinstance(value, list) and not one


def _at_layer(value: Any, index: int, depth: int) -> Any:
    """A mapping whose lists are per-layer values, at one layer."""
    if isinstance(value, dict):
        return {key: _at_layer(item, index, depth) for key, item in value.items()}
    if isinstance(value, list):
        return value[index] if len(value) == depth else value
    return value


def _size(value: Any) -> int:
    """The value as a usable size, or 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    return int(value) if value >= 1 and math.isfinite(value) and value == int(value) else 0


_STAND_IN = LayerSpec.model_validate(
    {
        "hidden_size": 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "v_head_dim": 2,
        "ffn": {"kind": "dense", "intermediate_size": 1},
    }
)


# --- back to a file ----------------------------------------------------------------------------------------------------


def to_mapping(spec: ModelSpec) -> dict[str, Any]:
    """The resolved spec as the mapping `resolve` reads back: one value where all layers agree, else a list."""
    data = spec.dump()
    layers = data.pop("layers")
    merged = {
        key: _merge([layer.get(key) for layer in layers]) for key in LAYER_KEYS if any(key in layer for layer in layers)
    }
    head = {key: data.pop(key) for key in SPEC_KEYS if key in data}
    # without it, a reader would take the layers' norm
    final = "none" if spec.final_norm is None else spec.final_norm.model_dump(mode="json", exclude_defaults=True)
    if "norm" in merged or spec.final_norm != ModelSpec.model_fields["final_norm"].default:
        data["final_norm"] = final
    return {**head, "num_hidden_layers": spec.num_hidden_layers, **merged, **data}


def _merge(values: list[Any]) -> Any:
    """One value per layer as briefly as the file form allows."""
    if all(json.dumps(value, sort_keys=True) == json.dumps(values[0], sort_keys=True) for value in values):
        return values[0]
    if all(isinstance(value, dict) and value.keys() == values[0].keys() for value in values):
        kinds = {value.get("kind") for value in values}
        if len(kinds) == 1:
            return {key: _merge([value[key] for value in values]) for key in values[0]}
    return values


def to_yaml(spec: ModelSpec) -> str:
    """The resolved spec as YAML text; `load_spec` of it gives an equal spec."""
    return dumps(to_mapping(spec))
