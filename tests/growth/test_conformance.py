"""Every expansion preserves every model's function: random models, random expansions, in any order, any number of times."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from scantling.errors import InputError
from scantling.growth.path import path
from scantling.growth.steps import Step
from scantling.parts import Gaussian
from scantling.spec import ModelSpec
from tests.growth.growing import difference, grown_model, random_model
from tests.growth.targets import OPERATIONS
from tests.strategies import specs

Operation = Callable[[st.DrawFn, ModelSpec, int], ModelSpec]


def one_step(draw: st.DrawFn, spec: ModelSpec, operation: Operation) -> tuple[Step, ...]:
    """The steps of an operation; none where it is impossible, which is said in a sentence."""
    index = draw(st.integers(0, len(spec.stacks[0]) - 1))
    try:
        target = operation(draw, spec, index)
    except ValueError:
        event(f"{operation.__name__}: no such spec")
        return ()
    try:
        steps = path(spec, target)
    except InputError as error:
        assert "expected" in str(error) or "cannot" in str(error)
        event(f"{operation.__name__}: refused")
        return ()
    assert not steps or steps[-1].after.dump() == target.dump()
    event(f"{operation.__name__}: grown" if steps else f"{operation.__name__}: nothing to do")
    return steps


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.__name__)
@settings(max_examples=25)
@given(data=st.data())
def test_one_expansion(operation: Operation, data: st.DataObject) -> None:
    spec = data.draw(specs())
    assume(not isinstance(spec.transition, Gaussian))
    steps = one_step(data.draw, spec, operation)  # type: ignore[arg-type]
    model = random_model(spec)
    assert difference(model, grown_model(model, steps)) < 1e-10


@settings(max_examples=50)
@given(data=st.data())
def test_compositions(data: st.DataObject) -> None:
    spec = start = data.draw(specs())
    assume(not isinstance(spec.transition, Gaussian))
    chosen = data.draw(st.lists(st.sampled_from(OPERATIONS), min_size=2, max_size=12))
    steps: tuple[Step, ...] = ()
    for operation in chosen:
        steps += one_step(data.draw, spec, operation)  # type: ignore[arg-type]
        spec = steps[-1].after if steps else spec
    model = random_model(start)
    assert difference(model, grown_model(model, steps)) < 1e-10


@settings(max_examples=15)
@given(data=st.data())
def test_in_single_precision(data: st.DataObject) -> None:
    spec = start = data.draw(specs())
    assume(not isinstance(spec.transition, Gaussian))
    steps: tuple[Step, ...] = ()
    for operation in data.draw(st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=6)):
        steps += one_step(data.draw, spec, operation)  # type: ignore[arg-type]
        spec = steps[-1].after if steps else spec
    model = random_model(start, dtype=torch.float32)
    assert difference(model, grown_model(model, steps)) < 1e-5
