"""The order in which prepared tokens come out."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scantling.data import Dataset
from scantling.data.dataset import whole_weights
from scantling.errors import InputError
from tests.corpora import in_memory, tokens

FIXED = settings(derandomize=True, deadline=None, max_examples=60, database=None)

# --- the order in which it comes out -------------------------------------------------------------------------------

SIZES = dict(n=st.integers(2, 400), length=st.integers(1, 40), rows=st.integers(1, 17), seed=st.integers(0, 2**70))


@given(**SIZES)
@FIXED
def test_every_window_once_per_epoch_whatever_the_batch(n: int, length: int, rows: int, seed: int) -> None:
    dataset = in_memory(n, vocab_size=2**16)
    windows = (n - 1) // length
    if windows == 0:
        with pytest.raises(InputError, match=f"sequence_length {length} needs {length + 1} tokens.* has {n};"):
            dataset.batch(seed=seed, step=0, batch_sequences=rows, sequence_length=length)
        return
    steps = -(-3 * windows // rows)
    batches = [dataset.batch(seed=seed, step=s, batch_sequences=rows, sequence_length=length) for s in range(steps)]
    starts = np.concatenate([inputs[:, 0] for inputs, _ in batches])  # token i is i, so a row shows where it starts
    for epoch in range(3):
        assert sorted(starts[epoch * windows : (epoch + 1) * windows]) == [i * length for i in range(windows)]
    for inputs, labels in batches:  # content, against naive slices
        assert inputs.dtype == labels.dtype == np.int64 and inputs.shape == labels.shape == (rows, length)
        for x, y in zip(inputs, labels, strict=True):
            assert x.tolist() == tokens(dataset)[x[0] : x[0] + length].tolist()
            assert y.tolist() == tokens(dataset)[x[0] + 1 : x[0] + 1 + length].tolist()
    one_by_one = [
        int(dataset.batch(seed=seed, step=s, batch_sequences=1, sequence_length=length)[0][0, 0])
        for s in range(len(starts))
    ]
    assert one_by_one == starts.tolist()


@given(parts=st.integers(1, 6), rows=st.integers(1, 5), step=st.integers(0, 10**12), seed=st.integers(0, 5))
@FIXED
def test_micro_batches_cut_a_step_without_changing_it(parts: int, rows: int, step: int, seed: int) -> None:
    dataset = in_memory(101)
    whole = dataset.batch(seed=seed, step=step, batch_sequences=parts * rows, sequence_length=10)
    cut = [
        dataset.batch(seed=seed, step=step * parts + p, batch_sequences=rows, sequence_length=10) for p in range(parts)
    ]
    for side in (0, 1):
        assert np.array_equal(whole[side], np.concatenate([c[side] for c in cut]))


def test_epochs_and_seeds_differ_and_the_order_is_pinned() -> None:
    dataset = in_memory(1001, vocab_size=2**16)

    def starts(seed: int, step: int) -> list[int]:
        inputs, _ = dataset.batch(seed=seed, step=step, batch_sequences=10, sequence_length=100)
        return [int(start) for start in inputs[:, 0]]

    orders = {tuple(starts(seed, epoch)) for seed in (0, 1, 2**32) for epoch in range(3)}
    assert len(orders) == 9
    assert starts(0, 0) == PINNED  # a change here changes every number ever trained


PINNED = [600, 300, 800, 100, 400, 500, 900, 200, 700, 0]


def test_bad_numbers_are_refused() -> None:
    good: dict[str, Any] = dict(seed=0, step=0, batch_sequences=1, sequence_length=4)
    for name, value in [("seed", -1), ("step", -1), ("batch_sequences", 0), ("sequence_length", 0)]:
        with pytest.raises(InputError, match=f"{name}: expected at least {value + 1}, got {value}"):
            in_memory(10).batch(**(good | {name: value}))


@given(n=st.integers(2, 300), length=st.integers(1, 30), rows=st.integers(1, 9))
@FIXED
def test_validation_sweep_is_whole_and_in_order(n: int, length: int, rows: int) -> None:
    dataset = in_memory(2, n, vocab_size=2**16)
    windows = (n - 1) // length
    if windows == 0:
        with pytest.raises(InputError, match="the validation split"):
            dataset.validation_batches(length, rows)  # at the call, not at the first batch
        return
    batches = list(dataset.validation_batches(length, rows))
    assert np.concatenate([x for x, *_ in batches]).ravel().tolist() == list(range(windows * length))
    assert np.concatenate([y for _, y, *_ in batches]).ravel().tolist() == list(range(1, windows * length + 1))
    assert [len(x) for x, *_ in batches[:-1]] == [rows] * (len(batches) - 1)


@given(windows=st.integers(1, 50), budget=st.integers(1, 60), rows=st.integers(1, 9))
@FIXED
def test_validation_budget_is_spread_evenly(windows: int, budget: int, rows: int) -> None:
    dataset = in_memory(2, 10 * windows + 1, vocab_size=2**16)
    found = [x[:, 0] // 10 for x, *_ in dataset.validation_batches(10, rows, max_tokens=10 * budget + 9)]
    order = np.concatenate(found)
    taken = min(windows, budget)
    assert len(order) == taken == len(set(order.tolist())) and order[0] == 0
    gaps = np.diff([*order, windows])
    assert gaps.min() >= windows // taken and gaps.max() <= -(-windows // taken)


def test_validation_numbers_documents_too() -> None:
    dataset = in_memory(2, 1000)  # a 0 at 256, 512, ...
    for batch in dataset.validation_batches(100, 4, documents=True):
        assert batch.documents is not None
        ends = batch.inputs == 0
        assert np.array_equal(batch.documents, np.cumsum(ends, axis=1) - ends)
    assert next(dataset.validation_batches(100, 4)).documents is None


def test_validation_budget_below_one_sequence() -> None:
    with pytest.raises(InputError, match="max_tokens 9 is less than one sequence of 10"):
        in_memory(2, 100).validation_batches(10, 1, max_tokens=9)


def test_epochs_of_a_budget() -> None:
    dataset = in_memory(1001, 2)
    assert dataset.epochs(1000, 100) == 1
    assert dataset.epochs(2500, 100) == 2.5
    assert dataset.epochs(900, 300) == 1  # the tail of 100 tokens is never seen


def test_batches_can_be_written_to_and_come_from_what_cannot() -> None:
    inputs, labels = in_memory(1000).batch(seed=3, step=7, batch_sequences=4, sequence_length=16)
    inputs += 1  # a copy of its own, contiguous, as torch.from_numpy wants it
    assert inputs.flags.c_contiguous and labels.flags.c_contiguous
    assert (inputs == labels % 256).mean() > 0.9


# --- numbers of sequences ------------------------------------------------------------------------------------------


@given(
    first=st.integers(0, 10**9), ranks=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 9), parts=st.integers(1, 3)
)
@FIXED
def test_the_order_knows_no_ranks(first: int, ranks: int, seed: int, parts: int) -> None:
    dataset = mixed([(101 + 50 * i, float(i + 1)) for i in range(parts)])
    asked: dict[str, Any] = dict(seed=seed, sequence_length=10, documents=True)
    whole = dataset.sequences(first=first, count=8, **asked)
    cut = [dataset.sequences(first=first + r * 8 // ranks, count=8 // ranks, **asked) for r in range(ranks)]
    for side in range(3):
        assert np.array_equal(whole[side], np.concatenate([part[side] for part in cut]))


@given(shards=st.integers(1, 30), n=st.integers(50, 200), length=st.integers(1, 40))
@FIXED
def test_shards_are_one_stream(shards: int, n: int, length: int) -> None:
    one, many = in_memory(n, n), in_memory(n, n, shards=shards)
    asked: dict[str, Any] = dict(seed=1, first=3, count=9, sequence_length=length)
    assert all(
        np.array_equal(a, b) for a, b in zip(one.sequences(**asked)[:2], many.sequences(**asked)[:2], strict=True)
    )
    sweeps = one.validation_batches(length, 4), many.validation_batches(length, 4)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(*sweeps, strict=True))


@given(st.lists(st.integers(0, 3), min_size=12, max_size=60), st.integers(1, 11), st.integers(0, 5))
@FIXED
def test_documents_are_numbered_as_by_hand(ids: list[int], length: int, seed: int) -> None:
    dataset = in_memory(len(ids))
    dataset.sources[0].streams["train"].shards[0].ids[:] = ids
    batch = dataset.sequences(seed=seed, first=2, count=5, sequence_length=length, documents=True)
    assert batch.documents is not None
    for row, found in zip(batch.inputs.tolist(), batch.documents.tolist(), strict=True):
        number = 0
        for token, document in zip(row, found, strict=True):
            assert document == number
            number += token == 0
    plain = dataset.sequences(seed=seed, first=2, count=5, sequence_length=length)
    assert plain.documents is None and np.array_equal(plain.labels, batch.labels)


# --- mixtures ------------------------------------------------------------------------------------------------------

WEIGHTS = st.lists(st.one_of(st.integers(1, 50).map(lambda n: n / 10), st.floats(1e-3, 1e3)), min_size=2, max_size=6)


def mixed(parts: list[tuple[int, float]]) -> Dataset:
    """A mixture of (training tokens, weight); part k holds nothing but k + 1, with a 0 every tenth."""
    sources = []
    for k, (n, weight) in enumerate(parts):
        (source,) = in_memory(n, n, name=f"part{k}", weight=weight).sources
        for stream in source.streams.values():
            stream.shards[0].ids[:] = np.where(np.arange(n) % 10 == 9, 0, k + 1)
        sources.append(source)
    return Dataset(tuple(sources), in_memory(2).tokenizer, "0" * 64)


@given(WEIGHTS)
@FIXED
def test_shares_are_kept_at_every_moment(weights: list[float]) -> None:
    dataset = mixed([(40 + 7 * k, weight) for k, weight in enumerate(weights)])
    inputs = dataset.sequences(seed=0, first=0, count=500, sequence_length=9).inputs
    owner = inputs.max(axis=1) - 1
    for k, share in enumerate(dataset.shares().values()):
        so_far = np.cumsum(owner == k)
        assert np.abs(so_far - share * np.arange(1, 501)).max() < len(weights)
        assert abs(share - weights[k] / sum(weights)) < 1e-5
    far = 10**12  # any place without replay, and still in proportion
    later = dataset.sequences(seed=0, first=far, count=500, sequence_length=9).inputs.max(axis=1) - 1
    for k, share in enumerate(dataset.shares().values()):
        assert abs((later == k).sum() - 500 * share) < 2 * len(weights)


def test_short_decimals_are_exact_shares() -> None:
    assert whole_weights([0.7, 0.2, 0.1]) == [7, 2, 1]
    dataset = mixed([(1000, 0.7), (1000, 0.2), (1000, 0.1)])
    owner = dataset.sequences(seed=0, first=10**9, count=1000, sequence_length=9).inputs.max(axis=1) - 1
    assert np.bincount(owner).tolist() == [700, 200, 100]
    assert dataset.shares() == {"part0": 0.7, "part1": 0.2, "part2": 0.1}


@given(n=st.integers(0, 10**12), weights=st.lists(st.integers(1, 10**6), min_size=2, max_size=5))
@FIXED
def test_counts_against_exact_fractions(n: int, weights: list[int]) -> None:
    dataset = mixed([(20, float(weight)) for weight in weights])
    now, after = dataset._counts(np.array([n, n + 1])).T
    assert now.sum() == n and ((after - now) >= 0).all() and (after - now).sum() == 1
    whole = dataset._weights
    for k, weight in enumerate(whole):
        assert abs(int(now[k]) - Fraction(n * weight, sum(whole))) < len(whole)


def test_each_source_runs_through_its_own_epochs() -> None:
    parts = [in_memory(101, 2, 2**16, name, weight).sources[0] for name, weight in (("a", 3.0), ("b", 1.0))]
    parts[1].streams["train"].shards[0].ids[:] += 1000
    dataset = Dataset(tuple(parts), in_memory(2, vocab_size=2**16).tokenizer, "0" * 64)
    starts = dataset.sequences(seed=4, first=0, count=80, sequence_length=10).inputs[:, 0]
    for k, epochs in ((0, 6), (1, 2)):
        mine = starts[starts // 1000 == k] - 1000 * k
        orders = [tuple(mine[10 * e : 10 * e + 10].tolist()) for e in range(epochs)]
        assert len(mine) == 10 * epochs and len(set(orders)) == epochs
        assert all(sorted(order) == list(range(0, 100, 10)) for order in orders)
    assert dataset.epochs_by_source(800, 10) == {"a": 6.0, "b": 2.0}
    assert dataset.epochs(800, 10) == 6.0 and dataset.windows(10) == 20


def test_validation_of_a_mixture_keeps_the_shares_and_repeats_nothing() -> None:
    dataset = mixed([(1001, 0.5), (201, 0.5)])
    owner = np.concatenate([x.max(axis=1) - 1 for x, *_ in dataset.validation_batches(10, 7)])
    assert np.bincount(owner).tolist() == [21, 20]  # the second has no more than 20
    owner = np.concatenate([x.max(axis=1) - 1 for x, *_ in dataset.validation_batches(10, 7, max_tokens=105)])
    assert np.bincount(owner).tolist() == [5, 5]
    assert dataset.bytes_per_token() == 1.0
