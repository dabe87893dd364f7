import json

import grain
import numpy as np
import pytest

from lorajax.data import packed_batches, packing_stats
from lorajax.data.documents import Documents

MAX_LENGTH = 64
OPTIONS = dict(max_length=MAX_LENGTH, max_segments=6, packing=True, seed=3)


def make_documents(count, seed=0, longest=MAX_LENGTH + 1):
    """Documents of random length and mask, whose tokens are all different."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(2.3, 1.0, count).astype(int), 2, longest)
    first = np.cumsum(lengths) - lengths + 1
    masks = [np.append(rng.random(n - 1) < 0.5, True) for n in lengths]
    return Documents.from_pairs(
        (range(a, a + n), mask) for a, n, mask in zip(first, lengths, masks, strict=True)
    )


def batches_of(documents, shape=(2, 4), **changes):
    return packed_batches(documents, batch_shape=shape, **{**OPTIONS, "prefetch": False, **changes})


def found_documents(batches):
    """(tokens, weights) of each document in the rows, in their order; checks the rows on the way."""
    found = []
    for batch in batches:
        rows = {name: values.reshape(-1, values.shape[-1]) for name, values in batch.items()}
        for number in range(len(rows["tokens"])):
            row = {name: values[number] for name, values in rows.items()}
            segment_ids = row["segment_ids"]
            count = int(segment_ids.max())
            filled = int((segment_ids > 0).sum())
            # Contiguous, from 1, padding last.
            assert np.all(np.diff(segment_ids[:filled]) >= 0) and np.all(segment_ids[filled:] == 0)
            for name in ("tokens", "targets", "weights", "positions"):
                assert not row[name][filled:].any(), name
            for segment in range(1, count + 1):
                here = segment_ids == segment
                tokens, targets = row["tokens"][here], row["targets"][here]
                assert row["positions"][here].tolist() == list(range(len(tokens)))
                assert targets[:-1].tolist() == tokens[1:].tolist()
                found.append(((tokens[0], *targets.tolist()), tuple(row["weights"][here])))
    return found


def expected_documents(documents):
    return [(tuple(tokens.tolist()), tuple(mask[1:].astype(np.float32))) for tokens, mask in documents]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_document_appears_once_an_epoch(packing, epochs):
    documents = make_documents(700)
    found = found_documents(batches_of(documents, packing=packing, epochs=epochs))
    assert sorted(found) == sorted(expected_documents(documents) * epochs)


def test_shapes_and_types():
    batch = next(iter(batches_of(make_documents(100), shape=(3, 2))))
    types = {name: (values.dtype.name, values.shape) for name, values in batch.items()}
    whole = (3, 2, MAX_LENGTH)
    assert types == {
        "tokens": ("int32", whole),
        "targets": ("int32", whole),
        "weights": ("float32", whole),
        "segment_ids": ("int32", whole),
        "positions": ("int32", whole),
    }


def test_segments_are_bounded():
    documents = make_documents(500, longest=5)
    most = {batch["segment_ids"].max() for batch in batches_of(documents)}
    assert most == {OPTIONS["max_segments"]}
    assert {batch["segment_ids"].max() for batch in batches_of(documents, packing=False)} == {1}


def test_last_batch_is_filled_with_empty_rows():
    documents = make_documents(5)
    (batch,) = list(batches_of(documents, shape=(2, 4), packing=False))
    used = batch["segment_ids"].reshape(8, -1).max(-1)
    assert sorted(used) == [0, 0, 0, 1, 1, 1, 1, 1]


@pytest.mark.slow
def test_order_is_seeded_and_another_in_each_epoch():
    documents = make_documents(300)
    by_seed = [found_documents(batches_of(documents, seed=seed)) for seed in (3, 3, 4)]
    assert by_seed[0] == by_seed[1] != by_seed[2]
    # One document a row, and one row a bin: the rows' order shows the documents'.
    two = found_documents(batches_of(documents, packing=False, epochs=2))
    assert two[:300] != two[300:]
    assert two[:300] != expected_documents(documents)
    in_order = found_documents(batches_of(documents, packing=False, shuffle=False))
    assert in_order == expected_documents(documents)


def test_no_document_starts_at_the_end_of_another_row():
    documents = Documents.from_pairs([(range(1, 66), [True] * 65)] * 3)
    batch = next(iter(batches_of(documents, shape=(1, 3))))
    assert batch["tokens"][0].tolist() == [list(range(1, 65))] * 3
    assert batch["targets"][0].tolist() == [list(range(2, 66))] * 3


def test_endless():
    documents = make_documents(300)
    batches = iter(batches_of(documents, epochs=None))
    found = [found_documents([next(batches)]) for _ in range(30)]
    assert sum(map(len, found)) > 3 * len(documents)


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("packing", [True, False])
def test_resumes_exactly(packing, prefetch):
    documents = make_documents(400)
    # About 50 groups of bins would be 64 rows each: the batches of 6 rows end within, at and across them.
    dataset = batches_of(documents, shape=(2, 3), packing=packing, epochs=4, prefetch=prefetch)
    whole, states = [], []
    batches = iter(dataset)
    states.append(json.dumps(batches.get_state()))
    for batch in batches:
        whole.append(batch)
        states.append(json.dumps(batches.get_state()))
    batches.close()
    assert len(whole) > 40
    for position in (0, 1, 7, 10, 11, 21, len(whole) // 2, len(whole) - 1, len(whole)):
        resumed = iter(dataset)
        if position % 2:
            next(resumed)
        resumed.set_state(json.loads(states[position]))
        assert json.dumps(resumed.get_state()) == states[position]
        rest = [next(resumed) for _ in whole[position : position + 12]]
        for got, expected in zip(rest, whole[position:], strict=False):
            for name in expected:
                np.testing.assert_array_equal(got[name], expected[name])
        if position + 12 > len(whole):
            with pytest.raises(StopIteration):
                next(resumed)
        resumed.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"packing": False}, {"epochs": 3}, {"shuffle": False}, {"max_segments": 2}]
)
@pytest.mark.parametrize("count", [1, 30, 1500])
def test_stats_are_those_of_the_rows(count, changes):
    documents = make_documents(count, seed=count)
    stats = packing_stats(documents, **{**OPTIONS, **changes})
    batches = list(batches_of(documents, **changes))
    segment_ids = np.concatenate([batch["segment_ids"].reshape(-1, MAX_LENGTH) for batch in batches])
    assert stats.rows == (segment_ids.max(-1) > 0).sum()
    assert stats.documents == segment_ids.max(-1).sum()
    assert stats.tokens == (segment_ids > 0).sum()
    assert stats.target_tokens == sum(batch["weights"].sum() for batch in batches)
    assert stats.fill_rate == stats.tokens / (stats.rows * MAX_LENGTH)
    assert len(batches) == -(-stats.rows // 8)


def test_stats_of_some_rows():
    documents = make_documents(2000)
    stats = packing_stats(documents, **{**OPTIONS, "epochs": None}, max_rows=100)
    assert 100 <= stats.rows < 200
    with pytest.raises(ValueError, match="max_rows"):
        packing_stats(documents, **{**OPTIONS, "epochs": None})


def test_packing_fills_rows():
    stats = packing_stats(make_documents(5000), **{**OPTIONS, "max_segments": 64})
    assert stats.fill_rate > 0.95


def test_is_a_grain_pipeline():
    assert isinstance(batches_of(make_documents(3)), grain.IterDataset)
