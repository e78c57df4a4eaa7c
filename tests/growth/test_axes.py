"""The table of axes against the modules that are built."""

from hypothesis import given

from scantling.checkpoint import weights_of
from scantling.growth.axes import shapes
from scantling.model import build_meta
from scantling.spec import ModelSpec
from tests.strategies import specs


@given(specs())
def test_every_parameter_has_its_axes(spec: ModelSpec) -> None:
    weights, _ = weights_of(build_meta(spec))
    assert shapes(spec) == {name: tuple(weight.shape) for name, weight in weights.items()}
