"""The HF Trainer's training loader, with a planned sampler in it and the samples' ids in its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from samplewise.loaders import SAMPLE_ID, PlannedSampler, collate_with_ids, with_ids
from samplewise.loaders.ids import has_ids

TOKENS = "input_ids"
LENGTHS = "sample_lengths"
"""Tokens of each sample, int64 (B,), in batches whose samples lie end to end."""

_KEPT = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
)
"""What a loader that is made anew takes over, besides data, batches and collate function."""


class PassedBatches(BatchSampler):
    """Batches of a sampler's ids for loops that, after a resume, iterate to where they stopped and discard what comes.

    The sampler begins where it was left. In front of that come ``passed`` batches to be discarded: the first ones of
    the epoch as they were, since accelerate keeps them to fill up the last ones with, then the same one again.

    Args:
        sampler: gives the ids of all ranks.
        batch_size: B, samples a batch and rank.
        drop_last: whether a last batch that is smaller is left out.

    Attributes:
        passed: batches, of all ranks together, that the next iterator begins with; it sets this to 0.
    """

    def __init__(self, sampler: PlannedSampler, batch_size: int, drop_last: bool):
        super().__init__(sampler, batch_size, drop_last)
        self.passed = 0

    def __iter__(self) -> Iterator[list[int]]:
        sampler: Any = self.sampler
        passed, self.passed = self.passed, 0
        if passed:
            order = sampler.order()
            start = order.index_of(0)  # below 0, where another number of ranks had begun the epoch
            batch: list[int] = []
            for number in range(passed):
                if number < sampler.num_replicas:
                    stop = min(start + self.batch_size, order.length)
                    batch, start = order.ids(start, stop).tolist(), stop
                yield list(batch)
        ids = iter(sampler)
        while batch := list(islice(ids, self.batch_size)):
            if len(batch) == self.batch_size or not self.drop_last:
                yield batch


class KeepIds:
    """For a collate function that takes the ids itself: the batch has them, too."""

    def __init__(self, collate: Callable[[Any], Any]):
        self.collate = collate

    def __call__(self, items: Any) -> Any:
        """Collate items that are dicts with ids."""
        batch = self.collate(items)
        batch[SAMPLE_ID] = torch.tensor([int(item[SAMPLE_ID]) for item in items], dtype=torch.int64)
        return batch


class NoteLengths:
    """For collate functions that lay samples end to end, in one row: the batch tells how long each sample is."""

    def __init__(self, collate: Callable[[Any], Any]):
        self.collate = collate

    def __call__(self, items: Any) -> Any:
        """Collate a list of items."""
        batch = self.collate(items)
        rows = batch.get(TOKENS) if isinstance(batch, MutableMapping) else None
        whole = isinstance(rows, Tensor) and len(rows) == 1 and isinstance(items, list) and len(items) > 1
        if whole and all(isinstance(item, Mapping) and TOKENS in item for item in items):
            batch[LENGTHS] = torch.tensor([len(item[TOKENS]) for item in items], dtype=torch.int64)
        return batch


def passed_batches(loader: Any) -> PassedBatches | None:
    """The batch sampler that :func:`planned_loader` made, under whatever accelerate wraps around it."""
    found = getattr(loader, "batch_sampler", None)
    while found is not None and not isinstance(found, PassedBatches):
        found = getattr(found, "batch_sampler", None)
    return found


def is_stream(dataset: Any) -> bool:
    """Whether a data set has no rows."""
    return isinstance(dataset, IterableDataset)


def planned_loader(trainer: Any, sampler: PlannedSampler, build: Callable[[], Any]) -> Any:
    """What the Trainer would train with, prepared by accelerate, but with the sampler, and ids in the batches.

    Args:
        trainer: a ``transformers.Trainer``.
        sampler: to be the loader's.
        build: the Trainer's own ``get_train_dataloader``.

    Raises:
        RuntimeError: it gives a loader that has another sampler, or a stream that none plans for.
        ValueError: its data set has another size.
    """
    with _unprepared(trainer, sampler):
        loader = build()
    kept = {name: getattr(loader, name) for name in _KEPT if hasattr(loader, name)}
    dataset: Any = getattr(loader, "dataset", None)
    collate = NoteLengths(getattr(loader, "collate_fn", None))  # type: ignore[arg-type]
    if is_stream(dataset):
        if sampler.on_plan is None:
            raise RuntimeError(
                f"attach: the Trainer's data set, {type(dataset).__name__}, is a stream, which takes no sampler. Put a "
                f"stage into it that follows the sampler's plans: samplewise.loaders.streams.keep(sampler, index)."
            )
        return _prepared_stream(
            trainer.accelerator,
            DataLoader(
                dataset,
                batch_size=loader.batch_size,
                drop_last=loader.drop_last,
                collate_fn=collate_with_ids(collate),
                **kept,
            ),
        )
    batches = _batches_of(loader, sampler)
    check_size(sampler, dataset)
    if has_ids(dataset):
        with_own: Any = KeepIds(collate)
    else:
        dataset, with_own = with_ids(dataset), collate_with_ids(collate)
    batches = PassedBatches(sampler, batches.batch_size, batches.drop_last)
    return trainer.accelerator.prepare(DataLoader(dataset, batch_sampler=batches, collate_fn=with_own, **kept))


@contextmanager
def _unprepared(trainer: Any, sampler: PlannedSampler) -> Iterator[None]:
    """Have the Trainer build a plain DataLoader with the sampler."""
    trainer._get_train_sampler = lambda dataset=None: sampler
    trainer.accelerator.prepare = lambda *given, **_: given[0] if len(given) == 1 else given
    try:
        yield
    finally:
        del trainer._get_train_sampler, trainer.accelerator.prepare


def _batches_of(loader: Any, sampler: PlannedSampler) -> BatchSampler:
    batches = getattr(loader, "batch_sampler", None)
    while batches is not None:
        if getattr(batches, "sampler", None) is sampler and batches.batch_size:
            found: BatchSampler = batches
            return found
        batches = getattr(batches, "batch_sampler", None)
    own = type(getattr(loader, "sampler", loader)).__name__
    raise RuntimeError(
        f"attach: the Trainer's get_train_dataloader() gives a loader with another sampler, {own}. Have it call "
        f"super().get_train_dataloader(), or make its DataLoader with sampler=self._get_train_sampler()."
    )


def _prepared_stream(accelerator: Any, loader: DataLoader[Any]) -> Any:
    """On the device, but neither dispatched from the first rank nor sharded once more."""
    from accelerate.data_loader import prepare_data_loader

    prepared = prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=accelerator.device_placement,
        rng_types=accelerator.rng_types.copy(),
        dispatch_batches=False,
        non_blocking=accelerator.non_blocking,
    )
    accelerator._dataloaders.append(prepared)
    return prepared


def check_size(sampler: PlannedSampler, dataset: Any) -> None:
    """Raise where a data set has another size than the sampler plans for."""
    if hasattr(dataset, "__len__") and len(dataset) != sampler.size:
        raise ValueError(
            f"attach: the sampler plans for {sampler.size} samples, the Trainer's data set has {len(dataset)}; make "
            f"the sampler with size=len(trainer.train_dataset)."
        )
