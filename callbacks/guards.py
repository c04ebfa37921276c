"""Guards of the Lightning callback: is the planned sampler still the one that the training loader has?

The trainer is Any below, since Lightning declares few of its attributes.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, IterableDataset, RandomSampler

from samplewise.loaders import PlannedSampler


def combined_loader(trainer: Any) -> CombinedLoader:
    """What Lightning made of the training loaders."""
    combined: CombinedLoader = trainer.fit_loop._combined_loader
    return combined


def batch_size_of(loader: Any) -> int | None:
    """Samples a batch, None where a batch sampler decides from batch to batch."""
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def has_sampler(loader: Any, sampler: PlannedSampler) -> bool:
    """Whether the loader has this very sampler."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return sampler in (getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))


def is_stream(loader: Any) -> bool:
    """Whether no sampler can be in the loader, since its data set has no rows."""
    return isinstance(getattr(loader, "dataset", None), IterableDataset)


def planned_loader(trainer: Any, sampler: PlannedSampler) -> int:
    """Which of the training loaders has the sampler, or is a stream that it plans for.

    Raises:
        RuntimeError: none of them, or more than one.
        ValueError: its data set, or its batch size, is another one than the sampler plans for.
    """
    loaders = combined_loader(trainer).flattened
    found = [index for index, loader in enumerate(loaders) if has_sampler(loader, sampler)]
    if len(found) > 1:
        raise RuntimeError(
            f"SamplingCallback: {len(found)} training loaders have the same sampler; one run takes one planned loader."
        )
    if not found and sampler.on_plan is not None:  # a stage of a stream follows its plans
        found = [index for index, loader in enumerate(loaders) if is_stream(loader)][:1]
    if not found:
        raise RuntimeError(f"SamplingCallback: the training loader has another sampler: {_found_instead(loaders)}")
    dataset: Any = getattr(loaders[found[0]], "dataset", None)
    if hasattr(dataset, "__len__") and len(dataset) != sampler.size:
        raise ValueError(
            f"SamplingCallback: the sampler plans for {sampler.size} samples, the training loader's data set has "
            f"{len(dataset)}; make the sampler with size=len(dataset)."
        )
    size, arranged = batch_size_of(loaders[found[0]]), getattr(sampler.arrange, "batch_size", None)
    if size is not None and arranged is not None and arranged != size:
        raise ValueError(
            f"SamplingCallback: the sampler arranges batches of {arranged}, the training loader makes them of {size}; "
            f"give both the same batch_size."
        )
    return found[0]


def _found_instead(loaders: list[Any]) -> str:
    for loader in loaders:
        own, batch_sampler = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
        if batch_sampler is not None and type(batch_sampler) is not BatchSampler:
            return (
                f"it has a batch_sampler of its own, {type(batch_sampler).__name__}, which Lightning rebuilds around a "
                f"DistributedSampler when there are several ranks. Pass DataLoader(..., batch_size=..., "
                f"sampler=sampler)."
            )
        if isinstance(own, PlannedSampler):
            return (
                f"it has another {type(own).__name__} object. Make the sampler once, outside train_dataloader(), and "
                f"pass the same one to the DataLoader and to SamplingCallback."
            )
        if is_stream(loader):
            return (
                f"its data set, {type(loader.dataset).__name__}, is a stream, which takes no sampler. Put a stage into "
                f"it that follows the sampler's plans: samplewise.loaders.streams.keep(sampler, index)."
            )
        if isinstance(own, RandomSampler):
            return "it has a RandomSampler. Pass DataLoader(..., sampler=sampler) instead of shuffle=True."
    names = ", ".join(type(getattr(loader, "sampler", loader)).__name__ for loader in loaders)
    return f"it has {names}. Pass DataLoader(..., batch_size=..., sampler=sampler), and no batch_sampler."


def check_validation(trainer: Any, sampler: PlannedSampler) -> None:
    """Raise where a validation loader has the training sampler."""
    loaders = trainer.val_dataloaders
    if loaders is not None and any(has_sampler(loader, sampler) for loader in CombinedLoader(loaders).flattened):
        raise RuntimeError(
            "SamplingCallback: a validation loader has the training sampler; give it none: DataLoader(val_set)."
        )
