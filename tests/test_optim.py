"""Optimizers, their groups, skipped steps and schedules, against torch called directly and second formulas."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from scantling.model import Decoder, build
from scantling.optim import apply, learning_rate_factor, make_optimizers, parameter_groups, tokens_before
from scantling.recipe import TrainConfig
from scantling.resolve import spec_from

BASE = {"tokens": 100 * 256, "batch_tokens": 256, "sequence_length": 32}
BOWTIE = {
    "vocab_size": 64,
    "hidden_size": [48, 32, 16, 32, 48],
    "num_hidden_layers": 5,
    "num_attention_heads": [4, 2, 2, 4, 4],
    "num_key_value_heads": [2, 2, 1, 2, 4],
    "head_dim": [8, 16, 8, 8, 12],
    "max_position_embeddings": 32,
    "attention_bias": True,
    "transition": {"kind": "linear_diff", "bias": True},
    "ffn": {"kind": "dense", "intermediate_size": [96, 80, 40, 64, 112], "bias": True},
}
BLOCKS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "learned_positions": True,
    "tie_word_embeddings": True,
    "ffn": {
        "kind": "moe",
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "expert": {"kind": "block_shuffle", "intermediate_size": 64, "num_blocks": 4},
        "shared_expert": {"kind": "low_rank", "intermediate_size": 48, "rank": 8},
    },
}
MUON = {"kind": "muon", "learning_rate": 1e-3, "matrix_learning_rate": 0.02, "weight_decay": 0.1}
SGD = {"kind": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01}
OPTIMIZERS: list[dict[str, Any]] = [
    {"kind": "adamw"},
    MUON,
    SGD,
    {**SGD, "nesterov": True},
    {**SGD, "momentum": 0.0},
]


def config(**keys: Any) -> TrainConfig:
    return TrainConfig.model_validate({**BASE, **keys})


def model_of(mapping: dict[str, Any], seed: int = 0) -> Decoder:
    return build(spec_from(mapping), seed)


def settings(model: Decoder, train: TrainConfig) -> dict[str, tuple[str, float, float]]:
    """Optimizer, base rate and weight decay of every parameter; each belongs to exactly one group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, tuple[str, float, float]] = {}
    for optimizer in make_optimizers(model, train):
        for group in optimizer.param_groups:
            assert group["lr"] == group["base_lr"]
            for parameter in group["params"]:
                name = names[parameter]
                assert name not in found
                found[name] = (type(optimizer).__name__, group["base_lr"], group["weight_decay"])
    assert found.keys() == set(names.values())
    return found


def backward(model: Decoder, seed: int) -> None:
    ids = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(seed))
    model.zero_grad(set_to_none=True)
    model.loss(ids[:, :-1], ids[:, 1:]).backward()


def weights(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# --- groups --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapping", [BOWTIE, BLOCKS])
def test_without_parametrization_everything_learns_at_the_rate(mapping: dict[str, Any]) -> None:
    model = model_of(mapping)
    for name, (kind, rate, decay) in settings(model, config(optimizer={"learning_rate": 0.01})).items():
        matrix = dict(model.named_parameters())[name].ndim >= 2
        assert (kind, rate, decay) == ("AdamW", 0.01, 0.1 if matrix else 0.0), name


@pytest.mark.parametrize("mapping", [BOWTIE, BLOCKS])
@pytest.mark.parametrize("rule", ["matrices", "matrices_without_tables", "all"])
def test_weight_decay_acts_where_it_is_said_to(mapping: dict[str, Any], rule: str) -> None:
    model = model_of(mapping)
    decayed = {name for name, (_, _, decay) in settings(model, config(weight_decay_on=rule)).items() if decay}
    vectors = {name for name in weights(model) if name.endswith(("norm.weight", "bias"))}
    tables = {"embed_tokens.weight", "embed_positions.weight"} & weights(model).keys()
    expected = {
        "all": weights(model).keys(),
        "matrices": weights(model).keys() - vectors,
        "matrices_without_tables": weights(model).keys() - vectors - tables,
    }
    assert decayed == expected[rule]


def test_mup_rates_follow_each_layers_own_widths() -> None:
    model = model_of(BOWTIE)
    train = config(optimizer={"learning_rate": 0.01}, parametrization={"kind": "mup", "base_hidden_size": 24})
    found = settings(model, train)
    heads, sizes = BOWTIE["num_attention_heads"], BOWTIE["head_dim"]
    for layer, (width, inner) in enumerate(zip(BOWTIE["hidden_size"], BOWTIE["ffn"]["intermediate_size"], strict=True)):
        fan_in = {
            "self_attn.q_proj": width,
            "self_attn.k_proj": width,
            "self_attn.v_proj": width,
            "self_attn.o_proj": heads[layer] * sizes[layer],
            "mlp.gate_proj": width,
            "mlp.up_proj": width,
            "mlp.down_proj": inner,
        }
        for name, size in fan_in.items():
            _, rate, decay = found.pop(f"layers.{layer}.{name}.weight")
            assert rate == pytest.approx(0.01 * 24 / size, rel=1e-12)
            assert rate * decay == pytest.approx(0.01 * 0.1, rel=1e-12)  # a step shrinks all widths alike
            assert found.pop(f"layers.{layer}.{name}.bias", ("AdamW", 0.01, 0.0))[1:] == (0.01, 0.0)
    # The two widenings, 16 -> 32 -> 48, predict the missing coordinates from those there.
    for at, have in ((3, 16), (4, 32)):
        assert found.pop(f"resize.{at}.linear.weight")[1] == pytest.approx(0.01 * 24 / have, rel=1e-12)
    for name, (_, rate, decay) in found.items():
        table = name in ("embed_tokens.weight", "lm_head.weight")
        assert (rate, decay) == (0.01, 0.1 if table else 0.0), name


def test_mup_of_structured_experts() -> None:
    found = settings(model_of(BLOCKS), config(parametrization={"kind": "mup", "base_hidden_size": 16}))
    mlp = "layers.1.mlp"
    fan_in = {
        f"{mlp}.gate.weight": 32,
        f"{mlp}.experts.2.gate_up_proj.down.weight": 32 // 4,
        f"{mlp}.experts.2.gate_up_proj.up.weight": 32 // 4,  # inner width min(32, 128) in 4 blocks
        f"{mlp}.experts.2.down_proj.down.weight": 64 // 4,
        f"{mlp}.shared_expert.gate_up_proj.down.weight": 32,
        f"{mlp}.shared_expert.gate_up_proj.up.weight": 8,
        "embed_tokens.weight": 16,
        "embed_positions.weight": 16,
    }
    for name, size in fan_in.items():
        assert found[name][1] == pytest.approx(3e-3 * 16 / size, rel=1e-12), name


@pytest.mark.parametrize("mapping", [BOWTIE, BLOCKS])
def test_matrix_divisor_divides_the_layers_matrices(mapping: dict[str, Any]) -> None:
    model = model_of(mapping)
    shapes = {name: tensor.ndim for name, tensor in weights(model).items()}
    found = settings(model, config(parametrization={"kind": "matrix_divisor", "m_width": 8}))
    for name, (_, rate, decay) in found.items():
        divided = name.startswith("layers.") and shapes[name] >= 2
        assert rate == pytest.approx(3e-3 / 8 if divided else 3e-3, rel=1e-12), name
        decayed = shapes[name] >= 2 or name.startswith("resize")  # a transition's bias too
        assert decay == (0.1 if decayed else 0.0), name
    groups = parameter_groups(model)  # the grouping that the parity cases check
    assert {name for name, (_, _, decay) in found.items() if not decay} == groups["no_weight_decay"].keys()
    assert {name for name, (_, rate, _) in found.items() if rate < 3e-3} == groups["mup"].keys()


@pytest.mark.parametrize("mapping", [BOWTIE, BLOCKS])
def test_muon_takes_the_layers_matrices(mapping: dict[str, Any]) -> None:
    model = model_of(mapping)
    shapes = {name: tensor.ndim for name, tensor in weights(model).items()}
    found = settings(model, config(optimizer=MUON))
    for name, (kind, rate, _) in found.items():
        muon = name.startswith("layers.") and shapes[name] == 2
        assert (kind, rate) == (("Muon", 0.02) if muon else ("AdamW", 1e-3)), name
    assert {kind for kind, _, _ in found.values()} == {"Muon", "AdamW"}
    assert any(size == 3 for size in shapes.values()) == (mapping is BLOCKS)  # stacks of matrices are AdamW's


@pytest.mark.parametrize("optimizer", [MUON, SGD])
@pytest.mark.parametrize("kind", ["mup", "matrix_divisor"])
def test_parametrizations_hold_for_adamw(optimizer: dict[str, Any], kind: str) -> None:
    with pytest.raises(ValidationError, match=f"parametrization {kind} holds for adamw, got optimizer"):
        config(optimizer=optimizer, parametrization={"kind": kind})


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ({"betas": [0.9, 1.0]}, "less than 1"),
        ({**MUON, "momentum": 1}, "less than 1"),
        ({**SGD, "momentum": 0, "nesterov": True}, "nesterov needs a momentum"),
    ],
)
def test_what_torch_would_refuse_is_refused_with_the_file(optimizer: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config(optimizer=optimizer)


# --- updates -------------------------------------------------------------------------------------------------------------


def directly(model: Decoder, optimizer: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """torch's optimizers set up by hand, not fused, for the default groups."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    if optimizer["kind"] == "sgd":
        keys = {key: optimizer[key] for key in ("momentum", "nesterov") if key in optimizer}
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        return [torch.optim.SGD(groups, lr=0.1, foreach=False, **keys)]
    hidden: list[torch.nn.Parameter] = []
    if optimizer["kind"] == "muon":
        hidden = [p for name, p in model.named_parameters() if name.startswith("layers.") and p.ndim == 2]
    ours = {id(p) for p in hidden}
    groups = [
        {"params": [p for p in matrices if id(p) not in ours], "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        groups, lr=1e-3 if hidden else 3e-3, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False
    )
    if not hidden:
        return [adamw]
    return [torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, ns_steps=5), adamw]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mapping", [BOWTIE, BLOCKS])
def test_updates_are_torchs(optimizer: dict[str, Any], mapping: dict[str, Any]) -> None:
    ours, theirs = model_of(mapping), model_of(mapping)
    mine, direct = make_optimizers(ours, config(optimizer=optimizer)), directly(theirs, optimizer)
    for step in range(4):
        backward(ours, step)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.grad = None if a.grad is None else a.grad.clone()
        for one in mine:
            apply(one, torch.tensor(0.0))
        for one in direct:
            one.step()
    for name, tensor in weights(ours).items():
        torch.testing.assert_close(tensor, weights(theirs)[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("flag", [torch.tensor(True), torch.tensor(3.0), torch.tensor(math.nan)])
def test_a_skipped_step_never_was(optimizer: dict[str, Any], at: int, flag: torch.Tensor) -> None:
    """NaN gradients with `skip` set, at the first step too: weights, states and all that follows are bit for bit the same."""

    def run(skipped: int | None) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        model = model_of(BLOCKS)
        optimizers = make_optimizers(model, config(optimizer=optimizer))
        for step in range(4):
            if step == skipped:
                backward(model, 99)
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.fill_(math.nan)
                before = weights(model), states(optimizers)
                for one in optimizers:
                    apply(one, flag)
                assert_same(before, (weights(model), states(optimizers)))
            backward(model, step)
            for one in optimizers:
                apply(one, torch.tensor(False))
        return weights(model), states(optimizers)

    assert_same(run(at), run(None))


def states(optimizers: list[torch.optim.Optimizer]) -> list[torch.Tensor]:
    """Every state tensor; zeros, the same as none yet, left out."""
    found = [value for one in optimizers for state in one.state.values() for value in state.values()]
    return [value.clone() for value in found if isinstance(value, torch.Tensor) and value.any()]


def assert_same(got: tuple[dict[str, Any], list[Any]], want: tuple[dict[str, Any], list[Any]]) -> None:
    assert len(got[1]) == len(want[1])
    for a, b in zip([*got[0].values(), *got[1]], [*want[0].values(), *want[1]], strict=True):
        assert torch.equal(a, b)


# --- schedules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.125, 1.0])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("steps", [None, 1, 2, 137])
def test_schedules_against_interpolation(warmup: float, final: float, steps: int | None) -> None:
    total = steps or 100
    warm = math.ceil(warmup * total)
    decay = max(warm, total - round(0.3 * total))
    for kind, start in (("linear", warm), ("cosine", warm), ("wsd", decay), ("constant", total)):
        keys = {"warmup": warmup, **({"final": final} if kind != "constant" else {})}
        train = config(schedule={"kind": kind, **keys, **({"decay": 0.3} if kind == "wsd" else {})})
        assert train.steps == 100
        for step in range(total):
            factor = learning_rate_factor(train, step, steps)
            if step < warm:
                assert factor == (step + 1) / warm
            elif step < start or total - 1 <= start:
                assert factor == 1.0
            else:
                share = (total - 1 - step) / (total - 1 - start)  # what is left
                bent = share if kind == "linear" else math.sin(math.pi / 2 * share) ** 2
                assert factor == pytest.approx(final * (1 - bent) + bent, abs=1e-12)


def test_the_power_schedule_counts_the_tokens_there_were() -> None:
    growing = {"start_batch_tokens": 64, "warmup": 0.5}
    power = {"kind": "power", "warmup": 0.05, "a": 0.5, "exponent": -0.5}
    train = config(schedule=power, batch_warmup=growing, optimizer={"learning_rate": 0.01})
    assert train.steps > 100
    warm, tokens = math.ceil(0.05 * train.steps), 0
    for step in range(train.steps):
        tokens += 32 * (train.sequences_before[step + 1] - train.sequences_before[step])
        assert tokens_before(train, step + 1) == tokens
        if step >= warm:
            expected = min(0.01, 0.5 * tokens**-0.5)
            assert 0.01 * learning_rate_factor(train, step) == pytest.approx(expected, rel=1e-12)
    assert tokens == 25600
    again = tokens_before(train, train.steps + 3)  # repeated data: the same batches once more
    assert again == 25600 + tokens_before(train, 3)


def test_a_warmed_up_batch_has_its_own_number_of_steps() -> None:
    train = config(schedule={"kind": "linear"}, batch_warmup={"start_batch_tokens": 64, "warmup": 0.5})
    assert learning_rate_factor(train, train.steps - 1) == 0.0 < learning_rate_factor(train, train.steps - 2)
