"""ADORE: train the query encoder on what it retrieves now, from an index of documents that stays as it is.

Zhan et al., "Optimizing Dense Retrieval Model Training with Hard Negatives", SIGIR 2021. For a query q, the K documents
that the current encoder ranks first, then the positives that are not among them, have ranks 1, 2, ...; y_j = q . d_j /
T. Over all pairs of a positive p and a retrieved document n that is none:

    l_q = mean softplus(-(y_p - y_n)) |1/rank_p - 1/rank_n|     1/rank = 0 beyond metric_cut     L = mean l_q

The paper's training: a query encoder that STAR trained, AdamW at 5e-6, batches of 32, 2,000 steps of warm-up, K = 200,
metric_cut = 200; no clipping but at the optimizer's step.

What differs from the public code: any number of positives a query, all in one tensor; several appended positives take
the ranks K + 1, K + 2, ... in the order in which they were given.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from samplewise.cuda_ext.checks import choice, integer, share
from samplewise.loaders.negatives import check_positives
from samplewise.loaders.ragged import Ragged
from samplewise.plugins.search import Embeddings, Search, Similarity, check_embeddings
from samplewise.plugins.search import search as exact_search
from samplewise.plugins.star import Reduction, unit


def rank_weights(
    retrieved: Tensor, positives: Tensor, *, metric_cut: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """|1/rank_p - 1/rank_n| of each positive and each retrieved document.

    Args:
        retrieved: int64 (B, K), document rows, the best first; -1 for none.
        positives: int64 (B, P), padded with -1.
        metric_cut: last rank that counts.
        dtype: of the weights.

    Returns:
        Weights (B, P, K), 0 where there is no pair, and bool (B, P, K): where there is one.

    >>> rank_weights(torch.tensor([[7, 4, 9]]), torch.tensor([[4, 5]]), metric_cut=200)[0]
    tensor([[[0.5000, 0.0000, 0.1667],
             [0.7500, 0.0000, 0.0833]]])
    """
    listed = positives >= 0
    same = positives[:, :, None] == retrieved[:, None, :]
    found = same.any(2)
    appended = retrieved.shape[1] + (listed & ~found).cumsum(1)
    rank = torch.where(found, same.byte().argmax(2) + 1, appended)
    ranks = torch.arange(1, retrieved.shape[1] + 1, device=retrieved.device)
    value, values = (r.to(dtype).reciprocal().masked_fill(r > metric_cut, 0.0) for r in (rank, ranks))
    negative = (retrieved >= 0) & ~same.any(1)
    pairs = listed[:, :, None] & negative[:, None, :]
    return (value[:, :, None] - values).abs().masked_fill(~pairs, 0.0), pairs


class AdoreLoss:
    """The loss of an ADORE step, see the equations above.

    ::

        loss = AdoreLoss(doc_emb, positives)  # encoded once, for example by the encoder that STAR trained
        for ids, queries in loader:  # ids are the queries' rows in positives
            sampler.observe(ids, loss(query_encoder(queries), ids, reduction="none")).backward()

    The gradient reaches the query encoder only. With DDP each rank searches for its own queries; batches of one size
    on all ranks make the mean of their gradients the gradient of the joined batch. No nn.Module, so that the index is
    in no checkpoint.

    Args:
        doc_emb: (D, E) floating point, the index: a tensor, an array or a memory map, never copied. Each step's search
            reads all of it: a tensor on the queries' device is fastest.
        positives: the relevant documents of each query: Q lists of rows of ``doc_emb``, at least one each, or a Ragged.
        top_k: K, documents retrieved for a query, at most D.
        metric_cut: last rank that counts, >= 1.
        similarity: ``"dot"``, or ``"cosine"``.
        temperature: T, > 0; it does not change the ranks.
        search: a retriever in place of exact search, for example
            :func:`~samplewise.plugins.pools.faiss_search`: ``(query_emb (B, E), k) -> (scores, ids)``, both (B, k),
            the best first, id -1 for none.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument outside its range, queries without positives, no documents.
    """

    def __init__(
        self,
        doc_emb: Embeddings,
        positives: Ragged | Any,
        *,
        top_k: int = 200,
        metric_cut: int = 200,
        similarity: Similarity = "dot",
        temperature: float = 1.0,
        search: Search | None = None,
    ):
        documents, _ = check_embeddings("AdoreLoss", doc_emb, doc_emb[:1])
        choice("AdoreLoss", "similarity", similarity, "dot", "cosine")
        self.documents = documents.detach()
        self.positives = check_positives("AdoreLoss", positives, len(positives), len(documents))
        self.top_k = integer("AdoreLoss", "top_k", top_k, 1, len(documents), what="how many documents are retrieved")
        self.metric_cut = integer("AdoreLoss", "metric_cut", metric_cut, 1)
        self.similarity = similarity
        self.temperature = share("AdoreLoss", "temperature", temperature, high=math.inf, ends="()")
        self._search = search or functools.partial(exact_search, self.documents, similarity=similarity)

    def __call__(self, query_emb: Tensor, query_ids: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """The loss of a batch.

        Args:
            query_emb: (B, E) floating point, with its graph. Scores and losses are computed in float32, in float64
                where these are.
            query_ids: integer (B,), the queries' rows in ``positives``.
            reduction: ``"mean"``, or ``"none"`` for the loss of each query.

        Returns:
            A scalar, or (B,), float32 or float64. 0, with a graph, for a query that retrieves positives only.

        Raises:
            TypeError: embeddings that are not floating point, ids that are no integers.
            ValueError: shapes that do not fit, or embeddings that are not finite.
            IndexError: an id outside [0, Q).
        """
        choice("AdoreLoss", "reduction", reduction, "mean", "none")
        positives = self._positives_of(query_emb, query_ids)
        with torch.autocast(query_emb.device.type, enabled=False):
            query = query_emb.to(torch.promote_types(query_emb.dtype, torch.float32))
            retrieved = self._retrieved(query.detach())
            weights, pairs = rank_weights(retrieved, positives, metric_cut=self.metric_cut, dtype=query.dtype)
            scores = self._scores(query, torch.cat([retrieved, positives], dim=1))
            negative, positive = scores[:, None, : self.top_k], scores[:, self.top_k :, None]
            losses = F.softplus(negative - positive, threshold=40) * weights
            losses = losses.sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)
        return losses.mean() if reduction == "mean" else losses

    def _positives_of(self, query_emb: Tensor, query_ids: Tensor) -> Tensor:
        """Int64 (B, P), padded with -1, where the embeddings are."""
        if not isinstance(query_emb, Tensor) or not query_emb.is_floating_point():
            kind = query_emb.dtype if isinstance(query_emb, Tensor) else type(query_emb).__name__
            raise TypeError(f"AdoreLoss(query_emb={kind}): query_emb must be a tensor of floating-point embeddings.")
        width = self.documents.shape[1]
        if query_emb.dim() != 2 or len(query_emb) == 0 or query_emb.shape[1] != width:
            raise ValueError(f"AdoreLoss(query_emb={tuple(query_emb.shape)}): query_emb must be (B, {width}), B >= 1.")
        finite = query_emb.isfinite().all(1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise ValueError(f"AdoreLoss(query_emb=...): row {row} holds NaN or infinity; check the encoder.")
        if not isinstance(query_ids, Tensor) or query_ids.dtype not in (torch.int64, torch.int32):
            kind = query_ids.dtype if isinstance(query_ids, Tensor) else type(query_ids).__name__
            raise TypeError(f"AdoreLoss(query_ids={kind}): query_ids must be an int64 or int32 tensor of query rows.")
        if query_ids.shape != query_emb.shape[:1]:
            raise ValueError(
                f"AdoreLoss(query_ids={tuple(query_ids.shape)}): there must be one id for each of the {len(query_emb)} "
                f"rows of query_emb."
            )
        ids = query_ids.cpu().long().numpy()
        if ids.min() < 0 or ids.max() >= len(self.positives):
            raise IndexError(f"AdoreLoss(query_ids={ids}): ids must be in [0, {len(self.positives)}), the queries.")
        return torch.from_numpy(self.positives.take(ids).padded()).to(query_emb.device)

    @torch.no_grad()
    def _retrieved(self, query: Tensor) -> Tensor:
        ids = torch.as_tensor(self._search(query, self.top_k)[1], device=query.device)
        if ids.shape != (len(query), self.top_k) or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"AdoreLoss(search=...): it gave ids {ids.dtype} {tuple(ids.shape)}, which must be integers "
                f"{(len(query), self.top_k)}, -1 where fewer are found."
            )
        if ids.max() >= len(self.documents):
            raise ValueError(
                f"AdoreLoss(search=...): it gave document {int(ids.max())} of {len(self.documents)}; the index must be "
                f"that of doc_emb."
            )
        return ids.long()

    def _scores(self, query: Tensor, ids: Tensor) -> Tensor:
        """The scores (B, m) of documents ``ids`` (B, m); for -1 that of the last document, which no pair uses."""
        documents = self.documents[ids.to(self.documents.device)].to(query)
        if self.similarity == "cosine":
            query, documents = unit(query), unit(documents)
        return (documents @ (query / self.temperature)[:, :, None])[:, :, 0]
