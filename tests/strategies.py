"""Random valid specs, for hypothesis: small, and over the whole union of what a spec can say."""

from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from scantling.resolve import spec_from
from scantling.spec import ModelSpec

ACTIVATIONS = ["silu", "gelu", "gelu_pytorch_tanh", "relu"]
TRANSITIONS: list[Any] = [
    "carry_forward",
    "zero",
    "gated",
    {"kind": "linear", "bias": True},
    {"kind": "linear", "sinkhorn_iters": 2},
    {"kind": "linear_diff"},
    "transposed_conv",
    "conv_diff",
    {"kind": "interpolate", "align_corners": True},
    "gaussian",
    "compress",
]
ROPES: list[dict[str, Any]] = [
    {"kind": "rope"},
    {"kind": "rope", "rope_theta": 500.0},
    {"kind": "rope", "scaling": {"kind": "linear", "factor": 2.0}},
    {"kind": "rope", "frequency_size": 6},
    {"kind": "rope", "scaling": {"kind": "ntk", "factor": 4.0}},
    {"kind": "rope", "scaling": {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    {"kind": "rope", "scaling": {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}},
]
NORMS: list[Any] = [
    {"kind": "rms_norm"},
    {"kind": "rms_norm", "eps": 1e-5},
    {"kind": "rms_norm", "statistic_size": 5},
    {"kind": "layer_norm"},
    {"kind": "layer_norm", "bias": False},
    {"kind": "layer_norm", "statistic_size": 7},
]


@st.composite
def ffns(draw: st.DrawFn, width: int, routed: bool = True) -> dict[str, Any]:
    kind = draw(st.sampled_from(["dense", "low_rank", "block_shuffle", "block_dense"] + (["moe"] if routed else [])))
    if kind == "moe":
        experts = draw(st.integers(1, 5))
        moe: dict[str, Any] = {
            "kind": "moe",
            "num_local_experts": experts,
            "num_experts_per_tok": draw(st.integers(1, experts)),
            "expert": draw(ffns(width, routed=False)),
            "router_softmax": draw(st.sampled_from(["after", "before"])),
            "norm_topk_prob": draw(st.booleans()),
            "router_z_loss_coef": draw(st.sampled_from([0.0, 0.1])),
        }
        if draw(st.booleans()):
            moe["shared_expert"] = draw(ffns(width, routed=False))
        return moe
    ffn: dict[str, Any] = {
        "kind": kind,
        "gated": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "bias": draw(st.booleans()),
        "intermediate_size": 4 * draw(st.integers(1, 12)),
    }
    if kind in ("block_shuffle", "block_dense"):
        ffn["num_blocks"] = draw(st.sampled_from([blocks for blocks in (1, 2, 4) if width % blocks == 0]))
    if kind in ("low_rank", "block_dense"):
        ffn["rank"] = 4 * draw(st.integers(1, 6))
    return ffn


@st.composite
def layers(draw: st.DrawFn, width: int) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 3))
    position: dict[str, Any] = draw(st.sampled_from([*ROPES, {"kind": "none"}]))
    head_dim = draw(st.integers(2, 6)) * (2 if position["kind"] == "rope" else 1)
    ntk = position.get("scaling", {}).get("kind") == "ntk"
    if position["kind"] == "rope" and head_dim % 4 == 0 and (head_dim > 4 or not ntk) and draw(st.booleans()):
        position = {**position, "partial_rotary_factor": 0.5}
    placement = draw(st.sampled_from(["pre", "post_residual", "post_branch", "sandwich"]))
    groups = draw(st.one_of(st.none(), st.lists(st.integers(0, kv_heads - 1), min_size=1, max_size=5)))
    return {
        "num_attention_heads": len(groups) if groups else kv_heads * draw(st.integers(1, 3)),
        "head_to_group": groups,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "v_head_dim": draw(st.integers(1, 12)),
        "attention_bias": draw(st.booleans()),
        "attention_out_bias": draw(st.sampled_from([None, True, False])),
        "attention_multiplier": draw(st.sampled_from([None, 0.25])),
        "attn_logit_softcapping": draw(st.sampled_from([None, 5.0])),
        "sliding_window": draw(st.sampled_from([None, 1, 3])),
        "qk_norm": draw(
            st.sampled_from(
                [None, {"over": "head"}, {"over": "head", "statistic_size": 2}, {"over": "all", "eps": 1e-5}]
            )
        ),
        "position": position,
        "norm": draw(st.sampled_from(NORMS)),
        "norm_placement": placement,
        "use_parallel_residual": placement == "pre" and draw(st.booleans()),
        "residual_multiplier": draw(st.sampled_from([1.0, 0.22])),
        "attention_input_size": draw(st.sampled_from([None, width // 2])),
        "ffn_output_size": draw(st.sampled_from([None, width - 4])) if placement == "pre" else None,
        "ffn": draw(ffns(width)),
    }


def fits(transition: Any, widths: list[int]) -> bool:
    """A convolution that predicts the missing coordinates can at most double the width."""
    return transition != "conv_diff" or all(b <= 2 * a for a, b in pairwise(widths))


@st.composite
def mappings(draw: st.DrawFn) -> dict[str, Any]:
    """A spec file's mapping: one to three stacks of 1-4 layers of any widths from 8 to 32."""
    depth = draw(st.integers(1, 4))
    widths = draw(st.lists(st.integers(4, 16).map(lambda n: 2 * n), min_size=depth, max_size=depth))
    tied = draw(st.booleans())
    branches = draw(st.sampled_from([None, None, "shared", "projection", "split"]))
    count = draw(st.integers(2, 3)) if branches else 1
    entry = draw(st.integers(4, 16)) * 2
    embedding = entry * count if branches == "split" else entry
    unembedding = embedding if tied else draw(st.integers(4, 16)) * 2
    stack = [draw(layers(width)) for width in widths]
    transition = draw(st.sampled_from([item for item in TRANSITIONS if fits(item, [entry, *widths, unembedding])]))
    model: dict[str, Any] = {
        "vocab_size": draw(st.integers(2, 40)),
        "max_position_embeddings": 64,
        "num_hidden_layers": depth * count,
        "hidden_size": widths * count,
        "embedding_size": embedding,
        "unembedding_size": unembedding,
        "tie_word_embeddings": tied,
        "learned_positions": draw(st.booleans()),
        "embedding_multiplier": draw(st.sampled_from([1.0, 12.0])),
        "logits_scaling": draw(st.sampled_from([1.0, 8.0])),
        "final_logit_softcapping": draw(st.sampled_from([None, 30.0])),
        "lm_head_bias": draw(st.booleans()),
        "final_norm": draw(st.sampled_from([*NORMS, "none"])),
        "initialization": draw(
            st.sampled_from(
                [{"kind": "fan_in"}, {"kind": "normal", "std": 0.05, "depth_scaled": True}, {"kind": "mup"}]
            )
        ),
        "transition": transition,
        "per_layer_config": {index: stack[index % depth] for index in range(depth * count)},
    }
    if branches:
        mixing = draw(st.sampled_from(["softmax", "sigmoid", "raw"] if count == 2 else ["softmax"]))
        model["branches"] = {"count": count, "entry": branches, "mixing": mixing}
    return model


def specs() -> st.SearchStrategy[ModelSpec]:
    return mappings().map(spec_from)
