"""A small retrieval problem whose rows can be told from its texts; importable in spawned processes too."""

import numpy as np

from samplewise.loaders import RetrievalDataset

Q, D, K = 12, 40, 6
QUERIES = [f"query {i}" for i in range(Q)]
DOCUMENTS = [f"document {i}" for i in range(D)]
POSITIVES = [[i, *range(20, 20 + i % 3)] for i in range(Q)]


def mined(shift=0, queries=Q, documents=D, width=K):
    """Row i: i + 1 + shift, i + 2 + shift, ...; int32 (Q, K)."""
    return ((np.arange(queries)[:, None] + np.arange(1, width + 1) + shift) % documents).astype(np.int32)


def write(table, negatives, **meta):
    """One version of mined negatives."""
    with table.writing({"negatives": (negatives.shape, negatives.dtype)}, meta=meta) as arrays:
        arrays["negatives"][:] = negatives
    return table


def make(negatives=None, **options):
    return RetrievalDataset(QUERIES, DOCUMENTS, POSITIVES, negatives, **options)


def drawn(dataset, rows=range(Q)):
    """Positive and negative ids of each item."""
    return [(item["positive_id"], item["negative_ids"].tolist()) for item in dataset.__getitems__(list(rows))]
