import copy
import random

import pytest
import streams_support
import torch
import webdataset as wds
from streams_support import keys_of, observe, web, write_shards
from torchdata.stateful_dataloader import StatefulDataLoader

from samplewise.loaders.key_index import KeyIndex
from samplewise.loaders.resumable import Resumable
from samplewise.loaders.streams import keep
from support import HardHalf, Lengths

SHARDS, EACH = 4, 20
KEYS = keys_of(SHARDS, EACH)
EPOCHS = 3


class Shuffle:
    """A shuffle buffer that depends on the epoch alone."""

    def __init__(self, stage):
        self.stage = stage

    def __call__(self, samples):
        return wds.filters._shuffle(samples, 10, 10, rng=random.Random(self.stage.epoch))


class Training:
    """A run over a stream: each object of it is new, as in a new process."""

    def __init__(self, paths, kind, workers, *, persistent=False):
        self.index = KeyIndex.from_keys(KEYS) if kind != "an index that grows" else KeyIndex(capacity=100)
        self.sampler = HardHalf(self.index.capacity)
        stage, options = keep(self.sampler, self.index), {"batch_size": 4}
        if kind == "shuffled shards":
            pipeline = Resumable(
                wds.DataPipeline(wds.SimpleShardList(paths), Shuffle(stage), *web(paths, stage).pipeline[2:]), stage
            )
        elif kind == "a shuffle buffer":
            pipeline = Resumable(web(paths, stage, Shuffle(stage)), stage)
        elif kind == "an epoch of so many samples":
            pipeline = Resumable(web(paths, stage).with_epoch(30), stage)
        elif kind == "batched by webdataset":
            pipeline, options = Resumable(web(paths, stage).batched(4), stage), {"batch_size": None}
        elif kind == "hugging face":
            import datasets  # slow to import

            rows = {"__key__": KEYS, "txt": KEYS}
            dataset = datasets.Dataset.from_dict(rows).to_iterable_dataset(num_shards=SHARDS)
            pipeline = dataset.map(stage.batch, batched=True, batch_size=6)
        elif kind == "wrapped":
            pipeline = stage.wrap(wds.WebDataset(paths, shardshuffle=False))
        else:
            pipeline = Resumable(web(paths, stage), stage)
        self.loader = StatefulDataLoader(pipeline, num_workers=workers, persistent_workers=persistent, **options)

    def run(self, cut=None):
        """Train to the end: each epoch's batches of (row, key), and the state after ``cut`` batches of epoch 1.

        The cut may also be "last", the last batch, or "end", behind it.
        """
        epochs, state = {}, None
        for epoch in range(self.sampler.epoch, EPOCHS):
            self.sampler.set_epoch(epoch)
            if hasattr(self.loader.dataset, "set_epoch"):
                self.loader.dataset.set_epoch(epoch)  # Hugging Face's goes back to the saved place otherwise
            batches = epochs[epoch] = []
            for batch in self.loader:
                ids, keys = (batch["sample_id"], batch["__key__"]) if isinstance(batch, dict) else batch[:2]
                observe(self.sampler, torch.as_tensor(ids), keys)
                batches.append(list(zip(torch.as_tensor(ids).tolist(), keys, strict=True)))
                if epoch == 1 and cut in (len(batches), "last"):
                    state = self.state()
            if epoch == 1 and cut == "end":
                state = self.state()
        return epochs, state

    def state(self):
        parts = {"sampler": self.sampler, "index": self.index, "loader": self.loader}
        return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})

    def load(self, state):
        self.index.load_state_dict(state["index"])
        self.sampler.load_state_dict(state["sampler"])
        self.loader.load_state_dict(state["loader"])
        return self


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), SHARDS, EACH)


@pytest.mark.parametrize(
    "kind",
    [
        "webdataset",
        "shuffled shards",
        "a shuffle buffer",
        "batched by webdataset",
        "wrapped",
        "hugging face",
        "an index that grows",
    ],
)
@pytest.mark.parametrize(("workers", "cut"), [(0, 1), (0, 6), (2, 3)])
def test_the_rest_is_exactly_the_same(paths, kind, workers, cut):
    whole, state = Training(paths, kind, workers).run(cut)
    assert [len(whole[1]) < len(whole[0]), cut < len(whole[1])] == [True, True]
    rest = Training(paths, kind, workers).load(state).run()[0]
    assert rest == {1: whole[1][cut:], 2: whole[2]}


def test_an_epoch_of_so_many_samples(paths):
    whole, state = Training(paths, "an epoch of so many samples", 0).run(2)
    rest = Training(paths, "an epoch of so many samples", 0).load(state).run()[0]
    assert rest == {1: whole[1][2:], 2: whole[2]}
    assert [sum(map(len, batches)) for batches in whole.values()] == [30] * EPOCHS


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("kind", ["webdataset", "a shuffle buffer"])
def test_resuming_twice_in_one_epoch(paths, workers, persistent, kind):
    whole, state = Training(paths, kind, workers, persistent=persistent).run(3)
    first = Training(paths, kind, workers, persistent=persistent).load(state)
    first.sampler.set_epoch(1)
    batches = []
    for ids, keys, _ in first.loader:
        observe(first.sampler, ids, keys)
        batches.append(list(zip(ids.tolist(), keys, strict=True)))
        if len(batches) == 4:
            break
    state = first.state()
    assert batches == whole[1][3:7]
    second = Training(paths, kind, workers, persistent=persistent).load(state)
    assert second.run()[0] == {1: whole[1][7:], 2: whole[2]}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["webdataset", "wrapped", "hugging face"])
@pytest.mark.parametrize("last", [True, False], ids=["at the last batch", "behind the epoch"])
def test_a_state_of_an_epochs_end_goes_on_with_the_next(paths, kind, workers, last):
    whole, state = Training(paths, kind, workers).run("last" if last else "end")
    rest = Training(paths, kind, workers).load(state).run()[0]
    assert rest.keys() == {2}  # which worker comes first may be another one
    assert sorted(pair for batch in rest[2] for pair in batch) == sorted(pair for batch in whole[2] for pair in batch)


@pytest.mark.parametrize(("kind", "decodes"), [("webdataset", 1), ("a shuffle buffer", 12)])
def test_what_is_passed_over_is_decoded_only_where_it_must(paths, kind, decodes):
    state = Training(paths, kind, 0).run(3)[1]
    resumed = Training(paths, kind, 0).load(state)
    resumed.sampler.set_epoch(1)
    streams_support.decoded.clear()
    next(iter(resumed.loader))
    assert len(streams_support.decoded) == decodes + 4


# --- mistakes ---------------------------------------------------------------------------------------------------------


def pass_at(epoch, length=5):
    """A pass of an epoch of ``length`` samples, its sampler."""
    sampler = Lengths(5, lengths=[length])
    sampler.set_epoch(epoch)
    stage = keep(sampler, KeyIndex.from_keys(range(5)), key="k")
    return iter(stage.wrap([{"k": number} for number in range(5)]))


def state_at(epoch, samples):
    saved = pass_at(epoch)
    for _ in range(samples):
        next(saved)
    return saved.state_dict()


@pytest.mark.parametrize(
    ("samples", "rest"), [(0, [0, 1, 2, 3, 4]), (1, [1, 2, 3, 4]), (4, [4]), (5, [])], ids=lambda value: str(value)
)
def test_a_pass_goes_on(samples, rest):
    resumed = pass_at(3)
    resumed.load_state_dict(state_at(3, samples))
    assert resumed.state_dict() == state_at(3, samples)
    assert [sample["sample_id"] for sample in resumed] == rest
    again = pass_at(3)
    again.load_state_dict(resumed.state_dict())
    assert list(again) == list(resumed) == []


@pytest.mark.parametrize("samples", [2, 5, 7])
def test_a_pass_that_repeats_goes_on(samples):
    stage = keep(Lengths(5, lengths=[3]), KeyIndex.from_keys(range(5)), key="k")
    pipeline = Resumable(wds.DataPipeline([[{"k": number} for number in range(5)]], stage).repeat(3), stage)
    saved, resumed = iter(pipeline), iter(pipeline)
    for _ in range(samples):
        next(saved)
    resumed.load_state_dict(saved.state_dict())
    assert [sample["k"] for sample in resumed] == [0, 1, 2, 0, 1, 2, 0, 1, 2][samples:]


def test_a_pass_that_had_ended_reads_nothing():
    saved, resumed = pass_at(3), pass_at(3, length=1)
    assert len(list(saved)) == 5
    resumed.load_state_dict(saved.state_dict())
    assert list(resumed) == []


def test_in_the_next_epoch_a_pass_begins_anew():
    resumed = pass_at(4)
    resumed.load_state_dict(state_at(3, 2))
    assert len(list(resumed)) == 5


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"version": 2}, "version 2 was saved, this release reads 1"),
        ({"epoch": 1}, r"it is of epoch 1, the sampler is at epoch 3: call sampler.load_state_dict"),
        ({"epoch": 4}, r"it is of epoch 4, the sampler is at epoch 3"),
    ],
)
def test_states_that_do_not_fit(change, error):
    with pytest.raises(ValueError, match=error):
        pass_at(3).load_state_dict({**state_at(3, 2), **change})


@pytest.mark.parametrize("in_step", [True, False])
def test_a_pass_that_has_become_shorter(in_step):
    resumed = pass_at(3, length=3)
    resumed.load_state_dict({**state_at(3, 4), "in_step": in_step})
    with pytest.raises(RuntimeError, match="4 samples had been handed out, but the pass is shorter now"):
        next(resumed)


def test_passes_at_the_same_time_do_not_disturb_each_other():
    stage = keep(Lengths(5, lengths=[5]), KeyIndex.from_keys(range(5)), key="k")
    samples = [{"k": number} for number in range(5)]
    one, two = (iter(stage.wrap(samples)) for _ in range(2))
    two.load_state_dict({**one.state_dict(), "yielded": 2})
    for rows in [(0, 2), (1, 3), (2, 4)]:
        assert (next(one)["sample_id"], next(two)["sample_id"]) == rows
        assert len(list(stage(samples))) == 5  # as a pipeline without an end that resumes
    assert one.state_dict() == {"version": 1, "epoch": 0, "yielded": 3, "in_step": True, "ended": False}
    assert two.state_dict() == {**one.state_dict(), "yielded": 5}
