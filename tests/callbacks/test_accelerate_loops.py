"""Plain loops with accelerate, on one rank and on two."""

import os
import re
import time
from collections import Counter

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from samplewise.callbacks.huggingface import attach
from samplewise.loaders import with_ids
from samplewise.loaders.streams import KeyIndex, keep
from support import Everything, HardHalf, loss_of, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*'set_vital' is deprecated")
SIZE, BATCH, EPOCHS = 53, 4, 3


class Rows:
    """Item i is a dict."""

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return {"x": torch.tensor([float(index), 1.0])}


def forget_accelerate():
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.fixture(autouse=True)
def _one_accelerator_a_test():
    forget_accelerate()
    yield
    forget_accelerate()


def prepared(sampler=None, *, workers=0, attached=True, accelerator=None, data=None, **settings):
    """An accelerator, its model, optimizer and loader, and the sampler."""
    accelerator = accelerator or Accelerator(cpu=True, **settings)
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.5)
    own = {} if data is not None else {"sampler": HardHalf(SIZE) if sampler is None else sampler}
    loader = DataLoader(with_ids(Rows()) if data is None else data, batch_size=BATCH, num_workers=workers, **own)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    return accelerator, model, optimizer, loader, attach(accelerator, loader) if attached else own.get("sampler")


def train(parts, *, epochs=EPOCHS, stop=None, move="sampler"):
    """The loop; gives the ids of each batch by epoch, and stops after ``stop`` batches in all."""
    accelerator, model, optimizer, loader, sampler = parts
    seen, plans, left = {}, {}, stop
    for epoch in range(sampler.epoch, epochs):
        if move is not None:
            {"sampler": sampler, "loader": loader}[move].set_epoch(epoch)
        for batch in loader:
            plans.setdefault(sampler.epoch, sampler.current_plan.ids.tolist())
            ids = batch["sample_id"]
            losses = loss_of(ids, sampler.step) + 0 * model(batch["x"]).squeeze(1)
            accelerator.backward(sampler.observe(ids, losses))
            optimizer.step()
            optimizer.zero_grad()
            seen.setdefault(sampler.epoch, []).append(ids.tolist())
            if left is not None and (left := left - 1) == 0:
                return seen, plans
    return seen, plans


def flat(batches):
    return [i for batch in batches for i in batch]


@pytest.mark.parametrize("move", ["sampler", "loader", None])
@pytest.mark.parametrize("workers", [0, 2])
def test_one_rank(workers, move):
    parts = prepared(workers=workers)
    seen, plans = train(parts, move=move)
    assert list(seen) == list(range(EPOCHS))
    for epoch, plan in plans.items():
        assert sorted(flat(seen[epoch])) == sorted(plan)
    assert len({len(plan) for plan in plans.values()}) > 1


@pytest.mark.parametrize("stop", [5, 14, 20])
def test_resume_through_save_state(tmp_path, stop):
    """In the middle of the first epoch, at its end, and in the second one."""
    parts = prepared()
    whole, _ = train(parts)
    ledger = parts[4].ledger.records.clone()
    forget_accelerate()
    parts = prepared()
    train(parts, stop=stop)
    parts[0].save_state(tmp_path)
    forget_accelerate()
    parts = prepared()
    parts[0].load_state(tmp_path)
    seen, _ = train(parts)
    assert flat(seen.values()) == flat(whole.values())[stop:]
    assert torch.equal(parts[4].ledger.records.view(torch.int32), ledger.view(torch.int32))


def two_ranks(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    mp.set_start_method("fork", force=True)  # of the loaders' workers: spawned ones import everything once more
    results = {}
    for name, settings in {
        "dealt out": {},
        "workers": {"workers": 2},
        "split": {"dataloader_config": DataLoaderConfiguration(split_batches=True)},
        "dispatched": {"dataloader_config": DataLoaderConfiguration(dispatch_batches=True)},
    }.items():
        forget_accelerate()
        parts = prepared(**settings)
        seen, plans = train(parts)
        parts[4].sync()
        results[name] = seen, plans, parts[4].ledger.records.clone()
    forget_accelerate()
    parts = prepared()
    train(parts, stop=9)
    parts[0].save_state(folder)
    forget_accelerate()
    parts = prepared()
    parts[0].load_state(folder)
    seen, _ = train(parts)
    parts[4].sync()
    results["resumed"] = seen, parts[4].ledger.records.clone()
    results["refused"] = {name: refusal(**settings) for name, settings in NOT_ATTACHED.items()}
    forget_accelerate()
    sampler, accelerator = Everything(SIZE), Accelerator(cpu=True)
    accelerator.prepare(DataLoader(with_ids(Rows()), batch_size=BATCH))  # another loader does not matter
    seen = [batch["sample_id"].tolist() for batch in DataLoader(with_ids(Rows()), batch_size=BATCH, sampler=sampler)]
    for ids in map(torch.tensor, seen):
        sampler.observe(ids, loss_of(ids))
    results["left alone"] = sampler.consumed
    return results


NOT_ATTACHED = {
    "dealt out": {},
    "dispatched": {"dataloader_config": DataLoaderConfiguration(dispatch_batches=True)},
    "a stream": {"stream": True, "dataloader_config": DataLoaderConfiguration(dispatch_batches=False)},
    "a stream from the first rank": {"stream": True},
}


def refusal(*, stream=False, **settings):
    """What is said of a prepared loader that is not attached, and after how many batches."""
    forget_accelerate()
    accelerator = Accelerator(cpu=True, **settings)
    sampler = Everything(SIZE)
    if stream:
        stage = keep(sampler, KeyIndex.from_keys(range(SIZE)), key="row")
        loader = DataLoader(stage.wrap([{"row": row} for row in range(SIZE)]), batch_size=BATCH)
    else:
        loader = DataLoader(with_ids(Rows()), batch_size=BATCH, sampler=sampler)
    for number, batch in enumerate(accelerator.prepare(loader)):
        ids = batch["sample_id"]
        try:
            sampler.observe(ids, loss_of(ids))
        except RuntimeError as error:
            return number, str(error)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(2, two_ranks, tmp_path_factory.mktemp("state"))


@pytest.mark.parametrize("name", ["dealt out", "workers", "split", "dispatched"])
def test_the_union_over_ranks_is_the_plan(ranks, name):
    assert torch.equal(*(rank[name][2].view(torch.int32) for rank in ranks))
    for epoch, plan in ranks[0][name][1].items():
        assert ranks[1][name][1][epoch] == plan
        served = Counter(flat(ranks[0][name][0][epoch]) + flat(ranks[1][name][0][epoch]))
        assert set(served) == set(plan)
        assert sum(served.values()) - len(plan) < 2 * BATCH
    assert len(ranks[0][name][1]) == EPOCHS


def test_every_loss_is_on_its_own_row(ranks):
    records = ranks[0]["dealt out"][2]
    last = {}
    steps = zip(*(flat(rank["dealt out"][0].values()) for rank in ranks), strict=True)
    for number, pair in enumerate(steps):
        batches = [torch.tensor(batch) for batch in pair]
        for ids in batches:
            last |= dict(zip(ids.tolist(), loss_of(ids, number).tolist(), strict=True))
    assert records[:, 0].tolist() == [last[row] for row in range(SIZE)]


def test_resume_on_two_ranks(ranks):
    """Exact, also in last batches, which are filled up."""
    for rank in ranks:
        whole, resumed = rank["dealt out"], rank["resumed"]
        done = 9 - len(whole[0][0])
        assert 0 < done < len(whole[0][1]) - 2
        assert resumed[0] == {1: whole[0][1][done:], 2: whole[0][2]}
        assert torch.equal(resumed[1].view(torch.int32), whole[2].view(torch.int32))


def test_processes_that_the_accelerator_does_not_know_of(monkeypatch):
    """As ``Accelerator()`` does not where there is no GPU."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"2 processes were launched.*make it Accelerator\(cpu=True\)"):
        prepared(accelerator=accelerator)


@pytest.mark.parametrize("name", NOT_ATTACHED)
def test_a_loader_that_is_prepared_but_not_attached(ranks, name):
    """T12."""
    fix = (
        r"Leave its loader out of accelerator\.prepare" if "stream" in name else r"call .*attach\(accelerator, loader\)"
    )
    for rank in ranks:
        batches, message = rank["refused"][name]
        assert batches == 0
        assert re.search(fix, message)


def test_a_loader_that_is_not_prepared(ranks):
    assert [rank["left alone"] for rank in ranks] == [SIZE + 1] * 2


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(SIZE)


def test_what_is_refused():
    accelerator = Accelerator(cpu=True)
    plain = DataLoader(with_ids(Rows()), batch_size=BATCH, sampler=Everything(SIZE))
    shuffled = accelerator.prepare(DataLoader(Rows(), batch_size=BATCH, shuffle=True))
    stream = accelerator.prepare(DataLoader(Stream(), batch_size=BATCH))
    other = accelerator.prepare(DataLoader(with_ids(Rows()), batch_size=BATCH, sampler=Everything(SIZE - 1)))
    for loader, error, message in (
        (Everything(SIZE), TypeError, "loader must be what accelerator.prepare"),
        (plain, RuntimeError, "is not prepared yet"),
        (shuffled, RuntimeError, "the loader has a .*RandomSampler; pass DataLoader"),
        (stream, ValueError, r"Leave its loader out of accelerator.prepare\(...\)"),
        (other, ValueError, "plans for 52 samples, the data set has 53"),
    ):
        with pytest.raises(error, match=message):
            attach(accelerator, loader)
    loader = prepared(accelerator=accelerator)[3]
    with pytest.raises(RuntimeError, match="attached already"):
        attach(accelerator, loader)


def test_a_stateful_loader_is_refused():
    with pytest.raises(ValueError, match="use_stateful_dataloader=True"):
        prepared(dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True))


def test_batches_that_are_skipped_twice(tmp_path):
    parts = prepared()
    train(parts, stop=5)
    parts[0].save_state(tmp_path)
    forget_accelerate()
    accelerator, model, optimizer, loader, sampler = prepared()
    accelerator.load_state(tmp_path)
    skipping = accelerator.skip_first_batches(loader, 5)
    with pytest.raises(RuntimeError, match=r"leave out accelerator\.skip_first_batches"):
        train((accelerator, model, optimizer, skipping, sampler), move=None)


class SlowFirst(Rows):
    """The first of two workers is slow, so that the batches of the second one overtake its own."""

    def __getitem__(self, index):
        if torch.utils.data.get_worker_info().id == 0:
            time.sleep(0.05)
        return super().__getitem__(index)


def test_batches_that_overtake_each_other():
    accelerator, sampler = Accelerator(cpu=True), Everything(SIZE)
    data = with_ids(SlowFirst())
    loader = accelerator.prepare(DataLoader(data, BATCH, sampler=sampler, num_workers=2, in_order=False))
    attach(accelerator, loader)
    seen = []
    for batch in loader:
        sampler.observe(batch["sample_id"], loss_of(batch["sample_id"]))
        seen += batch["sample_id"].tolist()
    assert seen != sampler.order().ids(0, SIZE).tolist()
    assert sorted(seen) == list(range(SIZE))


def test_a_new_loader_with_the_same_sampler(tmp_path):
    """As accelerate.utils.find_executable_batch_size makes one, where the memory did not suffice."""
    sampler, accelerator = HardHalf(SIZE), Accelerator(cpu=True)
    train(prepared(sampler, accelerator=accelerator), stop=2)
    with pytest.raises(RuntimeError, match=r"another loader with the same sampler; .*accelerator\.free_memory\(\)"):
        prepared(sampler, accelerator=accelerator)
    accelerator.free_memory()
    parts = prepared(sampler, accelerator=accelerator)
    with pytest.warns(UserWarning, match="left early and begins again"):
        seen, plans = train(parts, move=None, epochs=1)
    assert sorted(flat(seen[0])) == sorted(plans[0])
    assert len(accelerator._custom_objects) == 1
