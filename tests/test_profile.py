"""Where a step's time goes: what each operation counts as, that everything is counted once, and what is said about it."""

import json

import pytest
import torch
from torch.profiler import record_function

from scantling.model import build
from scantling.profile import DATA, GROUPS, Group, Operation, Profile, group_of, profile_steps
from scantling.resolve import spec_from


@pytest.mark.parametrize(
    ("name", "shapes", "expected"),
    [
        ("aten::mm", [[64, 32], [32, 80]], "matrix_products"),
        ("aten::addmm", [[80], [64, 32], [32, 80]], "matrix_products"),
        ("aten::mm", [[64, 32], [32, 97]], "cross_entropy"),
        ("aten::_log_softmax_backward_data", [[64, 97], [64, 97]], "cross_entropy"),
        ("aten::nll_loss_forward", [[64, 97]], "cross_entropy"),
        ("aten::copy_", [[64, 97], [64, 97]], "cross_entropy"),
        ("aten::mm", [[97, 64], [64, 32]], "cross_entropy"),
        ("aten::silu", [[4, 97, 80]], "elementwise"),  # 97 positions
        ("aten::embedding_dense_backward", [[64, 32], [4, 16]], "elementwise"),
        ("aten::bmm", [[8, 32, 8], [8, 8, 16]], "attention"),
        ("aten::bmm", [[4, 64, 8], [4, 8, 20]], "matrix_products"),
        ("aten::baddbmm_", [[8, 16, 8], [8, 16, 32], [8, 32, 8]], "attention"),
        ("aten::_softmax", [[4, 2, 16, 16]], "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [], "attention"),
        ("aten::_fused_rms_norm", [[4, 16, 32]], "elementwise"),
        ("aten::silu_backward", [], "elementwise"),
        ("aten::_fused_adamw_", [], "optimizer"),
        ("aten::linalg_vector_norm", [], "optimizer"),
        ("MulBackward0", [], "other"),
    ],
)
def test_what_an_operation_counts_as(name: str, shapes: list[list[int]], expected: str) -> None:
    assert group_of(name, shapes, vocab_size=97, sequence_length=16) == expected


def test_without_facts_batched_products_are_attentions() -> None:
    assert group_of("aten::bmm", [[4, 64, 8], [4, 8, 20]]) == "attention"
    assert group_of("aten::mm", [[64, 32], [32, 97]]) == "matrix_products"


def test_a_training_step_is_counted_once_and_whole() -> None:
    spec = spec_from(
        {
            "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 80, "max_position_embeddings": 16,
        }
    )  # fmt: skip
    model, count = build(spec), 0
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        nonlocal count
        count += 1
        with record_function(DATA):
            ids = torch.randint(0, 97, (4, 16))
        model.loss(ids, ids).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    found = profile_steps(step, flops_per_step=1e6, ceiling=1e9, steps=2, vocab_size=97, sequence_length=16)
    assert count == 5
    assert sum(group.share for group in found.groups) == pytest.approx(1)
    shares = {group.name: group.share for group in found.groups}
    assert shares.keys() == GROUPS.keys() and min(shares.values()) > 0
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    operations = {group.name: {item.name: item.calls for item in group.operations} for group in found.groups}
    # products: q, k, v, o, gate, up, down of two layers, three times each; the head's three are cross-entropy's
    assert operations["matrix_products"]["mm"] == 2 * 7 * 3 and operations["cross_entropy"]["mm"] == 3
    attention = operations["attention"]
    assert attention["bmm"] + attention.get("baddbmm_", 0) == 2 * 2 * 3
    assert operations["data"][DATA] == 1 and "randint" in operations["data"]
    assert any(name.startswith("Optimizer.step") for name in operations["optimizer"])
    assert found.flops_per_second == pytest.approx(1e6 / found.seconds)
    assert json.loads(json.dumps(found.to_json()))["share_of_ceiling"] == pytest.approx(found.flops_per_second / 1e9)
    assert len(found.sentences()) >= 2 and found.sentences()[0].startswith("A step takes ")


def profile(**shares: float) -> Profile:
    """A profile with these shares, the rest in matrix products."""
    shares["matrix_products"] = 1 - sum(shares.values())
    groups = [
        Group(name, shares.get(name, 0.0), (Operation("mm", 2e-3, 4),) if name == "matrix_products" else ())
        for name in GROUPS
    ]
    ordered = tuple(sorted(groups, key=lambda group: -group.share))
    return Profile(0.01, 4e10, 1e11, ordered, vocab_size=50304)


def test_sentences() -> None:
    assert profile(attention=0.2, cross_entropy=0.1).sentences() == [
        "A step takes 10.0 ms: 40.0 GFLOP/s, 40% of the 100.0 GFLOP/s that matrix products reach here.",
        "Matrix products: 70.0% of the step (mm 2.00 ms).",
        "Attention: 20.0% of the step.",
        "Cross-entropy over 50,304 ids: 10.0% of the step.",
    ]


@pytest.mark.parametrize(
    ("shares", "start"),
    [
        ({"cross_entropy": 0.21}, "The cross-entropy over 50,304 ids takes 21% of the step; a smaller vocabulary"),
        ({"data": 0.2, "cross_entropy": 0.3}, "The data takes 20% of the step; "),
        ({"other": 0.5, "optimizer": 0.1}, "The everything else"),
    ],
)
def test_advice_names_the_most_unusual_group(shares: dict[str, float], start: str) -> None:
    found = profile(**shares)
    advice = found.advice()
    assert advice is not None
    assert found.sentences()[-1] == advice == found.to_json()["advice"]
    assert advice.startswith(start)
