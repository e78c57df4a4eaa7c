"""Every rule of growth on every architecture family: the same function, or a sentence that names what is exact instead.

Where it is the same function, so are its gradients: the grown weights are a linear map of the old ones plus constants, so the
new gradient pulled back through that map must be the old gradient. Then nothing new is dead, and no two new units are twins.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from scantling.checkpoint import weights_of
from scantling.errors import InputError
from scantling.growth.axes import Axis, axes
from scantling.growth.path import path
from scantling.growth.receipt import new_entries
from scantling.growth.steps import Step
from scantling.growth.weights import applied
from scantling.model import Decoder
from scantling.model.layer import Cache
from scantling.parts import Rope
from scantling.resolve import spec_from
from scantling.spec import ModelSpec
from scantling.tensor_files import Held
from tests.growth.families import FAMILIES, OURS, RULES, family
from tests.growth.growing import grow_error, grown_model, random_model, some_ids
from tests.growth.targets import all_layers

JOINT_NORM = "qk_norm over all heads takes its statistic over new"
KEPT_NORM = "expected qk_norm.statistic_size: 8"
BLOCKS = "new coordinates come before these; expected the gain form: eps"
POST = "norm_placement post_residual"
SUM = "expected norm_topk_prob: true, router_softmax: after, or a shared_expert equal to the old feed-forward"
FREQUENCIES = "expected one of position.frequency_size: "
IMPOSSIBLE: dict[tuple[str, str], str | None] = {  # rule and family, * for all others: what the sentence says; None is exact
    ("structured", "*"): "dense cannot become low_rank exactly; expected dense, and self-guided training",
    ("experts_unnormalised", "*"): SUM,
    ("another_expert", "*"): "num_local_experts cannot grow exactly; expected",
    ("key_unruled", "*"): FREQUENCIES,
    ("key_unruled", "gpt_neox"): None,  # the rotated part does not grow
    ("one_narrow_layer", "compress"): "a map would come or go; expected equal widths there",
    ("hidden_writer", "paper"): "the model has no final norm; expected eps 6.6666666666666675e-31 (gain form)",
    ("key_frequency_size", "qwen3"): KEPT_NORM,
    ("key_theta", "qwen3"): KEPT_NORM,
    ("key_doubled", "qwen3"): KEPT_NORM,
    **dict.fromkeys([(rule, "olmo2") for rule in ("query_heads", "groups", "uneven_heads")], JOINT_NORM),
    **dict.fromkeys([(f"key_{way}", "olmo2") for way in ("partial", "frequency_size", "theta", "doubled")], JOINT_NORM),
    **dict.fromkeys([("hidden_statistic", name) for name in ("block dense", "block shuffle", "bowtie")], BLOCKS),
    ("fewer_blocks", "block shuffle"): "num_blocks: expected 2, got 1 (its permutation",
    **dict.fromkeys(
        [("experts_of_shards", name) for name in ("paper", "gpt2", "gpt_neox", "low rank", "block dense", "block shuffle")],
        "expected experts of",
    ),
    **dict.fromkeys([(f"hidden_{form}", "post-norm") for form in ("gain", "writer", "statistic")], POST),
    **dict.fromkeys([(rule, "post-norm") for rule in ("layer_at_the_end", "layers_front_and_middle", "everything")], POST),
}  # fmt: skip


def cells() -> Iterator[tuple[str, str]]:
    """Rule and family wherever the family has something for the rule to grow."""
    for name in FAMILIES:
        yield from ((rule, name) for rule, target in RULES.items() if target(family(name)) is not None)


def sentence(rule: str, name: str) -> str | None:
    return IMPOSSIBLE.get((rule, name), IMPOSSIBLE.get((rule, "*")))


POSSIBLE = [cell for cell in cells() if sentence(*cell) is None]


def first(*families: str) -> list[Any]:
    """All possible cells, those of other families marked as slow."""
    return [pytest.param(*each, marks=() if each[1] in families else pytest.mark.slow) for each in POSSIBLE]


@pytest.mark.parametrize(("rule", "name"), [cell for cell in cells() if sentence(*cell) is not None])
def test_what_is_impossible_is_said(rule: str, name: str) -> None:
    target = RULES[rule](family(name))
    assert target is not None
    with pytest.raises(InputError, match="cannot grow exactly: ") as caught:
        path(family(name), target)
    assert str(sentence(rule, name)) in str(caught.value)


SCALINGS: list[dict[str, Any] | None] = [
    None,
    {"kind": "linear", "factor": 2.0},
    {"kind": "ntk", "factor": 4.0},
    {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 16},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda each: each and each["kind"])
def test_every_named_alternative_is_exact(scaling: dict[str, Any] | None) -> None:
    """What the sentence on rotary frequencies lists, taken at its word; and the gain form of another epsilon."""
    spec = spec_from({**OURS, "position": {"kind": "rope", "scaling": scaling}})
    with pytest.raises(InputError, match="expected one of") as caught:
        path(spec, all_layers(spec, None, head_dim=10))
    named = str(caught.value).partition("expected one of ")[2].split("; ")
    assert len(named) >= 2
    for each in named:
        key, _, given = each.removeprefix("position.").partition(": ")
        size, changes = (10, {key: float(given)}) if given else (int(each.split()[1]), {})
        way = {name: int(value) if name == "frequency_size" else value for name, value in changes.items()}
        target = all_layers(spec, None, head_dim=size, position=lambda layer, way=way: layer.position.replace(**way))
        assert grow_error(spec, target) < 1e-10, each

    wider = {"hidden_size": 24, "rms_norm_eps": 1e-6}
    with pytest.raises(
        InputError, match=r"expected eps (\S+) \(gain form\), eps (\S+) everywhere \(writer form\)"
    ) as caught:
        path(family("llama"), spec_from({**OURS, **wider}))
    gain, writer = re.findall(r"eps (\S+) (?:\(gain|everywhere)", str(caught.value))
    for eps in (gain, writer):
        assert grow_error(spec_from(OURS), spec_from({**OURS, **wider, "rms_norm_eps": float(eps)})) < 1e-10


# --- the same function -------------------------------------------------------------------------------------------------


@cache
def old_model(name: str, dtype: torch.dtype = torch.float64) -> Decoder:
    return random_model(family(name), 0, dtype)


def steps_of(rule: str, name: str) -> tuple[Step, ...]:
    target = RULES[rule](family(name))
    assert target is not None
    steps = path(family(name), target)
    assert steps and steps[-1].after.dump() == target.dump()
    return steps


@torch.no_grad()
def logits(model: Decoder, ids: Tensor, cached: bool = False) -> Tensor:
    """All at once, or after a prefix token by token."""
    store = Cache(model.spec, len(ids), ids.shape[1], dtype=model.lm_head.weight.dtype) if cached else None
    parts = [ids[:, :5], ids[:, 5:6], ids[:, 6:7]] if cached else [ids]
    return torch.cat([model(part, store) for part in parts], 1)


@pytest.mark.parametrize(
    ("rule", "name"),
    first("paper", "llama", "qwen3", "gpt2", "gemma2", "olmo2", "mixtral", "block shuffle", "bowtie", "compress"),
)
def test_the_same_function(rule: str, name: str) -> None:
    """All at once and with a cache; in float64 within 1e-10 of the largest logit, in float32 within 1e-5."""
    steps = steps_of(rule, name)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = old_model(name, dtype)
        grown, ids = grown_model(model, steps), some_ids(model.spec, 1, (2, 7))
        for cached in (False, True) if dtype == torch.float64 else (False,):
            before, after = logits(model, ids, cached), logits(grown, ids, cached)[..., : model.spec.vocab_size]
            assert (before - after).abs().max() <= tolerance * before.abs().max(), (dtype, cached)


# --- the same gradients, and life in what is new -----------------------------------------------------------------------

STEP = 1e-4  # sign-sized updates: what an optimizer of that rate does at first
ROBUST = 20  # times as far as the old model's logits an update may move the grown model's
FRAGILE = ("experts_of_shards",)  # an update parts the router's equal rows, and other shards are chosen together
WAKES = {  # after how many gradients all that is new has had one, where not after two
    **{
        (f"hidden_{form}", "gemma2"): 3 for form in ("gain", "writer", "statistic")
    },  # zeros behind zeros of a tied table
    **{("everything", name): 3 for name in ("gemma2", "olmo2", "low rank", "block dense", "block shuffle")},
    ("everything", "paper"): 4,  # with no final norm, and rectified units that wake late
}


def parameters(model: Decoder) -> dict[str, Tensor]:
    names, _ = weights_of(model)
    return {name: weight for name, weight in model.named_parameters() if name in names}


def gradients(model: Decoder, ids: Tensor, tokens: int | None = None) -> dict[str, Tensor]:
    """Of the cross-entropy over all tokens, or the first so many."""
    for parameter in model.parameters():
        parameter.grad = None
    torch.autograd.backward(cross_entropy(model(ids)[..., :tokens].flatten(0, 1), ids.roll(-1, 1).flatten()))
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in parameters(model).items()
    }


@torch.no_grad()
def update(model: Decoder, found: dict[str, Tensor]) -> None:
    for key, weight in parameters(model).items():
        weight.sub_(STEP * found[key].sign())


def batch(spec: ModelSpec) -> Tensor:
    """Every token and every position at least once."""
    ids = some_ids(spec, 2, (8, spec.max_position_embeddings))
    ids.flatten()[: spec.vocab_size] = torch.arange(spec.vocab_size)
    return ids


@cache
def old_gradients(name: str) -> dict[str, Tensor]:
    return gradients(old_model(name), batch(family(name)))


@cache
def old_shift(name: str) -> float:
    """How far one update moves the logits of the model that does not grow."""
    model = grown_model(old_model(name), ())
    ids = batch(model.spec)
    before = logits(model, ids)
    update(model, old_gradients(name))
    return float((logits(model, ids) - before).abs().max())


@pytest.mark.parametrize(("rule", "name"), first("llama", "gpt2", "gemma2", "mixtral", "parallel branches"))
def test_the_same_gradients_and_nothing_dead(rule: str, name: str) -> None:
    model, steps = old_model(name), steps_of(rule, name)
    weights = {key: weight.detach() for key, weight in parameters(model).items()}
    grown, ids = grown_model(model, steps), batch(model.spec)
    found = gradients(grown, ids, model.spec.vocab_size)

    # the new gradient along what becomes of a change of old weights is the old gradient along that change
    generator = torch.Generator().manual_seed(3)
    change = {key: 1e-3 * torch.randn(each.shape, generator=generator).to(each) for key, each in weights.items()}
    kept = {key: weight.detach() for key, weight in parameters(grown).items()}
    signs = (1, -1) if rule == "materialised" else (1, 0)  # a product of factors is no linear map: both sides of it
    ahead, behind = (
        applied(Held({key: each + sign * change[key] for key, each in weights.items()}), list(steps)).tensor
        if sign
        else kept.__getitem__
        for sign in signs
    )
    along = sum(float((each * (ahead(key) - behind(key))).sum()) for key, each in found.items())
    expected = torch.stack([(each * change[key]).sum() for key, each in old_gradients(name).items()])
    assert abs(along / (signs[0] - signs[1]) - expected.sum()) < 1e-9 * expected.abs().sum()

    new = new_entries(steps, Held(weights))
    for index, layer in enumerate(grown.spec.layers):
        if not isinstance(layer.position, Rope) or layer.position.rotated(layer.head_dim) < layer.head_dim:
            new.pop(
                f"layers.{index}.self_attn.k_proj.bias", None
            )  # unrotated, it adds the same to all scores of a query
    alive = {key: each != 0 for key, each in found.items()}
    before = logits(grown, ids)
    update(grown, found)
    shift = float((logits(grown, ids) - before).abs().max())
    assert rule in FRAGILE or shift < ROBUST * old_shift(name)

    later, reached = batch(grown.spec), 1
    while any((each & ~alive[key]).any() for key, each in new.items()):
        reached += 1
        assert reached <= WAKES.get((rule, name), 2), {
            key: int((each & ~alive[key]).sum()) for key, each in new.items()
        }
        found = gradients(grown, later)
        alive = {key: each | (found[key] != 0) for key, each in alive.items()}
        if reached == 2:
            assert not list(twins(grown, found))
        update(grown, found)


JOINED = {"inner_pair": "inner", "inner_used": "inner", "rank_made": "rank", "rank_used": "rank"}
STREAM = ("write", "read", "norm")


def twins(model: Decoder, found: dict[str, Tensor]) -> Iterator[str]:
    """Units (coordinates, tokens, experts) of which two have the same weights and the same gradients everywhere."""
    uniform = len({*model.spec.stream_widths, model.spec.embedding_size}) == 1
    features: dict[tuple[object, ...], list[Tensor]] = {}
    experts: dict[str, dict[str, list[Tensor]]] = {}
    weights = parameters(model)
    for name, places in axes(model.spec).items():
        both = [weights[name].detach(), found[name]]
        for at, axis in enumerate(places):
            if axis.dim is None or axis.dim.kind.endswith("gain") or (axis.dim.kind in STREAM and not uniform):
                continue
            kind, layer, part = axis.dim
            unit = ("stream",) if kind in STREAM else (JOINED.get(kind, kind), layer, part)
            for each in both:
                rows = coordinates(each, at, axis)
                features.setdefault(unit, []).extend(rows.chunk(2) if kind == "inner_pair" else [rows])
        expert = re.fullmatch(r"(layers\.\d+)\.mlp\.experts\.(\d+)\..*", name)
        if expert:
            experts.setdefault(expert[1], {}).setdefault(expert[2], []).extend(each.flatten() for each in both)
    tables = {str(unit): torch.cat(rows, 1) for unit, rows in features.items()}
    tables |= {
        f"experts of {layer}": torch.stack([torch.cat(each) for each in of.values()]) for layer, of in experts.items()
    }
    for name, table in tables.items():
        if len(torch.unique(table, dim=0)) < len(table):
            yield name


def coordinates(weight: Tensor, at: int, axis: Axis) -> Tensor:
    """One row of features for each coordinate of the dimension that lies on an axis."""
    if axis.form == "flat":
        return weight.movedim(at, 0).flatten(1) if weight.ndim > 1 else weight[:, None]
    blocks = weight.movedim(at, 1)  # block, entry, rest
    return (blocks.transpose(0, 1) if axis.form == "lanes" else blocks).flatten(0, 1).flatten(1)
