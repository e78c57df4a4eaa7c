"""Self-guided runs: the plan against a simulation and the paper's values, FLOPs against torch's counter, guides in a model."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from scantling.config import run_from
from scantling.costing import param_counts, train_flops
from scantling.errors import InputError
from scantling.guidance import (
    Guidance,
    dense_twin,
    equal_flops_ratio,
    guidance,
    guide_flops_per_token,
    guide_params,
    guide_weight,
)
from scantling.model import Decoder, build
from scantling.model.decoder import build_meta
from scantling.model.guided import GuidedLinear, attach_guides, is_guide, plain_name, remove_guides, set_guides
from scantling.recipe import SelfGuided, TrainConfig
from scantling.resolve import spec_from
from scantling.rows import rows
from scantling.spec import ModelSpec

LOW_RANK: dict[str, Any] = {"kind": "low_rank", "rank": 4, "intermediate_size": 48}
SHUFFLE: dict[str, Any] = {"kind": "block_shuffle", "num_blocks": 4, "intermediate_size": 48, "bias": True}
BLOCK_DENSE: dict[str, Any] = {
    "kind": "block_dense", "num_blocks": 2, "rank": 8, "gated": False, "hidden_act": "relu", "intermediate_size": 48,
}  # fmt: skip
MOE: dict[str, Any] = {
    "kind": "moe", "num_local_experts": 4, "num_experts_per_tok": 2, "expert": LOW_RANK, "shared_expert": SHUFFLE,
}  # fmt: skip
KINDS = {"low_rank": LOW_RANK, "block_shuffle": SHUFFLE, "block_dense": BLOCK_DENSE, "moe": MOE}


def spec(ffn: dict[str, Any], **changes: Any) -> ModelSpec:
    """Two layers of width 16, the first one's feed-forward dense."""
    base = {"vocab_size": 23, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 64}
    ffns = [{"kind": "dense", "intermediate_size": 48}, ffn]
    layers = {"num_hidden_layers": 2, "per_layer_config": {at: {"ffn": each} for at, each in enumerate(ffns)}}
    return spec_from({**base, **layers, **changes})


def recipe(**keys: Any) -> TrainConfig:
    base = {"tokens": 40 * 64, "batch_tokens": 64, "sequence_length": 16, "guide": {}}
    return TrainConfig.model_validate({**base, **keys})


def planned(model_spec: ModelSpec, train: TrainConfig) -> Guidance:
    plan = guidance(model_spec, train)
    assert plan is not None
    return plan


def of_paper(name: str, ffn: dict[str, Any], inner: int = 0, attention: int = 0, kv_width: int = 0) -> ModelSpec:
    """A model of arXiv 2406.16450 (sheet 2.3): first feed-forward dense, tied 32,000-token table, context 1024."""
    width, depth, head = {"s": (768, 12, 64), "m": (1024, 24, 64), "l": (1536, 24, 128), "xl": (2048, 24, 128)}[name]
    rest = {"gated": False, "intermediate_size": inner or 4 * width, "bias": True}
    head = 64 if attention else head
    return spec_from(
        {
            "vocab_size": 32000,
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": (attention or width) // head,
            "num_key_value_heads": (kv_width or attention or width) // head,
            "head_dim": head,
            "tie_word_embeddings": True,
            "max_position_embeddings": 1024,
            "per_layer_config": {
                at: {"ffn": {**({"kind": "dense"} if at == 0 else ffn), **rest}} for at in range(depth)
            },
        }
    )


RANKS, BLOCK_RANKS = (
    {"s": 192, "m": 256, "l": 384, "xl": 512},
    {"s": (256, 2), "m": (384, 4), "l": (512, 2), "xl": (768, 4)},
)


@pytest.mark.parametrize(
    ("name", "low_rank", "block_dense"),
    [("s", 0.301, 0.301), ("m", 0.380, 0.395), ("l", 0.413, 0.413), ("xl", 0.432, 0.449)],
)
def test_equal_flops_ratios_are_the_papers(name: str, low_rank: float, block_dense: float) -> None:
    """Sheet 3.6, to the printed digits; the authors' hand-set values are these, rounded."""
    rank, blocks = BLOCK_RANKS[name]
    ffns: list[tuple[dict[str, Any], float]] = [
        ({"kind": "low_rank", "rank": RANKS[name]}, low_rank),
        ({"kind": "block_shuffle", "num_blocks": 4}, low_rank),
        ({"kind": "block_dense", "rank": rank, "num_blocks": blocks}, block_dense),
    ]
    for ffn, want in ffns:
        assert equal_flops_ratio(of_paper(name, ffn), 1024, SelfGuided()) == pytest.approx(want, abs=5e-4)


@pytest.mark.parametrize(("name", "inner", "attention", "want"), [("m", 4864, 512, 0.392), ("l", 7424, 768, 0.396)])
def test_equal_flops_ratios_of_the_wide_models(name: str, inner: int, attention: int, want: float) -> None:
    """Sheet 5.4: their baseline is the dense GQA model with its wider attention, so F_d is given here."""
    structured = of_paper(name, {"kind": "low_rank", "rank": attention}, inner, attention, 256)
    width = {"m": 1024, "l": 1536}[name]
    dense = of_paper(name, {"kind": "dense"}, inner, width, 256)
    forward = [train_flops(each, 1024, 1) / 3 for each in (dense, structured)]
    ratio = (forward[0] - forward[1]) / (forward[1] + 0.5 * guide_flops_per_token(structured))
    assert ratio == pytest.approx(want, abs=5e-4)


RECIPES = st.fixed_dictionaries(
    {
        "tokens": st.integers(8, 60).map(lambda steps: steps * 64),
        "batch_warmup": st.sampled_from([None, {"start_batch_tokens": 16, "warmup": 0.5}]),
        "guide": st.fixed_dictionaries(
            {
                "mode": st.sampled_from(["fixed_tokens", "fixed_flops"]),
                "ratio": st.sampled_from([None, 0.2, 0.5, 1.0]),
                "stochastic": st.booleans(),
            }
        ),
    }
)


@given(RECIPES, st.sampled_from(sorted(KINDS)))
@settings(max_examples=60)
def test_a_plan_is_its_simulation(keys: dict[str, Any], kind: str) -> None:
    """Step by step: which sequences, tokens and FLOPs, as sheet 3.6 and 3.7 tell it."""
    model_spec, train = spec(KINDS[kind]), recipe(**keys)
    plan = planned(model_spec, train)
    share = 0.5 if train.guide and train.guide.stochastic else 1.0
    forward, guide = train_flops(model_spec, 16, 1) / 3, guide_flops_per_token(model_spec)
    data: list[tuple[int, int]] = []
    tokens, flops = 0, 0.0
    for step in range(plan.steps):
        if step < train.steps:
            first = sum(count for _, count in data)
            data.append((first, train.sequences_before[step + 1] - first))
        else:
            data.append(data[step - train.steps])
        assert plan.sequences(step) == data[-1]
        alpha = plan.alpha(step)
        assert (alpha is None) == (step >= plan.guided_steps)
        if alpha is not None:
            assert alpha == guide_weight(step, plan.guided_steps)
        tokens += data[-1][1] * 16
        flops += 3 * data[-1][1] * 16 * (forward + (share * guide if alpha is not None else 0))
        assert plan.tokens(step + 1) == tokens
        assert plan.train_flops(step + 1) == pytest.approx(flops, rel=1e-12)
    assert plan.tokens() == tokens and plan.planned_steps == train.steps
    if train.guide and train.guide.mode == "fixed_flops":
        assert [plan.sequences(plan.planned_steps + at) for at in range(plan.guided_steps)] == data[: plan.guided_steps]
        if train.guide.ratio is None:  # as much as the dense model, short of less than one step
            dense = train_flops(dense_twin(model_spec), 16, train.sequences_before[-1] * 16)
            one = 3 * 64 * (forward + share * guide)
            assert dense - one < plan.train_flops() <= dense * (1 + 1e-12)
    elif train.guide and train.guide.ratio is None:
        assert plan.guided_steps == train.steps // 2 and plan.steps == train.steps


@pytest.mark.parametrize(
    ("ffn", "keys", "message"),
    [
        ({"kind": "dense", "intermediate_size": 48}, {}, "expected a model with structured feed-forwards"),
        ({**LOW_RANK, "rank": 16}, {"guide": {"mode": "fixed_flops"}}, "needs a model cheaper than with dense"),
        (
            {**LOW_RANK, "rank": 2, "intermediate_size": 4800},
            {"guide": {"mode": "fixed_flops"}},
            "equal FLOPs would take 1.35 times the planned steps",
        ),
        (LOW_RANK, {"tokens": 64}, "a ratio of 0.5 of 1 steps guides not even one"),
    ],
)
def test_impossible_plans_say_what_to_do(ffn: dict[str, Any], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        guidance(spec(ffn), recipe(**keys))


def test_a_run_counts_repeats_and_guides() -> None:
    run = {
        "name": "g",
        "model": {
            "vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": 64, "ffn": LOW_RANK,
        },
        "data": {"source": "x.txt"},
        "train": {"tokens": 40 * 64, "batch_tokens": 64, "sequence_length": 16},
    }  # fmt: skip
    plain = run_from(run, "t")
    assert (plain.guidance, plain.steps, plain.tokens) == (None, 40, 40 * 64)
    assert plain.train_flops == train_flops(plain.spec, 16, 40 * 64) and plain.sequences(3) == (12, 4)
    run["train"] = {**run["train"], "guide": {"mode": "fixed_flops"}}  # type: ignore[dict-item]
    guided = run_from(run, "t")
    plan = planned(guided.spec, guided.train)
    assert guided.guidance == plan and guided.steps == 40 + plan.guided_steps
    assert guided.tokens == guided.steps * 64 and guided.sequences(40) == (0, 4)
    dense = train_flops(dense_twin(guided.spec), 16, plain.tokens)
    assert plain.train_flops < guided.train_flops <= dense
    run["model"] = {**run["model"], "ffn": {"kind": "dense", "intermediate_size": 48}}  # type: ignore[dict-item]
    with pytest.raises(InputError, match="t: train: guide: expected a model with structured feed-forwards"):
        run_from(run, "t")
    run["train"] = {**run["train"], "guide": None, "batch_warmup": {"start_batch_tokens": 16}}  # type: ignore[dict-item]
    warm = run_from(run, "t")
    assert warm.tokens == 40 * 64 and warm.steps > 40


# --- guides in a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_a_guided_step_are_the_counters(kind: str) -> None:
    """Forward, and forward with backward, on the meta device: 3 x (F_s + F_g)."""
    model_spec = spec(KINDS[kind], attention_multiplier=0.25)
    model = build_meta(model_spec)
    attach_guides(model, stochastic=False)
    assert guide_params(model_spec) == sum(p.numel() for name, p in model.named_parameters() if is_guide(name))
    ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.loss(ids, ids).backward()  # type: ignore[no-untyped-call]
    plan = planned(model_spec, recipe(guide={"stochastic": False}))
    assert counter.get_total_flops() == pytest.approx(3 * 32 * (plan.forward_flops + plan.guide_flops), rel=1e-12)
    assert plan.train_flops(1) == 2 * counter.get_total_flops()


def logits(model: Decoder) -> torch.Tensor:
    ids = torch.arange(32).view(2, 16) % 23
    result: torch.Tensor = model(ids)
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_guides_come_and_go_without_changing_the_function(kind: str) -> None:
    model_spec = spec(KINDS[kind])
    model, plain = build(model_spec, seed=1), build(model_spec, seed=1)
    before, names = logits(model), dict(model.named_parameters())
    assert attach_guides(model, stochastic=True) == (10 if kind == "moe" else 2)
    assert attach_guides(model, stochastic=True) == 0
    attached = dict(model.named_parameters())
    own = {plain_name(name): value for name, value in attached.items() if not is_guide(name)}
    assert own.keys() == names.keys() and all(own[name] is names[name] for name in names)
    assert list(own) == list(names)
    plain.load_state_dict(own)
    for alpha in (1.0, 0.3, 0.0, None):
        set_guides(model, alpha, seed=0, step=0, micro_batch=0)
        torch.testing.assert_close(logits(model), before)
    with torch.no_grad():
        for name, value in attached.items():
            if is_guide(name):
                value.zero_()
    set_guides(model, 1.0, 0, 0, 0)
    assert not torch.allclose(logits(model), before)
    assert torch.equal(logits(model.eval()), before)
    guides = remove_guides(model.train())
    assert sum(guide.numel() for guide in guides) == guide_params(model_spec)
    assert dict(model.named_parameters()).keys() == names.keys() and torch.equal(logits(model), before)
    assert param_counts(rows(model_spec))["total"] == sum(p.numel() for p in model.parameters())


def draws(model: Decoder, *place: int) -> list[float]:
    set_guides(model, 0.5, *place)
    return [module.draw for module in model.modules() if isinstance(module, GuidedLinear)]


def test_draws_depend_on_seed_step_micro_batch_and_place_alone() -> None:
    model = build(spec(MOE))
    attach_guides(model, stochastic=True)
    first = draws(model, 3, 5, 1)
    torch.manual_seed(9)
    assert draws(model, 3, 5, 1) == first and len(set(first)) == len(first) == 10
    for place in ((4, 5, 1), (3, 6, 1), (3, 5, 0), (2**62, 5, 1)):
        assert not set(draws(model, *place)) & set(first)
    many = [draw for step in range(200) for draw in draws(model, 3, step, 0)]
    assert sum(draw < 0.5 for draw in many) / len(many) == pytest.approx(0.5, abs=0.05)


def test_a_skipped_guide_gets_no_gradient() -> None:
    """So AdamW leaves it alone, decay included; the structured map gets one in any case."""
    model = build(spec(LOW_RANK))
    attach_guides(model, stochastic=True)
    alpha = sum(draws(model, 0, 1, 0)) / 2
    set_guides(model, alpha, seed=0, step=1, micro_batch=0)
    logits(model).sum().backward()
    guided = [module for module in model.modules() if isinstance(module, GuidedLinear)]
    assert {module.draw < alpha for module in guided} == {True, False}
    for module in guided:
        assert (module.guide.grad is not None) == (module.draw < alpha)
        assert all(p.grad is not None for p in module.structured.parameters())
