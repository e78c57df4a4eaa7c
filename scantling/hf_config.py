"""A stock Hugging Face `config.json` as a spec document: the architecture it describes, in our own keys.

A `config.json` leaves out what its class has as default (`hf_classes.py`). What only matters in
training (dropout, router jitter) or in running (caches, dtypes, token ids) is ignored; a setting that changes the function
and has no equal here is refused. Our own keys beside the class's (as `--set ffn.kind=low_rank` adds them) are kept; a
key that neither knows is an error in `--set`.
"""

import math
from typing import Any

from scantling.errors import InputError
from scantling.hf_classes import ACTIVATIONS, BIASED, DEFAULTS, GPT2_NAMES, HEADS, MODEL_TYPES
from scantling.yamlio import Document, KeyPath, show

OWN_KEYS = (
    "attention_input_size",
    "attention_multiplier",
    "attention_out_bias",
    "branches",
    "embedding_multiplier",
    "embedding_size",
    "ffn",
    "ffn_output_size",
    "final_norm",
    "initialization",
    "learned_positions",
    "lm_head_bias",
    "logits_scaling",
    "norm",
    "norm_placement",
    "per_layer_config",
    "position",
    "qk_norm",
    "residual_multiplier",
    "transition",
    "unembedding_size",
    "v_head_dim",
    "width",
)
OPTIONAL = (
    "add_cross_attention",
    "architectures",
    "layer_types",
    "model_type",
    "partial_rotary_factor",
    "rope_parameters",
    "rope_scaling",
    "scale_attn_by_inverse_layer_idx",
    "use_bidirectional_attention",
)  # read where given, beside the class's defaults
MANY_LAYERS = 4096


def is_config(value: dict[str, Any]) -> bool:
    """Whether a mapping is a `config.json` (it names its class), not one of our own files."""
    return "model_type" in value or "architectures" in value


def translate(document: Document) -> Document:
    """The architecture of a `config.json` in our keys, each with its line; other documents unchanged.

    Raises:
        InputError: a model type, or a setting that changes the function, which has no equal here.
    """
    if not is_config(document.value):
        return document
    kind = document.value.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        message = (
            f"expected one of {', '.join(MODEL_TYPES)}, got {show(kind)}; describe other models in a spec's own keys"
        )
        raise InputError(document.fault(("model_type",), message))
    return _Translation(document, kind).document()


class _Translation:
    """One `config.json` on its way to our keys: collects faults instead of stopping at the first."""

    def __init__(self, document: Document, kind: str) -> None:
        self.source = document
        self.kind = kind
        self.written: dict[str, str] = {}  # our key, where the class has another name for it
        given = dict(document.value)
        for theirs, ours in GPT2_NAMES.items() if kind == "gpt2" else ():
            if theirs in given and ours not in given:
                given[ours], self.written[ours] = given.pop(theirs), theirs
        self.config = {**DEFAULTS[kind], **given}  # a null stays null: it is not the default
        self.out: dict[str, Any] = {}
        self.places = dict(document.places)
        self.faults: list[str] = []

    def document(self) -> Document:
        """The whole translation."""
        self.check_head()
        self.sizes()
        if self.kind == "gpt2":
            self.gpt2()
        elif self.kind == "gpt_neox":
            self.gpt_neox()
        else:
            self.llama_like()
        for key, value in self.source.value.items():
            if key in OWN_KEYS or self.is_override(key):
                self.put(key, value, key)
        if self.faults:
            raise InputError(*self.faults)
        return Document(self.out, self.source.source, self.places)

    def is_override(self, key: str) -> bool:
        """Whether `--set` gave a key that the class does not know: it must be one of ours, or the resolver refuses it."""
        known = key in DEFAULTS[self.kind] or key in OPTIONAL or (self.kind == "gpt2" and key in GPT2_NAMES)
        return not known and self.source.places.get((key,), "").startswith("--set ")

    # --- what all classes share ------------------------------------------------------------------------------------

    def put(self, key: str, value: Any, source: str) -> None:
        """Set one of our keys, which points at the line of the class's key `source`."""
        self.out[key] = value
        written = (self.written.get(source, source),)
        if written in self.source.places:
            self.places[(key,)] = self.source.places[written]

    def copy(self, *keys: str) -> None:
        """Keys with the same name and meaning here."""
        for key in keys:
            if self.config.get(key) is not None:
                self.put(key, self.config[key], key)

    def refuse(self, path: KeyPath, message: str) -> None:
        first = self.written.get(str(path[0]), path[0])
        self.faults.append(self.source.fault((first, *path[1:]), message))

    def check_head(self) -> None:
        """Classifiers and bare encoders have the same model_type and another head."""
        names = self.config.get("architectures") or []
        if isinstance(names, list) and names and not str(names[0]).endswith(HEADS):
            self.refuse(("architectures",), f"expected a language model, such as ...{HEADS[0]}, got {show(names[0])}")

    def sizes(self) -> None:
        self.copy("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        self.copy("head_dim", "intermediate_size", "max_position_embeddings", "tie_word_embeddings")
        std = self.config["initializer_range"]
        initialization = {"kind": "normal", "std": std, **({"depth_scaled": True} if self.kind == "gpt2" else {})}
        self.put("initialization", initialization, "initializer_range")

    def depth(self) -> int:
        """Layers, or 0 where the resolver will refuse the number."""
        count = self.config["num_hidden_layers"]
        whole = isinstance(count, int) and not isinstance(count, bool)
        return count if whole and 0 < count <= MANY_LAYERS else 0

    def activation(self, key: str) -> None:
        name = self.config.get(key)
        if isinstance(name, str) and name in ACTIVATIONS:
            self.put("hidden_act", ACTIVATIONS[name], key)
        else:
            self.refuse((key,), f"expected one of {', '.join(ACTIVATIONS)}, got {show(name)}")

    # --- positions -------------------------------------------------------------------------------------------------

    def rope(self) -> None:
        """Rotary positions from `rope_parameters`, or from `rope_scaling` beside `rope_theta`."""
        key = "rope_scaling" if self.config.get("rope_scaling") else "rope_parameters"
        given = self.config.get(key) or {}
        if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
            self.refuse(
                (key,),
                f"expected one mapping for all layers, such as {{rope_type: linear, factor: 2}}, got {show(given)}",
            )
            return
        theta = "rotary_emb_base" if self.kind == "gpt_neox" else "rope_theta"
        position: dict[str, Any] = {"kind": "rope", "rope_theta": given.get("rope_theta", self.config[theta])}
        share = given.get("partial_rotary_factor", self.config.get("rotary_pct", 1.0))
        if self.kind == "gpt_neox":
            position["partial_rotary_factor"] = share
        elif share != 1 or self.config.get("partial_rotary_factor", 1) != 1:
            self.refuse((key,), f"{self.kind} rotates whole heads; expected partial_rotary_factor 1, got {show(given)}")
        scaling = self.scaling(key, given)
        if scaling is not None:
            position["scaling"] = scaling
        self.put("position", position, key if key in self.source.value else theta)
        if theta in self.source.value:
            self.places[("position", "rope_theta")] = self.source.place((theta,))

    def scaling(self, key: str, given: dict[str, Any]) -> dict[str, Any] | None:
        kind = given.get("rope_type", given.get("type", "default"))
        context = self.config.get("max_position_embeddings")
        original = given.get("original_max_position_embeddings") or context
        match kind:
            case "default" | None:
                return None
            case "linear":
                return {"kind": "linear", **_only(given, "factor")}
            case "llama3":
                named = _only(
                    given, "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"
                )
                return {"kind": "llama3", **named}
            case "yarn":
                if given.get("truncate", True) is not True:
                    self.refuse(
                        (key, "truncate"),
                        f"expected true (bounds rounded to whole pairs), got {show(given['truncate'])}",
                    )
                named = _only(given, "factor", "beta_fast", "beta_slow", "attention_factor")
                if "attention_factor" not in named and given.get("mscale") and given.get("mscale_all_dim"):
                    stretch = [_stretch(given.get("factor"), given[name]) for name in ("mscale", "mscale_all_dim")]
                    named["attention_factor"] = stretch[0] / stretch[1]
                return {"kind": "yarn", "original_max_position_embeddings": original, **named}
        self.refuse(
            (key,),
            f"expected rope_type default, linear, yarn or llama3, got {show(kind)}; its function is not supported",
        )
        return None

    # --- Llama and its descendants ---------------------------------------------------------------------------------

    def llama_like(self) -> None:
        """RMSNorm, rotary positions, a gated feed-forward; then what is each class's own."""
        self.copy("rms_norm_eps")
        self.rope()
        self.activation("hidden_activation" if self.kind == "gemma2" else "hidden_act")
        if self.kind in BIASED:
            self.copy("attention_bias")
        qk_norm = {"eps": self.config.get("rms_norm_eps")}
        match self.kind:
            case "llama":
                self.copy("mlp_bias")
            case "mistral":
                self.copy("sliding_window")
            case "mixtral":
                self.copy("sliding_window")
                moe = _only(self.config, "num_local_experts", "num_experts_per_tok", "router_aux_loss_coef")
                # softmax over all experts, then renormalised over the chosen, is softmax over the chosen
                self.put("ffn", {"kind": "moe", **moe, "expert": {"kind": "dense"}}, "num_local_experts")
            case "qwen2":
                self.out["attention_bias"], self.out["attention_out_bias"] = True, False
                self.qwen_windows()
            case "qwen3":
                self.out["qk_norm"] = {"over": "head", **qk_norm}
                self.qwen_windows()
            case "gemma":
                self.gemma()
            case "gemma2":
                self.gemma()
                self.gemma2()
            case "olmo2":
                self.out["qk_norm"] = {"over": "all", **qk_norm}
                self.out["norm_placement"] = "post_branch"

    def gemma(self) -> None:
        """Embeddings times sqrt(width); gelu means its tanh approximation."""
        width = self.config["hidden_size"]
        width = width[0] if isinstance(width, list) and width else width  # the embedding's
        if _positive(width):
            self.put("embedding_multiplier", math.sqrt(width), "hidden_size")
        if self.kind == "gemma" and self.config["hidden_act"] == "gelu":  # as the class itself reads the first releases
            self.put("hidden_act", "gelu_pytorch_tanh", "hidden_act")
        if self.config.get("use_bidirectional_attention"):
            self.refuse(("use_bidirectional_attention",), "expected false: attention here is causal, got true")

    def gemma2(self) -> None:
        """Soft caps, a norm before and after each sub-layer, every other layer sliding."""
        self.copy("attn_logit_softcapping", "final_logit_softcapping")
        self.out["norm_placement"] = "sandwich"
        scalar = self.config["query_pre_attn_scalar"]
        if not _positive(scalar):
            self.refuse(("query_pre_attn_scalar",), f"expected a number above 0, got {show(scalar)}")
        elif scalar != self.config["head_dim"]:
            self.put("attention_multiplier", float(scalar) ** -0.5, "query_pre_attn_scalar")
        self.windows(["sliding_attention", "full_attention"] * self.depth())

    def qwen_windows(self) -> None:
        if not self.config["use_sliding_window"]:
            self.config["sliding_window"] = None
        full = self.config["max_window_layers"]
        full = full if isinstance(full, int) else 0
        self.windows(["full_attention" if at < full else "sliding_attention" for at in range(self.depth())])

    def windows(self, default: list[str]) -> None:
        """`sliding_window` of the layers that `layer_types`, or the class, makes sliding."""
        window, depth = self.config["sliding_window"], self.depth()
        given = self.config.get("layer_types")
        types = default[:depth] if given is None else given
        if not isinstance(types, list) or (depth and len(types) != depth):
            self.refuse(("layer_types",), f"expected one kind per layer ({depth}), got {show(types)}")
            return
        for at, kind in enumerate(types):
            if kind not in ("full_attention", "sliding_attention"):
                self.refuse(("layer_types", at), f"expected full_attention or sliding_attention, got {show(kind)}")
        sliding = [window if kind == "sliding_attention" else None for kind in types]
        if any(size is not None for size in sliding):
            self.put("sliding_window", sliding, "sliding_window")

    # --- the classes with LayerNorm and biases ---------------------------------------------------------------------

    def gpt2(self) -> None:
        """Learned positions; a null n_inner is 4 x the width."""
        self.layer_norm_and_biases()
        self.out |= {"position": "none", "learned_positions": True, "attention_bias": True}
        width, heads = self.config["hidden_size"], self.config["num_attention_heads"]
        if self.config["intermediate_size"] is None:
            self.out["ffn"]["expansion"] = 4
        if self.config.get("add_cross_attention"):
            self.refuse(("add_cross_attention",), "expected false: there is no encoder to attend to, got true")
        scaled, per_layer = self.config["scale_attn_weights"], self.config.get("scale_attn_by_inverse_layer_idx")
        if per_layer and isinstance(width, list):
            self.refuse(("hidden_size",), "scale_attn_by_inverse_layer_idx needs one width for all layers")
        elif (not scaled or per_layer) and _positive(width) and _positive(heads):
            scale = (width / heads) ** -0.5 if scaled else 1.0
            each = [scale / (index + 1) for index in range(self.depth())]
            self.put("attention_multiplier", each if per_layer else scale, "scale_attn_weights")

    def gpt_neox(self) -> None:
        """Partly rotated heads; attention and feed-forward in parallel."""
        self.layer_norm_and_biases()
        self.copy("use_parallel_residual", "attention_bias")
        self.rope()

    def layer_norm_and_biases(self) -> None:
        self.copy("layer_norm_eps")
        self.activation("hidden_act")
        self.out |= {"mlp_bias": True, "ffn": {"kind": "dense", "gated": False}}


def _only(mapping: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The keys that are there and not null."""
    return {key: mapping[key] for key in keys if mapping.get(key) is not None}


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _stretch(factor: Any, share: Any) -> float:
    """YaRN's 0.1 x share x ln(factor) + 1."""
    usable = _positive(factor) and _positive(share) and factor > 1
    return 0.1 * share * math.log(factor) + 1 if usable else 1.0
