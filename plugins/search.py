"""Exact search: the documents with the highest similarity to each query, in bounded memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from samplewise.cuda_ext.checks import choice, integer, optional_import
from samplewise.cuda_ext.ranks import gather_rows, world_size
from samplewise.loaders.ragged import Ragged
from samplewise.plugins.selection import BLOCK, Best, Found, highest

Similarity = Literal["dot", "cosine"]
Embeddings = Tensor | NDArray[Any]
Search = Callable[[Tensor, int], tuple[Any, Any]]
"""A retriever: from query embeddings (b, E) and k, scores (b, k), highest first, and document rows (b, k), or -1."""

QUERIES = 512  # searched at a time
_FIRST = 1024  # documents that are sorted outright; from there on the chunks grow
_GROWTH = 4
_BYTES = 96  # of a query's list while it is sorted, for each of its k documents
_CHECKED = 1 << 16  # rows looked at a time


def search(
    doc_emb: Embeddings,
    query_emb: Embeddings,
    k: int,
    *,
    similarity: Similarity = "dot",
    exclude: Ragged | None = None,
    ceiling: Tensor | None = None,
    first_id: int = 0,
    device: str | torch.device | None = None,
    buffer_mb: int = 256,
    progress: bool = False,
) -> Found:
    """The k documents with the highest ``q . d``, or cosine, for each query: the same as sorting all of them.

    Computed in float32, ``QUERIES`` queries and some ten thousand documents at a time.

    Args:
        doc_emb: (D, E), any floating-point dtype, on any device; a memory map is read chunk by chunk.
        query_emb: (Q, E).
        k: documents for each query; more than there are gives -1.
        similarity: ``"dot"`` or ``"cosine"``.
        exclude: for each query, ids that are not to be found.
        ceiling: float32 (Q,), documents that score higher are left out and counted.
        first_id: the id of document 0, where ``doc_emb`` is a part of the corpus.
        device: where it is computed; None: where ``query_emb`` lives.
        buffer_mb: most megabytes taken beside the arguments and the result, >= 16; a list of k documents and the
            products of one query must fit in.
        progress: show a bar on a terminal (with tqdm installed).

    Raises:
        ValueError: shapes that do not fit, an empty corpus, a similarity that is NaN or infinite.
    """
    found = _allocate(len(query_emb), k)
    blocks = search_blocks(
        doc_emb, query_emb, k, similarity=similarity, exclude=exclude, ceiling=ceiling, first_id=first_id,
        device=device, buffer_mb=buffer_mb, progress=progress,
    )  # fmt: skip
    for rows, part in blocks:
        for whole, values in zip(found, part, strict=True):
            whole[rows] = values.to(whole.device)
    return found


def search_blocks(
    doc_emb: Embeddings,
    query_emb: Embeddings,
    k: int,
    *,
    similarity: Similarity = "dot",
    exclude: Ragged | None = None,
    ceiling: Tensor | None = None,
    first_id: int = 0,
    device: str | torch.device | None = None,
    buffer_mb: int = 256,
    progress: bool = False,
) -> Iterator[tuple[slice, Found]]:
    """As :func:`search`, some queries at a time: yields their rows and what was found."""
    documents, queries = check_embeddings("search", doc_emb, query_emb)
    k = integer("search", "k", k, 1)
    choice("search", "similarity", similarity, "dot", "cosine")
    device = torch.device(device or queries.device)
    if exclude is not None:
        exclude = Ragged.from_lists(exclude, "search(exclude)")
    for name, rows_of in (("exclude", exclude), ("ceiling", ceiling)):
        if rows_of is not None and len(rows_of) != len(queries):
            raise ValueError(f"search({name}): {len(rows_of)} rows for {len(queries)} queries; give one a query.")
    buffer = integer("search", "buffer_mb", buffer_mb, 16) << 20
    many = max(1, min(QUERIES, len(queries), buffer // (_BYTES * k)))
    most = _chunk_size(buffer, many, documents.shape[1])
    first = max(k, min(most, _FIRST * QUERIES // many))  # the fewer queries, the fewer and larger the chunks
    bar = progress_bar("searching", len(queries), progress)
    memory = torch.empty(many * max(most, -(-first // BLOCK) * BLOCK), device=device)
    for start in range(0, len(queries), many):
        rows = slice(start, min(start + many, len(queries)))
        query = as_float32(queries[rows], device, similarity)
        best = Best(len(query), k, device)
        best.hide(exclude, rows, first_id)
        best.ceiling = None if ceiling is None else ceiling[rows].to(device, torch.float32)
        for low, high in _chunks(len(documents), first, most):
            document = as_float32(documents[low:high], device, similarity)
            if filling := -len(document) % BLOCK:
                document = F.pad(document, (0, 0, 0, filling))
            scores = memory[: len(query) * len(document)].view(len(query), len(document))
            torch.mm(query, document.T, out=scores)
            if not best.add(scores, low, high - low):
                check_finite(documents[low:high], "doc_emb", low)
                check_finite(queries[rows], "query_emb", start)
                raise ValueError("search: the products of the embeddings are more than float32 can hold; scale them.")
        bar.update(len(query))
        yield rows, best.found(first_id)
    bar.close()


def _chunks(size: int, first: int, most: int) -> Iterator[tuple[int, int]]:
    """Growing stretches of the documents, of whole blocks but for the last few documents."""
    low, length = 0, -(-first // BLOCK) * BLOCK
    while low < size:
        high = min(low + length, size)
        if high - low > BLOCK:
            high -= (high - low) % BLOCK
        yield low, high
        low, length = high, max(length, min(length * _GROWTH, most))


def merge_ranks(found: Found, k: int) -> Found:
    """One list from the lists that all ranks found in their parts of the corpus, the lower ids on the lower ranks.

    Collective. Without several processes, what was given.
    """
    if world_size() == 1:
        return found
    scores, ids, above = gather_rows(*found)
    shape = (world_size(), len(found.scores), -1)
    scores, ids = (part.view(shape).transpose(0, 1).flatten(1) for part in (scores, ids))
    return Found(*highest(scores, ids, k), above.view(world_size(), -1).sum(0))


def pair_scores(
    doc_emb: Embeddings,
    query_emb: Embeddings,
    ids: Tensor,
    *,
    similarity: Similarity = "dot",
    first_id: int = 0,
) -> Tensor:
    """The similarity of each query and its own documents ``ids`` int64 (Q, m): float32 (Q, m), on the CPU.

    -inf for an id that is not in ``[first_id, first_id + D)``.
    """
    documents, queries = check_embeddings("pair_scores", doc_emb, query_emb)
    out = torch.full(ids.shape, -torch.inf)
    rows, columns = torch.nonzero((ids >= first_id) & (ids < first_id + len(documents)), as_tuple=True)
    for part in torch.arange(len(rows)).split(1 << 14):
        row, column = rows[part], columns[part]
        wanted = (ids[row, column] - first_id).to(documents.device)
        document = as_float32(documents[wanted], queries.device, similarity)
        query = as_float32(queries[row.to(queries.device)], queries.device, similarity)
        out[row, column] = (query * document).sum(1).cpu()
    return out


def check_embeddings(owner: str, doc_emb: Embeddings, query_emb: Embeddings) -> tuple[Tensor, Tensor]:
    """Both as tensors that share the caller's memory.

    Raises:
        TypeError: no array or tensor of floating-point numbers.
        ValueError: shapes that do not fit, or an empty corpus.
    """
    documents, queries = (
        _tensor(owner, name, values) for name, values in (("doc_emb", doc_emb), ("query_emb", query_emb))
    )
    if len(documents) == 0:
        raise ValueError(f"{owner}(doc_emb={tuple(documents.shape)}): the corpus is empty; there must be a document.")
    if documents.shape[1] != queries.shape[1]:
        raise ValueError(
            f"{owner}: doc_emb has {documents.shape[1]} dimensions and query_emb {queries.shape[1]}; encode both with "
            f"the same model."
        )
    return documents, queries


def as_float32(values: Tensor, device: torch.device, similarity: Similarity) -> Tensor:
    """Embeddings in float32 on ``device``, of length 1 for the cosine."""
    values = values.to(device, torch.float32)
    return F.normalize(values, dim=1) if similarity == "cosine" else values


def check_finite(values: Tensor, name: str, first: int = 0) -> None:
    """Check embeddings (n, E) chunk by chunk; ``first`` is the number of the first row.

    Raises:
        ValueError: a row that is not finite.
    """
    for low in range(0, len(values), _CHECKED):
        part = values[low : low + _CHECKED]
        if part.numel() and not torch.stack(part.aminmax()).isfinite().all():
            row = first + low + int((~part.isfinite().all(1)).nonzero()[0])
            raise ValueError(f"{name}: row {row} holds NaN or infinity; check the encoder.")


def progress_bar(what: str, total: int, shown: bool) -> Any:
    """A bar of tqdm on a terminal; something as silent where it is not to be shown, or tqdm is missing."""
    try:
        tqdm: Any = optional_import("progress", "tqdm", "recipes").tqdm
    except ImportError:
        return _NoBar()
    return tqdm(total=total, desc=what, disable=None if shown else True)


class _NoBar:
    def update(self, count: int) -> None: ...

    def close(self) -> None: ...


def _allocate(count: int, k: int) -> Found:
    return Found(torch.empty(count, k), torch.empty(count, k, dtype=torch.int64), torch.empty(count, dtype=torch.int64))


def _chunk_size(buffer: int, queries: int, dimensions: int) -> int:
    """Documents at a time: two score matrices and three copies of the documents fit into the buffer."""
    chunk = buffer // (4 * (2 * queries + 3 * dimensions))
    return max(BLOCK, chunk // BLOCK * BLOCK)


def _tensor(owner: str, name: str, values: Any) -> Tensor:
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        values = values.copy() if min(values.strides, default=0) < 0 else values  # which torch cannot have
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read
            values = torch.from_numpy(values)
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = getattr(values, "dtype", type(values).__name__)
        raise TypeError(f"{owner}({name}={kind}): {name} must be floating-point embeddings, one row each.")
    if values.ndim != 2:
        raise ValueError(f"{owner}({name}={tuple(values.shape)}): {name} must have two dimensions, one row each.")
    return values.detach()
