"""Which negatives a query gets: from its mined ones, or from all documents; pure functions of the lots drawn for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from samplewise.cuda_ext.checks import integer
from samplewise.cuda_ext.hashing import hash64
from samplewise.loaders.ragged import Ragged
from samplewise.loaders.seeding import derive
from samplewise.loaders.table import Table, Version

IntArray = NDArray[np.int64]
Lots = NDArray[np.float64]


def lots_of(rows: IntArray, count: int, seed: int, epoch: int) -> Lots:
    """``count`` numbers in [0, 1) for each row, which depend on (seed, epoch, row) alone: float64 (B, count)."""
    key = derive(seed, epoch, "retrieval")
    numbers: NDArray[np.uint64] = np.arange(count, dtype=np.uint64)
    streams: NDArray[np.uint64] = hash64(rows.astype(np.uint64), key)[:, None] + numbers
    lots: Lots = (hash64(streams, key) >> np.uint64(11)) * 2.0**-53
    return lots


def scaled(lots: Lots, sizes: IntArray) -> IntArray:
    """Integers in [0, size), each equally likely, one a row: int64 (B,)."""
    return (lots * sizes).astype(np.int64)


def distinct(lots: Lots, sizes: IntArray) -> IntArray:
    """Different integers in [0, size) for each row, any set and order of them equally likely.

    Floyd's way: the j-th of n comes from the first size - n + j + 1, and where it is taken already, their last one is
    free. Then they are shuffled.

    Args:
        lots: float64 (B, 2 n).
        sizes: int64 (B,), >= n.

    Returns:
        int64 (B, n).
    """
    count = lots.shape[1] // 2
    picks = np.empty((len(lots), count), dtype=np.int64)
    for j in range(count):
        last = sizes - count + j
        pick = scaled(lots[:, j], last + 1)
        picks[:, j] = np.where((picks[:, :j] == pick[:, None]).any(axis=1), last, pick)
    return np.take_along_axis(picks, lots[:, count:].argsort(axis=1, kind="stable"), axis=1)


def some(rows: NDArray[np.bool_]) -> str:
    """The first rows that are true, and how many there are, for an error."""
    first = ", ".join(map(str, np.flatnonzero(rows)[:5]))
    more = int(rows.sum()) - 5
    return f"{first} and {more} more" if more > 0 else first


class RandomNegatives:
    """Any documents that are no positives of the query.

    Args:
        owner: class that the arguments belong to, for errors.
        positives: each query's positives, none twice.
        documents: D.
        count: negatives a query.

    Raises:
        ValueError: fewer than ``count`` documents are no positives of a query.
    """

    def __init__(self, owner: str, positives: Ragged, documents: int, count: int):
        few = documents - positives.lengths < count
        if few.any():
            raise ValueError(
                f"{owner}(count={count}): fewer of the {documents} documents are no positives of queries {some(few)}; "
                f"lower count."
            )
        self._documents = documents
        numbers = positives.row_numbers()
        ascending = np.sort(numbers * documents + positives.values) - numbers * documents
        self._before = Ragged(ascending - np.arange(len(numbers)) + positives.offsets[numbers], positives.offsets)

    def draw(self, rows: IntArray, lots: Lots) -> IntArray:
        """Rows of the documents for the queries ``rows`` (B,), from lots (B, 4 count): int64 (B, count)."""
        before = self._before.take(rows)  # of each positive, ascending: how many documents before it are none
        drawn = distinct(lots[:, : lots.shape[1] // 2], self._documents - before.lengths)
        passed: IntArray = (before.padded(self._documents)[:, None, :] <= drawn[:, :, None]).sum(axis=2)
        return drawn + passed


class MinedNegatives:
    """The first ``depth`` of those in a table, or in an array.

    Args:
        owner: class that the arguments belong to, for errors.
        source: a table with an array ``negatives`` (Q, K), hardest first, which may have no version yet, or such an
            array.
        queries: Q.
        documents: D.
        count: negatives a query.
        depth: how many of a row are drawn from, None: all K.
        fingerprint: gives that of the data; a table whose fingerprint is of the same kind must have the same.

    Raises:
        TypeError: an array that holds anything but integers.
        ValueError: of another shape, of other data, with rows outside [0, D), or too few to draw from.
    """

    def __init__(
        self,
        owner: str,
        source: Any,
        queries: int,
        documents: int,
        *,
        count: int,
        depth: int | None,
        fingerprint: Callable[[], str],
    ):
        self._owner, self._queries, self._documents = owner, queries, documents
        self._count = count
        self._depth = None if depth is None else integer(owner, "depth", depth, 1, what="how many of a row's negatives")
        self._fingerprint = fingerprint
        self._checked: Version | None = None
        self.table: Table | NDArray[Any] = source if isinstance(source, Table) else self._checked_array(source)
        if isinstance(source, Table) and source.version:
            self._rows()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checked": None}  # a copied memmap would be an array in memory

    def draw(self, rows: IntArray, lots: Lots) -> IntArray:
        """Rows of the documents for the queries ``rows`` (B,), from lots (B, 4 count): int64 (B, count)."""
        lots, more = np.split(lots, 2, axis=1)
        mined = self._rows()
        depth = self._depth or mined.shape[1]
        drawn: IntArray = mined[rows[:, None], distinct(lots, np.full(len(rows), depth))].astype(np.int64)
        if self._count > 1:
            ascending = np.sort(drawn, axis=1)
            for i in np.flatnonzero((ascending[:, 1:] == ascending[:, :-1]).any(axis=1)).tolist():
                drawn[i] = self._from_different(np.unique(mined[rows[i], :depth]), int(rows[i]), more[i : i + 1])
        outside = self._outside(drawn)
        if outside.any():
            i = int(outside.argmax())
            raise ValueError(
                f"{self._owner}(negatives={self.table!r:.80}): negatives are rows of the {self._documents} "
                f"documents, but query {rows[i]} has {drawn[i].tolist()}; mine them anew for these documents."
            )
        return drawn

    def _from_different(self, documents: NDArray[Any], query: int, lots: Lots) -> IntArray:
        """A draw that met one document twice is made once more, with lots of its own, from the row's different ones."""
        if len(documents) < self._count:
            raise ValueError(
                f"{self._owner}(count={self._count}): the negatives of query {query} are {len(documents)} different "
                f"documents only; lower count."
            )
        drawn: IntArray = documents[distinct(lots, np.array([len(documents)]))[0]].astype(np.int64)
        return drawn

    def _rows(self) -> NDArray[Any]:
        if not isinstance(self.table, Table):
            return self.table
        version = self.table.snapshot()
        if version is not self._checked:
            self._check_version(version)
            self._checked = version
        return version.arrays["negatives"]

    def _outside(self, ids: NDArray[Any]) -> NDArray[np.bool_]:
        """Which rows hold what is no document: bool, one a row."""
        outside: NDArray[np.bool_] = np.any((ids < 0) | (ids >= self._documents), axis=1)
        return outside

    def _check_version(self, version: Version) -> None:
        where = f"{self._owner}(negatives={self.table!r}), version {version.number}"
        if "negatives" not in version.arrays:
            raise ValueError(f"{where}: there is no array 'negatives', but {', '.join(version.arrays)}.")
        self._check_shape(where, version.arrays["negatives"])
        mined = version.meta.get("documents", self._documents)
        if mined != self._documents:
            raise ValueError(f"{where}: mined from {mined} documents, here are {self._documents}; mine it anew.")
        if version.fingerprint:
            own = self._fingerprint()
            if version.fingerprint.partition(":")[0] == own.partition(":")[0] and version.fingerprint != own:
                raise ValueError(
                    f"{where}: mined for data with the fingerprint {version.fingerprint!r}, these queries and "
                    f"documents have {own!r}; mine it anew, or take the data that it belongs to."
                )

    def _checked_array(self, negatives: Any) -> NDArray[Any]:
        where = f"{self._owner}(negatives=...)"
        if isinstance(negatives, (str, os.PathLike)):
            raise TypeError(f"{where}: a path is no table; give Table({os.fspath(negatives)!r}).")
        try:
            array = np.asarray(negatives.detach().cpu() if isinstance(negatives, Tensor) else negatives)
        except ValueError as error:
            raise ValueError(f"{where}: rows must be equally long, (Q, K); pad short ones: {error}.") from error
        self._check_shape(where, array)
        outside = self._outside(array)
        if outside.any():
            raise ValueError(
                f"{where}: negatives are rows of the {self._documents} documents, but those of queries "
                f"{some(outside)} hold others; pad short rows with random documents."
            )
        return array

    def _check_shape(self, where: str, negatives: NDArray[Any]) -> None:
        if negatives.ndim != 2 or len(negatives) != self._queries or not negatives.size:
            raise ValueError(
                f"{where}: negatives must be ({self._queries}, K), one row a query, not {negatives.shape}."
            )
        if negatives.dtype.kind not in "iu":
            raise TypeError(f"{where}: negatives must be integers, rows of the documents, not {negatives.dtype}.")
        most = negatives.shape[1]
        if self._depth is not None and self._depth > most:
            raise ValueError(f"{where}: depth={self._depth}, but rows have {most} negatives; lower it or mine more.")
        if self._count > (self._depth or most):
            raise ValueError(f"{where}: count={self._count} cannot come from {self._depth or most}; lower count.")
