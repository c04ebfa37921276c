"""BM25 and faiss as retrievers."""

import numpy as np
import pytest
import torch

from samplewise.cuda_ext.checks import optional_import
from samplewise.plugins.pools import bm25_candidates, faiss_search
from samplewise.plugins.search import search

TEXTS = ["a red fox", "the brown fox and a hen", "brown bears", "a red fox", "nothing of that kind"]


def test_bm25_ranks_by_words():
    ids, scores = bm25_candidates(TEXTS, ["brown fox", "red fox", "zebra"], 4, progress=False)
    assert ids[0, 0] == 1
    assert ids[1].tolist() == [0, 3, 1, -1]  # equal texts by id; the last has no word of the query
    assert ids[2].tolist() == [-1, -1, -1, -1]
    assert np.isnan(scores[2]).all()
    assert (np.diff(scores[1, :3]) <= 0).all()
    assert (ids.dtype, scores.dtype) == (np.int64, np.float32)


def test_bm25_without_words_or_queries():
    assert bm25_candidates(TEXTS, [], 2)[0].shape == (0, 2)
    with pytest.raises(ValueError, match="no word in them but stopwords"):
        bm25_candidates(["the", "a"], ["fox"], 1, progress=False)


def test_bm25_refuses_more_than_there_is():
    with pytest.raises(ValueError, match="at most the number of documents"):
        bm25_candidates(TEXTS, ["fox"], 6)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_faiss_finds_what_search_finds(factory, similarity):
    rng = np.random.default_rng(0)
    documents, queries = (torch.from_numpy(rng.normal(size=(n, 8))).float() for n in (400, 20))
    scores, ids = faiss_search(documents.numpy(), factory=factory, similarity=similarity)(queries, 10)
    exact = search(documents, queries, 10, similarity=similarity)
    recall = np.mean([len({*a} & {*b}) for a, b in zip(ids.tolist(), exact.ids.tolist(), strict=True)]) / 10
    assert recall > (0.99 if factory == "Flat" else 0.25)  # one of four cells is looked at
    if factory == "Flat":
        np.testing.assert_allclose(scores, exact.scores.numpy(), rtol=1e-4, atol=1e-5)


def test_a_missing_extra_is_named():
    with pytest.raises(
        ImportError, match=r"bm25_candidates needs no_such_module: pip install 'samplewise\[retrieval\]'"
    ):
        optional_import("bm25_candidates", "no_such_module", "retrieval")
