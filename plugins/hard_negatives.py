"""Hard-negative mining: for each query the documents that the retriever ranks highest and that are not relevant.

Zhan et al., "Optimizing Dense Retrieval Model Training with Hard Negatives", SIGIR 2021 (static hard negatives, STAR).
Encode documents and queries with the model at hand; for a query q with judged documents P(q)

    H(q) = the top K of {d not in P(q)} by q . d        (exact, ties by id)

What is added: guards against false negatives (a margin to the positive, bounds on the score, a range of ranks, further
exclusions) and pools of other retrievers. Lists that come out short are filled up with random documents, and counted,
instead of being refused. The result is a :class:`~samplewise.loaders.Table`, which the workers of a training run read
while its next version is mined.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, TypedDict

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from samplewise.cuda_ext.checks import choice, integer, share
from samplewise.cuda_ext.ranks import gather_rows, rank, world_size
from samplewise.loaders.negatives import check_positives
from samplewise.loaders.ragged import Ragged
from samplewise.loaders.table import Table
from samplewise.plugins import candidates
from samplewise.plugins.mining import INF, Mining
from samplewise.plugins.search import (
    Embeddings,
    Search,
    Similarity,
    check_embeddings,
    check_finite,
    merge_ranks,
    search_blocks,
)

MOST_DOCUMENTS = 2**31 - 1  # a table holds int32


class MiningOptions(TypedDict, total=False):
    """The options of :func:`mine_hard_negatives` that a refresh passes on."""

    similarity: Similarity
    margin: float | None
    relative_margin: float | None
    max_score: float | None
    min_score: float | None
    ranks: tuple[int, int | None]
    exclude: Ragged | Sequence[Any] | None
    pools: Sequence[NDArray[Any]]
    seed: int
    buffer_mb: int
    progress: bool


def mine_hard_negatives(
    doc_emb: Embeddings,
    query_emb: Embeddings,
    positives: Ragged | Sequence[Any],
    *,
    top_k: int,
    similarity: Similarity = "dot",
    margin: float | None = None,
    relative_margin: float | None = None,
    max_score: float | None = None,
    min_score: float | None = None,
    ranks: tuple[int, int | None] = (0, None),
    exclude: Ragged | Sequence[Any] | None = None,
    pools: Sequence[NDArray[Any]] = (),
    search: Search | None = None,
    sharded: bool = False,
    out: Table | str | Path | None = None,
    fingerprint: str = "",
    seed: int = 0,
    device: str | torch.device | None = None,
    buffer_mb: int = 256,
    progress: bool = True,
) -> Table:
    """Find the hard negatives of every query and write them into a table.

    The documents are ranked by similarity, positives and exclusions left out. Of the ranks ``[a, b)``, those that pass
    the filters are kept, at most ``top_k``, hardest first. With p the highest similarity of the query's positives, a
    document of similarity s passes if ``s <= p - margin``, ``s <= p - relative_margin * |p|``, ``s <= max_score`` and
    ``s >= min_score``.

    Args:
        doc_emb: (D, E) document embeddings, a tensor, an array or a memory map, of any floating-point dtype.
        query_emb: (Q, E).
        positives: for each query the rows of its relevant documents, at least one.
        top_k: K, negatives to keep for each query, in [1, D].
        similarity: ``"dot"`` or ``"cosine"``.
        margin: least distance to the positive's similarity, >= 0.
        relative_margin: the same as a share of it, >= 0.
        max_score: highest similarity of a negative.
        min_score: lowest similarity of a negative.
        ranks: the first rank to take, from 0, and the one to stop before; None for no end.
        exclude: for each query, further documents that must not be its negatives.
        pools: candidates of other retrievers, int (Q, k) each, best first, -1 where there are fewer. They pass the same
            filters (``ranks`` apart); the lists, the embeddings' own among them, are merged by reciprocal rank, ``sum
            over lists of 1 / (60 + rank)``.
        search: a retriever in place of exact search, for example :func:`~samplewise.plugins.pools.faiss_search`; what
            it does not find cannot be mined.
        sharded: with several ranks, ``doc_emb`` is this rank's part of the corpus; the parts follow each other in the
            order of the ranks. All else is equal on all ranks, and ``out`` is a folder that all of them see.
        out: where to: a table, a folder, or None for a temporary one that lives as long as the table.
        fingerprint: of the data set, see :func:`~samplewise.loaders.negatives.corpus_fingerprint`.
        seed: key of the random documents that fill up short lists; such a document above the filters' highest
            similarity is drawn again, a few times.
        device: where to compute; None: where ``query_emb`` lives.
        buffer_mb: most megabytes that the search takes beside the arguments and the result.
        progress: show a bar on a terminal (with tqdm installed).

    Returns:
        The table at its new version: ``negatives`` int32 (Q, K), hardest first; ``found`` int32 (Q,), how many of them
        were mined, the others being random; ``scores`` float32 (Q, K), their similarities, NaN where random;
        ``positive_scores`` float32 (Q,), p. ``table.snapshot().meta`` has ``padded`` (random entries), ``removed``
        (share of a plain top K that are positives, exclusions, or above the filters' highest similarity), ``margin``
        (mean of p minus the hardest negative's similarity, None where none was found), ``seconds``, and the settings.

    Raises:
        TypeError: embeddings that are no floating-point arrays; ids that are no integers.
        ValueError: embeddings that do not fit each other or are not finite, an empty corpus, a query without positives
            or without any possible negative, K larger than the corpus, ids out of range, an empty range.
    """
    begin = perf_counter()
    owner = "mine_hard_negatives"
    choice(owner, "similarity", similarity, "dot", "cosine")
    documents, queries = _checked(owner, doc_emb, query_emb, sharded)
    if search is not None and sharded and world_size() > 1:
        raise ValueError(
            f"{owner}(search=..., sharded=True): a retriever of one's own searches the whole corpus: mine on "
            f"one rank, with sharded=False."
        )
    if getattr(search, "similarity", similarity) != similarity:
        raise ValueError(
            f"{owner}(similarity={similarity!r}): the retriever was made with another; give both the same."
        )
    first_id, total = _place(len(documents), sharded)
    what = f"the negatives kept for each query, at most the number of documents ({total}),"
    top_k = integer(owner, "top_k", top_k, 1, min(total, MOST_DOCUMENTS), what=what)
    relevant, known = _known(owner, positives, exclude, len(queries), total)
    start, stop = _check_ranks(owner, ranks)
    mining = Mining(
        documents, queries, relevant, known, top_k, start, stop, similarity=similarity, first_id=first_id,
        total=total, sharded=sharded, seed=seed, floor=_number(owner, "min_score", min_score, -INF),
        pools=[candidates.check_list(owner, pool, len(queries), total) for pool in pools],
    )  # fmt: skip
    mining.bound(
        _number(owner, "margin", margin, None, 0.0),
        _number(owner, "relative_margin", relative_margin, None, 0.0),
        _number(owner, "max_score", max_score, INF),
    )
    if search is None:
        blocks = search_blocks(
            documents, queries, mining.depth, similarity=similarity, exclude=known, ceiling=mining.ceiling,
            first_id=first_id, device=device, buffer_mb=buffer_mb, progress=progress and rank() == 0,
        )  # fmt: skip
    else:
        blocks = mining.searched(search)
    table = _open(owner, out, fingerprint, sharded)
    filters = {"margin": margin, "relative_margin": relative_margin, "max_score": max_score, "min_score": min_score}
    meta: dict[str, Any] = {
        "documents": total, "queries": len(queries), "top_k": top_k, "similarity": similarity, "seed": seed,
        "filters": {**filters, "ranks": [start, stop], "pools": len(pools)},
    }  # fmt: skip
    with mining.writing(table, meta) as arrays:
        for rows, found in blocks:
            mining.write(arrays, rows, merge_ranks(found, mining.depth) if sharded else found)
        meta |= mining.figures() | {"seconds": perf_counter() - begin}
    if sharded and world_size() > 1:
        dist.barrier()
    if 2 * meta["padded"] > len(queries) * top_k and rank() == 0:
        warnings.warn(
            f"{owner}: {meta['padded']:,} of {len(queries) * top_k:,} negatives are random, since so few documents "
            f"pass the filters; loosen them or lower top_k.",
            stacklevel=2,
        )
    return table


def _checked(owner: str, doc_emb: Embeddings, query_emb: Embeddings, sharded: bool) -> tuple[Tensor, Tensor]:
    """The embeddings as tensors; what is wrong with one rank's part is raised on all, since the others would wait."""
    fault = ""
    try:
        documents, queries = check_embeddings(owner, doc_emb, query_emb)
        check_finite(documents, "doc_emb")
        check_finite(queries, "query_emb")
        if len(queries) == 0:
            raise ValueError(f"{owner}(query_emb={tuple(queries.shape)}): there must be a query.")
    except (TypeError, ValueError) as error:
        if not sharded or world_size() == 1:
            raise
        fault = str(error)
    if sharded and world_size() > 1:
        faults: list[str] = [""] * world_size()
        dist.all_gather_object(faults, fault)
        fault = "; ".join(f"rank {number}: {text}" for number, text in enumerate(faults) if text)
    if fault:
        raise ValueError(fault)
    return documents, queries


def _place(size: int, sharded: bool) -> tuple[int, int]:
    """The id of this rank's first document, and the documents on all ranks."""
    if not sharded or world_size() == 1:
        return 0, size
    sizes = gather_rows(torch.tensor([size]))[0]
    return int(sizes[: rank()].sum()), int(sizes.sum())


def _known(owner: str, positives: Any, exclude: Any, queries: int, documents: int) -> tuple[Ragged, Ragged]:
    """The positives, and with them all that is no negative."""
    relevant = check_positives(owner, positives, queries, documents)
    known = candidates.union(relevant)
    if exclude is not None:
        more = Ragged.from_lists(exclude, f"{owner}(exclude)")
        if len(more) != queries or (more.values.size and not 0 <= more.values.min() <= more.values.max() < documents):
            raise ValueError(
                f"{owner}(exclude): {len(more)} rows with ids from {more.values.min(initial=0)} to "
                f"{more.values.max(initial=0)}; give one row a query ({queries}), of document rows in [0, {documents})."
            )
        known = candidates.union(relevant, more)
    if (full := np.flatnonzero(known.lengths >= documents)).size:
        raise ValueError(
            f"{owner}: all {documents} documents are positives of query {full[0]}, or excluded, so that it has no "
            f"negative; leave it out ({full.size} such queries)."
        )
    return relevant, known


def _check_ranks(owner: str, ranks: tuple[int, int | None]) -> tuple[int, int | None]:
    try:
        start, stop = ranks
    except (TypeError, ValueError):
        raise TypeError(f"{owner}(ranks={ranks!r}): ranks are the first one and the one to stop before.") from None
    start = integer(owner, "ranks[0]", start, 0)
    return start, None if stop is None else integer(owner, "ranks[1]", stop, start + 1)


def _number(owner: str, name: str, value: float | None, default: Any, low: float = -INF) -> Any:
    return default if value is None else share(owner, name, value, low=low, high=INF)


def _open(owner: str, out: Table | str | Path | None, fingerprint: str, sharded: bool) -> Table:
    if isinstance(out, Table):
        if fingerprint and out.fingerprint not in ("", fingerprint):
            raise ValueError(
                f"{owner}(fingerprint={fingerprint!r}): the table has {out.fingerprint!r}; give one of the two."
            )
        out.fingerprint = fingerprint or out.fingerprint
        return out
    if out is not None:
        return Table(out, fingerprint=fingerprint)
    if sharded and world_size() > 1:
        raise ValueError(f"{owner}(sharded=True, out=None): give a folder that all ranks see.")
    table = Table(tempfile.mkdtemp(prefix="samplewise-"), fingerprint=fingerprint)
    weakref.finalize(table, _remove, table.path, os.getpid())
    return table


def _remove(folder: Path, owner: int) -> None:
    """Remove a temporary table; not from a worker process, which has a copy."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
