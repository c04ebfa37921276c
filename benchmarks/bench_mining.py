"""Mining hard negatives against the plain way, a chunked matrix product with topk, on two threads.

`--queries 1e4` is the whole job (some minutes for each row); by default a part of the queries, since time is linear in
them. `--dimensions` changes E.
"""

import argparse
from functools import partial

import torch
from timing import best_of_each, header, judged, peak_memory, table
from torch import Tensor

from samplewise.plugins import mine_hard_negatives
from samplewise.plugins.pools import faiss_search
from samplewise.plugins.search import QUERIES, search

TOP_K, CHUNK, BUFFER_MB = 200, 16_384, 256


def plain(documents: Tensor, queries: Tensor) -> None:
    """What one would write: product and topk of each chunk, then topk of the chunks' best."""
    for query in queries.split(QUERIES):
        best = torch.empty(len(query), 0)
        ids = torch.empty(len(query), 0, dtype=torch.int64)
        for low in range(0, len(documents), CHUNK):
            scores, columns = (query @ documents[low : low + CHUNK].T).topk(TOP_K)
            best, ids = torch.cat([best, scores], 1), torch.cat([ids, columns + low], 1)
            best, order = best.topk(TOP_K)
            ids = ids.gather(1, order)


def product(documents: Tensor, queries: Tensor) -> None:
    """The matrix product alone."""
    memory = torch.empty(QUERIES * CHUNK)
    for query in queries.split(QUERIES):
        for part in documents.split(CHUNK):
            torch.mm(query, part.T, out=memory[: len(query) * len(part)].view(len(query), len(part)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=float, default=1e6)
    parser.add_argument("--queries", type=float, default=512)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--repeat", type=int, default=2)
    options = parser.parse_args()
    header("Mining hard negatives", threads=2)
    generator = torch.Generator().manual_seed(0)
    documents = torch.randn(int(options.documents), options.dimensions, generator=generator)
    queries = torch.randn(int(options.queries), options.dimensions, generator=generator)
    positives = torch.randint(len(documents), (len(queries),), generator=generator).numpy()
    mine = partial(mine_hard_negatives, documents, queries, positives, top_k=TOP_K, buffer_mb=BUFFER_MB, progress=False)
    calls = {
        "product and topk, chunk by chunk": partial(plain, documents, queries),
        "the product alone": partial(product, documents, queries),
        "search": partial(search, documents, queries, TOP_K, buffer_mb=BUFFER_MB),
        "mine_hard_negatives": mine,
        "mine_hard_negatives, margin and max_score": partial(mine, margin=0.1, max_score=80.0),
        "mine_hard_negatives, cosine": partial(mine, similarity="cosine"),
    }
    megabytes = {name: peak_memory(call) for name, call in calls.items()}
    seconds = best_of_each(calls, repeat=options.repeat)
    index = faiss_search(documents)
    seconds["faiss, flat index"] = best_of_each({0: lambda: index(queries, TOP_K)}, repeat=1)[0]
    base = seconds["product and topk, chunk by chunk"]
    rows = []
    for name, s in seconds.items():
        ratio = judged(s / base, most=1.3 if name.startswith("mine_hard_negatives") else None)
        rows.append([name, f"{s:.1f}", ratio, f"{megabytes[name]:.0f}" if name in megabytes else ""])
    title = f"{len(queries):,} queries, {len(documents):,} documents of {options.dimensions}, K = {TOP_K}"
    table([title, "s", "to product and topk", "MB added at the peak"], rows)
    print(f"Of the megabytes, {len(queries) * TOP_K * 8 / 2**20:.0f} are the result; the buffer is {BUFFER_MB}.")


if __name__ == "__main__":
    main()
