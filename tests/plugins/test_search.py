"""Exact search against sorting all of the similarities."""

import numpy as np
import pytest
import torch

from samplewise.loaders.ragged import Ragged
from samplewise.plugins import search as module
from samplewise.plugins.search import check_embeddings, merge_ranks, pair_scores, search
from samplewise.plugins.selection import BLOCK, Found
from support import run_ranks


def brute_force(documents, queries, k, *, exclude=None, ceiling=None, cosine=False, first_id=0):
    """Scores and ids (Q, k), -inf and -1 where there is none, and the number of documents above each ceiling."""
    documents, queries = np.asarray(documents, dtype=np.float64), np.asarray(queries, dtype=np.float64)
    if cosine:
        documents, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (documents, queries))
    scores = queries @ documents.T
    out_scores, out_ids = np.full((len(queries), k), -np.inf), np.full((len(queries), k), -1)
    above = np.zeros(len(queries), dtype=np.int64)
    for row, line in enumerate(scores):
        hidden = set() if exclude is None else set(exclude[row])
        ids = [d for d in range(len(documents)) if d + first_id not in hidden]
        if ceiling is not None:
            above[row] = sum(line[d] > ceiling[row] for d in ids)
            ids = [d for d in ids if line[d] <= ceiling[row]]
        ids = sorted(ids, key=lambda d: (-line[d], d))[:k]
        out_ids[row, : len(ids)], out_scores[row, : len(ids)] = np.array(ids, dtype=int) + first_id, line[ids]
    return out_scores, out_ids, above


def integers(count, dimensions=8, high=4, seed=0):
    """Embeddings whose products are exact in float32, with many ties."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-high, high + 1, (count, dimensions))).float()


@pytest.fixture(params=[(7, 64, 192), (64, 1, 64), (500, 1024, 4096)], ids=str)
def chunks(request, monkeypatch):
    """Queries at a time, documents sorted at once, and documents at a time."""
    queries, first, most = request.param
    monkeypatch.setattr(module, "QUERIES", queries)
    monkeypatch.setattr(module, "_FIRST", first)
    monkeypatch.setattr(module, "_chunk_size", lambda buffer_mb, many, dimensions: most)


@pytest.mark.parametrize("k", [1, 5, 70, 1000])
@pytest.mark.parametrize("count", [1, 63, 64, 701])
def test_equals_sorting_everything_ties_by_id(chunks, count, k):
    documents, queries = integers(count), integers(29, seed=1)
    scores, ids, above = brute_force(documents, queries, k)
    found = search(documents, queries, k)
    assert (found.ids.numpy() == ids).all()
    assert (found.scores.numpy() == scores).all()
    assert (found.above.numpy() == above).all()


@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "clusters"])
def test_any_order_of_the_documents(chunks, order):
    values = {
        "ascending": np.arange(900),
        "descending": np.arange(900)[::-1].copy(),
        "equal": np.ones(900),
        "clusters": np.repeat([1, 5, 5, 9, 5, 7, 9, 0, 3], 100),
    }[order]
    documents, queries = torch.from_numpy(values).float()[:, None], torch.ones(3, 1)
    _, ids, _ = brute_force(documents, queries, 50)
    assert (search(documents, queries, 50).ids.numpy() == ids).all()


def test_exclusions_and_ceilings(chunks):
    rng = np.random.default_rng(2)
    documents, queries = integers(400), integers(31, seed=3)
    exclude = [rng.choice(400, size=rng.integers(0, 60), replace=False).tolist() for _ in range(31)]
    exclude[4] = list(range(400))
    ceiling = rng.integers(-5, 30, size=31).astype(float)
    scores, ids, above = brute_force(documents, queries, 80, exclude=exclude, ceiling=ceiling)
    found = search(documents, queries, 80, exclude=Ragged.from_lists(exclude), ceiling=torch.from_numpy(ceiling))
    assert (found.ids.numpy() == ids).all()
    assert (found.scores.numpy() == scores).all()
    assert (found.above.numpy() == above).all()
    assert (found.ids[4] == -1).all()


def test_real_numbers_and_the_cosine():
    rng = np.random.default_rng(4)
    documents, queries = rng.normal(size=(3000, 24)), rng.normal(size=(40, 24))
    for cosine in (False, True):
        scores, ids, _ = brute_force(documents, queries, 100, cosine=cosine)
        found = search(documents, queries, 100, similarity="cosine" if cosine else "dot")
        assert (found.ids.numpy() == ids).mean() > 0.999  # neighbours closer than float32 can tell
        assert np.abs(found.scores.numpy() - scores).max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_arrays_and_memory_maps_give_the_same(tmp_path, dtype):
    documents, queries = integers(200), integers(9, seed=1)
    expected = search(documents, queries, 20).ids
    assert (search(documents.to(dtype), queries.to(dtype), 20).ids == expected).all()
    np.save(tmp_path / "documents.npy", documents.numpy().astype(np.float16))
    mapped = np.load(tmp_path / "documents.npy", mmap_mode="r")
    assert (search(mapped, queries.numpy(), 20).ids == expected).all()
    assert (search(documents.numpy()[::-1].copy()[::-1], queries.numpy(), 20).ids == expected).all()


def test_parts_of_the_corpus_merge_to_the_whole():
    documents, queries = integers(300), integers(20, seed=1)
    parts = [search(documents[low:high], queries, 40, first_id=low) for low, high in ((0, 90), (90, 300))]
    assert (parts[1].ids.numpy() == brute_force(documents[90:], queries, 40, first_id=90)[1]).all()
    assert merge_ranks(parts[0], 40) is parts[0]  # one process


def merge_on(rank, documents, queries, cuts):
    found = search(documents[cuts[rank] : cuts[rank + 1]], queries, 40, first_id=cuts[rank])
    return tuple(merge_ranks(found, 40))


def test_ranks_merge_to_the_whole():
    documents, queries = integers(300), integers(20, seed=1)
    scores, ids, _ = brute_force(documents, queries, 40)
    for found in run_ranks(3, merge_on, documents, queries, [0, 10, 180, 300]):
        assert (found[1].numpy() == ids).all()
        assert (found[0].numpy() == scores).all()


def test_pair_scores():
    documents, queries = integers(50), integers(3, seed=1)
    ids = torch.tensor([[10, -1], [59, 12], [9, 60]])  # 9 and 60 are outside
    scores = pair_scores(documents, queries, ids, first_id=10)
    expected = queries @ documents.T
    assert scores.tolist() == [
        [expected[0, 0], -torch.inf],
        [expected[1, 49], expected[1, 2]],
        [-torch.inf, -torch.inf],
    ]


@pytest.mark.parametrize(("queries", "k"), [(1, 5), (300, 5), (300, 30_000)])
def test_the_buffer_bounds_what_is_allocated(monkeypatch, queries, k):
    sizes = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **more: sizes.append(np.prod(shape)) or empty(*shape, **more))
    convert = module.as_float32
    monkeypatch.setattr(module, "as_float32", lambda rows, *more: sizes.append(rows.numel()) or convert(rows, *more))
    documents = torch.zeros(100_000 if queries == 1 else 40_000, 64, dtype=torch.float16)
    next(iter(module.search_blocks(documents, torch.zeros(queries, 64), k, buffer_mb=16)))
    assert max(sizes) * 4 < 16 << 20


def test_selection_takes_whole_blocks():
    assert BLOCK == 64  # the chunks above are meant to end inside, at, and behind a block
    assert Found._fields == ("scores", "ids", "above")


@pytest.mark.parametrize(
    ("documents", "queries", "options", "message"),
    [
        (torch.empty(0, 4), torch.ones(2, 4), {}, "the corpus is empty"),
        (torch.ones(3, 4), torch.ones(2, 5), {}, "doc_emb has 4 dimensions and query_emb 5"),
        (torch.ones(3), torch.ones(2, 5), {}, "two dimensions"),
        (torch.ones(3, 4), torch.ones(2, 4), {"similarity": "l2"}, "must be one of 'dot', 'cosine'"),
        (torch.ones(3, 4), torch.ones(2, 4), {"exclude": [[0]]}, r"search\(exclude\): 1 rows for 2 queries"),
        (torch.ones(3, 4), torch.ones(2, 4), {"ceiling": torch.ones(3)}, r"search\(ceiling\): 3 rows for 2 queries"),
        (torch.ones(3, 4), torch.ones(2, 4), {"k": 0}, "k must be >= 1"),
        (torch.ones(3, 4), torch.ones(2, 4), {"buffer_mb": 1}, "buffer_mb must be >= 16"),
        (torch.full((3, 4), 3e38), torch.full((2, 4), 3e38), {}, "more than float32 can hold"),
        (torch.full((3, 4), 3e38), torch.tensor([[3e38, -3e38, 3e38, -3e38]]), {}, "more than float32 can hold"),
        (torch.tensor([[1.0], [torch.nan]]), torch.ones(2, 1), {}, "doc_emb: row 1 holds NaN"),
        (torch.ones(3, 1), torch.tensor([[1.0], [1.0], [torch.inf]]), {}, "query_emb: row 2 holds NaN or infinity"),
    ],
)
def test_bad_input(documents, queries, options, message):
    call = {"k": 2, **options}
    with pytest.raises(ValueError, match=message):
        search(documents, queries, **call)


def test_embeddings_are_numbers():
    for wrong in (torch.ones(2, 2, dtype=torch.int64), [[1.0]], np.ones((2, 2), dtype=int)):
        with pytest.raises(TypeError, match="floating-point embeddings"):
            check_embeddings("search", wrong, torch.ones(2, 2))
