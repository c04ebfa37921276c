import multiprocessing
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from samplewise.loaders import SAMPLE_ID, collate_with_ids, ids_of, with_ids
from support import Everything


class Dicts(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"x": torch.tensor(float(index)), "name": str(index)}


class Batched(Dataset):
    """Answers with a list of items, or with a whole batch."""

    def __init__(self, as_list):
        self.as_list, self.calls = as_list, 0

    def __len__(self):
        return 6

    def __getitem__(self, index):
        raise AssertionError("__getitems__ must be used")

    def __getitems__(self, indices):
        self.calls += 1
        if self.as_list:
            return [float(i) for i in indices]
        return {"x": torch.tensor(indices) * 2.0}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def keep(batch):
    return batch


def padded(items):
    return torch.nn.utils.rnn.pad_sequence(items, batch_first=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_pairs(workers):
    data = TensorDataset(torch.arange(6) * 10, torch.arange(6) * 100)
    for ids, (x, y) in DataLoader(with_ids(data), batch_size=4, num_workers=workers):
        assert ids.dtype == torch.int64
        assert torch.equal(x, ids * 10)
        assert torch.equal(y, ids * 100)


def test_dicts_get_a_key():
    batch = next(iter(DataLoader(with_ids(Dicts()), batch_size=3)))
    assert batch[SAMPLE_ID].tolist() == [0, 1, 2]
    assert batch["x"].tolist() == [0, 1, 2]
    assert ids_of(batch) is batch[SAMPLE_ID]


def test_getitems_is_passed_through():
    data = Batched(as_list=True)
    ids, x = next(iter(DataLoader(with_ids(data), batch_size=6)))
    assert ids.tolist() == x.tolist() == [0, 1, 2, 3, 4, 5]
    assert data.calls == 1
    assert not hasattr(with_ids(Dicts()), "__getitems__")


def test_a_whole_batch_from_getitems():
    loader = DataLoader(with_ids(Batched(as_list=False)), batch_size=4, collate_fn=collate_with_ids(keep))
    batch = list(loader)[1]
    assert batch[SAMPLE_ID].tolist() == [4, 5]
    assert batch["x"].tolist() == [8, 10]


@pytest.mark.parametrize("workers", [0, 2])
def test_without_a_collate(workers):
    """Whole batches stay as they are, items go through the default collate."""
    for data in (Batched(as_list=False), Dicts()):
        loader = DataLoader(with_ids(data), batch_size=4, num_workers=workers, collate_fn=collate_with_ids())
        batch = list(loader)[1]
        assert batch[SAMPLE_ID].tolist() == [4, 5]
        assert batch["x"].tolist() == ([8, 10] if isinstance(data, Batched) else [4, 5])
    ids, x = next(iter(DataLoader(with_ids(Batched(as_list=True)), batch_size=3, collate_fn=collate_with_ids(None))))
    assert (ids.dtype, ids.tolist(), x.tolist()) == (torch.int64, [0, 1, 2], [0, 1, 2])


def test_custom_collate_sees_bare_items():
    data = [torch.ones(n) for n in (1, 3, 2)]
    ids, x = next(iter(DataLoader(with_ids(data), batch_size=3, collate_fn=collate_with_ids(padded))))
    assert ids.tolist() == [0, 1, 2]
    assert x.shape == (3, 3)
    batch = next(iter(DataLoader(with_ids(Dicts()), batch_size=2, collate_fn=collate_with_ids(default_collate))))
    assert batch["name"] == ["0", "1"]
    assert ids_of(batch).tolist() == [0, 1]


def test_subsets_carry_their_own_rows():
    subset = Subset(TensorDataset(torch.arange(10)), [7, 3])
    ids, (x,) = next(iter(DataLoader(with_ids(subset), batch_size=2)))
    assert ids.tolist() == [0, 1]
    assert x.tolist() == [7, 3]


@pytest.mark.parametrize("data", [Dicts(), Batched(as_list=True), Batched(as_list=False)])
def test_t23_pickle(data):
    twin = pickle.loads(pickle.dumps(with_ids(data)))
    assert len(twin) == 6
    assert type(twin.dataset) is type(data)
    for collate in (keep, None):
        assert pickle.loads(pickle.dumps(collate_with_ids(collate))).collate is collate


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_t23_spawned_workers(method):
    sampler = Everything(6)
    loader = DataLoader(
        with_ids(Dicts()),
        batch_size=2,
        sampler=sampler,
        num_workers=1,
        multiprocessing_context=multiprocessing.get_context(method),
        persistent_workers=True,
        collate_fn=collate_with_ids(default_collate),
    )
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert [i for batch in loader for i in batch[SAMPLE_ID].tolist()] == list(sampler)


@pytest.mark.parametrize("data", [Stream(), object()])
def test_streams_have_no_rows(data):
    with pytest.raises(TypeError, match="map-style"):
        with_ids(data)


def test_mistakes():
    with pytest.raises(TypeError, match="wrap it once"):
        with_ids(with_ids([1]))
    with pytest.raises(TypeError, match=r"collate_with_ids\(3\): a collate function is needed, or None"):
        collate_with_ids(3)
    with pytest.raises(KeyError, match="with_ids"):
        collate_with_ids(keep)([{"x": 1}])
    for items in ([1, 2], [(torch.ones(1), 2)], [(1, 2, 3)]):
        with pytest.raises(TypeError, match="with_ids"):
            collate_with_ids(keep)(items)


class Named(Batched):
    """Its batches have ids of their own."""

    def __getitems__(self, indices):
        return {SAMPLE_ID: torch.tensor(indices) + 70}


@pytest.mark.parametrize("collate", [None, keep])
def test_a_key_of_the_same_name_is_refused(collate):
    message = "with_ids: {} has a key 'sample_id' of its own; give that column another name"
    with pytest.raises(ValueError, match=message.format("item 0")):
        with_ids([{SAMPLE_ID: 77}])[0]
    loader = DataLoader(with_ids(Named(as_list=False)), batch_size=4, collate_fn=collate_with_ids(collate))
    with pytest.raises(ValueError, match=message.format("the batch")):
        next(iter(loader))


def test_a_batch_that_the_data_set_keeps_is_not_written_into():
    data, batch = Batched(as_list=False), {"x": torch.zeros(6)}
    data.__class__ = type("Kept", (Batched,), {"__getitems__": lambda self, indices: batch})
    loader = DataLoader(with_ids(data), batch_size=6, collate_fn=collate_with_ids())
    for _ in range(2):
        assert set(next(iter(loader))) == {"x", SAMPLE_ID}
    assert set(batch) == {"x"}


@pytest.mark.parametrize(
    "batch", [torch.arange(3), (torch.ones(3), torch.ones(3)), {"x": 1}, (1, 2, 3), [torch.zeros(2, 2).long(), 1]]
)
def test_no_ids_found(batch):
    assert ids_of(batch) is None
