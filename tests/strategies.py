"""Random valid specs, for hypothesis: small, and over the whole union of what a spec can say."""

from typing import Any

from hypothesis import strategies as st

from scantling.resolve import spec_from
from scantling.spec import ModelSpec

ACTIVATIONS = ["silu", "gelu", "gelu_pytorch_tanh", "relu"]


@st.composite
def ffns(draw: st.DrawFn, width: int, routed: bool = True) -> dict[str, Any]:
    kind = draw(st.sampled_from(["dense", "low_rank", "block_shuffle", "block_dense"] + (["moe"] if routed else [])))
    if kind == "moe":
        experts = draw(st.integers(1, 5))
        chosen = draw(st.integers(1, experts))
        expert = draw(ffns(width, routed=False))
        return {"kind": "moe", "num_local_experts": experts, "num_experts_per_tok": chosen, "expert": expert}
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
    position: dict[str, Any] = draw(
        st.sampled_from([{"kind": "rope"}, {"kind": "rope", "rope_theta": 500.0}, {"kind": "none"}])
    )
    head_dim = draw(st.integers(1, 6)) * (2 if position["kind"] == "rope" else 1)
    return {
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "v_head_dim": draw(st.integers(1, 12)),
        "attention_bias": draw(st.booleans()),
        "attention_multiplier": draw(st.sampled_from([None, 0.25])),
        "position": position,
        "norm": {"kind": "rms_norm", "eps": draw(st.sampled_from([1e-6, 1e-5]))},
        "ffn": draw(ffns(width)),
    }


@st.composite
def mappings(draw: st.DrawFn) -> dict[str, Any]:
    """A spec file's mapping: 1-4 layers of any widths from 8 to 32."""
    depth = draw(st.integers(1, 4))
    widths = draw(st.lists(st.integers(4, 16).map(lambda n: 2 * n), min_size=depth, max_size=depth))
    tied = draw(st.booleans())
    ends = draw(st.integers(4, 16)) * 2
    return {
        "vocab_size": draw(st.integers(2, 40)),
        "max_position_embeddings": 64,
        "num_hidden_layers": depth,
        "hidden_size": widths,
        "embedding_size": ends,
        "unembedding_size": ends if tied else draw(st.integers(4, 16)) * 2,
        "tie_word_embeddings": tied,
        "transition": draw(st.sampled_from(["carry_forward", "zero"])),
        "per_layer_config": {index: draw(layers(widths[index])) for index in range(depth)},
    }


def specs() -> st.SearchStrategy[ModelSpec]:
    return mappings().map(spec_from)
