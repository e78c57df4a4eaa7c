"""Every fast path of training against the plain formula it stands for: attention, documents, loss, norm, rotation."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from scantling.model import Decoder, block_attention, build, norm, rotary
from scantling.model import loss as losses
from scantling.model.attention import Attention, attend, plain_attention
from scantling.model.loss import Head, cross_entropy
from scantling.parts import Gaussian
from scantling.resolve import spec_from
from scantling.spec import ModelSpec
from tests.strategies import specs

DOUBLE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Fixed normal numbers that ask for gradients."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def ranks(cuts: list[int], length: int) -> Tensor:
    """Document numbers of a row whose documents end at `cuts`."""
    return torch.tensor([sum(cut <= at for cut in cuts) for at in range(length)])


# --- block attention -----------------------------------------------------------------------------------------------------


@st.composite
def attention_cases(draw: st.DrawFn) -> dict[str, Any]:
    length, groups = draw(st.integers(1, 40)), draw(st.integers(1, 3))
    batch = draw(st.integers(1, 2))
    cuts = st.lists(st.integers(1, max(1, length - 1)), max_size=4)
    documents = [ranks(draw(cuts), length) for _ in range(batch)] if draw(st.booleans()) else None
    return {
        "batch": batch,
        "length": length,
        "groups": groups,
        "heads": groups * draw(st.integers(1, 3)),
        "head_dim": draw(st.integers(1, 9)),
        "v_head_dim": draw(st.integers(1, 9)),
        "window": draw(st.sampled_from([None, 1, 2, 5, 16, 1000])),
        "documents": torch.stack(documents) if documents else None,
        "block": draw(st.sampled_from([1, 3, 7, 16, 64])),
    }


def values_and_gradients(call: Callable[[], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """What a call gives, and the gradients of a fixed weighted sum of it."""
    out = call()
    return [out.detach(), *torch.autograd.grad(out, inputs, seeded(*out.shape, seed=9).detach().to(out.dtype))]


@given(attention_cases())
def test_block_attention_is_plain_attention(case: dict[str, Any]) -> None:
    batch, length = case["batch"], case["length"]
    q = seeded(batch, case["heads"], length, case["head_dim"], seed=1)
    k = seeded(batch, case["groups"], length, case["head_dim"], seed=2)
    v = seeded(batch, case["groups"], length, case["v_head_dim"], seed=3)
    window, documents = case["window"], case["documents"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_attention, "BLOCK", case["block"])
        block = values_and_gradients(
            lambda: block_attention.block_attention(q, k, v, 0.7, window, documents), [q, k, v]
        )
    plain = values_and_gradients(lambda: plain_attention(q, k, v, 0.7, window, documents=documents), [q, k, v])
    fused = values_and_gradients(lambda: attend(q, k, v, 0.7, window, documents=documents, kernel="fused"), [q, k, v])
    for one, two, three in zip(block, plain, fused, strict=True):
        torch.testing.assert_close(one, two, **DOUBLE)
        torch.testing.assert_close(three, two, **DOUBLE)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("length", [63, 64, 65, 130])
def test_blocks_of_the_real_size(length: int, window: int | None) -> None:
    q, k, v = seeded(2, 4, length, 8, seed=1), seeded(2, 2, length, 8, seed=2), seeded(2, 2, length, 5, seed=3)
    documents = torch.stack([ranks([length // 3, length // 2], length), ranks([1], length)])
    for given_documents in (None, documents):
        block = values_and_gradients(
            lambda each=given_documents: attend(q, k, v, 0.3, window, documents=each, kernel="block"),  # type: ignore[misc]
            [q, k, v],
        )
        plain = values_and_gradients(
            lambda each=given_documents: plain_attention(q, k, v, 0.3, window, documents=each),  # type: ignore[misc]
            [q, k, v],
        )
        for one, two in zip(block, plain, strict=True):
            torch.testing.assert_close(one, two, **DOUBLE)


def test_attention_by_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_attention, "BLOCK", 3)
    q, k, v = seeded(1, 2, 7, 3, seed=1), seeded(1, 1, 7, 3, seed=2), seeded(1, 1, 7, 2, seed=3)
    documents = ranks([4], 7)[None]
    assert gradcheck(lambda *qkv: block_attention.block_attention(*qkv, 0.5, 4, documents), (q, k, v))


def test_no_position_sees_a_later_one_or_beyond_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of one output position, key by key: zero exactly where it must not look."""
    monkeypatch.setattr(block_attention, "BLOCK", 5)
    q, k, v = seeded(1, 1, 17, 4, seed=1), seeded(1, 1, 17, 4, seed=2), seeded(1, 1, 17, 4, seed=3)
    documents = ranks([6], 17)[None]
    for position in range(17):
        out = block_attention.block_attention(q, k, v, 1.0, 4, documents)[0, 0, position].sum()
        (dv,) = torch.autograd.grad(out, [v])
        first = max(0, position - 3, 6 if position >= 6 else 0)
        seen = [at for at in range(17) if dv[0, 0, at].abs().sum() > 0]
        assert seen == list(range(first, position + 1))


# --- documents -----------------------------------------------------------------------------------------------------------


def kernels(model: Decoder, kernel: str) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.kernel = kernel  # type: ignore[assignment]


def spec_of(**changes: Any) -> ModelSpec:
    base: dict[str, Any] = {
        "vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "ffn": {"kind": "dense", "intermediate_size": 24},
    }  # fmt: skip
    return spec_from({**base, **changes})


BRANCHES: dict[str, Any] = {"count": 2, "entry": "projection", "mixing": "softmax"}
PACKED: dict[str, dict[str, Any]] = {
    "gqa": {},
    "sliding window": {"sliding_window": [None, 3, 5]},
    "soft-capped": {"attn_logit_softcapping": [5.0, None, 5.0], "sliding_window": [None, None, 3]},
    "bowtie": {"hidden_size": [24, 8, 16], "num_attention_heads": [4, 2, 4], "transition": "carry_forward"},
    "branches": {"num_hidden_layers": 4, "branches": BRANCHES},
    "partial rotary": {"position": {"kind": "rope", "partial_rotary_factor": 0.5}, "head_dim": 8},
}


def assert_documents_are_alone(model: Decoder, cuts: list[int], length: int) -> None:
    """The logits of a packed row are those of each of its documents run alone, with gradients and without."""
    model = model.double()
    ids = torch.randint(0, model.spec.vocab_size, (1, length), generator=torch.Generator().manual_seed(4))
    documents = ranks(cuts, length)[None]
    starts = [0, *sorted({cut for cut in cuts if 0 < cut < length}), length]
    for wanted in (True, False):
        for kernel in ("block", "fused"):
            kernels(model, kernel)
            with torch.set_grad_enabled(wanted):
                packed = model(ids, documents=documents)
                alone = [model(ids[:, a:b]) for a, b in pairwise(starts)]
            torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("what", PACKED)
def test_a_packed_row_is_its_documents_alone(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_attention, "BLOCK", 4)
    model = build(spec_of(**PACKED[what]), seed=1)
    assert_documents_are_alone(model, [1, 6, 13], 21)
    ids = torch.arange(21)[None]
    documents = ranks([1, 6, 13], 21)[None]
    assert not torch.allclose(model(ids), model(ids, documents=documents))  # the mask does something


@given(specs(), st.lists(st.integers(1, 11), max_size=3))
@settings(max_examples=25)
def test_packed_rows_of_any_model(spec: ModelSpec, cuts: list[int]) -> None:
    """But for learned positions, which count from the start of the row, and noise drawn anew in every pass."""
    assume(not spec.learned_positions and not isinstance(spec.transition, Gaussian))
    assert_documents_are_alone(build(spec), cuts, 12)


def test_a_packed_rows_loss_is_the_sum_of_its_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_attention, "BLOCK", 4)
    model = build(spec_of(), seed=1).double()
    kernels(model, "block")
    ids = torch.randint(0, 31, (1, 15), generator=torch.Generator().manual_seed(4))
    whole = model.total_loss(ids[:, :-1], ids[:, 1:], ranks([5], 14)[None])
    parts = [model.total_loss(ids[:, a:b], ids[:, a + 1 : b + 1]) for a, b in ((0, 5), (5, 14))]
    torch.testing.assert_close(whole, parts[0] + parts[1], **DOUBLE)
    packed = torch.autograd.grad(whole, list(model.parameters()), retain_graph=True)
    alone = torch.autograd.grad(parts[0] + parts[1], list(model.parameters()))
    for one, two in zip(packed, alone, strict=True):
        torch.testing.assert_close(one, two, **DOUBLE)


# --- the loss of a large vocabulary --------------------------------------------------------------------------------------

TOKENS, WIDTH, VOCABULARY = 23, 6, 37


@pytest.fixture(params=[(1, 1), (37 * 8 * 5, 37 * 4 * 2), (37 * 8 * 7, 2**20), (2**20, 37 * 4 * 3)])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """Every vocabulary counts as large; rows and cached spans of several sizes that divide nothing."""
    monkeypatch.setattr(losses, "SMALL", 0)
    monkeypatch.setattr(losses, "ROWS_BYTES", request.param[0])
    monkeypatch.setattr(losses, "CACHE_BYTES", request.param[1])
    yield request.param


def plain_loss(x: Tensor, head: Head, labels: Tensor, z_loss: float) -> Tensor:
    """The same by torch's own cross-entropy, from all logits at once."""
    logits = F.linear(x, head.weight, head.bias) / head.scaling
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    known = labels >= 0
    squares = torch.logsumexp(logits[known], -1).square().sum()
    return F.cross_entropy(logits[known], labels[known], reduction="sum") + z_loss * squares


def head_of(scaling: float, softcap: float | None, bias: bool, dtype: torch.dtype = torch.float64) -> Head:
    own = seeded(VOCABULARY, seed=6, dtype=dtype) if bias else None
    return Head(seeded(VOCABULARY, WIDTH, seed=5, dtype=dtype), own, scaling, softcap)


def some_labels(ignored: bool) -> Tensor:
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(7))
    if ignored:
        labels[[0, 5, 6, TOKENS - 1]] = -1
    return labels


def leaves(x: Tensor, head: Head) -> list[Tensor]:
    return [x, head.weight] + ([] if head.bias is None else [head.bias])


@pytest.mark.parametrize("scaling", [1.0, 4.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("ignored", [False, True])
def test_chunked_cross_entropy(
    chunks: tuple[int, int], scaling: float, softcap: float | None, bias: bool, z_loss: float, ignored: bool
) -> None:
    x, head, labels = seeded(TOKENS, WIDTH), head_of(scaling, softcap, bias), some_labels(ignored)
    wanted = plain_loss(x, head, labels, z_loss)
    found = cross_entropy(x, head, labels, z_loss)
    torch.testing.assert_close(found, wanted, **DOUBLE)
    for one, two in zip(
        torch.autograd.grad(found * 1.7, leaves(x, head)),
        torch.autograd.grad(wanted * 1.7, leaves(x, head)),
        strict=True,
    ):
        torch.testing.assert_close(one, two, **DOUBLE)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(x, head, labels, z_loss), wanted.detach(), **DOUBLE)


def test_small_and_chunked_agree_on_what_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    x, head = seeded(TOKENS, WIDTH), head_of(2.0, 5.0, True)
    for labels in (some_labels(True), torch.full((TOKENS,), -1)):
        small = cross_entropy(x, head, labels, 0.1)
        torch.testing.assert_close(small.detach(), plain_loss(x, head, labels, 0.1).detach(), **DOUBLE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(losses, "SMALL", 0)
            chunked = cross_entropy(x, head, labels, 0.1)
        for one, two in zip(
            torch.autograd.grad(small, leaves(x, head)), torch.autograd.grad(chunked, leaves(x, head)), strict=True
        ):
            torch.testing.assert_close(one, two, **DOUBLE)


def test_chunked_loss_by_finite_differences(chunks: tuple[int, int]) -> None:
    """Central differences: gradcheck would ask the same graph twice, which this loss allows once."""
    x, labels = seeded(5, WIDTH), some_labels(True)[:5]
    head = head_of(2.0, 3.0, True)
    gradients = torch.autograd.grad(cross_entropy(x, head, labels, 0.2), leaves(x, head))
    with torch.no_grad():
        for leaf, gradient in zip(leaves(x, head), gradients, strict=True):
            flat = leaf.view(-1)
            for at in range(0, flat.numel(), 7):
                kept, ends = flat[at].clone(), []
                for step in (1e-6, -1e-6):
                    flat[at] = kept + step
                    ends.append(cross_entropy(x, head, labels, 0.2).item())
                    flat[at] = kept
                assert gradient.reshape(-1)[at].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6, abs=1e-7)


def test_chunked_loss_under_autocast(chunks: tuple[int, int]) -> None:
    """Products in bfloat16, everything else in float32; gradients arrive in the parameters' own precision."""
    x, head = seeded(TOKENS, WIDTH, dtype=torch.float32), head_of(1.0, 3.0, True, torch.float32)
    labels = some_labels(True)
    wanted = plain_loss(x, head, labels, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cross_entropy(x, head, labels, 0.1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=4e-3, atol=0.0)
    for one, two in zip(
        torch.autograd.grad(found, leaves(x, head)), torch.autograd.grad(wanted, leaves(x, head)), strict=True
    ):
        assert one.dtype == torch.float32
        assert (one - two).norm() <= 0.01 * two.norm()


@given(specs())
@settings(max_examples=15)
def test_chunked_loss_of_any_model(spec: ModelSpec) -> None:
    model, ids = build(spec).double(), torch.arange(22).view(2, 11) % spec.vocab_size
    model.eval()

    def both() -> list[Tensor]:
        torch.manual_seed(0)
        total = model.total_loss(ids[:, :-1], ids[:, 1:], z_loss=0.01)
        found = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
        return [total.detach(), *(torch.zeros(()) if each is None else each for each in found)]

    plain = both()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "SMALL", 0)
        patch.setattr(losses, "ROWS_BYTES", 3 * 8 * spec.vocab_size)
        chunked = both()
    for one, two in zip(chunked, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)


# --- norm and rotation ---------------------------------------------------------------------------------------------------


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 7), (2, 3, 2, 4)])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rms_norm(shape: tuple[int, ...], eps: float) -> None:
    x, weight = seeded(*shape), seeded(shape[-1], seed=1)
    assert gradcheck(lambda a, b: norm._RMSNorm.apply(a, b, eps), (x, weight))
    found = values_and_gradients(lambda: norm._RMSNorm.apply(x, weight, eps), [x, weight])
    for one, two in zip(found, values_and_gradients(lambda: plain_norm(x, weight, eps), [x, weight]), strict=True):
        torch.testing.assert_close(one, two, **DOUBLE)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_rms_norm_in_training_is_torchs_own(size: float) -> None:
    """float32 on a CPU with gradients takes the short way; the same numbers as without, at any scale, and at zero."""
    module = norm.Norm(spec_of().layers[0].norm, 16)
    torch.nn.init.normal_(module.weight, 1.0, 0.1, generator=torch.Generator().manual_seed(0))
    x = (seeded(4, 9, 16, dtype=torch.float32).detach() * size).requires_grad_()
    found = module(x)
    assert "RMSNorm" in type(found.grad_fn).__name__
    torch.testing.assert_close(found, F.rms_norm(x, (16,), module.weight, module.spec.eps), rtol=2e-6, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(module(x), found.detach(), rtol=2e-6, atol=1e-7)
    (dx,) = torch.autograd.grad(module(torch.zeros_like(x, requires_grad=True)).sum(), [module.weight])
    assert torch.isfinite(dx).all()


@pytest.mark.parametrize("scaling", [None, {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}])
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_rotation(partial: float, scaling: dict[str, Any] | None) -> None:
    """As complex numbers: pair (i, i + half) times exp(i angle) and what yarn multiplies by; the rest passes by."""
    position = {"kind": "rope", "partial_rotary_factor": partial, "scaling": scaling}
    rope: Any = spec_of(position=position, head_dim=8).layers[0].position
    cos, sin = rotary.rotary_table(rope, 8, 7, torch.device("cpu"), torch.float64)
    half = cos.shape[-1]
    assert half == 4 * partial
    x = seeded(2, 3, 7, 8)

    def plain() -> Tensor:
        turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(cos, sin)
        return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), -1)

    assert gradcheck(lambda a: rotary.rotate(a, cos, sin), (x,))
    for one, two in zip(
        values_and_gradients(lambda: rotary.rotate(x, cos, sin), [x]), values_and_gradients(plain, [x]), strict=True
    ):
        torch.testing.assert_close(one, two, **DOUBLE)


# --- all of it, in any model ---------------------------------------------------------------------------------------------


@given(specs(), st.sampled_from([4, 64]))
def test_kernels_agree_in_any_model(spec: ModelSpec, block: int) -> None:
    """Loss and gradients of a training step, block and fused attention, in float32 to 1e-5 of the largest gradient."""
    model, ids = build(spec, seed=3), torch.arange(26).view(2, 13) % spec.vocab_size

    def step(kernel: str) -> tuple[float, list[Tensor]]:
        kernels(model, kernel)
        torch.manual_seed(0)
        loss = model.total_loss(ids[:, :-1], ids[:, 1:]) / 24
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return loss.item(), [torch.zeros(1) if each is None else each for each in found]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_attention, "BLOCK", block)
        (one, ones), (two, twos) = step("block"), step("fused")
    assert one == pytest.approx(two, rel=1e-5, abs=1e-5)
    largest = max(1.0, *(float(each.abs().max()) for each in twos))
    for first, second in zip(ones, twos, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5 * largest)
