"""Sample ids travel inside the batch: no side channel, so no look-ahead or reordering attributes a loss wrongly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

SAMPLE_ID = "sample_id"
"""The key under which dict-style items and batches carry their ids."""


_NO_IDS = "collate_with_ids: an item carries no id; wrap the data set: DataLoader(with_ids(dataset), ...)."


class BatchWithIds(NamedTuple):
    """What ``__getitems__`` gives where the data set itself answers with a whole batch instead of a list of items."""

    ids: Sequence[int]
    batch: Any


class _WithIds(Dataset[Any]):
    """See :func:`with_ids`."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return _attach(int(index), self.dataset[index])

    def __repr__(self) -> str:
        return f"with_ids({self.dataset!r})"


class _WithIdsBatched(_WithIds):
    """For a data set that fetches whole batches: the DataLoader looks for ``__getitems__`` with hasattr."""

    def __getitems__(self, indices: Sequence[int]) -> Any:
        items = self.dataset.__getitems__(indices)
        if isinstance(items, list) and len(items) == len(indices):
            return [_attach(int(index), item) for index, item in zip(indices, items, strict=True)]
        return BatchWithIds(indices, items)


def _attach(index: int, item: Any) -> Any:
    if not isinstance(item, Mapping):
        return index, item
    _check_free(f"item {index}", item)
    return {**item, SAMPLE_ID: index}


def _check_free(what: str, given: Mapping[str, Any]) -> None:
    if SAMPLE_ID in given:
        raise ValueError(f"with_ids: {what} has a key {SAMPLE_ID!r} of its own; give that column another name.")


def with_ids(dataset: Any) -> _WithIds:
    """Let every item of a map-style data set carry its row: ``(id, item)``, or a ``"sample_id"`` key in dict items.

    The default collate then gives ``(ids int64 (B,), batch)``, or a dict with ``"sample_id"``: int64 (B,). A custom
    ``collate_fn`` is wrapped: :func:`collate_with_ids`. ``__getitems__`` is passed through, nothing is copied, and the
    wrapped data set stays reachable as ``.dataset``.

    Raises:
        TypeError: an iterable data set, or one without ``__len__``; its samples have no rows.

    >>> with_ids(["a", "b"])[1]
    (1, 'b')
    """
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(
            f"with_ids({type(dataset).__name__}): a map-style data set is needed, with __getitem__ and __len__; the "
            f"samples of a stream have no rows."
        )
    if has_ids(dataset):
        raise TypeError("with_ids(with_ids(...)): the data set carries its ids already; wrap it once.")
    return _WithIdsBatched(dataset) if hasattr(dataset, "__getitems__") else _WithIds(dataset)


def has_ids(dataset: Any) -> bool:
    """Whether a data set went through :func:`with_ids`."""
    return isinstance(dataset, _WithIds)


class collate_with_ids:  # used like a function; a class, so that it can be pickled for spawned workers
    """Wrap a ``collate_fn`` that knows nothing of ids: ``DataLoader(..., collate_fn=collate_with_ids(my_collate))``.

    ``my_collate`` gets the bare items. The batch is ``(ids int64 (B,), my_collate(items))``, or, where the items are
    dicts and ``my_collate`` gives a dict, that dict with the ids under ``"sample_id"``.

    Args:
        collate: the function. None: items go through torch's default collate, and what a data set's ``__getitems__``
            gives as a whole batch stays as it is.

    Raises:
        TypeError: anything else.
        ValueError: when called, for a batch that has a ``"sample_id"`` of its own.
    """

    def __init__(self, collate: Callable[[Any], Any] | None = None):
        if collate is not None and not callable(collate):
            raise TypeError(f"collate_with_ids({collate!r}): a collate function is needed, or None.")
        self.collate = collate

    def __call__(self, items: Any) -> Any:
        """Collate what the loader fetched: a list of items with ids, or a :class:`BatchWithIds`."""
        if isinstance(items, BatchWithIds):
            batch = items.batch if self.collate is None else self.collate(items.batch)
            return self._join(torch.tensor(list(items.ids), dtype=torch.int64), batch)
        if isinstance(items[0], Mapping):
            ids = [_taken(item) for item in items]
            bare: list[Any] = [{key: value for key, value in item.items() if key != SAMPLE_ID} for item in items]
        elif all(isinstance(item, tuple) and len(item) == 2 and type(item[0]) is int for item in items):
            ids, bare = [index for index, _ in items], [item for _, item in items]
        else:
            raise TypeError(_NO_IDS)
        return self._join(torch.tensor(ids, dtype=torch.int64), (self.collate or default_collate)(bare))

    def _join(self, ids: Tensor, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            _check_free("the batch", batch)
        if isinstance(batch, MutableMapping):
            batch = copy.copy(batch)  # it may be the data set's own
            batch[SAMPLE_ID] = ids
            return batch
        return ids, batch


def _taken(item: Mapping[str, Any]) -> int:
    if SAMPLE_ID not in item:
        raise KeyError(_NO_IDS)
    return int(item[SAMPLE_ID])


def ids_of(batch: Any) -> Tensor | None:
    """The ids int64 (B,) in a collated batch: the first of an ``(ids, batch)`` pair, or ``batch["sample_id"]``."""
    if isinstance(batch, Mapping):
        ids = batch.get(SAMPLE_ID)
    else:
        ids = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    if isinstance(ids, Tensor) and ids.ndim == 1 and ids.dtype == torch.int64:
        return ids
    return None
