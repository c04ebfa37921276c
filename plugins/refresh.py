"""Mining again while the encoder learns: encode everything, mine, swap the table (ANCE, Xiong et al., ICLR 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from samplewise.cuda_ext.checks import integer
from samplewise.cuda_ext.ranks import gather_rows, rank, world_size
from samplewise.loaders.negatives import RetrievalDataset, corpus_fingerprint, fetched
from samplewise.loaders.ragged import Ragged
from samplewise.loaders.table import Table, Version
from samplewise.plugins import candidates
from samplewise.plugins.hard_negatives import MiningOptions, mine_hard_negatives
from samplewise.plugins.search import progress_bar

Encoder = Callable[[list[Any]], Tensor]
"""From a list of b queries or documents to their embeddings, floating point (b, E)."""

_STRETCH = 64  # batches that are sorted by length together
_COMPARED = 10_000  # queries whose lists are compared with the version before


def encode(
    items: Any, encoder: Encoder, *, batch_size: int = 256, progress: bool = False, what: str = "encoding"
) -> Tensor:
    """The embeddings of all items: float32 (N, E) on the CPU, without gradients.

    Put the model into evaluation mode first, or dropout is in the embeddings. Within stretches of ``64 * batch_size``,
    texts go through the encoder sorted by length, so that a batch holds little padding.

    Args:
        items: N queries or documents; anything with a length and rows.
        encoder: from a list of items to (b, E).
        batch_size: items at a time.
        progress: show a bar on a terminal (with tqdm installed).
        what: the bar's name.

    Raises:
        ValueError: no items, or an encoder that does not give one row an item.
    """
    batch_size = integer("encode", "batch_size", batch_size, 1)
    count = len(items)
    if count == 0:
        raise ValueError("encode(items): there is nothing to encode.")
    out = torch.empty(0)
    bar = progress_bar(what, count, progress)
    for rows, batch in _batches(items, batch_size):
        with torch.no_grad():
            part = encoder(batch)
        part = torch.from_numpy(part) if isinstance(part, np.ndarray) else part
        if not isinstance(part, Tensor) or part.ndim != 2 or len(part) != len(batch):
            shape = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(f"encode: the encoder gave {shape} for {len(batch)} items; it must give a tensor (b, E).")
        if not len(out):
            out = torch.empty(count, part.shape[1])
        out[rows] = part.detach().to("cpu", torch.float32)
        bar.update(len(batch))
    bar.close()
    return out


def _batches(items: Any, batch_size: int) -> Iterator[tuple[Tensor, list[Any]]]:
    """Rows int64 (b,) and items of each batch, texts of like length together."""
    for low in range(0, len(items), _STRETCH * batch_size):
        stretch = fetched(items, np.arange(low, min(low + _STRETCH * batch_size, len(items))), "items")
        order = sorted(range(len(stretch)), key=[_length(item) for item in stretch].__getitem__)
        for start in range(0, len(stretch), batch_size):
            rows = order[start : start + batch_size]
            yield low + torch.tensor(rows), [stretch[row] for row in rows]


def _length(item: Any) -> int:
    """Characters of a text, or of the texts in a dict."""
    if isinstance(item, Mapping):
        return sum(map(_length, item.values()))
    return len(item) if isinstance(item, str) else 0


def refresh_hard_negatives(
    dataset: RetrievalDataset,
    encode_queries: Encoder,
    encode_documents: Encoder | None = None,
    *,
    top_k: int | None = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    **mining: Unpack[MiningOptions],
) -> dict[str, float]:
    """Encode a data set's queries and documents, and mine the next version of its table.

    Put the model into evaluation mode first. With several ranks, call it on all of them: each encodes and searches its
    share of the documents, the first one writes, and all see the new version when it returns.

    Args:
        dataset: its ``negatives`` must be a :class:`~samplewise.loaders.Table`; one without a fingerprint gets that of
            the data.
        encode_queries: from a list of queries to (b, E).
        encode_documents: the same for documents; None: by ``encode_queries``.
        top_k: K, negatives kept for each query; None: as many as before, or else 200.
        batch_size: queries or documents encoded at a time.
        device: where the similarities are computed; None: on the CPU.
        **mining: more options of :func:`~samplewise.plugins.mine_hard_negatives`. Similarity, filters and seed that are
            not given are those of the version before; ``exclude`` and ``pools`` have to be given each time.

    Returns:
        ``overlap``: share of the mined negatives that the version before had too (NaN for the first one); ``removed``:
        share of a plain top K that was kept out as known positives or by the filters; ``padded``: share of the table
        that is random filling; ``margin``: mean similarity of the positive minus that of the hardest negative;
        ``encode_seconds`` and ``mine_seconds``, of this rank.

    Raises:
        TypeError: the data set has no table, or an option that there is not.
        ValueError: fewer negatives than the data set draws from.
    """
    table = check_refresh("refresh_hard_negatives", dataset, top_k, mining)
    table.fingerprint = table.fingerprint or corpus_fingerprint(dataset.queries, dataset.documents)
    before = table.snapshot() if table.version else None
    mining, top_k = _settled(mining, top_k, before, len(dataset.documents))
    begin = perf_counter()
    progress = mining.get("progress", True) and rank() == 0
    queries = gather_rows(_encode_share(dataset.queries, encode_queries, batch_size, progress, "queries"))[0]
    encoder = encode_documents or encode_queries
    documents = _encode_share(dataset.documents, encoder, batch_size, progress, "documents")
    encoded = perf_counter()
    mine_hard_negatives(
        documents, queries, dataset.positives, top_k=top_k, sharded=world_size() > 1, out=table, device=device, **mining
    )
    after = table.snapshot()
    meta = after.meta
    return {
        "overlap": float("nan") if before is None else overlap(before, after),
        "removed": meta["removed"],
        "padded": meta["padded"] / after.arrays["negatives"].size,
        "margin": float("nan") if meta["margin"] is None else meta["margin"],
        "encode_seconds": encoded - begin,
        "mine_seconds": perf_counter() - encoded,
    }


def check_refresh(owner: str, dataset: Any, top_k: int | None, mining: Mapping[str, Any]) -> Table:
    """The data set's table.

    Raises:
        TypeError: no RetrievalDataset with a table, or an option that there is not.
        ValueError: fewer negatives than the data set draws from.
    """
    if not isinstance(dataset, RetrievalDataset) or not isinstance(dataset.negatives, Table):
        raise TypeError(
            f"{owner}(dataset={type(dataset).__name__}): a RetrievalDataset whose negatives are a Table is needed, not "
            f"wrapped in with_ids(): RetrievalDataset(queries, documents, positives, Table(folder))."
        )
    if unknown := sorted(set(mining) - set(MiningOptions.__annotations__)):
        raise TypeError(f"{owner}({unknown[0]}=...): there are {', '.join(MiningOptions.__annotations__)}.")
    if top_k is not None:
        low, high = max(dataset.count, dataset.depth or 1), len(dataset.documents)
        integer(owner, "top_k", top_k, low, high, what="at least what the data set draws from, at most all documents,")
    return dataset.negatives


def _settled(
    mining: MiningOptions, top_k: int | None, before: Version | None, documents: int
) -> tuple[MiningOptions, int]:
    """The options with those of the version before where they are not given."""
    if before is None or "filters" not in before.meta:
        return mining, top_k or min(200, documents)
    meta = before.meta
    kept: Any = {key: value for key, value in meta["filters"].items() if key != "pools"}
    kept |= {"similarity": meta["similarity"], "seed": meta["seed"], **mining}
    return kept, top_k or int(meta["top_k"])


def overlap(before: Version, after: Version) -> float:
    """Share of the mined negatives of ``after`` that ``before`` had mined too, over up to 10,000 queries."""
    size = len(after.arrays["found"])
    rows = np.unique(np.linspace(0, size - 1, min(size, _COMPARED)).astype(np.int64))
    old, new = (_mined(version, rows) for version in (before, after))
    lengths = (old >= 0).sum(1)
    known = Ragged(old[old >= 0], np.concatenate(([0], np.cumsum(lengths))))
    return float(candidates.is_in(new, known).sum() / max(1, (new >= 0).sum()))


def _mined(version: Version, rows: np.ndarray[Any, np.dtype[np.int64]]) -> candidates.Ids:
    """The lists of some queries, -1 in place of random filling: int64 (n, K)."""
    ids = version.arrays["negatives"][rows].astype(np.int64)
    return np.where(np.arange(ids.shape[1]) < version.arrays["found"][rows, None], ids, -1)


def _encode_share(items: Any, encoder: Encoder, batch_size: int, progress: bool, what: str) -> Tensor:
    """This rank's share of the items, a stretch of them, encoded."""
    world = world_size()
    low, high = (len(items) * part // world for part in (rank(), rank() + 1))
    if low == high:  # fewer items than ranks
        return encode(_Stretch(items, 0, 1), encoder)[:0]
    return encode(
        items if world == 1 else _Stretch(items, low, high),
        encoder,
        batch_size=batch_size,
        progress=progress,
        what=f"encoding {what}",
    )


class _Stretch:
    """Rows ``low`` to ``high`` of a sequence, without a copy; fetched a batch at a time."""

    def __init__(self, items: Any, low: int, high: int):
        self.items, self.low, self.high = items, low, high

    def __len__(self) -> int:
        return self.high - self.low

    def __getitem__(self, row: int) -> Any:
        return self.items[self.low + row]

    def __getitems__(self, rows: list[int]) -> list[Any]:
        return fetched(self.items, self.low + np.asarray(rows), "items")
