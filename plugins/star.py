"""STAR: hard negatives that were mined before the epoch, beside those that the batch gives for nothing.

Zhan et al., "Optimizing Dense Retrieval Model Training with Hard Negatives", SIGIR 2021. A batch of B queries q_i, each
with a positive document d_i and n hard negatives; h_j, j = 1 ... B n, are the hard negatives of the whole batch:

    s_ij = q_i . d_j / T     m_ij = 1 unless d_j is a positive of q_i
    t_ij = q_i . h_j / T     w_ij = 1 unless h_j is a positive of q_i

    pooling="pairs":  L = (alpha sum m softplus(s_ij - s_ii) + sum w softplus(t_ij - s_ii)) / (alpha sum m + sum w)
    pooling="split":  L = alpha sum m softplus(s_ij - s_ii) / sum m + sum w softplus(t_ij - s_ii) / sum w     (Eq. 13)

The paper's training: LAMB at 1e-4, batches of 256, one hard negative a query from the top 200, 1,000 steps of warm-up,
gradients clipped at norm 1.

What differs from the public code: it pools all pairs with alpha = 1, the default here; documents and hard negatives
come from all ranks, with gradient; any number of hard negatives; masks by id, so that no copy of a positive is a
negative.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from samplewise.cuda_ext.checks import choice, share
from samplewise.cuda_ext.ranks import rank, world_size
from samplewise.loaders.negatives import known_positives
from samplewise.plugins.search import Similarity

Reduction = Literal["mean", "none"]


def star_loss(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    positive_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    known: Tensor | None = None,
    pooling: Literal["pairs", "split"] = "pairs",
    alpha: float = 1.0,
    temperature: float = 1.0,
    similarity: Similarity = "dot",
    reduction: Reduction = "mean",
    gather: bool = True,
) -> Tensor:
    """The loss of a STAR step, see the equations above.

    ::

        for batch in loader:  # of a RetrievalDataset, collated by CollateRetrieval
            q, d = model(batch["queries"]), model(batch["documents"])  # (B, E), (B + B n, E)
            losses = star_loss(
                q, d[: len(q)], d[len(q) :].unflatten(0, batch["negative_ids"].shape), reduction="none",
                positive_ids=batch["positive_ids"], negative_ids=batch["negative_ids"], known=batch["positives"],
            )
            sampler.observe(batch["sample_id"], losses).backward()  # each query's difficulty, for any sampler

    Collective where there are several processes, unless ``gather=False``: the documents are those of all ranks, and so
    are the sums below the fraction bars. The mean over the ranks of what each returns is the loss of the joined batch,
    and the mean of the gradients, which DDP takes, is its gradient: exactly what one process would compute. Shapes are
    compared first, in a small collective that the host waits for: batches of different sizes would hang.

    NaN and inf in the embeddings make the loss NaN: nothing waits for the device to look for them.

    Args:
        queries: (B, E) floating point. Scores and losses are computed in float32, in float64 where these are.
        positives: (B, E), the positive document of each query.
        negatives: (B, n, E), the hard negatives of each query; None for those of the batch only.
        positive_ids: integer (B,), rows of the positives. Without ids nothing is masked but s_ii.
        negative_ids: integer (B, n), rows of the hard negatives.
        known: integer (B, P), all positives of each query, padded with -1. None: the one in ``positive_ids``.
        pooling: ``"pairs"``, all pairs weigh the same, or ``"split"``, the in-batch and the hard ones have a mean each.
        alpha: weight of the in-batch pairs, >= 0; with 0 there are only hard (or random) negatives.
        temperature: T, > 0.
        similarity: ``"dot"``, or ``"cosine"``: all vectors at length 1, zero vectors left as they are.
        reduction: ``"mean"``, or ``"none"`` for what each query adds: B times its sums over the fraction bars, so that
            the mean is the loss.
        gather: with several processes, take the documents of all ranks.

    Returns:
        A scalar, or (B,), float32 or float64. 0, with a graph, where every pair is masked.

    Raises:
        TypeError: embeddings that are not floating point, ids that are no integers.
        ValueError: shapes that do not fit, ids for a part of the documents only, an argument outside its range, or
            batches of different shapes on the ranks.
    """
    count = _check_embeddings(queries, positives, negatives)
    _check_ids(len(queries), count, positive_ids, negative_ids, known)
    alpha = share("star_loss", "alpha", alpha, high=math.inf, ends="[)", what="the weight of the in-batch pairs")
    if alpha == 0 and count == 0:
        raise ValueError("star_loss(alpha=0, negatives=None): no pairs are left; give hard negatives, or alpha > 0.")
    temperature = share("star_loss", "temperature", temperature, high=math.inf, ends="()", what="what divides scores")
    choice("star_loss", "pooling", pooling, "pairs", "split")
    choice("star_loss", "similarity", similarity, "dot", "cosine")
    choice("star_loss", "reduction", reduction, "mean", "none")
    ranks = world_size() if gather else 1
    with torch.autocast(queries.device.type, enabled=False):
        query, own, documents = _prepared(queries, positives, negatives, similarity, temperature)
        own_ids = None if positive_ids is None else positive_ids[:, None].to(query.device, torch.int64)
        ids = None if own_ids is None else _beside(own_ids, negative_ids).T
        if ranks > 1:
            documents, ids = _joined(documents, ids)
        if own_ids is None or ids is None:
            masked = torch.zeros(len(query), *documents.shape[:2], dtype=torch.bool, device=query.device)
        else:
            masked = known_positives(_beside(own_ids, known), ids.flatten()).unflatten(1, ids.shape)
        masked[:, 0].diagonal(len(query) * rank() if ranks > 1 else 0).fill_(True)
        first = 0 if alpha > 0 else 1
        sums, pairs = _sums(query, own, documents[first:], masked[:, first:], 1 - first)
        if ranks > 1:
            dist.all_reduce(pairs)
        losses = _pooled(sums, pairs, alpha, pooling) * (len(query) * ranks)
    return losses.mean() if reduction == "mean" else losses


def unit(vectors: Tensor) -> Tensor:
    """The vectors (..., E) at length 1; a zero vector, and its gradient, as they are."""
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / length.masked_fill(length == 0, 1.0)


def _prepared(
    queries: Tensor, positives: Tensor, negatives: Tensor | None, similarity: Similarity, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries over T (B, E), s_ii (B,) and documents (1 + n, B, E), the positives first."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    query, documents = queries.to(dtype), positives.to(dtype)[None]
    if negatives is not None:
        documents = torch.cat([documents, negatives.to(dtype).transpose(0, 1)])
    if similarity == "cosine":
        query, documents = unit(query), unit(documents)
    query = query / temperature
    return query, (query * documents[0]).sum(1), documents


def _beside(own_ids: Tensor, others: Tensor | None) -> Tensor:
    """Each query's own positive (B, 1), then its ``others`` (B, k): int64 (B, 1 + k)."""
    return own_ids if others is None else torch.cat([own_ids, others.to(own_ids)], dim=1)


def _sums(query: Tensor, own: Tensor, documents: Tensor, masked: Tensor, in_batch: int) -> tuple[Tensor, Tensor]:
    """sum_j softplus(q_i . d_j - s_ii) over documents (k, M, E) that are not masked (B, k, M), and the number of pairs.

    (2, B) and (2,): of the first ``in_batch`` of the k, then of the others. exp(-inf) is 0 and so is its gradient, so
    that masking needs no second matrix. Above its threshold softplus is the identity: 20, the usual one, is too low for
    float64.
    """
    differences = torch.addmm(-own[:, None], query, documents.flatten(0, 1).T)
    losses = F.softplus(differences.masked_fill_(masked.flatten(1), -torch.inf), threshold=40)
    sums, pairs = losses.view(masked.shape).sum(2).T, (~masked).sum((0, 2))
    sums, pairs = (torch.stack([part[:in_batch].sum(0), part[in_batch:].sum(0)]) for part in (sums, pairs))
    return sums, pairs


def _pooled(sums: Tensor, pairs: Tensor, alpha: float, pooling: str) -> Tensor:
    """Sums (2, B) over the normalisers, from the numbers of pairs (2,) of the whole batch: (B,)."""
    pairs = pairs.to(sums.dtype)
    if pooling == "pairs":
        pairs = (alpha * pairs[0] + pairs[1]).expand(2)
    shares: Tensor = sums / pairs.masked_fill(pairs == 0, 1.0)[:, None]
    return alpha * shares[0] + shares[1]


# --- ranks ------------------------------------------------------------------------------------------------------------


class _GatherRows(torch.autograd.Function):
    """The rows of all ranks, in rank order; backward, each rank gets what all ranks' losses say about its own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return _gathered(rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


def _gathered(rows: Tensor) -> Tensor:
    out = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(out, rows.contiguous())
    return out


def _joined(documents: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Documents (1 + n, B, E) and their ids (1 + n, B) of all ranks: (1 + n, W B, E) and (1 + n, W B)."""
    mine = [*documents.shape, documents.element_size(), int(ids is not None)]
    everyone = _gathered(torch.tensor([mine], device=documents.device)).tolist()
    if any(other != mine for other in everyone):
        shapes = ", ".join(
            f"rank {number}: B={batch} n={kinds - 1} E={width} float{8 * size} {'with' if ids else 'without'} ids"
            for number, (kinds, batch, width, size, ids) in enumerate(everyone)
        )
        raise ValueError(
            f"star_loss: the ranks' batches differ ({shapes}). Give all ranks batches of one size, for example with "
            f"DataLoader(drop_last=True), or use gather=False."
        )
    kinds = (world_size(), len(documents))
    rows: Tensor = _GatherRows.apply(documents)  # type: ignore[no-untyped-call]
    documents = rows.unflatten(0, kinds).transpose(0, 1).flatten(1, 2)
    return documents, None if ids is None else _gathered(ids).unflatten(0, kinds).transpose(0, 1).flatten(1, 2)


# --- arguments --------------------------------------------------------------------------------------------------------


def _check_embeddings(queries: Tensor, positives: Tensor, negatives: Tensor | None) -> int:
    """The number n of hard negatives a query."""
    for name, values in (("queries", queries), ("positives", positives), ("negatives", negatives)):
        if not (values is None or (isinstance(values, Tensor) and values.is_floating_point())):
            kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"star_loss({name}={kind}): {name} must be a tensor of floating-point embeddings.")
    if queries.dim() != 2 or len(queries) == 0 or positives.shape != queries.shape:
        raise ValueError(
            f"star_loss: queries {tuple(queries.shape)} and positives {tuple(positives.shape)} must both be (B, E), a "
            f"positive for each of B >= 1 queries."
        )
    if negatives is None:
        return 0
    if negatives.dim() != 3 or (negatives.shape[0], negatives.shape[2]) != queries.shape:
        raise ValueError(
            f"star_loss(negatives={tuple(negatives.shape)}): negatives must be (B, n, E) with queries' (B, E), "
            f"{tuple(queries.shape)}; from rows in the order of the queries: negatives.unflatten(0, (B, n))."
        )
    return negatives.shape[1]


def _check_ids(
    batch: int, count: int, positive_ids: Tensor | None, negative_ids: Tensor | None, known: Tensor | None
) -> None:
    rows = {"positive_ids": (positive_ids, (batch,)), "negative_ids": (negative_ids, (batch, count))}
    for name, (ids, shape) in {**rows, "known": (known, (batch, -1))}.items():
        if ids is None:
            continue
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
            kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"star_loss({name}={kind}): {name} must be an int64 or int32 tensor of document rows.")
        if ids.dim() != len(shape) or any(
            size not in (-1, given) for size, given in zip(shape, ids.shape, strict=True)
        ):
            wanted = str(shape).replace("-1", "P")
            raise ValueError(f"star_loss({name}={tuple(ids.shape)}): {name} must have shape {wanted}.")
    if positive_ids is None and not (negative_ids is None and known is None):
        raise ValueError("star_loss(positive_ids=None): masks need positive_ids too: give them, or no ids at all.")
    if positive_ids is not None and negative_ids is None and count > 0:
        raise ValueError(
            "star_loss(negative_ids=None): negatives that are positives would not be masked: give their ids."
        )
