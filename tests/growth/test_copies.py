"""Growth by copies, and keys that grow under a q/k norm: exact, trainable, and refused in sentences that hold."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from scantling.checkpoint import optimizer_tensors, restore_optimizer, weights_of
from scantling.errors import InputError
from scantling.growth import Policy, grow, grow_folder, path
from scantling.growth.copies import EQUAL as EQUAL_COPIES
from scantling.growth.folders import grown_state
from scantling.growth.steps import Change
from scantling.growth.weights import applied
from scantling.model import Decoder
from scantling.model.layer import Cache
from scantling.parts import Gaussian, MoEFFN, Norm
from scantling.resolve import spec_from
from scantling.spec import LayerSpec, ModelSpec
from scantling.tensor_files import Held
from tests.growth.families import FAMILIES, OURS, family
from tests.growth.growing import difference, grown_model, random_model, some_ids
from tests.growth.targets import all_layers
from tests.growth.test_folders import adam, config_to, stock, trained, update
from tests.strategies import specs

COPIED = [name for name in FAMILIES if name != "block shuffle"]
EQUAL, NOISY = Policy(width="copies"), Policy(width="copies", snr_db=10.0)


def multiplied(spec: ModelSpec, stream: int = 1, heads: int = 1, inner: int = 1) -> ModelSpec:
    """Everything so many times as large."""

    def size(old: int | None) -> int | None:
        return None if old is None else old * stream

    def norm(old: Norm | None) -> Norm | None:
        return old and old.replace(statistic_size=size(old.statistic_size))

    def ffn(old: Any) -> Any:
        if isinstance(old, MoEFFN):
            return old.replace(expert=ffn(old.expert), shared_expert=old.shared_expert and ffn(old.shared_expert))
        return old.replace(intermediate_size=old.intermediate_size * inner)

    def layer(old: LayerSpec) -> LayerSpec:
        groups = old.head_to_group
        return old.replace(
            hidden_size=old.hidden_size * stream,
            attention_input_size=size(old.attention_input_size),
            ffn_output_size=size(old.ffn_output_size),
            norm=norm(old.norm),
            num_attention_heads=old.num_attention_heads * heads,
            num_key_value_heads=old.num_key_value_heads * heads,
            head_to_group=groups and [g + copy * old.num_key_value_heads for copy in range(heads) for g in groups],
            ffn=ffn(old.ffn),
        )

    return spec.replace(
        layers=tuple(layer(old) for old in spec.layers),
        embedding_size=spec.embedding_size * stream,
        unembedding_size=spec.unembedding_size * stream,
        final_norm=norm(spec.final_norm),
    )


@torch.no_grad()
def decoded(model: Decoder, ids: Tensor) -> Tensor:
    """Logits of cached decoding, a few tokens at a time."""
    cache = Cache(model.spec, len(ids), ids.shape[1], dtype=next(model.parameters()).dtype)
    return torch.cat([model(part, cache) for part in (ids[:, :3], ids[:, 3:4], ids[:, 4:])], 1)


@pytest.mark.parametrize("policy", [EQUAL, NOISY], ids=["equal", "noisy"])
@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("name", COPIED)
def test_copies_preserve_every_family(name: str, times: int, policy: Policy) -> None:
    spec = family(name)
    target = multiplied(spec, times, times, times)
    (step,) = path(spec, target, policy)
    assert step.after.dump() == target.dump() and step.broken is None
    assert (step.warning is None) == (policy.snr_db is not None)
    model = random_model(spec)
    grown, ids = grown_model(model, [step], policy), some_ids(spec)
    assert difference(model, grown) < 1e-10
    wanted = decoded(model, ids)
    assert (decoded(grown, ids) - wanted).abs().max() < 1e-10 * wanted.abs().max().clamp(min=1)
    single = random_model(spec, dtype=torch.float32)
    assert difference(single, grown_model(single, [step], policy)) < 1e-5


@settings(max_examples=60)
@given(data=st.data())
def test_copies_of_any_spec(data: st.DataObject) -> None:
    spec = data.draw(specs())
    assume(not isinstance(spec.transition, Gaussian))
    target = multiplied(spec, *(data.draw(st.sampled_from([2, 3, 1])) for _ in range(3)))
    more = data.draw(st.integers(0, 2))
    target = target.replace(vocab_size=target.vocab_size + more, lm_head_bias=True, embedding_multiplier=3.0)
    try:
        steps = path(spec, target, data.draw(st.sampled_from([EQUAL, NOISY])))
    except InputError as error:
        event(str(error)[20:60])
        assert "expected" in str(error)
        return
    event(" and ".join(step.rule for step in steps))
    model = random_model(spec)
    assert difference(model, grown_model(model, steps)) < 1e-10


SMALL = {**OURS, "num_hidden_layers": 3}


@pytest.mark.parametrize(
    "changes",
    [
        {"per_layer_config": {1: {"intermediate_size": 72}}},
        {"per_layer_config": {0: {"num_attention_heads": 8, "num_key_value_heads": 4}}},
        {"num_attention_heads": 12},  # key/value heads stay
        {"num_attention_heads": 8, "num_key_value_heads": 8},  # and more of these than of those
        {"hidden_size": 32},
        {"hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 5, "v_head_dim": 11, "vocab_size": 31},
    ],
    ids=str,
)
def test_parts_alone_and_with_other_growth(changes: dict[str, Any]) -> None:
    spec, target = spec_from(SMALL), spec_from({**SMALL, **changes})
    model = random_model(spec)
    for policy in (EQUAL, NOISY):
        steps = path(spec, target, policy)
        assert steps[0].rule == "copies" and steps[-1].after.dump() == target.dump()
        assert difference(model, grown_model(model, steps, policy)) < 1e-10


def gradients(model: Decoder, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(model.train().loss(ids, ids.roll(-1, 1)))
    found, _ = weights_of(model)
    named = {name: parameter.grad for name, parameter in model.named_parameters() if name in found}
    return {name: torch.zeros_like(found[name]) if each is None else each for name, each in named.items()}


@pytest.mark.parametrize("name", COPIED)
def test_moments_follow_the_gradients(name: str) -> None:
    """The gradient is what a first moment averages, its square what a second does: grown moments are the grown model's own."""
    spec = family(name)
    steps = path(spec, multiplied(spec, 3, 3, 3), EQUAL)
    model, ids = random_model(spec), some_ids(spec, 5, (3, 9))
    old, new = gradients(model, ids), gradients(grown_model(model, steps), ids)
    squares = Held({name: each.square() for name, each in old.items()})
    first, second = applied(Held(old), steps, EQUAL, "first"), applied(squares, steps, EQUAL, "second")
    assert set(first.names) == set(second.names) == set(new)
    for key, gradient in new.items():
        assert (first.tensor(key) - gradient).abs().max() < 1e-10 * max(1, float(gradient.abs().max())), key
        assert (second.tensor(key) - gradient.square()).abs().max() < 1e-10 * max(1, float(gradient.square().max())), (
            key
        )


def test_one_step_of_adam_moves_every_copy_as_its_original() -> None:
    spec = spec_from(OURS)
    target = multiplied(spec, 2, 2, 2)
    model, optimizer = trained(spec)
    grown, (step,) = grow(model, target, EQUAL).train(), path(spec, target, EQUAL)
    later = adam(grown)
    restore_optimizer(grown, [later], grown_state(optimizer_tensors(model, [optimizer]), [step]))
    before, start = ({name: value.clone() for name, value in weights_of(each)[0].items()} for each in (model, grown))
    update(model, optimizer, 9)
    update(grown, later, 9)
    moved = Held({name: value - before[name] for name, value in weights_of(model)[0].items()})
    bare = dataclasses.replace(step, changes={dim: Change(change.index) for dim, change in step.changes.items()})
    wanted = applied(moved, [bare])
    for name, value in weights_of(grown)[0].items():
        assert (value - start[name] - wanted.tensor(name)).abs().max() < 1e-9, name


def test_equal_copies_train_as_the_old_model_at_a_smaller_rate_for_what_adds_up() -> None:
    spec = spec_from(OURS)
    times = 3
    model, optimizer = trained(spec)
    grown = grow(model, multiplied(spec, times, times, times), EQUAL).train()
    added_up = [each for name, each in grown.named_parameters() if name.endswith(("proj.weight", "lm_head.weight"))]
    others = [each for each in grown.parameters() if all(each is not other for other in added_up)]
    (rate,) = (group["lr"] for group in optimizer.param_groups)
    later = adam(grown)
    later.param_groups.clear()
    later.add_param_group({"params": others})
    later.add_param_group({"params": added_up, "lr": rate / times})
    steps = path(spec, grown.spec, EQUAL)
    restore_optimizer(grown, [later], grown_state(optimizer_tensors(model, [optimizer]), steps))
    for seed in range(9, 14):
        update(model, optimizer, seed)
        update(grown, later, seed)
    assert difference(model, grown) < 1e-9
    later.param_groups[1]["lr"] = rate  # and not at the old one
    update(model, optimizer, 20)
    update(grown, later, 20)
    assert difference(model, grown) > 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "post-norm", "mixtral"])
def test_equal_copies_stay_equal_and_noisy_ones_do_not(name: str) -> None:
    spec = family(name)
    target, original = multiplied(spec, 2, 2, 2), random_model(spec)
    for policy in (EQUAL, NOISY):
        (step,) = path(spec, target, policy)
        model = grown_model(original, [step], policy).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for seed in range(4):
            update(model, optimizer, seed)
        weights = weights_of(model)[0]
        apart = {
            tail: _apart(value) for tail, value in weights.items() if tail.endswith(("up_proj.weight", "v_proj.weight"))
        }
        assert apart
        if policy is EQUAL:
            assert max(apart.values()) < 1e-12
        else:
            assert min(apart.values()) > 1e-3
        assert (_apart(weights["embed_tokens.weight"].T) > 1e-4) == (policy is NOISY)


def _apart(weight: Tensor) -> float:
    """Largest difference between the two copies of the rows."""
    one, other = weight.chunk(2)
    return float((one - other).abs().max())


def test_noise_has_the_power_asked_for_and_its_own_numbers_everywhere() -> None:
    spec = spec_from({**OURS, "num_hidden_layers": 1})
    target = multiplied(spec, 5, 3, 2)
    model = random_model(spec)
    weights = Held(weights_of(model)[0])
    (equal,), (noisy,) = path(spec, target, EQUAL), path(spec, target, NOISY)
    seen = []
    for name in (
        "layers.0.self_attn.q_proj.weight",
        "layers.0.self_attn.o_proj.weight",
        "layers.0.mlp.down_proj.weight",
    ):
        plain, with_noise = (applied(weights, [step], NOISY).tensor(name) for step in (equal, noisy))
        rows, columns = weights.shape(name)
        blocks = [
            part.chunk(plain.shape[1] // columns, 1) for part in (with_noise - plain).chunk(plain.shape[0] // rows)
        ]
        for block in blocks:
            for plus, minus in zip(block[0:-1:2], block[1::2], strict=True):
                assert torch.allclose(plus, -minus, atol=1e-12)
                share = plain.square().mean() / plus.square().mean()
                assert abs(10 * share.log10().item() - 10.0) < 1e-6
                seen.append(plus)
            assert len(block) % 2 == 0 or not block[-1].any()
    flat = torch.stack([each.flatten()[:64] for each in seen])
    assert ((flat @ flat.T) / flat.square().sum(1)).fill_diagonal_(0).abs().max() < 0.7  # no block twice
    again = applied(weights, [noisy], NOISY).rows("layers.0.self_attn.q_proj.weight")
    whole = again(0, 96)
    assert torch.equal(torch.cat([again(0, 7), again(7, 50), again(50, 96)]), whole)  # however many rows at a time


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": 24}, "24 is no whole number of copies of 16; expected 16 or 32"),
        ({"intermediate_size": 100}, "100 is no whole number of copies of 24; expected 96 or 120"),
        ({"num_attention_heads": 6}, "6 is no whole number of copies of 4; expected 4 or 8"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3}, "3 is no whole number of copies of 2; expected 2 or 4"),
        ({"intermediate_size": 12}, "expected at least 24"),
        (
            {"hidden_size": 32, "unembedding_size": 48, "transition": "carry_forward"},
            "expected one multiple everywhere",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_copied(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        path(spec_from(OURS), spec_from({**OURS, **changes}), EQUAL)


def test_options_that_do_not_fit() -> None:
    spec = spec_from(OURS)
    for policy in (Policy(snr_db=10.0), Policy(width="copies", snr_db=float("nan")), Policy(qk_noise=0.0)):
        with pytest.raises(InputError, match="expected"):
            path(spec, multiplied(spec, 2), policy)
    with pytest.raises(InputError, match="block_shuffle"):
        path(family("block shuffle"), multiplied(family("block shuffle"), 2), EQUAL)
    with pytest.raises(InputError, match=r"width: copies.*hidden_size 32"):
        path(family("post-norm"), multiplied(family("post-norm"), 2))


def test_tied_tables_without_a_final_norm_need_a_logit_scale() -> None:
    spec = spec_from({**OURS, "tie_word_embeddings": True, "final_norm": "none", "logits_scaling": 2.0})
    target = multiplied(spec, 3, 1, 1)
    with pytest.raises(InputError, match=r"expected logits_scaling: ([\d.]+), or tie_word_embeddings: false") as caught:
        path(spec, target, EQUAL)
    (scale,) = re.findall(r"logits_scaling: ([\d.]+),", str(caught.value))
    model = random_model(spec)
    for exact in (target.replace(logits_scaling=float(scale)), target.replace(tie_word_embeddings=False)):
        assert difference(model, grown_model(model, path(spec, exact, NOISY))) < 1e-10


def test_copied_heads_that_would_read_other_keys_name_the_map() -> None:
    spec = spec_from({**OURS, "head_to_group": [0, 0, 0, 1]})
    wrong = spec_from({**OURS, "num_attention_heads": 8, "num_key_value_heads": 4, "head_to_group": [0, 1, 2, 3] * 2})
    with pytest.raises(InputError, match="head_to_group") as caught:
        path(spec, wrong, EQUAL)
    (named,) = re.findall(r"expected (\[.*\])", str(caught.value))
    exact = all_layers(wrong, None, head_to_group=tuple(map(int, named.strip("[]").split(","))))
    model = random_model(spec)
    assert difference(model, grown_model(model, path(spec, exact, NOISY))) < 1e-10


# --- keys under a q/k norm ---------------------------------------------------------------------------------------------

NORMED: dict[str, Any] = {**OURS, "head_dim": 8, "v_head_dim": 8, "qk_norm": {"over": "head", "eps": 1e-5}}
WIDER_KEY: dict[str, Any] = {"head_dim": 16, "qk_norm": {"over": "head", "eps": 5e-6}}


@pytest.mark.parametrize("over", ["head", "all"])
def test_noisy_keys_under_a_norm_err_by_the_square_of_the_noise(over: str) -> None:
    spec = spec_from({**NORMED, "qk_norm": {"over": over, "eps": 1e-5}})
    target = spec_from({**NORMED, **WIDER_KEY, "qk_norm": {"over": over, "eps": 5e-6}})
    with pytest.raises(InputError, match=r"qk_noise: 0\.001"):
        path(spec, target)
    model, errors = random_model(spec), {}
    for noise in (1e-2, 1e-3, 1e-4):
        steps = path(spec, target, Policy(qk_noise=noise))
        assert all(step.broken is not None and f"{noise:g}" in step.broken for step in steps)
        errors[noise] = difference(model, grown_model(model, steps))
    assert 0 < errors[1e-3] < 1e-4
    for large, small in ((1e-2, 1e-3), (1e-3, 1e-4)):
        assert errors[large] / errors[small] == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize(
    "position",
    [
        {"kind": "rope"},
        {"kind": "rope", "partial_rotary_factor": 0.5},
        {"kind": "none"},
    ],
    ids=str,
)
def test_refused_keys_under_a_norm_name_an_exact_target(position: dict[str, Any]) -> None:
    spec = spec_from({**NORMED, "position": position})
    target = spec_from({**NORMED, "position": position, "head_dim": 16})
    with pytest.raises(InputError) as caught:
        path(spec, target)
    (size,) = re.findall(r"qk_norm.statistic_size: (\d+)", str(caught.value))
    norm = {**NORMED["qk_norm"], "statistic_size": int(size)}
    for factor in re.findall(r"partial_rotary_factor: ([\d.]+)", str(caught.value)):
        position = {**position, "partial_rotary_factor": float(factor)}
    exact = spec_from({**NORMED, "position": position, "head_dim": 16, "qk_norm": norm})
    model = random_model(spec)
    assert difference(model, grown_model(model, path(spec, exact))) < 1e-10


# --- folders -----------------------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_stock_models_are_copied_in_and_out(name: str, tmp_path: Path) -> None:
    model = stock(tmp_path / "old", name)
    doubled = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
    if name == "gpt2":
        doubled = {"n_embd": 64, "n_inner": 96, "n_head": 8}
    receipt = grow_folder(tmp_path / "old", config_to(tmp_path / "old", doubled), tmp_path / "new", NOISY)
    assert receipt.format == "hugging_face", receipt.why_own_format
    assert receipt.exact and not receipt.notes and receipt.logit_difference is not None
    assert receipt.logit_difference["float64"] < 1e-10 * max(1.0, receipt.largest_logit or 0.0)
    grown = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    ids = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = model(ids).logits, grown(ids).logits
    assert (before - after).abs().max() < 1e-5 * max(1.0, before.abs().max().item())


def test_receipts_tell_of_equal_copies_and_of_what_is_not_exact(tmp_path: Path) -> None:
    stock(tmp_path / "old", "qwen3")
    target = config_to(tmp_path / "old", {"head_dim": 16})
    receipt = grow_folder(tmp_path / "old", target, tmp_path / "new", Policy(qk_noise=1e-3))
    assert not receipt.exact and "square" in receipt.notes[0] and receipt.format == "hugging_face"
    assert receipt.logit_difference is not None and 1e-12 < receipt.logit_difference["float64"] < 1e-3
    assert receipt.liveness is not None and receipt.liveness > 0.999
    target = config_to(tmp_path / "old", {"intermediate_size": 96})
    receipt = grow_folder(tmp_path / "old", target, tmp_path / "copies", EQUAL)
    assert receipt.exact and receipt.notes == [EQUAL_COPIES]
