"""One mining of hard negatives in progress: from what was found for some queries to the table's rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samplewise.cuda_ext.ranks import gather_rows, rank, world_size
from samplewise.loaders.ragged import Ragged
from samplewise.loaders.table import Table
from samplewise.plugins import candidates
from samplewise.plugins.candidates import Ids, Scores
from samplewise.plugins.search import QUERIES, Search, Similarity, pair_scores
from samplewise.plugins.selection import Found

INF = float("inf")
_REDRAWS = 3  # of random filling that is above the ceiling


@dataclass
class Mining:
    """One mining in progress: its settings, and what it has counted."""

    documents: Tensor
    queries: Tensor
    relevant: Ragged
    known: Ragged
    top_k: int
    start: int
    stop: int | None
    similarity: Similarity
    first_id: int
    total: int
    sharded: bool
    seed: int
    floor: float
    pools: Sequence[Ids]
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("padded", "removed", "margin", "hard"), 0))

    @property
    def depth(self) -> int:
        """Documents to find for each query."""
        return min(self.total, self.start + self.top_k)

    def similarities(self, ids: Ids, rows: slice) -> Tensor:
        """Of each query of ``rows`` and its documents ``ids`` (q, m): float32 (q, m), -inf for -1. Collective."""
        scores = pair_scores(
            self.documents,
            self.queries[rows],
            torch.from_numpy(ids),
            similarity=self.similarity,
            first_id=self.first_id,
        )
        if not self.sharded:
            return scores
        return gather_rows(scores)[0].view(world_size(), *scores.shape).amax(0)

    def positive_scores(self, rows: slice) -> Tensor:
        """Of each query of ``rows`` and its positives, -inf behind the last: float32 (q, P)."""
        return self.similarities(self.relevant.take(np.arange(rows.start, rows.stop)).padded(), rows)

    def bound(self, margin: float | None, relative_margin: float | None, max_score: float) -> None:
        """Set the highest score of a negative of each query, and p."""
        self.best = torch.cat([self.positive_scores(rows).amax(1) for rows in _slices(len(self.queries))])
        self.ceiling: Tensor | None = None
        limits = [torch.full_like(self.best, max_score)]
        limits += [self.best - margin] if margin is not None else []
        limits += [self.best - relative_margin * self.best.abs()] if relative_margin is not None else []
        if len(limits) > 1 or max_score < INF:
            self.ceiling = torch.stack(limits).amin(0)

    def searched(self, search: Search) -> Iterator[tuple[slice, Found]]:
        """What a given retriever finds: more than is needed, since what is known comes with it."""
        for rows in _slices(len(self.queries)):
            known = self.known.take(np.arange(rows.start, rows.stop))
            spare = int(known.lengths.max()) + (self.top_k if self.ceiling is not None else 0)
            size = min(self.total, self.depth + spare)
            ids, scores = check_found(search(self.queries[rows], size), rows.stop - rows.start, size, self.total)
            fresh = (ids >= 0) & ~candidates.is_in(ids, known)
            above = np.zeros_like(fresh) if self.ceiling is None else scores > self.ceiling[rows, None].numpy()
            ids, scores = candidates.keep(ids, scores, fresh & ~above, self.depth)
            count = torch.from_numpy((fresh & above).sum(1))
            yield rows, Found(torch.from_numpy(scores).nan_to_num(-INF), torch.from_numpy(ids), count)

    def writing(self, table: Table, meta: dict[str, Any]) -> AbstractContextManager[Mapping[str, NDArray[Any]] | None]:
        """A new version of the table, on the rank that writes it."""
        if self.sharded and rank() > 0:
            return nullcontext()
        lists, values = (len(self.queries), self.top_k), (len(self.queries),)
        return table.writing(
            {
                "negatives": (lists, np.int32), "found": (values, np.int32),
                "scores": (lists, np.float32), "positive_scores": (values, np.float32),
            },
            meta=meta,
        )  # fmt: skip

    def write(self, arrays: Mapping[str, NDArray[Any]] | None, rows: slice, found: Found) -> None:
        """From what was found to the table's rows."""
        known = self.known.take(np.arange(rows.start, rows.stop))
        ids, scores = self._lists(rows, found, known)
        self._count(rows, ids, scores, found, known)
        full = self._filled(ids, rows, known)
        if arrays is None:
            return
        arrays["found"][rows] = (ids >= 0).sum(1)
        arrays["scores"][rows] = scores
        arrays["positive_scores"][rows] = self.best[rows]
        arrays["negatives"][rows] = full

    def _lists(self, rows: slice, found: Found, known: Ragged) -> tuple[Ids, Scores]:
        """The range of ranks, then the floor, then the pools: (q, K) each."""
        above, places = found.above.cpu().numpy()[:, None], np.arange(found.ids.shape[1])
        ids, scores = found.ids.cpu().numpy(), found.scores.cpu().numpy()
        wanted = (ids >= 0) & (scores >= self.floor) & (places >= self.start - above)
        if self.stop is not None:
            wanted &= places < self.stop - above
        lists = [candidates.keep(ids, scores, wanted, self.top_k)]
        ceiling = INF if self.ceiling is None else self.ceiling[rows, None].numpy()
        for pool in self.pools:
            ids, scores = pool[rows], self.similarities(pool[rows], rows).numpy()
            wanted = (ids >= 0) & ~candidates.is_in(ids, known) & (scores >= self.floor) & (scores <= ceiling)
            lists.append(candidates.keep(ids, scores, wanted, self.top_k))
        return lists[0] if len(lists) == 1 else candidates.fuse(lists, self.top_k)

    def _filled(self, ids: Ids, rows: slice, known: Ragged) -> Ids:
        """The lists with their short rows filled up; what is above the ceiling is drawn again, a few times."""
        full: Ids = ids.copy()
        numbers = np.arange(rows.start, rows.stop)
        candidates.pad(full, known, self.total, self.seed, numbers)
        if self.ceiling is None or not (ids < 0).any():
            return full
        ceiling = self.ceiling[rows, None].numpy()
        for _ in range(_REDRAWS):
            filling = np.where(ids < 0, full, -1)
            above = self.similarities(filling, rows).numpy() > ceiling
            offsets = np.concatenate(([0], np.cumsum(above.sum(1)))).astype(np.int64)
            known = candidates.union(known, Ragged(filling[above], offsets))
            above[known.lengths >= self.total] = False  # nothing else is left
            full, _ = candidates.keep(full, np.zeros_like(full, dtype=np.float32), ~above, self.top_k)
            candidates.pad(full, known, self.total, self.seed, numbers)
        return full

    def _count(self, rows: slice, ids: Ids, scores: Scores, found: Found, known: Ragged) -> None:
        """What stands in the way of a plain top K: the known, and what is above the ceiling."""
        plain = found.scores[:, : self.top_k].cpu().numpy()
        before = np.arange(plain.shape[1]) + found.above.cpu().numpy()[:, None]
        hidden = self.similarities(known.padded(), rows).numpy()
        for column in range(hidden.shape[1]):
            before += hidden[:, column : column + 1] > plain
        inside = (np.isfinite(plain) & (before < self.top_k)).sum()
        hard = ids[:, 0] >= 0
        self.counts["padded"] += int((ids < 0).sum())
        self.counts["removed"] += float(len(ids) * min(self.top_k, self.total) - inside)
        self.counts["margin"] += float((self.best[rows].numpy() - scores[:, 0])[hard].sum(dtype=np.float64))
        self.counts["hard"] += int(hard.sum())

    def figures(self) -> dict[str, Any]:
        """For the table's meta."""
        counts, entries = self.counts, len(self.queries) * self.top_k
        margin = counts["margin"] / counts["hard"] if counts["hard"] else None
        return {"padded": int(counts["padded"]), "removed": counts["removed"] / max(entries, 1), "margin": margin}


def check_found(found: tuple[Any, Any], count: int, size: int, total: int) -> tuple[Ids, Scores]:
    """What a retriever gave as ids int64 (count, size), -1 for none, and scores float32, best first.

    Raises:
        ValueError: another shape, or ids that are no documents.
    """
    scores, ids = (np.asarray(part.cpu() if isinstance(part, Tensor) else part) for part in found)
    if ids.shape != (count, size) or scores.shape != ids.shape or not (ids.min() >= -1 and ids.max() < total):
        raise ValueError(
            f"search: it must give scores and ids of {count} queries, {size} each, the ids in [-1, {total}); it gave "
            f"scores {scores.shape} and ids {ids.shape} from {ids.min(initial=0)} to {ids.max(initial=0)}."
        )
    return ids.astype(np.int64, copy=False), np.where(ids < 0, -np.inf, scores).astype(np.float32)


def _slices(size: int) -> list[slice]:
    return [slice(low, min(low + QUERIES, size)) for low in range(0, size, QUERIES)]
