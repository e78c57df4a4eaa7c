"""Models with every weight random, grown, and compared."""

from collections.abc import Sequence

import torch
from hypothesis import settings
from torch import Tensor

from scantling.checkpoint import weights_of
from scantling.growth.path import path
from scantling.growth.steps import Step
from scantling.growth.weights import applied
from scantling.hf_folder import load_weights
from scantling.lineage import Policy
from scantling.model import Decoder, build
from scantling.spec import ModelSpec
from scantling.tensor_files import Held


def times(examples: int) -> int:
    """Examples of a costly test: so many by default, a quarter in the quick profile, twenty times as many in the nightly one."""
    return max(1, examples * settings().max_examples // 100)


def random_model(spec: ModelSpec, seed: int = 0, dtype: torch.dtype = torch.float64) -> Decoder:
    """A model whose gains, shifts and biases are random too."""
    model = build(spec, seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype))
    return model.eval()


def grown_model(model: Decoder, steps: Sequence[Step], policy: Policy | None = None) -> Decoder:
    weights, _ = weights_of(model)
    tensors = applied(Held(weights), list(steps), policy or Policy())
    return load_weights(steps[-1].after if steps else model.spec, tensors, next(model.parameters()).dtype)


def some_ids(spec: ModelSpec, seed: int = 0, shape: tuple[int, int] = (2, 7)) -> Tensor:
    return torch.randint(0, spec.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def difference(model: Decoder, grown: Decoder, seed: int = 0) -> float:
    """Largest logit difference over the old vocabulary, relative to the largest logit."""
    ids = some_ids(model.spec, seed)
    before, after = model(ids), grown(ids)[..., : model.spec.vocab_size]
    return ((before - after).abs().max() / before.abs().max().clamp(min=1)).item()


def grow_error(spec: ModelSpec, target: ModelSpec, seed: int = 0) -> float:
    model = random_model(spec, seed)
    return difference(model, grown_model(model, path(spec, target)), seed)
