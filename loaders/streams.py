"""Streams: a sampler's plan for webdataset pipelines, Hugging Face's ``IterableDataset`` and any other iterable.

A stream cannot be asked for row 7, so the plan comes to the samples: :func:`keep` makes a stage that stands before the
decoding, looks each sample's row up by its key and passes on what the current epoch trains on, with its row as
``"sample_id"``. What is left out is read but never decoded. Losses go the usual way, ``sampler.observe(ids, losses)``,
which also applies the plan's weights::

    index = KeyIndex.from_shards(urls)                                       # rows for the samples' keys
    sampler = Method(len(index), fingerprint=index.fingerprint)
    stage = keep(sampler, index)
    pipeline = (
        wds.WebDataset(urls, shardshuffle=False, nodesplitter=wds.split_by_node)
        .compose(stage)
        .shuffle(1000)
        .decode("torchrgb", partial=True)                                    # partial: the row is no bytes
        .to_tuple("sample_id", "jpg;png", "cls")
    )
    loader = DataLoader(pipeline, batch_size=64, num_workers=8, persistent_workers=True)

    for epoch in range(epochs):
        sampler.set_epoch(epoch)                                             # before the loader is iterated
        for ids, images, labels in loader: ...

Hugging Face: ``ds.map(stage.batch, batched=True)``, and ``ds.set_epoch(epoch)`` beside the sampler's, without which a
data set that was resumed begins later epochs where it was saved, too. Where it decodes images or audio, let the stage
stand before that::

    features = Features({**ds.features, "sample_id": Value("int64")})
    ds = ds.decode(False).map(stage.batch, batched=True, features=features).decode(True)

Any other iterable of dicts: ``stage.wrap(iterable)``. To resume in the middle of an epoch: :class:`Resumable` around
the pipeline, in torchdata's ``StatefulDataLoader``; Hugging Face's data sets have states of their own (without a
shuffle buffer they are exact).

What a stream cannot give. A plan's order is not the stream's: shuffle behind the stage, and the more so where a plan
repeats samples, whose copies come one after another. The number of batches of an epoch is not known beforehand, workers
end with batches of their own that are not full, and ranks get unequal numbers of them; where all ranks need the same
number (DDP), limit it, or let the pipeline go on with ``.repeat()`` and ``.with_epoch(n)``, which a worker cannot of
whose shards the plan has nothing. With several ranks the pipeline must divide the shards among them (``nodesplitter``,
``split_dataset_by_node``). A loader does not tell the sampler that an epoch begins: without ``set_epoch`` it stays at
its first plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from multiprocessing import context
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from samplewise.cuda_ext.ranks import world_size
from samplewise.loaders.epoch import SharedEpoch
from samplewise.loaders.guard import StreamWatch
from samplewise.loaders.ids import SAMPLE_ID
from samplewise.loaders.key_index import KeyIndex, shared_zeros
from samplewise.loaders.plan import Plan
from samplewise.loaders.resumable import Resumable, Tally
from samplewise.loaders.sampler import PlannedSampler

MOST_REPEATS = (1 << 16) - 1

Sample = Mapping[Any, Any]


def keep(sampler: PlannedSampler, index: KeyIndex, key: str = "__key__") -> Keep:
    """A stage of a data pipeline that passes on what ``sampler`` plans.

    Each plan is published to the workers when it is made, also to persistent ones; a sampler may have several stages.

    The sampler's size says what becomes of keys that the index does not know:

    - ``len(index)``: the index is complete, and a new key is an error.
    - ``index.capacity``: a worker that meets a new key adds it. The sampler plans rows before they have a key, and its
      ledger has room for them, so the first loss of a new sample is recorded like any other one. The plan decides on
      new samples as on all that are unseen; shares and sizes of plans refer to the capacity, so choose it close to the
      number of samples. Several ranks cannot agree on new rows: there a new key is an error.

    Args:
        sampler: of any method. It plans its current epoch now, where it has not yet.
        index: rows of the samples' keys.
        key: where a sample has its key: a str, bytes or int.

    Raises:
        TypeError: no sampler, or no index.
        ValueError: the sampler's size is neither of the two, its ledger is sharded over the ranks, or a plan has a row
            more than 65,535 times.
    """
    if not isinstance(sampler, PlannedSampler) or not isinstance(index, KeyIndex):
        raise TypeError(
            f"keep({type(sampler).__name__}, {type(index).__name__}): it takes a sampler and a KeyIndex, in this order."
        )
    if sampler.sharded:
        raise ValueError(
            f"keep({type(sampler).__name__}(sharded=True), KeyIndex): a rank would know the plan of its ledger's share "
            f"only, while its shards hold other samples, too; make the sampler with sharded=False."
        )
    if sampler.size not in (len(index), index.capacity):
        raise ValueError(
            f"keep({type(sampler).__name__}, KeyIndex): the sampler's size {sampler.size} must be that of the index: "
            f"len(index), {len(index)}, where it is complete, or index.capacity, {index.capacity}, where keys are "
            f"added as they are met."
        )
    publisher = sampler.on_plan
    if publisher is not None and not isinstance(publisher, _Publisher):
        raise ValueError(
            f"keep({type(sampler).__name__}, KeyIndex): the sampler's on_plan calls something else already."
        )
    if publisher is None or len(publisher.counts) != sampler.size:
        publisher = _Publisher(sampler)
        publisher()
        sampler.on_plan, sampler.watch = publisher, StreamWatch()
    return Keep(index, key, publisher.counts, sampler.shared_epoch, sampler.ledger.distributed)


class _Publisher:
    """Writes a sampler's plan where the workers see it: how often the epoch trains on each row, uint16 (N,)."""

    def __init__(self, sampler: PlannedSampler):
        self.sampler = sampler
        self.counts = shared_zeros((sampler.size,), torch.uint16)

    def __call__(self) -> None:
        name = type(self.sampler).__name__
        if self.sampler.size != len(self.counts):
            raise ValueError(
                f"{name}.grow: the sampler has {self.sampler.size} samples now, its stage was made for "
                f"{len(self.counts)}; make the stage and the loader anew: keep(sampler, index)."
            )
        # One copy, so that a worker in the middle of a pass sees the old count of a row or the new one, nothing else.
        self.counts.numpy()[:] = plan_counts(self.sampler.current_plan, self.sampler.size, name)


def plan_counts(plan: Plan, size: int, name: str) -> NDArray[np.uint16]:
    """How often a plan has each row: uint16 (size,).

    Raises:
        ValueError: more than 65,535 times.
    """
    counts = np.zeros(size, dtype=np.uint16)
    ids = plan.ids
    if isinstance(ids, range):
        ascending = ids if ids.step > 0 else ids[::-1]
        counts[ascending.start : ascending.stop : ascending.step] = 1
    elif (ids[1:] > ids[:-1]).all():
        counts[ids] = 1
    else:
        times = np.bincount(ids, minlength=size)
        if times.max() > MOST_REPEATS:
            row = int(times.argmax())
            raise ValueError(
                f"{name}: its plan has row {row} {times[row]} times; a stream repeats it {MOST_REPEATS} at most."
            )
        counts[:] = times
    return counts


class Keep:
    """What :func:`keep` gives: the stage, which goes to worker processes without the sampler and its ledger."""

    def __init__(self, index: KeyIndex, key: str, counts: Tensor, epoch: SharedEpoch, one_ledger: bool):
        self.index = index
        self.key = key
        self._counts = counts
        self._origins = shared_zeros((len(counts),), torch.uint16)  # of a row: 0, or a hash of its shard
        self._origins_of = shared_zeros((1,), torch.int64)  # index.cleared when they were begun
        self._epoch = epoch
        self._one_ledger = one_ledger  # for all ranks
        self._world = 1
        self._open()

    def _open(self) -> None:
        self._times = self._counts.numpy()
        # A memoryview reads one number in a third of the time that numpy needs.
        self._times_view = memoryview(self._times)  # type: ignore[arg-type]
        self._origins_view = memoryview(self._origins.numpy())  # type: ignore[arg-type]
        self.tally: Tally | None = None

    def __getstate__(self) -> dict[str, Any]:
        if context.get_spawning_popen() is None:
            raise TypeError("keep(...): its stage shares memory, so it can be sent to a DataLoader's workers only.")
        own = {"_times", "_times_view", "_origins_view", "tally"}
        state = {name: value for name, value in self.__dict__.items() if name not in own}
        return {**state, "_world": world_size()}  # which a spawned worker could not find out

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __deepcopy__(self, memo: dict[int, Any]) -> Keep:
        return self  # a copy would never see another plan

    def __repr__(self) -> str:
        return f"keep(..., key={self.key!r})"

    @property
    def epoch(self) -> int:
        """The sampler's current epoch, in worker processes too; for what else in a pipeline goes by it."""
        return self._epoch.value

    # --- what passes --------------------------------------------------------------------------------------------------

    def __call__(self, samples: Iterable[Sample]) -> Iterator[dict[Any, Any]]:
        """Pass on the planned samples, as shallow copies with their row as ``"sample_id"``, as often as planned.

        Raises:
            TypeError: a sample is no dict, or its key no str, bytes or int.
            KeyError: a sample has no key.
            ValueError: a sample has a ``"sample_id"`` of its own, two shards have samples of the same key, or a key is
                new where none can be added.
            RuntimeError: there is no room for a new key.
        """
        tally = self.tally or Tally()
        tally.begun += 1
        if self._origins_of.item() != self.index.cleared:  # the rows are other samples' now
            self._origins.zero_()
            self._origins_of.fill_(self.index.cleared)
        times, origins = self._times_view, self._origins_view
        url, origin = None, 0
        for sample in samples:
            row = self._row(sample)
            if (here := sample.get("__url__")) is not url:
                url, origin = here, _origin(here)
            if origin and origins[row] != origin:
                if origins[row]:
                    raise self._same_key(sample)
                origins[row] = origin
            for _ in range(times[row]):
                tally.passed += 1
                if tally.passed > tally.skip:
                    yield {**sample, SAMPLE_ID: row}

    def batch(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """The same for a batch of columns: ``dataset.map(stage.batch, batched=True)`` of Hugging Face's data sets.

        Args:
            columns: equally long lists, arrays or tensors by name.

        Returns:
            The columns with the planned rows only, and the column ``"sample_id"``.
        """
        self._check(columns)
        keys = columns[self.key]
        rows = self.index.rows(keys)
        for place in np.flatnonzero(rows < 0):
            rows[place] = self._new_row(keys[int(place)])
        self._check_rows(int(rows.max(initial=-1)))
        places = np.repeat(np.arange(len(rows)), self._times[rows])
        return {**{name: _taken(column, places) for name, column in columns.items()}, SAMPLE_ID: rows[places].tolist()}

    def _row(self, sample: Sample) -> int:
        try:
            row = self.index.row(sample[self.key])
        except (KeyError, TypeError, IndexError):
            self._check(sample)
            raise
        if SAMPLE_ID in sample:
            self._check(sample)
        if row < 0:
            row = self._new_row(sample[self.key])
        if row >= len(self._times_view):
            self._check_rows(row)
        return row

    def _new_row(self, key: Any) -> int:
        world = max(self._world, world_size())
        if self._one_ledger and world > 1:
            raise ValueError(
                f"keep(...): the key {key!r} is not in the index, and {world} ranks would give it different rows; "
                f"build the index of all shards beforehand, in the same order on each rank (KeyIndex.from_shards), or "
                f"of each rank's own, followed by index.merge_ranks()."
            )
        if len(self._times) < self.index.capacity:
            raise ValueError(
                f"keep(...): the key {key!r} is not in the index, which is complete, as the sampler's size says; build "
                f"it of these shards, or give the sampler the size index.capacity, {self.index.capacity}."
            )
        return self.index.row_or_new(key)

    def _check_rows(self, last: int) -> None:
        if last >= len(self._times):
            raise ValueError(
                f"keep(...): row {last} is beyond the sampler's {len(self._times)} samples: the index has got more "
                f"keys since the stage was made; make the sampler, the stage and the loader for the whole index."
            )

    def _check(self, sample: Any) -> None:
        if not isinstance(sample, Mapping):
            raise TypeError(f"keep(...): a sample must be a dict with its key in it, not a {type(sample).__name__}.")
        if self.key not in sample:
            has = ", ".join(map(repr, sample))
            raise KeyError(f"keep(key={self.key!r}): a sample has no {self.key!r}, but {has}; say where its key is.")
        if SAMPLE_ID in sample:
            raise ValueError(
                f"keep(...): the samples have a {SAMPLE_ID!r} already; rename it, and put only one stage in a pipeline."
            )

    def _same_key(self, sample: Sample) -> ValueError:
        return ValueError(
            f"keep(key={self.key!r}): the key {sample[self.key]!r} in {sample['__url__']} is also that of a sample in "
            f"another shard; each sample needs a key of its own, for example one that begins with its shard's name."
        )

    # --- resuming -----------------------------------------------------------------------------------------------------

    def wrap(self, samples: Iterable[Any]) -> Resumable:
        """This stage over an iterable of dicts, as an ``IterableDataset`` that resumes where it was.

        Args:
            samples: one that can be iterated anew for each pass. For several workers it must be an ``IterableDataset``
                that divides the samples among them, as each one has to.
        """
        return Resumable(_Kept(samples, self), self)


class _Kept(IterableDataset[Any]):
    def __init__(self, samples: Iterable[Any], stage: Keep):
        self.samples = samples
        self.stage = stage

    def __iter__(self) -> Iterator[dict[Any, Any]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1 and not isinstance(self.samples, IterableDataset):
            raise TypeError(
                f"keep(...).wrap({type(self.samples).__name__}): each of the {worker.num_workers} workers would pass "
                f"on all samples; give an IterableDataset that divides them (get_worker_info), or take one worker."
            )
        return self.stage(self.samples)


def _origin(url: Any) -> int:
    return 0 if url is None else crc32(str(url).encode("utf-8", "surrogatepass")) % MOST_REPEATS + 1


def _taken(column: Any, places: NDArray[np.int64]) -> Any:
    if isinstance(column, np.ndarray):
        return column[places]
    if isinstance(column, Tensor):
        return column[torch.from_numpy(places)]
    return [column[place] for place in places.tolist()]
