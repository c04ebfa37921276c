"""``check_sampler``: the contract that every sampler of this library, or of a third party, keeps."""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader

from samplewise.loaders.ids import with_ids
from samplewise.loaders.sampler import PlannedSampler

Factory = Callable[[], PlannedSampler]


def check_sampler(factory: Factory, *, epochs: int = 3) -> None:
    """Raise AssertionError, with what went wrong, unless the sampler keeps the contract.

    Checked, over several epochs with recorded losses between them: the length is true, and equal on all ranks; the
    union over ranks is the plan; iterators are fresh and free of side effects; the order depends on (seed, epoch,
    ledger) only, not on workers; a resume at any cursor is exact, in the ledger too; states survive ``torch.save`` with
    ``weights_only`` and the iterator's survives JSON; the global generators are untouched; ids are rows; the sampler
    can be pickled.

    Args:
        factory: makes a new sampler, the same each time, of at most a few hundred samples.
        epochs: how many epochs to go through.
    """
    for check in (
        _check_iterators,  # first: a sampler that resets in iter() would keep the later ones from ending
        _check_lengths_and_ids,
        _check_ranks,
        _check_determinism,
        _check_global_generators,
        _check_workers,
        _check_resume,
        _check_pickle,
    ):
        check(factory, epochs)


def train_epoch(sampler: PlannedSampler, *, batch_size: int = 7, stop: int | None = None) -> list[int]:
    """Go through the rest of the current epoch like a training loop, and give the ids.

    Each sample's loss is a fixed function of its id and the step, so that equal histories give equal ledgers.

    Args:
        sampler: the sampler to iterate and to report to.
        batch_size: samples a batch.
        stop: batches after which to stop in the middle.
    """
    taken: list[int] = []
    for batch in islice(BatchSampler(sampler, batch_size, drop_last=False), stop):
        ids = torch.tensor(batch)
        losses = 1 + torch.sin(ids.float() * 12.9898 + sampler.step)
        sampler.observe(ids, losses.requires_grad_())
        taken += batch
    return taken


def _check_lengths_and_ids(factory: Factory, epochs: int) -> None:
    sampler = factory()
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        ids = list(sampler)
        _expect(len(ids) == len(sampler), f"epoch {epoch}: len() is {len(sampler)}, but {len(ids)} ids came")
        _expect(all(type(i) is int for i in ids), f"epoch {epoch}: ids must be Python integers")
        _expect(all(0 <= i < sampler.size for i in ids), f"epoch {epoch}: ids outside [0, {sampler.size})")
        _expect(sorted(ids) == sorted(_planned(sampler)), f"epoch {epoch}: the ids are not those of the plan")
        sampler.set_epoch(epoch)
        _expect(list(sampler) == ids, f"epoch {epoch}: set_epoch() of the same epoch changed the order")
        train_epoch(sampler)


def _check_iterators(factory: Factory, epochs: int) -> None:
    sampler = factory()
    whole = list(sampler)
    iterator = iter(sampler)
    _expect(iter(iterator) is iterator, "iter(iterator) must be the iterator itself")
    first = [*islice(iterator, 2), *islice(iterator, 3)]
    _expect(first == whole[:5], "islice() twice over one iterator must go on where it was")
    outer, inner = iter(sampler), iter(sampler)
    both = [i for pair in zip(outer, inner, strict=True) for i in pair]
    _expect(both == [i for i in whole for _ in range(2)], "two iterators must not share their position")
    _expect(list(sampler) == whole, "iterating must not change what the next iterator gives")
    for epoch in range(epochs):  # a loop that forgets set_epoch()
        _expect(sampler.epoch == epoch, f"after {epoch} whole epochs the sampler stands at epoch {sampler.epoch}")
        train_epoch(sampler)
        iter(sampler)


def _check_ranks(factory: Factory, epochs: int) -> None:
    for world in (2, 3):
        ranks = [factory() for _ in range(world)]
        for rank, sampler in enumerate(ranks):
            sampler.num_replicas, sampler.rank = world, rank
        for epoch in range(epochs):
            for sampler in ranks:
                sampler.set_epoch(epoch)
            shares = [list(sampler) for sampler in ranks]
            lengths = {len(share) for share in shares} | {len(sampler) for sampler in ranks}
            _expect(len(lengths) == 1, f"epoch {epoch}: the ranks' lengths differ: {lengths}")
            planned = _planned(ranks[0])
            served = [i for group in zip(*shares, strict=True) for i in group]
            if ranks[0].drop_last:
                _expect(not _surplus(served, planned), f"epoch {epoch}: ids that are not planned were served")
            else:
                _expect(not _surplus(planned, served), f"epoch {epoch}: planned ids were not served")
                _expect(len(served) - len(planned) < world, f"epoch {epoch}: more filled up than one id a rank")
            _observe_alike(ranks)


def _check_determinism(factory: Factory, epochs: int) -> None:
    one, other = factory(), factory()
    for epoch in range(epochs):
        for sampler in (one, other):
            sampler.set_epoch(epoch)
        _expect(train_epoch(one) == train_epoch(other), f"epoch {epoch}: two equal samplers gave different orders")
    if one.shuffle and len(one) > 10:  # short orders are equal by chance
        one, other = factory(), factory()
        other.set_epoch(1)
        _expect(list(one) != list(other), "epochs 0 and 1 have the same order")


def _check_global_generators(factory: Factory, epochs: int) -> None:
    before = _global_states()
    sampler = factory()
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        train_epoch(sampler)
    _expect(_global_states() == before, "the global generator of python, numpy or torch was used or changed")


def _check_workers(factory: Factory, epochs: int) -> None:
    del epochs
    sampler = factory()
    loader = DataLoader(with_ids(range(sampler.size)), batch_size=4, sampler=sampler, num_workers=2)
    served = torch.cat([ids for ids, _ in loader]).tolist()
    _expect(served == list(sampler), "two workers gave another order than none")


def _check_resume(factory: Factory, epochs: int) -> None:
    reference = factory()
    stop = 0
    for epoch in range(epochs):
        reference.set_epoch(epoch)
        batches = -(-len(reference) // 7)
        for stop in sorted({0, 1, batches // 2, batches - 1, batches}):
            _check_resume_at(factory, epoch, stop)
        train_epoch(reference)


def _check_resume_at(factory: Factory, epoch: int, stop: int) -> None:
    where = f"resumed in epoch {epoch} after {stop} batches"
    original = factory()
    for past in range(epoch):
        original.set_epoch(past)
        train_epoch(original)
    original.set_epoch(epoch)
    train_epoch(original, stop=stop)
    resumed = factory()
    resumed.load_state_dict(_through_file(original.state_dict()))
    if stop * 7 >= len(original):
        _expect((resumed.epoch, resumed.consumed) == (epoch + 1, 0), f"{where}: an epoch's end is the next one's start")
        original.set_epoch(epoch + 1)
    else:
        rest_of_epoch = list(original)[original.consumed :]
        iterator, twin = iter(resumed), iter(resumed)
        next(iterator)
        twin.load_state_dict(json.loads(json.dumps(iterator.state_dict())))  # type: ignore[attr-defined]
        _expect(list(twin) == rest_of_epoch[1:], f"{where}: an iterator's state does not survive JSON")
        resumed = factory()
        resumed.load_state_dict(_through_file(original.state_dict()))
        _expect(train_epoch(resumed) == rest_of_epoch, f"{where}: the rest of the epoch differs")
        _replay(original, rest_of_epoch)
        for sampler in (original, resumed):
            sampler.set_epoch(epoch + 1)
    _expect(torch.equal(_bytes(original), _bytes(resumed)), f"{where}: the ledger differs")
    _expect(list(original) == list(resumed), f"{where}: the next epoch differs")


def _check_pickle(factory: Factory, epochs: int) -> None:
    sampler = factory()
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        train_epoch(sampler, stop=2 if epoch == epochs - 1 else None)
    twins = pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler)
    order = list(sampler)
    for twin in twins:
        _expect(list(twin) == order, "a pickled or copied sampler gives another order")
        _expect(
            (twin.epoch, twin.consumed, twin.step) == (sampler.epoch, sampler.consumed, sampler.step),
            "a pickled or copied sampler stands elsewhere",
        )
        _expect(torch.equal(_bytes(twin), _bytes(sampler)), "a pickled or copied sampler has another ledger")


def _expect(condition: bool, otherwise: str) -> None:
    """An assertion that ``python -O`` keeps."""
    if not condition:
        raise AssertionError(otherwise)


def _planned(sampler: PlannedSampler) -> list[int]:
    plan = sampler.current_plan
    return [int(i) for i in plan.ids]


def _surplus(some: list[int], others: list[int]) -> bool:
    """Whether ``some`` has an id more often than ``others``."""
    size = max(*some, *others) + 1
    return bool((np.bincount(some, minlength=size) > np.bincount(others, minlength=size)).any())


def _observe_alike(ranks: list[PlannedSampler]) -> None:
    """Record the same losses on all simulated ranks, as a sync would."""
    ids = torch.from_numpy(np.unique(_planned(ranks[0])))
    for sampler in ranks:
        sampler.observe(ids, (1 + torch.sin(ids.float())).requires_grad_())


def _replay(sampler: PlannedSampler, ids: list[int]) -> None:
    """Observe ``ids`` in batches, as :func:`train_epoch` does."""
    for begin in range(0, len(ids), 7):
        batch = torch.tensor(ids[begin : begin + 7])
        sampler.observe(batch, (1 + torch.sin(batch.float() * 12.9898 + sampler.step)).requires_grad_())


def _through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def _bytes(sampler: PlannedSampler) -> torch.Tensor:
    return sampler.ledger.records.cpu().view(torch.int32)


def _global_states() -> tuple[Any, ...]:
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002 (only looked at)
    return random.getstate(), pickle.dumps(legacy), torch.get_rng_state().numpy().tobytes()
