"""Other retrievers than exact search: BM25, whose candidates can join a mining, and faiss for very large corpora."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samplewise.cuda_ext.checks import integer, optional_import
from samplewise.plugins.candidates import Ids, Scores
from samplewise.plugins.search import Embeddings, Search, Similarity, as_float32, check_embeddings

TRAINING_ROWS = 4_000_000  # documents that an index of faiss is trained on, at most


def bm25_candidates(
    documents: Sequence[str],
    queries: Sequence[str],
    k: int,
    *,
    stopwords: str | list[str] = "en",
    progress: bool = True,
) -> tuple[Ids, Scores]:
    """The best documents by BM25 (bm25s, ``samplewise[retrieval]``), for the ``pools`` of a mining.

    Args:
        documents: D texts.
        queries: Q texts.
        k: candidates for each query, in [1, D].
        stopwords: words to pass over: a language that bm25s knows, or a list.
        progress: show bars on a terminal.

    Returns:
        ids int64 (Q, k), highest score first, equal ones by id (which of equal ones come last into the list is left to
        bm25s), -1 where a document has no word of the query; scores float32 (Q, k), NaN there.
    """
    bm25s = optional_import("bm25_candidates", "bm25s", "retrieval")
    k = integer("bm25_candidates", "k", k, 1, len(documents), what="at most the number of documents")
    shown = progress and sys.stderr.isatty()
    if len(queries) == 0:
        return np.empty((0, k), dtype=np.int64), np.empty((0, k), dtype=np.float32)
    words = [bm25s.tokenize(list(texts), stopwords=stopwords, show_progress=shown) for texts in (documents, queries)]
    if not words[0].vocab:
        raise ValueError("bm25_candidates(documents=...): there is no word in them but stopwords.")
    index = bm25s.BM25(backend="numpy")
    index.index(words[0], show_progress=shown)
    ids, scores = index.retrieve(words[1], k=k, show_progress=shown, backend_selection="numpy")
    order = np.lexsort((ids, -scores))
    ids, scores = (np.take_along_axis(part, order, 1) for part in (ids.astype(np.int64), scores))
    return np.where(scores > 0, ids, -1), np.where(scores > 0, scores, np.nan).astype(np.float32)


def faiss_search(doc_emb: Embeddings, *, factory: str = "Flat", similarity: Similarity = "dot") -> Search:
    """An index of faiss (``samplewise[faiss]``) over the documents, for corpora that are too large for exact search.

    Args:
        doc_emb: (D, E).
        factory: what ``faiss.index_factory`` takes, for example ``"IVF4096,Flat"`` or ``"HNSW32"``; an index that needs
            training is trained on the documents.
        similarity: ``"dot"`` or ``"cosine"``.

    Returns:
        A search for :func:`~samplewise.plugins.mine_hard_negatives` and for ADORE's loss.
    """
    faiss = optional_import("faiss_search", "faiss", "faiss")
    documents, _ = check_embeddings("faiss_search", doc_emb, doc_emb[:1])
    index = faiss.index_factory(documents.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    chunks = torch.arange(len(documents)).split(1 << 16)
    cpu = torch.device("cpu")

    def vectors(part: Tensor) -> NDArray[np.float32]:
        low, high = int(part[0]), int(part[-1]) + 1
        values: NDArray[np.float32] = as_float32(documents[low:high], cpu, similarity).numpy()
        return values

    if not index.is_trained:
        index.train(np.concatenate([vectors(part) for part in chunks[: TRAINING_ROWS >> 16]]))
    for part in chunks:
        index.add(vectors(part))

    def find(query_emb: Tensor, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        query = as_float32(query_emb.detach(), cpu, similarity).numpy()
        scores, ids = index.search(query, k)
        return scores, ids

    find.similarity = similarity  # type: ignore[attr-defined]  # compared with that of the mining
    return find
