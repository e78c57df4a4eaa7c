"""The moving average of the weights, against its closed form."""

import pytest
import torch

from scantling.average import Average
from scantling.errors import InputError
from scantling.model import Decoder, build
from scantling.resolve import spec_from

GO, SKIP = torch.tensor(False), torch.tensor(True)


@pytest.fixture
def model() -> Decoder:
    layers = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 16}
    ffn = {"kind": "dense", "intermediate_size": 24}
    return build(spec_from({"vocab_size": 32, "tie_word_embeddings": True, "ffn": ffn, **layers}))


def weights(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def wander(model: Decoder) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_closed_form(model: Decoder, decay: float) -> None:
    average = Average(model, decay)
    steps = [weights(model)]
    for _ in range(7):
        wander(model)
        average.update(model, GO)
        steps.append(weights(model))
    for name, tensor in average.tensors().items():
        shares = [decay**7] + [(1 - decay) * decay ** (7 - i) for i in range(1, 8)]
        expected = sum(share * step[name].double() for share, step in zip(shares, steps, strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-5)
    assert average.tensors().keys() == weights(model).keys()


@pytest.mark.parametrize("skip", [SKIP, torch.tensor(2.0), torch.tensor(float("nan"))])
@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_a_skipped_step_changes_nothing(model: Decoder, skip: torch.Tensor, decay: float) -> None:
    average = Average(model, decay)
    wander(model)
    average.update(model, GO)
    before = {name: tensor.clone() for name, tensor in average.tensors().items()}
    wander(model)
    average.update(model, skip)
    assert all(torch.equal(before[name], tensor) for name, tensor in average.tensors().items())


def test_swapped_in_and_back_bit_for_bit(model: Decoder) -> None:
    average = Average(model, 0.9)
    for _ in range(3):
        wander(model)
        average.update(model, GO)
    own, mean = weights(model), {name: tensor.clone() for name, tensor in average.tensors().items()}
    storages = [parameter.data_ptr() for parameter in model.parameters()]
    ids = torch.arange(8)[None]
    with average.swapped(model):
        assert all(torch.equal(mean[name], tensor) for name, tensor in weights(model).items())
        assert model.lm_head.weight is model.embed_tokens.weight
        averaged = model(ids)
    with pytest.raises(ZeroDivisionError), average.swapped(model):
        raise ZeroDivisionError
    assert not torch.equal(averaged, model(ids))
    assert all(torch.equal(own[name], tensor) for name, tensor in weights(model).items())
    assert all(torch.equal(mean[name], tensor) for name, tensor in average.tensors().items())
    assert storages == [parameter.data_ptr() for parameter in model.parameters()]


def test_saved_and_loaded_it_goes_on_the_same(model: Decoder) -> None:
    average = Average(model, 0.9)
    wander(model)
    average.update(model, GO)
    saved = {name: tensor.clone() for name, tensor in average.tensors().items()}
    other = Average(model, 0.9)  # starts from today's weights, not from the saved average
    assert not all(torch.equal(saved[name], tensor) for name, tensor in other.tensors().items())
    other.load(saved)
    wander(model)
    for one in (average, other):
        one.update(model, GO)
    for name, tensor in average.tensors().items():
        assert torch.equal(tensor, other.tensors()[name])
        assert not torch.equal(tensor, saved[name])  # load copied


def test_an_average_of_another_model_is_refused(model: Decoder) -> None:
    average = Average(model, 0.9)
    saved = dict(average.tensors())
    saved["layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj\.weight: expected shape \(24, 16\), got \(3, 3\)"):
        average.load(saved)
    del saved["norm.weight"]
    with pytest.raises(InputError, match=r"first difference: norm\.weight"):
        average.load(saved)
