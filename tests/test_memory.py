"""Training memory against what autograd really keeps, against hand counts, and on arrays."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.utils.checkpoint import checkpoint

import scantling.model.attention as attention_module
from scantling.costing import param_counts
from scantling.memory import OPTIMIZER_BYTES, Kernel, paper_training_values, training_memory
from scantling.model import build
from scantling.model.layer import Layer
from scantling.resolve import spec_from
from scantling.rows import Stack, StackFFN, StackLayer, rows
from scantling.spec import ModelSpec
from tests.strategies import specs

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
}
MOE: dict[str, Any] = {"kind": "moe", "num_local_experts": 4, "num_experts_per_tok": 2, "expert": {"kind": "dense"}}
POINTS = [(2, 16), (1, 24)]


def spec(**changes: Any) -> ModelSpec:
    return spec_from({**BASE, **changes})


def saved_bytes(model_spec: ModelSpec, sequences: int, length: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of every distinct storage that autograd saves in one training loss, parameters aside."""
    model = build(model_spec, dtype=dtype)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = torch.randint(0, model_spec.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(ids, ids.clone())
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


def counted(model_spec: ModelSpec, sequences: int, length: int, attention: Kernel, activation_bytes: int = 4) -> int:
    memory = training_memory(
        model_spec, length, sequences, activation_bytes=activation_bytes, attention=attention, norm="plain"
    )
    return int(memory.activations + memory.logits) + 4  # the loss's own divisor


@pytest.fixture(params=["plain", "fused"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """Both kernels on a CPU, whatever the length."""
    monkeypatch.setattr(attention_module, "PLAIN_LENGTH", 10**9 if request.param == "plain" else 0)
    yield request.param


EXACT: dict[str, dict[str, Any]] = {
    "dense gated GQA": {},
    "MHA, not gated": {"num_key_value_heads": 4, "ffn": {"kind": "dense", "gated": False, "hidden_act": "gelu"}},
    "MQA, relu": {"num_key_value_heads": 1, "hidden_act": "relu"},
    "layer norm, learned positions": {"norm": {"kind": "layer_norm"}, "learned_positions": True, "position": "none"},
    "q/k norm per head": {"qk_norm": {"over": "head"}},
    "q/k norm over all": {"qk_norm": {"over": "all"}},
    "low rank": {"ffn": {"kind": "low_rank", "rank": 8}},
    "block shuffle": {"ffn": {"kind": "block_shuffle", "num_blocks": 4, "bias": True}},
    "block dense": {"ffn": {"kind": "block_dense", "num_blocks": 4, "rank": 8, "gated": False, "hidden_act": "relu"}},
    "MoE": {"ffn": MOE},
    "MoE, softmax before, shared expert": {
        "ffn": {**MOE, "router_softmax": "before", "shared_expert": {"kind": "dense", "intermediate_size": 48}}
    },
    "sandwich": {"norm_placement": "sandwich"},
    "post-norm": {"norm_placement": "post_residual"},
    "parallel": {"use_parallel_residual": True},
    "soft caps": {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0},
    "window": {"sliding_window": 3},
    "carry forward": {"num_hidden_layers": 4, "hidden_size": [32, 16, 24, 32], "transition": "carry_forward"},
    "linear, Sinkhorn": {
        "num_hidden_layers": 4, "hidden_size": [32, 16, 24, 32], "transition": {"kind": "linear", "sinkhorn_iters": 3},
    },
    "part of the stream": {
        "attention_input_size": 20, "ffn_output_size": 16, "ffn": {"kind": "block_shuffle", "num_blocks": 4},
    },
    "part of the stream, MoE": {"attention_input_size": 20, "ffn_output_size": 16, "ffn": MOE},
    "branches": {"num_hidden_layers": 4, "branches": {"count": 2}, "embedding_size": 32, "unembedding_size": 32},
}  # fmt: skip


@pytest.mark.parametrize("changes", EXACT.values(), ids=EXACT.keys())
def test_equals_saved_tensors_to_the_byte(changes: dict[str, Any], attention: Kernel) -> None:
    model_spec = spec(**changes)
    for sequences, length in POINTS:
        assert counted(model_spec, sequences, length, attention) == saved_bytes(model_spec, sequences, length)


@given(specs())
@settings(max_examples=25)
def test_any_spec_is_within_five_percent(model_spec: ModelSpec) -> None:
    """Over the whole union; what is not exact: views shared between branches, block shuffles that need no copy."""
    assert counted(model_spec, 2, 16, "plain") == pytest.approx(saved_bytes(model_spec, 2, 16), rel=0.05)


def test_sixteen_bits_are_exact_too(attention: Kernel) -> None:
    model_spec = spec()
    assert counted(model_spec, 2, 16, attention, 2) == saved_bytes(model_spec, 2, 16, torch.bfloat16)


def test_a_value_head_of_another_size_is_the_stated_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's fused CPU kernel needs equal head sizes and falls back to keeping probabilities."""
    monkeypatch.setattr(attention_module, "PLAIN_LENGTH", 0)
    model_spec = spec(v_head_dim=12)
    assert counted(model_spec, 2, 16, "fused") < saved_bytes(model_spec, 2, 16)


def test_hand_count() -> None:
    """One pre-norm layer, d 32, h 4, g 2, k 8, f 80, V 97, T 16: fused kernels, float32."""
    memory = training_memory(spec(num_hidden_layers=1), 16)
    found = {row.component: row.bytes for row in memory.rows if row.layer == 0}
    assert found["stream"] == 4 * 32 * 16 * 4
    assert found["attention"] == ((4 + 2) * 8 + 2 * 8 + 2 * 4 * 8 + 4) * 16 * 4
    assert found["ffn"] == 4 * 80 * 16 * 4
    assert found["norm"] == 2 * 16 * 4
    assert memory.logits == 97 * 16 * 4 + 16 * 8
    params = param_counts(rows(spec(num_hidden_layers=1)))["total"]
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * params, 4 * params, 8 * params)
    assert memory.total == 16 * params + memory.activations + memory.logits
    assert memory.activations == sum(row.bytes for row in memory.rows if row.component != "loss")
    assert memory.peak == memory.total + 2 * 97 * 16 * 4
    sgd = training_memory(spec(num_hidden_layers=1), 16, optimizer_bytes=OPTIMIZER_BYTES["sgd"])
    assert memory.total - sgd.total == 8 * params


def test_checkpointing_keeps_inputs_and_the_largest_layer() -> None:
    model_spec = spec(intermediate_size=[80, 400])
    whole = training_memory(model_spec, 16, 2)
    kept = training_memory(model_spec, 16, 2, checkpointing=True)
    d_bytes = 32 * 2 * 16 * 4
    assert [row.bytes for row in kept.rows if row.component == "input"] == [d_bytes, d_bytes]
    largest = sum(row.bytes for row in whole.rows if row.layer == 1)
    assert [row.bytes for row in kept.rows if row.component == "recompute"] == [largest - d_bytes]
    first = sum(row.bytes for row in whole.rows if row.layer == 0)
    assert whole.activations - kept.activations == first - d_bytes
    one = spec(num_hidden_layers=1)
    assert training_memory(one, 16, checkpointing=True).total == training_memory(one, 16).total


@pytest.mark.parametrize("name", ["dense gated GQA", "low rank", "carry forward"])
def test_checkpointed_layers_save_their_inputs_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's own checkpointing around every layer; what is recomputed is not saved in the forward pass."""
    inside = Layer.forward
    monkeypatch.setattr(
        Layer, "forward", lambda self, x, past: checkpoint(lambda y: inside(self, y), x, use_reentrant=True)
    )
    model_spec = spec(**EXACT[name], tie_word_embeddings=True)
    memory = training_memory(model_spec, 16, 2, checkpointing=True, attention="plain", norm="plain")
    later = sum(row.bytes for row in memory.rows if row.component in ("recompute", "rotary"))
    assert memory.activations + memory.logits - later + 4 == saved_bytes(model_spec, 2, 16)


def test_grows_with_everything() -> None:
    for model_spec in (spec(), spec(ffn=MOE)):
        small = training_memory(model_spec, 16)
        for args in ((32, 1), (16, 2)):
            assert training_memory(model_spec, *args).activations > small.activations
        assert training_memory(model_spec, 16, attention="plain").total != small.total
        assert training_memory(model_spec, 16, norm="plain").total > small.total
        assert training_memory(model_spec, 16, activation_bytes=2).activations < small.activations


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 20}, {"ffn": MOE}], ids=["dense", "window", "moe"])
def test_arrays_equal_ints(changes: dict[str, Any], checkpointing: bool) -> None:
    lengths, sequences = np.array([8, 16, 24]), np.array([1, 3, 2])
    found = training_memory(spec(**changes), lengths, sequences, checkpointing=checkpointing)
    for index in range(3):
        one = training_memory(spec(**changes), int(lengths[index]), int(sequences[index]), checkpointing=checkpointing)
        for name in ("activations", "logits", "total", "peak"):
            assert np.broadcast_to(getattr(found, name), 3)[index] == getattr(one, name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_stack_of_candidates_costs_what_each_spec_does(checkpointing: bool) -> None:
    inner, depth = np.array([80, 160]), np.array([2, 5])
    layer = StackLayer(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, v_head_dim=8,
        ffn=StackFFN(inner), repeat=depth,
    )  # fmt: skip
    stack = Stack(97, 32, 32, False, (layer,))
    found = training_memory(stack, 16, checkpointing=checkpointing)
    tables = (
        2 * 4 * 16 * 4
    )  # a stack names no positions: the cos and sin tables, the same for every shape, are left out
    for index in range(2):
        one = spec(num_hidden_layers=int(depth[index]), intermediate_size=int(inner[index]))
        assert found.total[index] == training_memory(one, 16, checkpointing=checkpointing).total - tables


def test_the_papers_convention() -> None:
    model_spec = spec()
    n = param_counts(rows(model_spec))["matmul_non_embedding"]
    assert paper_training_values(model_spec, 16) == 4 * n + 16 * 32 * 2
