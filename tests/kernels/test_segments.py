"""Segment arithmetic against a dense mask."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lorajax_kernels import checked, segments
from lorajax_kernels.attention import reference

run = st.tuples(st.integers(0, 3), st.integers(1, 5))  # id, length


@st.composite
def packed_rows(draw):
    """Two rows of runs, ids repeated or not; few lengths, so that little is compiled."""
    length = draw(st.sampled_from((1, 7, 16)))
    rows = []
    for _ in range(2):
        runs = draw(st.lists(run, min_size=1, max_size=length))
        row = [number for number, repeats in runs for _ in range(repeats)]
        rows.append((row + [0] * length)[:length])
    return np.array(rows, np.int32)


def dense_mask(row: np.ndarray) -> np.ndarray:
    """mask[t, s]: s <= t, and every token from s to t has the same id."""
    length = len(row)
    mask = np.zeros((length, length), bool)
    for t in range(length):
        for s in range(t + 1):
            mask[t, s] = len(set(row[s : t + 1])) == 1
    return mask


@settings(max_examples=60, deadline=None)
@given(packed_rows())
def test_segments_agree_with_dense_mask(segment_ids):
    k_start, q_end = map(np.asarray, jax.jit(segments.bounds)(segment_ids))
    positions = np.asarray(jax.jit(segments.positions)(segment_ids))
    lengths = np.asarray(jax.jit(segments.lengths)(segment_ids))
    assert {x.dtype for x in (k_start, q_end, positions, lengths)} == {np.dtype(np.int32)}
    for b, row in enumerate(segment_ids):
        mask = dense_mask(row)
        index = np.arange(len(row))
        np.testing.assert_array_equal((index >= k_start[b][:, None]) & (index <= index[:, None]), mask)
        np.testing.assert_array_equal((index[:, None] < q_end[b]) & (index <= index[:, None]), mask)
        np.testing.assert_array_equal(positions[b], mask.sum(1) - 1)
        np.testing.assert_array_equal(lengths[b], mask.sum(1) + mask.sum(0) - 1)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(packed_rows(), st.sampled_from((1, 3, 16)))
def test_places_of_segments_agree_with_dense_mask(segment_ids, max_segments):
    places = jax.jit(segments.starts_and_lengths, static_argnums=1)(segment_ids, max_segments)
    starts, lengths = map(np.asarray, places)
    ranks = np.asarray(jax.jit(segments.ranks)(segment_ids))
    assert {x.dtype for x in (starts, lengths, ranks)} == {np.dtype(np.int32)}
    assert starts.shape == lengths.shape == (2, max_segments)
    for b, row in enumerate(segment_ids):
        mask = dense_mask(row)
        first = np.flatnonzero(mask.sum(1) == 1)  # sees only itself
        kept = first[:max_segments]
        rest = max_segments - len(kept)
        np.testing.assert_array_equal(starts[b], [*kept, *[len(row)] * rest])
        np.testing.assert_array_equal(lengths[b], [*mask.sum(0)[kept], *[0] * rest])
        np.testing.assert_array_equal(first[ranks[b]], mask.argmax(1))


@settings(max_examples=30, deadline=None)
@given(packed_rows(), st.sampled_from((None, 1, 3)))
def test_reference_mask_agrees_with_dense_mask(segment_ids, window):
    found = np.asarray(jax.jit(reference.mask, static_argnums=1)(segment_ids, window))
    index = np.arange(segment_ids.shape[1])
    near = index[:, None] - index < (window or len(index))
    for b, row in enumerate(segment_ids):
        np.testing.assert_array_equal(found[b], dense_mask(row) & near)


@pytest.mark.parametrize("name", ("bounds", "positions", "lengths", "ranks", "starts_and_lengths"))
def test_arguments_that_do_not_fit_are_named(name):
    function, more = getattr(segments, name), (2,) if name == "starts_and_lengths" else ()
    for shape in ((6,), (1, 2, 3)):
        with pytest.raises(ValueError, match=rf"segment_ids must be \[B, T\], got shape \({shape[0]},"):
            function(np.zeros(shape, np.int32), *more)
    with pytest.raises(ValueError, match="segment_ids must be integers, got float32"):
        function(np.zeros((2, 6), np.float32), *more)


def test_more_segments_than_places_are_an_error_in_checked_mode():
    ids = np.array([[1, 1, 2, 3]])
    with pytest.raises(ValueError, match="starts_and_lengths: max_segments must be at least 1, got 0"):
        segments.starts_and_lengths(ids, 0)
    segments.starts_and_lengths(ids, 2)
    with checked(), pytest.raises(ValueError, match="has 3 segments, more than max_segments=2"):
        segments.starts_and_lengths(ids, 2)


def test_bounds_of_a_packed_row():
    k_start, q_end = segments.bounds(np.array([[1, 1, 1, 2, 3, 3, 0, 0]]))
    np.testing.assert_array_equal(k_start, [[0, 0, 0, 3, 4, 4, 6, 6]])
    np.testing.assert_array_equal(q_end, [[3, 3, 3, 4, 6, 6, 8, 8]])


def test_rows_of_no_tokens_have_no_segments():
    empty = np.zeros((2, 0), np.int32)
    for function in (segments.positions, segments.lengths, segments.ranks):
        assert function(empty).shape == (2, 0)
    starts, lengths = segments.starts_and_lengths(empty, 3)
    np.testing.assert_array_equal(starts, np.zeros((2, 3)))
    np.testing.assert_array_equal(lengths, np.zeros((2, 3)))
    with pytest.raises(ValueError, match="bounds: segment_ids must be an array, got list"):
        segments.bounds([[1, 1]])
