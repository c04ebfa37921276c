import copy
import os
import pickle
from collections import Counter
from multiprocessing import context, get_context
from types import SimpleNamespace

import numpy as np
import pytest
import streams_support
import torch
from streams_support import Numbers, epoch_of, keys_of, loss_of_key, observe, web, write_shards, write_tar
from torch.utils.data import DataLoader

from samplewise.loaders import Plan, streams
from samplewise.loaders.key_index import KeyIndex
from samplewise.loaders.resumable import Resumable
from samplewise.loaders.streams import Keep, keep, plan_counts
from samplewise.plugins import RS2, InfoBatch, SeTa
from support import Everything, HardHalf, Lengths, Returns, run_ranks

SHARDS, EACH = 4, 30
SIZE = SHARDS * EACH
KEYS = keys_of(SHARDS, EACH)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), SHARDS, EACH)


@pytest.fixture
def decoded():
    streams_support.decoded.clear()
    return streams_support.decoded


def planned(sampler):
    """How often the epoch has each row."""
    return Counter(np.asarray(sampler.current_plan.ids).tolist())


def has_losses_of_its_keys(sampler, keys=KEYS):
    """Whether each recorded loss lies on the row of its key; which rows have one."""
    losses, seen = sampler.ledger.column("loss_last"), sampler.ledger.seen
    expected = torch.tensor([loss_of_key(key) for key in keys])
    assert torch.equal(losses[seen], expected[seen])
    return set(seen.nonzero().flatten().tolist())


REPEATED = Plan(np.array([3, 3, 119, 40, 3, 7]), np.array([1, 1, 2, 0.5, 1, 4], dtype=np.float32))
SAMPLERS = {
    "everything": lambda: Everything(SIZE),
    "losses and weights": lambda: HardHalf(SIZE),
    "infobatch": lambda: InfoBatch(SIZE, epochs=4),
    "seta": lambda: SeTa(SIZE, epochs=4, prune=0.2, groups=3, window=0.5),
    **{
        mode: lambda mode=mode: RS2(SIZE, ratio=0.4, mode=mode)
        for mode in ("without_replacement", "with_replacement", "hash")
    },
    "stratified": lambda: RS2(SIZE, ratio=0.4, mode="stratified", labels=np.arange(SIZE) % 3),
    "repeats and weights": lambda: Returns(SIZE, REPEATED),
    "a backward range": lambda: Returns(SIZE, Plan(range(100, 3, -7))),
    "lengths": lambda: Lengths(SIZE, lengths=[5, 100, 1]),
    "epochs of a fixed length": lambda: RS2(SIZE, ratio=0.3, epoch_length=50),
}


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_what_passes_is_the_plan_and_losses_find_their_rows(paths, make, decoded):
    sampler = make()
    pipeline = web(paths, keep(sampler, KeyIndex.from_keys(KEYS)))
    seen = set()
    for epoch in range(4):
        passed = epoch_of(sampler, DataLoader(pipeline, batch_size=16), epoch)
        assert Counter(row for row, _ in passed) == planned(sampler)
        assert all(KEYS[row] == key for row, key in passed)
        assert decoded == [key for _, key in passed]  # what is left out is never decoded
        decoded.clear()
        seen |= {row for row, _ in passed}
    assert has_losses_of_its_keys(sampler) == seen


def test_the_plans_weights_are_applied(paths):
    sampler = Returns(SIZE, REPEATED)
    pipeline = web(paths, keep(sampler, KeyIndex.from_keys(KEYS)))
    for ids, keys, _ in DataLoader(pipeline, batch_size=6):
        assert ids.tolist() == [3, 3, 3, 7, 40, 119]
        weights = torch.tensor([1, 1, 1, 4, 0.5, 2])
        losses = torch.tensor([loss_of_key(key) for key in keys])
        assert observe(sampler, ids, keys).item() == pytest.approx((weights * losses).mean().item())


def test_samples_are_copied_not_changed():
    sampler = Returns(3, Plan(np.array([2, 2])))
    samples = [{"__key__": number, "text": "t"} for number in range(3)]
    passed = list(keep(sampler, KeyIndex.from_keys(range(3)))(samples))
    assert passed == [{"__key__": 2, "text": "t", "sample_id": 2}] * 2
    assert passed[0] is not passed[1]
    assert all("sample_id" not in sample for sample in samples)


# --- workers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "persistent"), [("fork", False), ("fork", True), ("spawn", True)], ids=lambda value: str(value)
)
def test_workers_see_each_epochs_plan_and_share_new_keys(paths, method, persistent):
    index = KeyIndex(capacity=150)
    sampler = HardHalf(150)
    stage = keep(sampler, index)
    loader = DataLoader(
        web(paths, stage), batch_size=8, num_workers=2, persistent_workers=persistent, multiprocessing_context=method
    )
    everything = epoch_of(sampler, loader, 0)
    rows = {key: row for row, key in everything}
    assert len(everything) == len(index) == SIZE
    assert sorted(rows.values()) == list(range(SIZE))
    keys = [key for _, key in sorted(everything)]
    assert index.rows(keys).tolist() == list(range(SIZE))
    lengths = []
    for epoch in (1, 2, 3):
        if epoch == 2:
            sampler.set_epoch(1)
            next(iter(loader))  # a pass that is left at once
        passed = epoch_of(sampler, loader, epoch)
        assert Counter(row for row, _ in passed) == Counter({row: 1 for row in planned(sampler) if row < SIZE})
        lengths.append(len(passed))
        assert all(rows[key] == row for row, key in passed)
    assert max(lengths) < SIZE
    assert has_losses_of_its_keys(sampler, keys + ["9/9"] * 30) == set(range(SIZE))


def test_two_stages_of_one_sampler_get_the_same_plans(paths):
    sampler = Lengths(SIZE, lengths=[10, 3])
    index = KeyIndex.from_keys(KEYS)
    pipelines = [web(paths, keep(sampler, index)) for _ in range(2)]
    for epoch, length in enumerate([10, 3]):
        sampler.set_epoch(epoch)
        assert [len(list(pipeline)) for pipeline in pipelines] == [length] * 2


def test_workers_get_neither_sampler_nor_ledger():
    sampler = Everything(5)
    stage = keep(sampler, KeyIndex.from_keys(range(5)))
    reached, left = set(), [stage]
    while left:
        value = left.pop()
        if id(value) not in reached and hasattr(value, "__dict__"):
            reached.add(id(value))
            left += vars(value).values()
    assert {id(stage), id(sampler.shared_epoch)} <= reached
    assert not {id(sampler), id(sampler.ledger), id(sampler.on_plan)} & reached
    with pytest.raises(TypeError, match="shares memory"):
        pickle.dumps(stage)
    assert copy.deepcopy([stage])[0] is stage


def test_epoch_is_the_samplers(paths):
    sampler = Everything(5)
    stage = keep(sampler, KeyIndex.from_keys(range(5)))
    sampler.set_epoch(3)
    assert stage.epoch == 3


# --- other streams ----------------------------------------------------------------------------------------------------


def hugging_face(stage):
    """A pipeline of (id, text) rows, in 4 shards."""
    import datasets  # slow to import, also in spawned processes

    rows = {"id": [f"k{number}" for number in range(40)], "text": [str(number) for number in range(40)]}
    dataset = datasets.Dataset.from_dict(rows).to_iterable_dataset(num_shards=4)
    return dataset.map(stage.batch, batched=True, batch_size=7)


@pytest.mark.parametrize("workers", [0, 2])
def test_hugging_faces_iterable_dataset(workers):
    sampler = Lengths(40, lengths=[40, 13, 1])
    dataset = hugging_face(keep(sampler, KeyIndex.from_keys(f"k{number}" for number in range(40)), key="id"))
    loader = DataLoader(dataset, batch_size=4, num_workers=workers, persistent_workers=workers > 0)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(loader)
        rows = [row for batch in batches for row in batch["sample_id"].tolist()]
        assert sorted(rows) == list(range([40, 13, 1][epoch]))
        assert [text for batch in batches for text in batch["text"]] == [str(row) for row in rows]


def test_hugging_faces_images_are_decoded_behind_the_stage(monkeypatch):
    image = pytest.importorskip("PIL.Image")
    import datasets

    rows = {"id": list(range(9)), "image": [image.new("L", (2, 2), 20 * number) for number in range(9)]}
    features = datasets.Features({"id": datasets.Value("int64"), "image": datasets.Image()})
    dataset = datasets.Dataset.from_dict(rows, features=features).to_iterable_dataset()
    stage = keep(Returns(9, Plan(np.array([7, 2]))), KeyIndex.from_keys(range(9)), key="id")
    features = datasets.Features({**dataset.features, "sample_id": datasets.Value("int64")})
    decode, count = datasets.Image.decode_example, []
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *args, **kw: (count.append(1), decode(*args, **kw))[1])
    samples = list(dataset.decode(False).map(stage.batch, batched=True, features=features).decode(True))
    assert [(sample["sample_id"], sample["image"].getpixel((0, 0))) for sample in samples] == [(2, 40), (7, 140)]
    assert len(count) == 2


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_batches_of_columns(kind):
    sampler = Returns(6, Plan(np.array([5, 0, 5, 2])))
    stage = keep(sampler, KeyIndex(capacity=6), key="n")
    stage.batch({"n": kind([10, 11]), "x": ["a", "b"]})
    columns = stage.batch({"n": kind([12, 10, 13, 14, 15]), "x": kind([1, 2, 3, 4, 5])})
    assert {name: [int(value) for value in column] for name, column in columns.items()} == {
        "n": [12, 10, 15, 15],
        "x": [1, 2, 5, 5],
        "sample_id": [2, 0, 5, 5],
    }
    assert type(columns["x"]) is type(kind([1]))
    assert stage.batch({"n": kind([13]), "x": kind([1])})["sample_id"] == []


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_iterable_dataset(workers):
    sampler = Lengths(20, lengths=[20, 7])
    stage = keep(sampler, KeyIndex.from_keys(range(20)), key="key")
    loader = DataLoader(stage.wrap(Numbers(20)), batch_size=3, num_workers=workers)
    for epoch, length in enumerate([20, 7]):
        sampler.set_epoch(epoch)
        pairs = [torch.stack([batch["sample_id"], batch["value"]], dim=1) for batch in loader]
        passed = dict(torch.cat(pairs).tolist())
        assert passed == {row: 10 * row for row in range(length)}


def test_a_list_is_for_one_worker(monkeypatch):
    stage = keep(Everything(3), KeyIndex.from_keys(["a", "b", "c"]), key="k")
    samples = stage.wrap([{"k": "a"}, {"k": "b"}])
    for workers in (0, 1):
        batches = list(DataLoader(samples, batch_size=None, num_workers=workers))
        assert [sample["sample_id"] for sample in batches] == [0, 1]
    monkeypatch.setattr(streams, "get_worker_info", lambda: SimpleNamespace(id=0, num_workers=2))
    with pytest.raises(TypeError, match=r"wrap\(list\): each of the 2 workers would pass on all samples"):
        list(samples)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        ([{"key": "a"}], KeyError, r"keep\(key='__key__'\): a sample has no '__key__', but 'key'"),
        ([("a", 1)], TypeError, "must be a dict with its key in it, not a tuple"),
        ([{"__key__": 1.5}], TypeError, "a key must be a str, bytes or int, not float"),
        ([{"__key__": "a", "sample_id": 3}], ValueError, "have a 'sample_id' already"),
        ([{"__key__": "z"}], ValueError, "the key 'z' is not in the index, which is complete"),
    ],
)
def test_samples_that_do_not_fit(samples, error, message):
    stage = keep(Everything(2), KeyIndex.from_keys(["a", "b"], capacity=5))
    with pytest.raises(error, match=message):
        list(stage(samples))
    if isinstance(samples[0], dict):
        with pytest.raises(error, match=message):
            stage.batch({name: [value] for name, value in samples[0].items()})


class Shares(Everything):
    plans_shares = True


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda index: keep(index, Everything(2)), TypeError, r"keep\(KeyIndex, Everything\): it takes a sampler and"),
        (lambda index: keep(Shares(2, sharded=True), index), ValueError, r"keep\(Shares\(sharded=True\), KeyIndex\)"),
        (lambda index: keep(Everything(3), index), ValueError, r"size 3 must be.*len\(index\), 2,.*capacity, 5"),
        (
            lambda index: keep(Returns(2, Plan(np.zeros(65_536, int))), index),
            ValueError,
            "Returns: .*row 0 65536 times",
        ),
        (lambda index: Resumable([], index), TypeError, r"Resumable\(\.\.\., KeyIndex\): the stage"),
    ],
)
def test_stages_that_do_not_fit(make, error, message):
    with pytest.raises(error, match=message):
        make(KeyIndex.from_keys(["a", "b"], capacity=5))


def test_an_index_that_is_full_says_so():
    stage = keep(Everything(2), KeyIndex(capacity=2))
    samples = ({"__key__": key} for key in "abc")
    with pytest.raises(RuntimeError, match=r"KeyIndex\(capacity=2\): it is full"):
        list(stage(samples))


def test_a_stage_is_for_one_size():
    index = KeyIndex.from_keys(["a"], capacity=3)
    sampler = Everything(1)
    stage = keep(sampler, index)
    index.add(["b"])
    with pytest.raises(ValueError, match=r"row 1 is beyond the sampler's 1 samples"):
        list(stage([{"__key__": "b"}]))
    with pytest.raises(ValueError, match=r"row 1 is beyond the sampler's 1 samples"):
        stage.batch({"__key__": ["b"]})
    sampler.grow(2)
    with pytest.raises(ValueError, match=r"Everything.grow: the sampler has 2 samples now.*keep\(sampler, index\)"):
        sampler.set_epoch(1)
    assert len(list(keep(sampler, index)([{"__key__": "b"}]))) == 1


def test_somebody_elses_on_plan_is_not_replaced():
    sampler = Everything(1)
    sampler.on_plan = print
    with pytest.raises(ValueError, match="on_plan calls something else"):
        keep(sampler, KeyIndex.from_keys(["a"]))


def test_keys_that_begin_anew_in_each_shard(tmp_path):
    shards = [write_tar(tmp_path / f"{name}.tar", ["a.txt", "b.txt"]) for name in "xy"]
    pipeline = streams_support.wds.WebDataset(shards, shardshuffle=False).compose(
        keep(Everything(10), KeyIndex(capacity=10))
    )
    with pytest.raises(ValueError, match=r"the key 'a' in .*y.tar is also that of a sample in another shard"):
        list(pipeline)


def test_keys_of_two_workers_shards():
    stage = keep(Everything(10), KeyIndex(capacity=10))
    worker = get_context("fork").Process(target=list, args=(stage([{"__key__": "a", "__url__": "x.tar"}]),))
    worker.start()
    worker.join()
    with pytest.raises(ValueError, match=r"the key 'a' in y.tar is also that of a sample in another shard"):
        list(stage([{"__key__": "a", "__url__": "y.tar"}]))


def test_shards_may_come_again(paths):
    sampler = Lengths(SIZE, lengths=[5])
    stage = keep(sampler, KeyIndex.from_keys(KEYS))
    assert len(list(web(paths * 2, stage).repeat(2))) == 20


def test_counts_of_plans():
    assert plan_counts(Plan(np.array([2, 0])), 4, "X").tolist() == [1, 0, 1, 0]
    assert plan_counts(Plan(np.array([0, 2, 2])), 4, "X").tolist() == [1, 0, 2, 0]
    assert plan_counts(Plan(range(3, -1, -2)), 4, "X").tolist() == [0, 1, 0, 1]
    assert plan_counts(Plan(range(2, -1, -2)), 4, "X").tolist() == [1, 0, 1, 0]
    assert plan_counts(Plan(range(1, 4)), 4, "X").tolist() == [0, 1, 1, 1]
    assert plan_counts(Plan(np.full(65_535, 1)), 2, "X").tolist() == [0, 65_535]


# --- ranks ------------------------------------------------------------------------------------------------------------

NEW = r"'new' is not in the index, and 2 ranks would give it different rows"


def train_on_ranks(rank, paths):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}  # as torchrun sets them
    return [train_on_rank(rank, paths, own) for own in (False, True)]


def train_on_rank(rank, paths, own):
    index = KeyIndex.from_shards(paths[rank::2] if own else paths)
    index.merge_ranks()
    sampler = HardHalf(len(index), fingerprint=index.fingerprint)
    stage = keep(sampler, index)
    pipeline = web(paths, stage, nodesplitter=streams_support.wds.split_by_node)
    loader = DataLoader(pipeline, batch_size=4, num_workers=2, persistent_workers=True, multiprocessing_context="fork")
    epochs = [(epoch_of(sampler, loader, epoch), planned(sampler)) for epoch in range(3)]
    sampler.sync()
    context.set_spawning_popen(object())
    worker = Keep.__new__(Keep)
    worker.__setstate__(stage.__getstate__())
    context.set_spawning_popen(None)
    with pytest.raises(ValueError, match=NEW):
        list(stage([{"__key__": "new"}]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "world_size", lambda: 1)  # a spawned worker has no process group
        with pytest.raises(ValueError, match=NEW):
            list(worker([{"__key__": "new"}]))
    return epochs, sampler.ledger.records, index.rows(keys_of(8, 10))


def test_ranks_pass_on_the_plan_together(tmp_path):
    keys, expected = keys_of(8, 10), torch.tensor([loss_of_key(key) for key in keys_of(8, 10)])
    results = run_ranks(2, train_on_ranks, write_shards(tmp_path, 8, 10))
    for own, (first, ledger, rows), (second, other, other_rows) in zip([False, True], *results, strict=True):
        assert torch.equal(ledger.view(torch.int32), other.view(torch.int32))
        assert torch.equal(ledger[torch.from_numpy(rows), 0], expected)
        assert rows.tolist() == other_rows.tolist()
        assert sorted(rows.tolist()) == list(range(80))
        assert (rows.tolist() == list(range(80))) == (not own)
        for epoch, ((passed, plan), (others, same)) in enumerate(zip(first, second, strict=True)):
            assert plan == same == Counter(row for row, _ in passed + others)
            assert min(len(passed), len(others)) > 0
            assert all(rows[keys.index(key)] == row for row, key in passed + others)
            assert len(plan) == 80 if epoch == 0 else len(plan) < 80
