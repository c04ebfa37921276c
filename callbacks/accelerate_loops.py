"""The side of loops that are written with accelerate: `attach` tells a prepared loader's sampler who deals out its ids.

accelerate deals any sampler's batches out to the ranks, also of a sampler that serves one rank already; moves a
sampler to the epoch that its loader has counted, from 0 after a resume too; and saves no sampler's state.
"""

from __future__ import annotations

import os
from typing import Any

from torch.utils.data import IterableDataset

from samplewise.cuda_ext.checks import optional_import
from samplewise.loaders import PlannedSampler
from samplewise.loaders.guard import DueWatch
from samplewise.loaders.shares import load_saved_state, saved_state


def attach_accelerator(accelerator: Any, loader: Any) -> PlannedSampler:
    """See :func:`samplewise.callbacks.huggingface.attach`.

    Args:
        accelerator: the ``accelerate.Accelerator`` that prepared the loader.
        loader: what ``accelerator.prepare`` made of the training loader.

    Returns:
        The loader's sampler.

    Raises:
        TypeError: ``loader`` is no loader.
        RuntimeError: it is not prepared, has no PlannedSampler, or is attached already.
        ValueError: settings that do not go with it.
    """
    data_loader = optional_import("attach(accelerator)", "accelerate.data_loader", "hf")
    if isinstance(loader, PlannedSampler) or not hasattr(loader, "dataset"):
        raise TypeError(
            f"attach(accelerator, loader={type(loader).__name__}): loader must be what accelerator.prepare(...) made "
            f"of the training DataLoader."
        )
    if isinstance(loader.dataset, IterableDataset | data_loader.IterableDatasetShard):
        raise ValueError(
            "attach(accelerator, loader): accelerate deals a stream out to the ranks once more, or reads it on the "
            "first one only, although its shards are divided already. Leave its loader out of accelerator.prepare(...) "
            "and move batches with accelerate.utils.send_to_device(batch, accelerator.device)."
        )
    if not isinstance(loader, data_loader.DataLoaderShard | data_loader.DataLoaderDispatcher):
        raise RuntimeError(
            "attach(accelerator, loader): the loader is not prepared yet; call loader = accelerator.prepare(loader) "
            "first."
        )
    if loader.use_stateful_dataloader:
        raise ValueError(
            "attach(accelerator, loader): DataLoaderConfiguration(use_stateful_dataloader=True) would pass over the "
            "batches that the sampler passes over itself after a resume; set it to False."
        )
    sampler = _sampler_of(loader)
    launched = max(sampler.num_replicas, int(os.environ.get("WORLD_SIZE", 1)))
    if launched != accelerator.num_processes:
        raise RuntimeError(
            f"attach(accelerator, loader): {launched} processes were launched, but the Accelerator knows of "
            f"{accelerator.num_processes}, so that each would train alone. Without GPUs make it Accelerator(cpu=True)."
        )
    if sampler.sharded:
        raise ValueError(
            f"attach(accelerator, loader): {type(sampler).__name__}(sharded=True) plans each rank's share by itself, "
            f"but accelerate deals out what all ranks plan together; leave sharded out."
        )
    if any("set_epoch" in vars(other) and _sampler_of(other) is sampler for other in accelerator._dataloaders):
        raise RuntimeError(
            "attach(accelerator, loader): it is attached already, or another loader with the same sampler; call attach "
            "once, and accelerator.free_memory() before the sampler is given to a new loader."
        )
    sampler.sharding = "loader"
    split = loader.split_batches if hasattr(loader, "split_batches") else accelerator.split_batches
    size = loader.batch_sampler.batch_size if split else loader.batch_sampler.batch_size * accelerator.num_processes
    shard = loader.batch_sampler
    fills = accelerator.num_processes > 1 and getattr(shard, "even_batches", True) and not shard.drop_last
    sampler.step_samples = size if fills else 1  # accelerate would do it with what this process has seen first
    sampler.watch = DueWatch(
        size,
        "Give the sampler to the DataLoader that is prepared, leave out accelerator.skip_first_batches (a sampler that "
        "was restored begins at the right batch itself), and observe every batch of it.",
    )
    sampler.watch.done = not getattr(loader, "in_order", True)  # its workers' batches come as they are done
    _follow(loader, sampler)
    if not any(isinstance(saved, _Saved) and saved.sampler is sampler for saved in accelerator._custom_objects):
        accelerator.register_for_checkpointing(_Saved(sampler))
    return sampler


def _sampler_of(loader: Any) -> PlannedSampler:
    batches = loader.batch_sampler
    batches = getattr(batches, "batch_sampler", batches)  # inside of the one that deals them out
    sampler = getattr(batches, "sampler", None)
    if not isinstance(sampler, PlannedSampler):
        raise RuntimeError(
            f"attach(accelerator, loader): the loader has a {type(sampler).__name__}; pass DataLoader(..., "
            f"batch_size=..., sampler=sampler), with one of samplewise.plugins, and no batch_sampler or shuffle."
        )
    if len(loader.dataset) != sampler.size:
        raise ValueError(
            f"attach(accelerator, loader): the sampler plans for {sampler.size} samples, the data set has "
            f"{len(loader.dataset)}; make the sampler with size=len(dataset)."
        )
    return sampler


def _follow(loader: Any, sampler: PlannedSampler) -> None:
    """Keep the loader's own count of epochs and the sampler's equal: the one that was moved last is right.

    Each pass sets the sampler to the loader's count, which knows nothing of ``sampler.set_epoch`` and of a resume.
    """
    seen = sampler.epoch

    def set_epoch(epoch: int) -> None:
        nonlocal seen
        if sampler.epoch == seen:
            sampler.set_epoch(epoch)
        loader.iteration = seen = sampler.epoch

    loader.set_epoch = set_epoch


class _Saved:
    """The sampler in ``accelerator.save_state``, which all ranks call."""

    def __init__(self, sampler: PlannedSampler):
        self.sampler = sampler

    def state_dict(self) -> dict[str, Any]:
        return saved_state(self.sampler)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_saved_state(self.sampler, state)
