"""Every expansion preserves every model's function: random models, random expansions, in any order, any number of times."""

from collections import Counter
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
from tests.growth.growing import difference, grown_model, random_model, times
from tests.growth.targets import OPERATIONS, has_something, narrow, ready, suited
from tests.strategies import specs

Operation = Callable[[st.DrawFn, ModelSpec, int], ModelSpec]
GROWN = 0.7  # of the drawn operations at least; the others are refused in a sentence, or find nothing to grow
GROWN_NARROW = 0.4  # not every drawn model has a narrow layer


def one_step(draw: st.DrawFn, spec: ModelSpec, operation: Operation, counts: Counter[str]) -> tuple[Step, ...]:
    """The steps of an operation; none where it is impossible, which is said in a sentence."""
    index = draw(st.integers(0, len(spec.stacks[0]) - 1))
    counts["drawn"] += 1
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
    counts["grown"] += bool(steps)
    return steps


def several(draw: st.DrawFn, spec: ModelSpec, count: int, counts: Counter[str]) -> tuple[Step, ...]:
    """Random operations one after the other, each of those that have something to grow in some layer."""
    steps: tuple[Step, ...] = ()
    for _ in range(count):
        places = range(len(spec.stacks[0]))
        found = [each for each in OPERATIONS if any(has_something(each, spec, at) for at in places)]
        steps += one_step(draw, spec, draw(st.sampled_from(found)), counts)
        spec = steps[-1].after if steps else spec
    return steps


def drawn(draw: st.DrawFn) -> ModelSpec:
    """Any spec that computes the same twice."""
    spec = draw(specs())
    assume(not isinstance(spec.transition, Gaussian))
    return spec


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.__name__)
def test_one_expansion(operation: Operation) -> None:
    counts: Counter[str] = Counter()

    @settings(max_examples=times(25))
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        spec = suited(data.draw, drawn(data.draw), operation)  # type: ignore[arg-type]
        steps = one_step(data.draw, spec, operation, counts)  # type: ignore[arg-type]
        model = random_model(spec)
        assert difference(model, grown_model(model, steps)) < 1e-10

    check()
    assert counts["grown"] > (GROWN_NARROW if operation is narrow else GROWN) * counts["drawn"]


@settings(max_examples=times(50))
@given(data=st.data())
def test_any_expansion_of_any_model(data: st.DataObject) -> None:
    """Models as they come: many expansions are impossible, and none ends in anything but a sentence or the same function."""
    spec, operation = drawn(data.draw), data.draw(st.sampled_from(OPERATIONS))  # type: ignore[arg-type]
    steps = one_step(data.draw, spec, operation, Counter())  # type: ignore[arg-type]
    model = random_model(spec)
    assert difference(model, grown_model(model, steps)) < 1e-10


@pytest.mark.parametrize(
    ("dtype", "tolerance", "examples", "most"), [(torch.float64, 1e-10, 40, 12), (torch.float32, 1e-5, 15, 6)]
)
def test_compositions(dtype: torch.dtype, tolerance: float, examples: int, most: int) -> None:
    counts: Counter[str] = Counter()

    @settings(max_examples=times(examples))
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        spec = ready(drawn(data.draw))  # type: ignore[arg-type]
        steps = several(data.draw, spec, data.draw(st.integers(1, most)), counts)  # type: ignore[arg-type]
        model = random_model(spec, dtype=dtype)
        assert difference(model, grown_model(model, steps)) < tolerance

    check()
    assert counts["grown"] > GROWN * counts["drawn"], counts
