"""RetrievalDataset, its collate and the masks: what is drawn, from which version of the table, and what is refused."""

import copy
import itertools
import pickle

import datasets
import numpy as np
import pytest
import torch
from draws_support import DOCUMENTS, POSITIVES, QUERIES, Q, drawn, make, mined, write
from torch.utils.data import DataLoader

from samplewise.loaders import (
    CollateRetrieval,
    Ragged,
    RetrievalDataset,
    Table,
    collate_with_ids,
    known_positives,
    with_ids,
)
from samplewise.loaders.negatives import check_positives, corpus_fingerprint
from support import Everything

# --- items ------------------------------------------------------------------------------------------------------------


class Batched:
    """Knows how many accesses it answered."""

    def __init__(self, items):
        self.items, self.calls = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        raise AssertionError("__getitems__ must be used")

    def __getitems__(self, rows):
        self.calls.append(rows)
        return [self.items[row] for row in rows]


def hf(texts):
    return datasets.Dataset.from_dict({"text": texts})


def column(texts):
    return hf(texts)["text"]


def tensor(texts):
    return torch.tensor([[number(text), 0] for text in texts])


def dicts(texts):
    return [{"text": text} for text in texts]


def number(item):
    """The row that an item of any kind was made from."""
    if isinstance(item, torch.Tensor):
        return int(item[0])
    return int((item["text"] if isinstance(item, dict) else item).split()[1])


@pytest.mark.parametrize("kind", [list, tuple, np.array, Batched, hf, column, tensor, dicts])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_items(kind, count):
    dataset = RetrievalDataset(kind(QUERIES), kind(DOCUMENTS), POSITIVES, mined(), count=count)
    items = dataset.__getitems__(range(Q))
    assert len(dataset) == len(items) == Q
    for i, item in enumerate(items):
        assert set(item) == {"query", "positive", "negatives", "positive_id", "negative_ids", "positives"}
        assert type(item["positive_id"]) is int
        assert item["negative_ids"].dtype == item["positives"].dtype == np.int64
        assert item["negative_ids"].shape == (count,)
        assert number(item["query"]) == i
        assert number(item["positive"]) == item["positive_id"]
        assert [number(document) for document in item["negatives"]] == item["negative_ids"].tolist()
        assert item["positives"].tolist() == POSITIVES[i]
        assert item["positive_id"] in POSITIVES[i]
        assert len({*item["negative_ids"].tolist()} & {*mined()[i].tolist()}) == count


def test_items_carry_their_ids():
    assert with_ids(make(mined()))[7]["sample_id"] == 7
    assert [item["sample_id"] for item in with_ids(make(mined())).__getitems__([3, 1])] == [3, 1]


def test_one_access_to_the_documents_and_one_snapshot_a_batch(tmp_path):
    queries, documents = Batched(QUERIES), Batched(DOCUMENTS)
    table = write(Table(tmp_path), mined())
    dataset = RetrievalDataset(queries, documents, POSITIVES, table, count=2)
    snapshots, snapshot = [], table.snapshot
    table.snapshot = lambda: snapshots.append(1) or snapshot()
    items = dataset.__getitems__([4, 0, 9])
    assert queries.calls == [[4, 0, 9]]
    ids = [item["positive_id"] for item in items] + [i for item in items for i in item["negative_ids"].tolist()]
    assert documents.calls == [ids]
    assert snapshots == [1]
    assert dataset.__getitems__([]) == []


def test_one_access_to_a_column_of_an_hf_data_set(monkeypatch):
    documents, calls, getitem = column(DOCUMENTS), [], datasets.Dataset.__getitem__
    dataset = RetrievalDataset(QUERIES, documents, POSITIVES, mined(), count=2)
    monkeypatch.setattr(datasets.Dataset, "__getitem__", lambda self, key: calls.append(key) or getitem(self, key))
    dataset.__getitems__([4, 0, 9])
    assert [len(rows) for rows in calls] == [9]


# --- what the draws depend on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", [None, mined()], ids=["random", "mined"])
def test_an_item_is_the_same_in_any_batch(negatives):
    dataset = make(negatives, count=3, seed=5)
    together = drawn(dataset)
    assert [drawn(dataset, [i])[0] for i in range(Q)] == together
    assert drawn(dataset, reversed(range(Q))) == together[::-1]
    assert drawn(dataset, [4, 4, 2]) == [together[4], together[4], together[2]]
    for i in range(Q):
        item = dataset[i]
        assert (item["positive_id"], item["negative_ids"].tolist()) == together[i]
    for row in (np.int64(4), torch.tensor(4)):
        assert dataset[row]["negative_ids"].tolist() == together[4][1]
    assert drawn(make(negatives, count=3, seed=5)) == together


def test_epochs_and_seeds_differ():
    """With depth 6, two draws of one negative agree with probability 1/6: 200 queries, binomial."""
    data = RetrievalDataset(["q"] * 200, DOCUMENTS, [[0]] * 200, mined(queries=200), seed=0)
    draws = {}
    for seed, epoch in itertools.product((0, 1), (0, 1, 7)):
        data.seed = seed
        data.set_epoch(epoch)
        draws[seed, epoch] = [negatives[0] for _, negatives in drawn(data, range(200))]
    for one, other in itertools.combinations(draws.values(), 2):
        same = np.mean(np.array(one) == np.array(other))
        assert abs(same - 1 / 6) < 5 * np.sqrt(1 / 6 * 5 / 6 / 200)


def test_the_epoch_is_the_samplers():
    sampler = Everything(Q)
    follows, own = make(mined(), sampler=sampler, count=2), make(mined(), count=2)
    for epoch in (0, 3, 1):
        sampler.set_epoch(epoch)
        follows.set_epoch(99)  # frameworks call it, the sampler knows better
        own.set_epoch(epoch)
        assert drawn(follows) == drawn(own)
    with pytest.raises(ValueError, match=r"set_epoch\(epoch=-1\)"):
        own.set_epoch(-1)


def test_draws_do_not_touch_global_generators():
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    drawn(make(mined(), count=2)), drawn(make(count=2))
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before  # noqa: NPY002


# --- the table's versions ---------------------------------------------------------------------------------------------


class Bare:
    """Collates to a pair, as ``collate_with_ids`` makes of what is no dict."""

    def __call__(self, items):
        return [(item["positive_id"], item["negative_ids"].tolist(), item["negatives"]) for item in items]


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_t23_t24_persistent_workers_follow_epochs_and_versions(tmp_path, method, workers):
    """Two epochs with a new version between them, against the data set in this process."""
    table = write(Table(tmp_path), mined())
    sampler = Everything(Q)
    dataset = make(table, count=2, sampler=sampler)
    loader = DataLoader(
        with_ids(dataset),
        batch_size=4,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context=method,
        collate_fn=collate_with_ids(Bare()),
    )
    for epoch in range(2):
        sampler.set_epoch(epoch)
        write(table, mined(10 * epoch))
        alone = make(mined(10 * epoch), count=2)
        alone.set_epoch(epoch)
        expected = drawn(alone)
        for ids, batch in loader:
            assert [item[:2] for item in batch] == [expected[i] for i in ids.tolist()]
            assert all(documents == [DOCUMENTS[i] for i in ids] for _, ids, documents in batch)


def test_t24_a_copied_data_set_reaches_its_forked_workers_too():
    dataset = copy.deepcopy(make(mined(), count=2))
    loader = DataLoader(
        with_ids(dataset),
        batch_size=4,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="fork",
        collate_fn=collate_with_ids(Bare()),
    )
    for epoch in (0, 5):
        dataset.set_epoch(epoch)
        expected = drawn(dataset)
        assert [item[:2] for _, batch in loader for item in batch] == expected


def test_pickled_it_is_small(tmp_path):
    table = write(Table(tmp_path), mined(queries=2000, width=500))
    dataset = RetrievalDataset(range(2000), DOCUMENTS, np.zeros((2000, 1), np.int64), table)
    before = drawn(dataset, range(2000))
    data = pickle.dumps(dataset)
    assert len(data) < 100_000  # 1 million negatives stay in the table
    assert drawn(pickle.loads(data), range(2000)) == before


# --- fingerprints -----------------------------------------------------------------------------------------------------


ITEMS = ["text", b"bytes", 3, 2.5, None, True, {"b": 1, "a": [1, "x"]}, ("p", 2), np.arange(3), torch.ones(2)]


def test_a_fingerprint_is_the_same_in_every_process():
    assert corpus_fingerprint(ITEMS, DOCUMENTS) == "corpus-sha256:d970a08ea9a7b74342b96cc5c94633af"


def test_a_fingerprint_tells_data_apart():
    variants = [(QUERIES, DOCUMENTS), (DOCUMENTS, QUERIES), (QUERIES[1:], DOCUMENTS), (QUERIES, DOCUMENTS[:-1])]
    for i in range(len(ITEMS)):
        variants.append(([*ITEMS[:i], "other", *ITEMS[i + 1 :]], DOCUMENTS))
    variants += [(ITEMS, DOCUMENTS), ([["ab", "c"]], DOCUMENTS), ([["a", "bc"]], DOCUMENTS)]
    assert len({corpus_fingerprint(*variant) for variant in variants}) == len(variants)
    assert corpus_fingerprint(hf(QUERIES), column(DOCUMENTS)) == corpus_fingerprint(dicts(QUERIES), DOCUMENTS)


def test_a_fingerprint_of_many_items_reads_a_few():
    class Counting(list):
        read = 0

        def __getitem__(self, row):
            self.read += 1
            return super().__getitem__(row)

    items = Counting(range(100_000))
    corpus_fingerprint(items, [0])
    assert items.read == 64


# --- positives --------------------------------------------------------------------------------------------------------


def test_check_positives_keeps_the_order_and_leaves_repeats_out():
    rows = check_positives("mine", [[3, 1], [2, 2, 0, 2], [1]], 3, 4)
    assert [row.tolist() for row in rows] == [[3, 1], [2, 0], [1]]
    ragged = Ragged.from_lists([[3, 1], [2]])
    assert check_positives("mine", ragged, 2, 4) is ragged


@pytest.mark.parametrize(
    ("positives", "error", "message"),
    [
        ([[1]] * 11, ValueError, r"one list a query, but there are 11 for 12 queries"),
        ([[1], []] * 6, ValueError, r"queries 1, 3, 5, 7, 9 and 1 more have none; leave them out"),
        ([[1]] * 10 + [[40], [2, -1]], ValueError, r"queries 10, 11 are not all in \[0, 40\): query 10 has \[40\]"),
        ([["a"]] * 12, TypeError, r"row 0 must hold integers"),
    ],
)
def test_bad_positives(positives, error, message):
    with pytest.raises(error, match=rf"RetrievalDataset\(positives=...\): .*{message}"):
        RetrievalDataset(QUERIES, DOCUMENTS, positives)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indices", [[-1], [0, 12]])
def test_rows_that_are_no_queries(indices):
    with pytest.raises(IndexError, match=r"rows in \[0, 12\)"):
        make(mined()).__getitems__(indices)
    with pytest.raises(IndexError):
        make(mined())[indices[-1]]


def test_a_getitems_that_gives_no_list():
    documents = Batched(DOCUMENTS)
    documents.__class__ = type("Whole", (Batched,), {"__getitems__": lambda self, rows: {"x": rows}})
    with pytest.raises(TypeError, match=r"documents=Whole\): its __getitems__ must give a list"):
        RetrievalDataset(QUERIES, documents, POSITIVES)[0]


# --- collate and masks ------------------------------------------------------------------------------------------------


def upper(texts):
    return [text.upper() for text in texts]


@pytest.mark.parametrize("workers", [0, 2])
def test_collate(workers):
    dataset = make(mined(), count=2)
    collate = collate_with_ids(CollateRetrieval(upper, list))
    loader = DataLoader(with_ids(dataset), batch_size=5, num_workers=workers, collate_fn=collate)
    for start, batch in zip((0, 5, 10), loader, strict=True):
        rows = list(range(start, min(start + 5, Q)))
        ids = drawn(dataset, rows)
        negatives = [i for _, row in ids for i in row]
        assert batch["sample_id"].tolist() == rows
        assert batch["queries"] == [QUERIES[i].upper() for i in rows]
        assert batch["documents"] == [DOCUMENTS[i] for i in [*(positive for positive, _ in ids), *negatives]]
        assert batch["positive_ids"].tolist() == [positive for positive, _ in ids]
        assert batch["negative_ids"].tolist() == [row for _, row in ids]
        width = max(len(POSITIVES[i]) for i in rows)
        assert batch["positives"].tolist() == [POSITIVES[i] + [-1] * (width - len(POSITIVES[i])) for i in rows]
        for name in ("positive_ids", "negative_ids", "positives"):
            assert batch[name].dtype == torch.int64


def test_collate_without_negatives():
    batch = CollateRetrieval(list)(make(count=0).__getitems__([2, 3]))
    assert batch["negative_ids"].shape == (2, 0)
    assert len(batch["documents"]) == 2


@pytest.mark.parametrize("arguments", [(None,), (list, 3)])
def test_collate_needs_functions(arguments):
    with pytest.raises(TypeError, match=r"CollateRetrieval\(tokenize"):
        CollateRetrieval(*arguments)


def test_known_positives():
    positives = torch.tensor([[3, 5], [5, -1], [-1, -1]])
    ids = torch.tensor([5, -1, 3, 5, 0])
    expected = [[1, 0, 1, 1, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0]]
    assert known_positives(positives, ids).int().tolist() == expected
    assert known_positives(positives, ids[:0]).shape == (3, 0)


@pytest.mark.parametrize("seed", range(5))
def test_known_positives_agree_with_the_definition(seed):
    generator = torch.Generator().manual_seed(seed)
    positives = torch.randint(-1, 30, (7, 4), generator=generator)
    ids = torch.randint(-1, 30, (50,), generator=generator)
    expected = ((positives[:, :, None] == ids) & (positives[:, :, None] >= 0)).any(dim=1)
    assert torch.equal(known_positives(positives, ids), expected)
    assert torch.equal(known_positives(positives.T.contiguous().T, ids), expected)


@pytest.mark.parametrize(("positives", "ids"), [((3,), (2,)), ((3, 2), (2, 1))])
def test_known_positives_of_another_shape(positives, ids):
    with pytest.raises(ValueError, match=r"positives must be \(B, P\)"):
        known_positives(torch.zeros(positives).long(), torch.zeros(ids).long())
