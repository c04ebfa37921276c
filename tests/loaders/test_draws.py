"""What a RetrievalDataset draws: from which documents, how often each, and from which tables and arrays not."""

import itertools
from collections import Counter

import numpy as np
import pytest
from draws_support import DOCUMENTS, POSITIVES, QUERIES, D, Q, drawn, make, mined, write

from samplewise.loaders import RetrievalDataset, Table
from samplewise.loaders.negatives import corpus_fingerprint
from support import Everything

MANY = 20_000


def chi_square_fits(counts, expected):
    """Whether counts of independent draws are within 5 standard deviations of what the chi-square statistic gives."""
    counts = np.asarray(counts, float)
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.size - 1
    return abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_uniform_over_positives_and_over_the_first_negatives():
    positives = [[1], [2, 3], [4, 5, 6], [7, 8, 9, 10]] * (MANY // 4)
    table = mined(queries=MANY, documents=1000, width=9)
    dataset = RetrievalDataset(range(MANY), range(1000), positives, table, count=2, depth=5)
    items = dataset.__getitems__(range(MANY))
    for size in (2, 3, 4):
        places = [item["positives"].tolist().index(item["positive_id"]) for item in items[size - 1 :: 4]]
        assert chi_square_fits(np.bincount(places, minlength=size), len(places) / size)
    places = np.array([(item["negative_ids"] - table[i, 0]) % 1000 for i, item in enumerate(items)])
    pairs = Counter(map(tuple, places.tolist()))
    assert set(pairs) == set(itertools.permutations(range(5), 2))  # never twice the same, none beyond the depth
    assert chi_square_fits(list(pairs.values()), MANY / 20)


def test_uniform_over_all_documents_that_are_no_positives():
    """Each ordered pair of the 5 others is equally likely, whatever the positives."""
    for positives in ([0], [6], [2, 3], [5, 0, 3]):
        others = sorted({*range(7)} - {*positives})
        dataset = RetrievalDataset(range(MANY), range(7), [positives] * MANY, count=2)
        pairs = Counter(tuple(negatives) for _, negatives in drawn(dataset, range(MANY)))
        assert set(pairs) == set(itertools.permutations(others, 2))
        assert chi_square_fits(list(pairs.values()), MANY / len(pairs))


@pytest.mark.parametrize("positives", [[[0, 1, 2, 3, 4, 6]], [[3]]])
def test_all_that_there_are(positives):
    others = sorted({*range(7)} - {*positives[0]})
    dataset = RetrievalDataset(["q"], range(7), positives, count=len(others))
    assert sorted(drawn(dataset, [0])[0][1]) == others


def test_the_whole_row_when_count_is_its_depth():
    for _, negatives in drawn(make(np.tile(np.arange(30, 36), (Q, 1)), count=4, depth=4)):
        assert sorted(negatives) == [30, 31, 32, 33]


def test_padding_that_repeats_is_never_twice_in_an_item():
    row = [30, 31, 32, 30, 31, 30]
    dataset = make(np.tile(row, (Q, 1)), count=3)
    for epoch in range(20):
        dataset.set_epoch(epoch)
        assert all(sorted(negatives) == [30, 31, 32] for _, negatives in drawn(dataset))
        assert drawn(dataset, [5]) == [drawn(dataset)[5]]
    with pytest.raises(ValueError, match=r"count=4\): the negatives of query 0 are 3 different documents only"):
        drawn(make(np.tile(row, (Q, 1)), count=4))


# --- tables -----------------------------------------------------------------------------------------------------------


def test_documents_that_stand_equally_often_are_equally_likely_where_others_repeat():
    queries = 40_000
    row = [30, 30, 30, 30, 31, 32]
    dataset = RetrievalDataset(range(queries), range(40), np.zeros(queries, int), np.tile(row, (queries, 1)), count=2)
    ids = np.stack([item["negative_ids"] for item in dataset.__getitems__(range(queries))])
    counts = np.bincount(ids.ravel(), minlength=40)[[31, 32]]
    # equal means, and each count's standard deviation is below sqrt(queries) / 2
    assert abs(counts[0] - counts[1]) < 4 * np.sqrt(queries)
    assert (ids[:, 0] != ids[:, 1]).all()


def test_a_table_that_is_written_later_and_anew(tmp_path):
    table = Table(tmp_path)
    dataset = make(table, count=2)
    with pytest.raises(RuntimeError, match="nothing has been written yet"):
        dataset[0]
    for shift in (0, 10):
        write(table, mined(shift))
        assert drawn(dataset) == drawn(make(mined(shift), count=2))
    table.restore(1)
    assert drawn(dataset) == drawn(make(mined(), count=2))


def test_a_table_of_other_data_is_refused(tmp_path):
    own, other = corpus_fingerprint(QUERIES, DOCUMENTS), corpus_fingerprint(QUERIES, ["changed", *DOCUMENTS[1:]])
    make(write(Table(tmp_path / "own", fingerprint=own), mined()))
    make(write(Table(tmp_path / "named", fingerprint="a name of the user's"), mined()))
    table = write(Table(tmp_path / "other", fingerprint=other), mined())
    with pytest.raises(ValueError, match=rf"version 1: mined for data with the fingerprint '{other}'.*'{own}'"):
        make(table)
    late = make(Table(tmp_path / "late"))
    write(Table(tmp_path / "late", fingerprint=other), mined())
    with pytest.raises(ValueError, match="fingerprint"):
        late[0]


# --- mistakes ---------------------------------------------------------------------------------------------------------

OUTSIDE = mined()
OUTSIDE[[2, 5], 3] = D, -1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": -1}, ValueError, "count"),
        ({"count": 1.5}, TypeError, "count"),
        ({"count": 39}, ValueError, r"count=39\): fewer of the 40 documents.*queries 1, 2, 4, 5, 7 and 3 more; lower"),
        ({"depth": 5}, ValueError, r"depth=5\): depth is of mined negatives; give negatives="),
        ({"negatives": mined(), "depth": 0}, ValueError, "depth"),
        ({"negatives": mined(), "depth": 7}, ValueError, "depth=7, but rows have 6 negatives"),
        ({"negatives": mined(), "count": 7}, ValueError, "count=7 cannot come from 6"),
        ({"negatives": mined(), "count": 4, "depth": 3}, ValueError, "count=4 cannot come from 3"),
        ({"negatives": mined()[1:]}, ValueError, r"must be \(12, K\), one row a query, not \(11, 6\)"),
        ({"negatives": mined()[:, 0]}, ValueError, r"must be \(12, K\)"),
        ({"negatives": mined()[:, :0]}, ValueError, r"must be \(12, K\)"),
        ({"negatives": mined().astype(float)}, TypeError, "must be integers, rows of the documents, not float64"),
        ({"negatives": [[1, 2], [3]] * 6}, ValueError, "rows must be equally long"),
        ({"negatives": "some/folder"}, TypeError, r"a path is no table; give Table\('some/folder'\)"),
        ({"negatives": OUTSIDE}, ValueError, "those of queries 2, 5 hold others; pad short rows"),
        ({"sampler": [1, 2]}, TypeError, r"sampler=list\): a PlannedSampler"),
        ({"sampler": Everything(5)}, ValueError, "plans for 5 samples, but there are 12 queries"),
        ({"seed": -1}, ValueError, "seed"),
        ({"queries": "text"}, TypeError, r"queries=str\)"),
        ({"queries": {"a": 1}}, TypeError, r"queries=dict\)"),
        ({"documents": iter(DOCUMENTS)}, TypeError, r"documents=list_iterator\): documents must have len"),
        ({"documents": []}, ValueError, "there are no documents"),
        ({"queries": [], "positives": []}, ValueError, "there are no queries"),
    ],
)
def test_bad_construction(options, error, message):
    arguments = {"queries": QUERIES, "documents": DOCUMENTS, "positives": POSITIVES, **options}
    with pytest.raises(error, match=message):
        RetrievalDataset(**arguments)


@pytest.mark.parametrize(
    ("arrays", "meta", "error", "message"),
    [
        ({"scores": mined()}, {}, ValueError, "no array 'negatives', but scores"),
        ({"negatives": mined()[1:]}, {}, ValueError, r"version 1: negatives must be \(12, K\)"),
        ({"negatives": mined()}, {"documents": 41}, ValueError, "mined from 41 documents, here are 40"),
        ({"negatives": mined()[:, :1]}, {}, ValueError, "count=2 cannot come from 1"),
        ({"negatives": mined().astype(np.float32)}, {}, TypeError, "must be integers"),
    ],
)
def test_bad_tables_are_refused_at_once_or_when_they_appear(tmp_path, arrays, meta, error, message):
    table = Table(tmp_path)
    early = make(table, count=2)
    with table.writing({name: (array.shape, array.dtype) for name, array in arrays.items()}, meta=meta) as out:
        for name, array in arrays.items():
            out[name][:] = array
    for read in (lambda: make(table, count=2), lambda: early[0]):
        with pytest.raises(error, match=message):
            read()


def test_every_new_version_is_checked(tmp_path):
    table = write(Table(tmp_path), mined())
    dataset = make(table, count=2)
    assert len(drawn(dataset)) == Q
    write(table, mined(), documents=41)
    with pytest.raises(ValueError, match="version 2: mined from 41 documents"):
        drawn(dataset)


def test_rows_of_a_table_that_are_no_documents(tmp_path):
    dataset = make(write(Table(tmp_path), OUTSIDE), count=6)
    assert len(drawn(dataset, [0, 1])) == 2
    with pytest.raises(ValueError, match=r"rows of the 40 documents, but query 5 has .*-1.*; mine them anew"):
        drawn(dataset, [0, 5])
