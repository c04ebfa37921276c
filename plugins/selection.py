"""The best of a stream of scores: what search keeps of each matrix product.

Of each product only what beats a query's k best so far is looked at: maxima over blocks of documents find it in one
fast pass, so that the selection costs little beside the product (``topk`` over everything costs as much as it).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from samplewise.loaders.ragged import Ragged

BLOCK = 64  # documents under one maximum


class Found(NamedTuple):
    """The best documents of each query: highest similarity first, equal ones by id.

    Attributes:
        scores: float32 (Q, k), -inf where there is no document.
        ids: int64 (Q, k), rows of the documents, -1 where there is none.
        above: int64 (Q,), documents left out for a score above the query's ceiling.
    """

    scores: Tensor
    ids: Tensor
    above: Tensor


class Best:
    """The k best documents so far of each of some queries; documents come in the order of their ids."""

    def __init__(self, count: int, k: int, device: torch.device):
        self.k = k
        self.scores = torch.empty(count, 0, device=device)
        self.ids = torch.empty(count, 0, dtype=torch.int64, device=device)
        self.above = torch.zeros(count, dtype=torch.int64, device=device)
        self.ceiling: Tensor | None = None
        self.hidden = torch.empty(2, 0, dtype=torch.int64)  # (row, document) pairs, by document

    def hide(self, exclude: Ragged | None, rows: slice, first_id: int) -> None:
        """Leave out the ids of ``exclude``'s ``rows``; document 0 has the id ``first_id``."""
        if exclude is not None:
            part = exclude.take(np.arange(rows.start, rows.stop))
            pairs = np.stack([part.row_numbers(), part.values - first_id])
            self.hidden = torch.from_numpy(pairs[:, pairs[1].argsort(kind="stable")])

    def add(self, scores: Tensor, low: int, count: int) -> bool:
        """Consider ``count`` documents from ``low`` on; False, and nothing else, where a score is NaN or +inf.

        Args:
            scores: float32 (rows, m), m a multiple of ``BLOCK`` and at least ``count``; written to.
            low: the first document.
            count: how many there are.
        """
        scores[:, count:] = -torch.inf
        span = torch.searchsorted(self.hidden[1].contiguous(), torch.tensor([low, low + count]))
        row, document = self.hidden[:, int(span[0]) : int(span[1])].to(scores.device)
        scores[row, document - low] = -torch.inf
        if self.ceiling is not None:
            over = scores > self.ceiling[:, None]
            self.above += over.sum(1)
            scores.masked_fill_(over, -torch.inf)
        blocks = scores.unflatten(1, (-1, BLOCK))
        maxima = blocks.amax(2)
        if not (maxima < torch.inf).all():
            return False
        hit = maxima > self.scores[:, -1:] if self.scores.shape[1] == self.k else None
        if hit is None or hit.sum() > hit.numel() // 4:
            values, columns = best_columns(scores, self.k)
        else:
            values, columns = self._better(blocks, hit)
        values, ids = torch.cat([self.scores, values], 1), torch.cat([self.ids, columns + low], 1)
        self.scores, self.ids = highest(values, ids, self.k)
        return True

    def _better(self, blocks: Tensor, hit: Tensor) -> tuple[Tensor, Tensor]:
        """What beats a row's worst, from the blocks (rows, m / BLOCK, BLOCK) that were hit.

        An equal score does not beat it: the documents that are there have lower ids.

        Returns:
            Scores (rows, h), -inf where a row has fewer, and columns (rows, h), ascending in each row.
        """
        row, block = hit.nonzero(as_tuple=True)
        inside = blocks[row, block]
        which, offset = (inside > self.scores[row, -1:]).nonzero(as_tuple=True)
        row, column = row[which], block[which] * BLOCK + offset
        counts = torch.bincount(row, minlength=len(hit))
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        values = self.scores.new_full((len(hit), int(counts.max())), -torch.inf)
        columns = torch.zeros_like(values, dtype=torch.int64)
        values[row, place], columns[row, place] = inside[which, offset], column
        return values, columns

    def found(self, first_id: int) -> Found:
        """The best of all that was added."""
        missing = self.k - self.scores.shape[1]
        scores = F.pad(self.scores, (0, missing), value=-torch.inf)
        ids = F.pad(self.ids + first_id, (0, missing), value=-1)
        return Found(scores, ids.masked_fill_(scores == -torch.inf, -1), self.above)


def best_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, among equal ones the first: scores (rows, k) and columns (rows, k), ascending."""
    values, columns = scores.topk(min(k + 1, scores.shape[1]))
    chosen = (
        values[:, k - 1 :].diff(dim=1) == 0
    )  # a choice among equals, of which topk takes any; (rows, 1) or (rows, 0)
    columns = columns[:, :k]
    for rows in chosen.any(1).nonzero()[:, 0].split(32):
        columns[rows] = scores[rows].sort(dim=1, descending=True, stable=True).indices[:, : columns.shape[1]]
    columns = columns.sort(1).values
    return scores.gather(1, columns), columns


def highest(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row; equal ones keep their order."""
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), ids.gather(1, order)
