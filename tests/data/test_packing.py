"""Packed rows: every token once, starts and loss weights right, each row by its index alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.data.packing import PackedDocuments, PackedSamples, interleave
from mmx.errors import UserError


def documents(lengths):
    """Documents whose tokens tell their document and place: doc · 1000 + place."""
    tokens = np.concatenate([1000 * i + np.arange(n) for i, n in enumerate(lengths)])
    return tokens, np.cumsum(lengths)


def fill(rows, index):
    S = rows.seq_len + 1
    ids, starts, weights = np.full(S, -1), np.ones(S, bool), np.full(S - 1, -1.0, np.float32)
    rows.fill(index, ids, starts, weights)
    return ids, starts, weights


lengths_and_width = st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=12),
                              st.integers(2, 33), st.booleans(), st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(lengths_and_width)
def test_every_token_is_packed_once(case):
    lengths, width, shuffle, seed = case
    tokens, ends = documents(lengths)
    rows = PackedDocuments(tokens, ends, width, seed, shuffle)
    blocks = 1 if rows.num_rows > 8 else len(tokens)  # as many rows as tokens: whole epochs
    count = blocks * rows.num_rows
    inputs = np.concatenate([fill(rows, i)[0][:-1] for i in range(count)])
    epochs, rest = divmod(count * width, len(tokens))
    seen, times = np.unique(inputs, return_counts=True)
    assert set(seen) <= set(tokens.tolist())
    assert times.sum() == count * width
    assert times.min() >= (epochs if len(seen) == len(tokens) else 0)
    assert times.max() <= epochs + (rest > 0)


@settings(max_examples=60, deadline=None)
@given(lengths_and_width)
def test_starts_and_weights_follow_the_documents(case):
    lengths, width, shuffle, seed = case
    tokens, ends = documents(lengths)
    rows = PackedDocuments(tokens, ends, width, seed, shuffle)
    for index in range(min(2 * rows.num_rows, 20)):
        ids, starts, weights = fill(rows, index)
        assert starts[0]
        np.testing.assert_array_equal(starts[1:], ids[1:] % 1000 == 0)
        inside = ~starts[1:]
        np.testing.assert_array_equal(ids[1:][inside], ids[:-1][inside] + 1)
        np.testing.assert_array_equal(weights, inside.astype(np.float32))


def test_each_row_follows_on_from_the_one_before_it_in_the_stream():
    tokens, ends = documents([13, 40, 7, 29])
    rows = PackedDocuments(tokens, ends, 16, shuffle=False)
    for index in range(12):
        assert fill(rows, index)[0][-1] == fill(rows, index + 1)[0][0]


def test_rows_depend_on_index_and_seed_alone():
    tokens, ends = documents([13, 40, 7, 29] * 5)
    one, two = (PackedDocuments(tokens, ends, 16, seed=7) for _ in range(2))
    backwards = {i: fill(one, i)[0] for i in reversed(range(60))}
    for i in range(60):
        np.testing.assert_array_equal(fill(two, i)[0], backwards[i])
    other = PackedDocuments(tokens, ends, 16, seed=8)
    assert any((fill(other, i)[0] != backwards[i]).any() for i in range(3))
    second_epoch = [tuple(fill(one, i)[0]) for i in range(one.num_rows, 2 * one.num_rows)]
    assert second_epoch != [tuple(backwards[i]) for i in range(one.num_rows)]


class Sampler:
    """Samples of length 10 + index % 7, whose last three tokens are to be predicted."""

    def sample(self, index, max_tokens):
        length = min(10 + index % 7, max_tokens)
        ids = 1000 * index + np.arange(length)
        return ids, np.arange(length) >= length - 3


@pytest.mark.parametrize("width", [16, 40, 41])
def test_samples_stay_whole_or_without_loss(width):
    rows = PackedSamples(Sampler(), width, min_tokens=16)
    used = set()
    for index in range(6):
        ids, starts, weights = fill(rows, index)
        assert (ids >= 0).all() and starts[0]
        for sample in np.unique(ids // 1000):
            here = np.flatnonzero(ids // 1000 == sample)
            assert starts[here[0]] and not starts[here[1:]].any()
            assert sample not in used
            used.add(sample)
            whole = len(here) == 10 + sample % 7
            expected = len(here) - 3 if whole else len(here)
            got = weights[here[here > 0] - 1]
            if whole and width + 1 - here[0] >= rows.min_tokens:
                np.testing.assert_array_equal(got[-3:], 1)
            np.testing.assert_array_equal(got[:max(0, len(got) - (len(here) - expected))], 0)
        assert weights.sum() > 0


def test_samples_that_cannot_fill_a_row_are_refused():
    class Empty:
        def sample(self, index, max_tokens):
            return np.zeros(0, int), np.zeros(0, bool)

    with pytest.raises(UserError, match="empty"):
        fill(PackedSamples(Empty(), 16), 0)
    with pytest.raises(UserError, match="do not fill"):
        fill(PackedSamples(Sampler(), 5000), 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=5).filter(lambda w: sum(w) > 0.1))
def test_interleaving_keeps_every_prefix_in_proportion(weights):
    cycle = interleave(weights, 256)
    share = np.asarray(weights) / np.sum(weights)
    counts = np.cumsum(cycle[:, None] == np.arange(len(weights)), axis=0)
    ideal = np.arange(1, 257)[:, None] * share
    # Smooth round robin of n sources is never off by n - 1 or more.
    assert np.abs(counts - ideal).max() < max(len(weights) - 1, 1) + 1e-6


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0]])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(UserError, match="mixture weights"):
        interleave(weights)
