"""Queries with a positive and some negative documents each, drawn anew every epoch, and what false negatives need.

Which positive and which negatives query i gets in epoch e is a hash of (seed, e, i): the same in any worker, on any
rank, in a batch of any composition and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from samplewise.cuda_ext.checks import integer
from samplewise.loaders.draws import IntArray, MinedNegatives, RandomNegatives, lots_of, scaled, some
from samplewise.loaders.epoch import SharedEpoch
from samplewise.loaders.ids import SAMPLE_ID
from samplewise.loaders.ragged import Ragged
from samplewise.loaders.sampler import PlannedSampler
from samplewise.loaders.table import Table

_PROBES = 64  # items of which a fingerprint is made


def check_positives(owner: str, positives: Ragged | Sequence[Any], queries: int, documents: int) -> Ragged:
    """The documents that are relevant for each query, in the order given, none twice.

    Args:
        owner: class or function that the argument belongs to, for the error.
        positives: Q lists of rows of the documents.
        queries: Q.
        documents: D.

    Raises:
        TypeError: lists that hold anything but integers.
        ValueError: not Q lists, an empty one, or a row outside [0, D).
    """
    name = f"{owner}(positives=...)"
    rows = Ragged.from_lists(positives, name)
    if len(rows) != queries:
        raise ValueError(f"{name}: there must be one list a query, but there are {len(rows)} for {queries} queries.")
    if not rows.lengths.all():
        raise ValueError(
            f"{name}: every query needs a positive document, but queries {some(rows.lengths == 0)} have none; leave "
            f"them out of the queries and of the positives."
        )
    numbers = rows.row_numbers()
    outside = np.zeros(queries, dtype=np.bool_)
    outside[numbers[(rows.values < 0) | (rows.values >= documents)]] = True
    if outside.any():
        raise ValueError(
            f"{name}: positives are rows of the {documents} documents, but those of queries {some(outside)} are not "
            f"all in [0, {documents}): query {outside.argmax()} has {rows[int(outside.argmax())].tolist()!r:.80}."
        )
    first = np.unique(numbers * documents + rows.values, return_index=True)[1]
    if len(first) == len(numbers):
        return rows
    first.sort()
    lengths = np.bincount(numbers[first], minlength=queries)
    return Ragged(rows.values[first], np.concatenate(([0], np.cumsum(lengths))).astype(np.int64))


def corpus_fingerprint(queries: Any, documents: Any) -> str:
    """A text that identifies the data: a hash of the two lengths and of 64 items of each, evenly spaced."""
    digest = sha256()
    for items in (queries, documents):
        digest.update(b"%d;" % len(items))
        for row in np.unique(np.linspace(0, len(items) - 1, _PROBES).astype(np.int64)).tolist():
            content = _content(items[row])
            digest.update(b"%d:%b" % (len(content), content))
    return f"corpus-sha256:{digest.hexdigest()[:32]}"


def _content(item: Any) -> bytes:
    """Bytes that are equal in every process where the item is."""
    if isinstance(item, str):
        return item.encode("utf-8", "surrogatepass")
    if isinstance(item, Tensor):
        item = item.detach().cpu().numpy()
    if isinstance(item, np.ndarray):
        return f"{item.dtype}{item.shape}".encode() + item.tobytes()
    if isinstance(item, Mapping):
        item = [part for key in sorted(item, key=str) for part in (str(key), item[key])]
    if isinstance(item, (list, tuple)):
        return b"".join(b"%d:%b" % (len(part), part) for part in map(_content, item))
    known = isinstance(item, (bool, int, float, bytes, type(None)))
    return repr(item).encode() if known else type(item).__qualname__.encode()


class RetrievalDataset(Dataset[dict[str, Any]]):
    """Map-style data set of queries, each with a positive and ``count`` negatives.

    Item i is a dict: ``query``; ``positive``, drawn uniformly from the query's positives; ``negatives``, a list of
    ``count`` documents, all different, drawn uniformly from the first ``depth`` of row i of the table, or, without a
    table, from all documents that are no positives of the query; and their rows, ``positive_id`` (int),
    ``negative_ids`` (int64 (count,)) and ``positives`` (int64 (P_i,), all of them). Wrapped in ``with_ids`` it has
    ``sample_id`` too. Batches are made by ``collate_fn=CollateRetrieval(tokenize)``.

    A new version of the table is used from the next batch on that a worker fetches, in persistent workers too; all of
    a batch comes from one version.

    Args:
        queries: Q queries: anything with ``len()`` and ``[row]``, for example a list, a tensor, an HF ``Dataset`` or a
            column of one. Where it has ``__getitems__``, that is called once a batch; nothing is copied.
        documents: D documents, likewise.
        positives: Q lists of rows of ``documents``.
        negatives: mined negatives, hardest first: a :class:`samplewise.loaders.Table` with an array ``negatives`` (Q,
            K), or the array itself; None draws random ones. A document that is in a row more than once (padding) is
            drawn more often, but never twice for one item. A table may still be empty; it is checked when it is read.
        count: negatives a query; 0 leaves it to the other documents of the batch.
        depth: how many of a row's first negatives are drawn from, None: all K.
        seed: key of the draws.
        sampler: the loader's sampler, whose epoch the draws follow; without it :meth:`set_epoch` sets the epoch.

    Raises:
        TypeError: an argument of another type.
        ValueError: a query without a positive, rows outside [0, D), lengths that disagree, a table of other data, a
            depth above K, more negatives than there are to draw from.
    """

    def __init__(
        self,
        queries: Any,
        documents: Any,
        positives: Ragged | Sequence[Any],
        negatives: Table | NDArray[Any] | Tensor | None = None,
        *,
        count: int = 1,
        depth: int | None = None,
        seed: int = 0,
        sampler: PlannedSampler | None = None,
    ):
        name = type(self).__name__
        self.queries = _checked_items(name, "queries", queries)
        self.documents = _checked_items(name, "documents", documents)
        self.positives = check_positives(name, positives, len(queries), len(documents))
        self.count = integer(name, "count", count, 0, what="the number of negatives a query")
        self.depth, self.seed = depth, integer(name, "seed", seed, 0)
        self._follows = sampler is not None
        self.shared_epoch = SharedEpoch() if sampler is None else epoch_of(name, sampler, len(queries), "queries")
        self.negatives: Table | NDArray[Any] | None = None
        self._source: MinedNegatives | RandomNegatives
        if negatives is not None:
            fingerprint = partial(corpus_fingerprint, queries, documents)
            sizes = len(queries), len(documents)
            self._source = MinedNegatives(name, negatives, *sizes, count=count, depth=depth, fingerprint=fingerprint)
            self.negatives = self._source.table
        elif depth is None:
            self._source = RandomNegatives(name, self.positives, len(documents), self.count)
        else:
            raise ValueError(f"{name}(depth={depth}): depth is of mined negatives; give negatives=, or no depth.")

    def set_epoch(self, epoch: int) -> None:
        """Draw for ``epoch`` from now on. Where a sampler was given its epoch counts, and this does nothing."""
        if not self._follows:
            self.shared_epoch.value = integer(f"{type(self).__name__}.set_epoch", "epoch", epoch, 0)

    def __len__(self) -> int:
        return len(self.positives)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The items of a batch, their negatives from one version of the table."""
        if not len(indices):
            return []
        rows = np.asarray(indices, dtype=np.int64)
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"{type(self).__name__}: queries are rows in [0, {len(self)}), not {rows.tolist()!r:.80}.")
        lots = lots_of(rows, 1 + 4 * self.count, self.seed, self.shared_epoch.value)
        positives = self.positives.take(rows)
        positive_ids = positives.values[positives.offsets[:-1] + scaled(lots[:, 0], positives.lengths)]
        negative_ids = self._source.draw(rows, lots[:, 1:])
        return self._items(rows, positives, positive_ids, negative_ids)

    def _items(
        self, rows: IntArray, positives: Ragged, positive_ids: IntArray, negative_ids: IntArray
    ) -> list[dict[str, Any]]:
        queries = fetched(self.queries, rows, "queries")
        documents = fetched(self.documents, np.concatenate([positive_ids, negative_ids.ravel()]), "documents")
        count, begins = self.count, positives.offsets.tolist()
        return [
            {
                "query": queries[i],
                "positive": documents[i],
                "negatives": documents[len(rows) + i * count : len(rows) + (i + 1) * count],
                "positive_id": positive_id,
                "negative_ids": negative_ids[i],
                "positives": positives.values[begins[i] : begins[i + 1]],
            }
            for i, positive_id in enumerate(positive_ids.tolist())
        ]


def _checked_items(owner: str, name: str, items: Any) -> Any:
    if hasattr(items, "iloc"):
        raise TypeError(
            f"{owner}({name}={type(items).__name__}): rows of pandas are found by label, not by number; give "
            f"{name}.tolist() of one column, or {name}.to_dict('records')."
        )
    if isinstance(items, (str, bytes, Mapping)) or not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
        raise TypeError(
            f"{owner}({name}={type(items).__name__}): {name} must have len() and [row], like a list, a tensor, an HF "
            f"Dataset or a column of one."
        )
    if len(items) == 0:
        raise ValueError(f"{owner}({name}=...): there are no {name}; at least one is needed.")
    return items


def epoch_of(owner: str, sampler: PlannedSampler, size: int, what: str) -> SharedEpoch:
    """The epoch of a loader's sampler, which draws of a data set of ``size`` ``what`` can follow.

    Raises:
        TypeError: no PlannedSampler.
        ValueError: one of another size.
    """
    if not isinstance(sampler, PlannedSampler):
        raise TypeError(f"{owner}(sampler={type(sampler).__name__}): a PlannedSampler is needed, the loader's.")
    if sampler.size != size:
        raise ValueError(
            f"{owner}(sampler=...): the sampler plans for {sampler.size} samples, but there are {size} {what}; make it "
            f"with size=len({what})."
        )
    return sampler.shared_epoch


def fetched(items: Any, rows: IntArray, name: str) -> list[Any]:
    """The items at ``rows``, by one access where that is possible."""
    if isinstance(items, (np.ndarray, Tensor)):
        return list(items[rows])
    if hasattr(items, "__getitems__"):
        fetched = items.__getitems__(rows.tolist())
        if not isinstance(fetched, list) or len(fetched) != len(rows):
            raise TypeError(
                f"RetrievalDataset({name}={type(items).__name__}): its __getitems__ must give a list with one item a "
                f"row, not {type(fetched).__name__}."
            )
        return fetched
    if type(items).__module__.startswith("datasets."):  # a column of an HF data set: one access a list of rows, too
        return list(items[rows.tolist()])
    return [items[row] for row in rows.tolist()]


class CollateRetrieval:
    """Collate function for the items of a :class:`RetrievalDataset`; a class, so that spawned workers can have it.

    ``sample_id`` int64 (B,) is in the batch where the data set is wrapped in ``with_ids``.

    A batch is a dict: ``queries``, what ``tokenize`` makes of the B queries; ``documents``, of the B positives and
    then the B * count negatives, row by row; ``positive_ids`` int64 (B,), ``negative_ids`` int64 (B, count), and
    ``positives`` int64 (B, P), all positives of each query, filled up with -1, for :func:`known_positives`.

    Args:
        tokenize: makes what the model takes of a list of queries.
        tokenize_documents: the same for documents, None: ``tokenize``.

    Raises:
        TypeError: nothing that can be called.
    """

    def __init__(
        self, tokenize: Callable[[list[Any]], Any], tokenize_documents: Callable[[list[Any]], Any] | None = None
    ):
        self.tokenize = tokenize
        self.tokenize_documents = tokenize if tokenize_documents is None else tokenize_documents
        for name in ("tokenize", "tokenize_documents"):
            if not callable(getattr(self, name)):
                raise TypeError(f"CollateRetrieval({name}={getattr(self, name)!r}): a function of a list is needed.")

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate the items of one batch."""
        negatives = [document for item in items for document in item["negatives"]]
        positives = Ragged.from_lists([item["positives"] for item in items])
        ids = {SAMPLE_ID: torch.tensor([item[SAMPLE_ID] for item in items])} if SAMPLE_ID in items[0] else {}
        return {
            **ids,
            "queries": self.tokenize([item["query"] for item in items]),
            "documents": self.tokenize_documents([item["positive"] for item in items] + negatives),
            "positive_ids": torch.tensor([item["positive_id"] for item in items], dtype=torch.int64),
            "negative_ids": torch.from_numpy(np.stack([item["negative_ids"] for item in items])),
            "positives": torch.from_numpy(positives.padded()),
        }


def known_positives(positives: Tensor, document_ids: Tensor) -> Tensor:
    """Which documents are positives of which queries: what no query may be pushed away from.

    Args:
        positives: int64 (B, P), each query's positives, filled up with -1, which matches nothing.
        document_ids: int64 (M,), the documents of the batch, or of the batches of all ranks.

    Returns:
        bool (B, M), True where document j is a positive of query i. Takes memory for (B, M), never for (B, P, M).

    Raises:
        ValueError: of another shape.
    """
    if positives.ndim != 2 or document_ids.ndim != 1:
        raise ValueError(
            f"known_positives: positives must be (B, P) and document_ids (M,), not {tuple(positives.shape)} and "
            f"{tuple(document_ids.shape)}."
        )
    ascending = torch.cat([document_ids.sort().values, document_ids.new_full((1,), torch.iinfo(torch.int64).max)])
    place = torch.searchsorted(ascending, positives.contiguous())  # of the first document with that id, if any has it
    found = (positives >= 0) & (ascending[place] == positives)
    first = torch.zeros(len(positives), len(ascending), dtype=torch.bool, device=positives.device)
    first.scatter_(1, place.where(found, len(document_ids)), True)
    return first[:, torch.searchsorted(ascending, document_ids)]
