"""Ranked candidates of queries, from what a search found to the rows of a table: pure functions on arrays.

A list of candidates is int64 (q, k) ids with float32 (q, k) scores, best first, -1 behind the last one of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samplewise.loaders.ragged import Ragged
from samplewise.loaders.seeding import generator

Ids = NDArray[np.int64]
Scores = NDArray[np.float32]
RRF = 60  # the constant of reciprocal rank fusion (Cormack et al., SIGIR 2009)


def union(*parts: Ragged) -> Ragged:
    """The ids of each row of all parts together, ascending, each once."""
    rows = np.concatenate([part.row_numbers() for part in parts])
    values = np.concatenate([part.values for part in parts])
    order = np.lexsort((values, rows))
    rows, values = rows[order], values[order]
    first = np.ones(len(rows), dtype=np.bool_)
    first[1:] = (rows[1:] != rows[:-1]) | (values[1:] != values[:-1])
    lengths = np.bincount(rows[first], minlength=len(parts[0]))
    return Ragged(values[first], np.concatenate(([0], np.cumsum(lengths))).astype(np.int64))


def keep(ids: Ids, scores: Scores, kept: NDArray[np.bool_], width: int) -> tuple[Ids, Scores]:
    """The first ``width`` of each row where ``kept`` bool (q, k), moved to the front: (q, width) each."""
    places = np.cumsum(kept, axis=1) - 1
    rows, columns = np.nonzero(kept & (places < width))
    out_ids = np.full((len(ids), width), -1, dtype=np.int64)
    out_scores = np.full((len(ids), width), np.nan, dtype=np.float32)
    out_ids[rows, places[rows, columns]] = ids[rows, columns]
    out_scores[rows, places[rows, columns]] = scores[rows, columns]
    return out_ids, out_scores


def is_in(ids: Ids, rows: Ragged) -> NDArray[np.bool_]:
    """Whether each id (q, k) stands in its row: bool (q, k)."""
    size = max(int(rows.values.max(initial=0)), int(ids.max(initial=0))) + 1
    keys = ids + np.arange(len(ids))[:, None] * size
    return np.isin(keys, rows.values + rows.row_numbers() * size) & (ids >= 0)


def fuse(lists: Sequence[tuple[Ids, Scores]], width: int) -> tuple[Ids, Scores]:
    """Merge several lists of the same queries by reciprocal rank, ``sum over lists of 1 / (60 + rank)``, ties by id."""
    ids = np.concatenate([part for part, _ in lists], axis=1)
    scores = np.concatenate([part for _, part in lists], axis=1)
    votes = np.concatenate(
        [np.broadcast_to(1 / (RRF + 1 + np.arange(part.shape[1])), part.shape) for part, _ in lists], 1
    )
    order = np.argsort(ids, axis=1, kind="stable")
    ids, scores, votes = (np.take_along_axis(part, order, 1) for part in (ids, scores, votes))
    first = np.ones(ids.shape, dtype=np.bool_)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    group = np.cumsum(first) - 1
    total = np.bincount(group.ravel(), weights=votes.ravel())[group].reshape(ids.shape)
    order = np.argsort(-np.where(first, total, -1), axis=1, kind="stable")
    ids, scores, first = (np.take_along_axis(part, order, 1) for part in (ids, scores, first))
    return keep(ids, scores, first & (ids >= 0), width)


def pad(ids: Ids, known: Ragged, documents: int, seed: int, queries: Ids) -> None:
    """Fill up short rows, in place, with random documents that are neither known nor in the row already.

    Where there are too few of those, all that are possible are repeated.

    Args:
        ids: int64 (q, K), -1 at the end of short rows.
        known: for each row, documents that must not be drawn.
        documents: D.
        seed: key of the draw, with the query's number.
        queries: int64 (q,), the numbers of the queries.

    Raises:
        ValueError: a row that is empty, of a query for which all documents are known.
    """
    for row in np.flatnonzero(ids[:, -1] < 0).tolist():
        have = ids[row][ids[row] >= 0]
        taken = np.concatenate([have, known[row]])
        missing = ids.shape[1] - len(have)
        rng = generator(seed, int(queries[row]), "padding")
        drawn = rng.choice(documents, size=min(documents, missing + len(taken)), replace=False)
        drawn = drawn[~np.isin(drawn, taken)][:missing]
        if not len(drawn) + len(have):
            raise ValueError(f"Query {queries[row]} has no negative: all {documents} documents are its positives.")
        ids[row, len(have) :] = np.resize(drawn if len(drawn) == missing else np.concatenate([drawn, have]), missing)


def check_list(owner: str, candidates: Any, queries: int, documents: int) -> Ids:
    """A pool as int64 (Q, k).

    Raises:
        TypeError: no integers.
        ValueError: another number of queries, or ids outside [-1, D).
    """
    ids = np.asarray(candidates)
    if ids.dtype.kind not in "iu" or ids.ndim != 2:
        raise TypeError(f"{owner}(pools): a pool must be an int array (Q, k), not {ids.dtype}{ids.shape}.")
    if len(ids) != queries:
        raise ValueError(f"{owner}(pools): a pool has {len(ids)} rows for {queries} queries; give one row a query.")
    if ids.size and not (ids.min() >= -1 and ids.max() < documents):
        raise ValueError(
            f"{owner}(pools): a pool holds ids from {ids.min()} to {ids.max()}; they must be document rows in "
            f"[0, {documents}), or -1 for none."
        )
    return ids.astype(np.int64, copy=False)
