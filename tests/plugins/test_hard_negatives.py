"""Mining against a direct evaluation of what its docstring says."""

import gc

import numpy as np
import pytest
import torch

from samplewise.loaders import Ragged, Table
from samplewise.plugins import mine_hard_negatives, mining
from samplewise.plugins import search as search_module
from samplewise.plugins.candidates import RRF, fuse, pad, union
from samplewise.plugins.pools import faiss_search
from support import run_ranks

DOCUMENTS, QUERIES = 120, 33
pytestmark = pytest.mark.filterwarnings("ignore:.*negatives are random")


def embeddings(count, seed):
    """Integers, so that similarities are exact in float32 and many are equal."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-3, 4, (count, 6))).float()


def judgements(queries=QUERIES, documents=DOCUMENTS, most=4, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.choice(documents, size=rng.integers(1, most + 1), replace=False).tolist() for _ in range(queries)]


def expected(
    documents, queries, positives, top_k, *, exclude=None, margin=None, relative_margin=None, max_score=None,
    min_score=None, ranks=(0, None), cosine=False,
):  # fmt: skip
    """For each query the list of (document, similarity), and p."""
    documents, queries = documents.double().numpy(), queries.double().numpy()
    if cosine:
        documents, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (documents, queries))
    lists, best = [], []
    for q, scores in enumerate(queries @ documents.T):
        known = {*positives[q], *([] if exclude is None else exclude[q])}
        p = max(scores[d] for d in positives[q])
        ranked = sorted((d for d in range(len(documents)) if d not in known), key=lambda d: (-scores[d], d))
        ranked = ranked[ranks[0] : ranks[1]]
        kept = [
            d
            for d in ranked
            if (margin is None or scores[d] <= p - margin)
            and (relative_margin is None or scores[d] <= p - relative_margin * abs(p))
            and (max_score is None or scores[d] <= max_score)
            and (min_score is None or scores[d] >= min_score)
        ]
        lists.append([(d, scores[d]) for d in kept[:top_k]])
        best.append(p)
    return lists, best


def check(table, lists, best, positives, documents=DOCUMENTS, exclude=None):
    negatives, found, scores = (table[name] for name in ("negatives", "found", "scores"))
    assert negatives.dtype == np.int32
    assert table["positive_scores"].tolist() == pytest.approx(best, rel=1e-6, abs=1e-6)
    assert found.tolist() == [len(row) for row in lists]
    padded = 0
    for q, row in enumerate(lists):
        assert negatives[q, : len(row)].tolist() == [d for d, _ in row], q
        assert scores[q, : len(row)].tolist() == pytest.approx([s for _, s in row], rel=1e-6, abs=1e-6)
        assert np.isnan(scores[q, len(row) :]).all()
        known = {*positives[q], *([] if exclude is None else exclude[q])}
        assert not known & set(negatives[q].tolist())
        if documents - len(known) >= negatives.shape[1]:
            assert len(set(negatives[q].tolist())) == negatives.shape[1]
        padded += negatives.shape[1] - len(row)
    assert table.snapshot().meta["padded"] == padded


CASES = {
    "plain": {},
    "margin": {"margin": 3.0},
    "relative margin": {"relative_margin": 0.25},
    "maximum": {"max_score": 8.0},
    "minimum": {"min_score": 14.0},
    "ranks": {"ranks": (5, 12)},
    "no end": {"ranks": (30, None)},
    "all of them": {"margin": 1.0, "relative_margin": 0.125, "max_score": 20.0, "min_score": 3.0, "ranks": (4, 25)},
    "nothing passes": {"max_score": -1000.0},
}


@pytest.mark.parametrize("top_k", [1, 17])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case, top_k, monkeypatch):
    monkeypatch.setattr(search_module, "_FIRST", 64)
    documents, queries, positives = embeddings(DOCUMENTS, 1), embeddings(QUERIES, 2), judgements()
    lists, best = expected(documents, queries, positives, top_k, **CASES[case])
    table = mine_hard_negatives(documents, queries, positives, top_k=top_k, **CASES[case])
    check(table, lists, best, positives)


def test_exclusions_are_no_negatives_and_no_filling():
    documents, queries, positives = embeddings(DOCUMENTS, 1), embeddings(QUERIES, 2), judgements()
    exclude = judgements(most=100, seed=5)
    lists, best = expected(documents, queries, positives, 40, exclude=exclude)
    table = mine_hard_negatives(documents, queries, positives, top_k=40, exclude=exclude)
    check(table, lists, best, positives, exclude=exclude)


def test_the_cosine():
    documents, queries, positives = embeddings(DOCUMENTS, 1) + 0.37, embeddings(QUERIES, 2) + 0.21, judgements()
    lists, best = expected(documents, queries, positives, 9, cosine=True, margin=0.05)
    table = mine_hard_negatives(documents, queries, positives, top_k=9, similarity="cosine", margin=0.05)
    check(table, lists, best, positives)


def test_positives_that_fill_the_top():
    documents = torch.arange(40.0)[:, None]
    positives = [list(range(20, 40)), [0]]
    table = mine_hard_negatives(documents, torch.ones(2, 1), positives, top_k=3)
    assert table["negatives"].tolist() == [[19, 18, 17], [39, 38, 37]]
    meta = table.snapshot().meta
    assert meta["removed"] == 0.5  # all three places of the first query's plain top, none of the second's
    assert meta["margin"] == ((39 - 19) + (0 - 39)) / 2
    assert (meta["padded"], meta["documents"], meta["queries"]) == (0, 40, 2)


def test_fewer_possible_negatives_than_places():
    documents, queries = embeddings(6, 1), embeddings(2, 2)
    table = mine_hard_negatives(documents, queries, [[0, 1, 2, 3], [5]], top_k=6)
    assert table["found"].tolist() == [2, 5]
    assert set(table["negatives"][0].tolist()) == {4, 5}
    assert set(table["negatives"][1].tolist()) == {0, 1, 2, 3, 4}
    assert table.snapshot().meta["padded"] == 5


def test_filling_depends_on_seed_and_query_only_and_is_uniform(monkeypatch):
    documents, queries, positives = embeddings(50, 1), embeddings(2000, 2), [[row % 50] for row in range(2000)]

    def filling(seed, rows=slice(None)):
        table = mine_hard_negatives(
            documents, queries[rows], positives[rows], top_k=4, max_score=-1e9, seed=seed, progress=False
        )
        return np.array(table["negatives"])

    drawn = filling(0)
    assert (drawn == filling(0)).all()
    assert (drawn != filling(1)).any()
    assert (filling(0, slice(0, 100)) == drawn[:100]).all()
    monkeypatch.setattr(mining, "QUERIES", 100)
    monkeypatch.setattr(search_module, "QUERIES", 100)
    assert (drawn == filling(0)).all()
    counts = np.bincount(((drawn - np.arange(2000)[:, None]) % 50).ravel(), minlength=50)  # relative to the positive
    assert counts[0] == 0
    # each of 49 documents: hypergeometric, mean m = 8000 / 49; the chi-square of 49 cells has mean 48, sd sqrt(96)
    mean = 8000 / 49
    assert np.square(counts[1:] - mean).sum() / mean < 48 + 5 * np.sqrt(96)


def test_known_false_negatives_are_counted():
    documents = torch.arange(10.0)[:, None]
    table = mine_hard_negatives(documents, torch.ones(1, 1), [[6]], top_k=4, margin=1.0)
    assert table["negatives"].tolist() == [[5, 4, 3, 2]]
    assert table.snapshot().meta["removed"] == 1.0  # 9, 8, 7 and the positive 6


def test_what_was_removed_from_a_plain_top_is_counted():
    documents, query = torch.arange(100.0)[:, None], torch.ones(1, 1)

    def removed(positives, **options):
        return mine_hard_negatives(documents, query, [positives], top_k=10, **options).snapshot().meta["removed"]

    assert removed([0]) == 0.0
    assert removed([0, 95, 89]) == 0.1
    assert removed([0], exclude=[[99, 98, 97, 96, 95, 3]]) == 0.5
    assert removed([0, 95], max_score=97.0) == pytest.approx(0.3)  # 99, 98 and 95
    assert removed([0], ranks=(5, None)) == 0.0  # a choice, no guard
    assert removed([99, *range(80, 95)], min_score=1000.0) == 0.6


def test_filling_above_the_highest_similarity_is_drawn_again():
    documents, query = torch.arange(1000.0)[:, None], torch.ones(200, 1)
    table = mine_hard_negatives(documents, query, [[0]] * 200, top_k=20, max_score=500.0, min_score=495.0)
    assert (table["found"] == 6).all()
    above = (table["negatives"][:, 6:] > 500).mean()
    assert above < 0.15  # 1/2, and half of that each of three times
    assert len({*table["negatives"][0].tolist()}) == 20


def test_pools_are_merged_by_reciprocal_rank():
    documents = torch.tensor([[9.0], [8.0], [7.0], [6.0], [5.0], [0.0]])
    pool = np.array([[4, 5, 0, -1]])  # 5 is the positive
    table = mine_hard_negatives(documents, torch.ones(1, 1), [[5]], top_k=4, pools=[pool])
    # embeddings: 0 1 2 3 at ranks 1 2 3 4; pool: 4 0 at ranks 1 2; 0 has both
    assert table["negatives"].tolist() == [[0, 4, 1, 2]]
    assert table["scores"].tolist() == [[9, 5, 8, 7]]
    filtered = mine_hard_negatives(documents, torch.ones(1, 1), [[5]], top_k=4, pools=[pool], min_score=6.0)
    assert filtered["negatives"][0, :4].tolist() == [0, 1, 2, 3]


def test_pools_pass_the_filters():
    documents = torch.tensor([[9.0], [8.0], [7.0], [6.0], [5.0], [7.5]])
    table = mine_hard_negatives(
        documents, torch.ones(1, 1), [[5]], top_k=2, pools=[np.array([[0, 1, 4]])], margin=0.0, ranks=(0, 3)
    )
    assert table["negatives"][0, : table["found"][0]].tolist() == [2, 4]  # 0 and 1 score above the positive


def one_list(*ids):
    return np.array([ids]), np.zeros((1, len(ids)), dtype=np.float32)


@pytest.mark.parametrize(
    ("lists", "fused"),
    [
        ([one_list(1, 2, 3), one_list(3, -1, -1)], [3, 1, 2]),
        ([one_list(1, 2, 9), one_list(4, 5, 9)], [9, 1, 4]),  # 2 / 63 > 1 / 61
        ([one_list(7, 2), one_list(5, 8)], [5, 7, 2]),  # equal votes: by id
        ([one_list(3), one_list(3)], [3, -1, -1]),
    ],
)
def test_fuse(lists, fused):
    assert RRF == 60
    assert fuse(lists, 3)[0].tolist() == [fused]


def test_union():
    rows = union(Ragged.from_lists([[3, 1], [], [2]]), Ragged.from_lists([[1, 0], [5], []]))
    assert [rows[row].tolist() for row in range(3)] == [[0, 1, 3], [5], [2]]


def test_pad_refuses_a_row_without_any_document():
    with pytest.raises(ValueError, match="Query 7 has no negative"):
        pad(np.array([[-1, -1]]), Ragged.from_lists([[0, 1]]), 2, 0, np.array([7]))


@pytest.mark.parametrize("case", ["plain", "all of them"])
def test_another_retriever_finds_the_same(case):
    rng = np.random.default_rng(0)  # no ties, whose order faiss does not promise
    documents, queries = (torch.from_numpy(rng.normal(size=(n, 16))).float() for n in (DOCUMENTS, QUERIES))
    positives = judgements()
    options = {"top_k": 10, **CASES[case]}
    exact = mine_hard_negatives(documents, queries, positives, **options)
    other = mine_hard_negatives(documents, queries, positives, search=faiss_search(documents), **options)
    same = exact["found"] == other["found"]
    if case == "plain":
        assert same.all()
        assert (exact["negatives"] == other["negatives"]).all()
    else:  # what is above the ceiling takes places in what an index is asked for
        assert (other["found"] <= exact["found"]).all()
        for row in np.flatnonzero(same):
            found = exact["found"][row]
            assert (exact["negatives"][row, :found] == other["negatives"][row, :found]).all()


def test_another_retriever_is_asked_for_more_than_is_needed():
    documents, query = torch.arange(20.0)[:, None], torch.ones(1, 1)
    options = {
        "top_k": 4,
        "search": lambda q, k: tuple(x[:, :k] for x in (q @ documents.T.flip(1), 19 - torch.arange(20)[None])),
    }
    table = mine_hard_negatives(documents, query, [[15, 19]], **options)
    assert table["negatives"].tolist() == [[18, 17, 16, 14]]
    table = mine_hard_negatives(documents, query, [[15, 2]], max_score=17, **options)
    assert table["negatives"].tolist() == [[17, 16, 14, 13]]


def test_a_retriever_of_another_similarity():
    documents = embeddings(20, 1)
    with pytest.raises(ValueError, match=r"similarity='cosine'\): the retriever was made with another"):
        mine_hard_negatives(
            documents, documents[:1], [[0]], top_k=2, similarity="cosine", search=faiss_search(documents)
        )


def mine_shards(rank, folder, documents, queries, positives, cuts, options):
    part = documents[cuts[rank] : cuts[rank + 1]]
    table = mine_hard_negatives(part, queries, positives, sharded=True, out=folder, **options)
    return {name: np.array(table[name]) for name in ("negatives", "found", "scores", "positive_scores")}, table.version


@pytest.mark.parametrize("case", ["plain", "all of them"])
def test_shards_of_two_ranks_give_the_whole(tmp_path, case):
    documents, queries, positives = embeddings(DOCUMENTS, 1), embeddings(QUERIES, 2), judgements()
    pool = np.random.default_rng(3).permuted(np.tile(np.arange(DOCUMENTS), (QUERIES, 1)), axis=1)[:, :20]
    options = {"top_k": 11, "pools": [pool], **CASES[case]}
    whole = mine_hard_negatives(documents, queries, positives, **options)
    for arrays, version in run_ranks(
        2, mine_shards, tmp_path / "t", documents, queries, positives, [0, 35, 120], options
    ):
        assert version == 1
        for name, values in arrays.items():
            np.testing.assert_array_equal(values, whole[name], err_msg=name)


def mine_damaged(rank, folder):
    documents = torch.full((4, 2), torch.nan) if rank else torch.ones(4, 2)
    with pytest.raises(ValueError, match="rank 1: doc_emb: row 0 holds NaN"):
        mine_hard_negatives(documents, torch.ones(1, 2), [[0]], top_k=2, sharded=True, out=folder)


def mine_with_a_retriever(rank, folder):
    with pytest.raises(ValueError, match=r"search=\.\.\., sharded=True\): a retriever of one's own"):
        mine_hard_negatives(
            torch.ones(4, 2), torch.ones(1, 2), [[0]], top_k=2, sharded=True, out=folder, search=lambda q, k: None
        )


def test_what_is_wrong_on_one_rank_is_raised_on_all(tmp_path):
    run_ranks(2, mine_damaged, tmp_path / "t")
    run_ranks(2, mine_with_a_retriever, tmp_path / "t")


def test_versions_and_temporary_tables(tmp_path):
    documents, queries, positives = embeddings(DOCUMENTS, 1), embeddings(QUERIES, 2), judgements()
    table = Table(tmp_path / "table", fingerprint="mine")
    assert mine_hard_negatives(documents, queries, positives, top_k=3, out=table) is table
    mine_hard_negatives(documents, queries, positives, top_k=5, out=tmp_path / "table", fingerprint="mine")
    assert (table.version, table["negatives"].shape) == (2, (QUERIES, 5))
    with pytest.raises(ValueError, match=r"fingerprint='other'\): the table has 'mine'"):
        mine_hard_negatives(documents, queries, positives, top_k=5, out=table, fingerprint="other")
    with pytest.raises(ValueError, match="fingerprint"):
        mine_hard_negatives(documents, queries, positives, top_k=5, out=tmp_path / "table", fingerprint="other")
    temporary = mine_hard_negatives(documents, queries, positives, top_k=3)
    folder = temporary.path
    assert folder.is_dir()
    del temporary
    gc.collect()
    assert not folder.exists()


def wrong(**changes):
    call = {"doc_emb": torch.ones(5, 2), "query_emb": torch.ones(2, 2), "positives": [[0], [1]], "top_k": 2}
    return mine_hard_negatives(**{**call, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positives": [[0], []]}, "quer.* 1"),
        ({"positives": [[0], [5]]}, "5"),
        ({"positives": [[0]]}, "2"),
        ({"doc_emb": torch.empty(0, 2)}, "the corpus is empty"),
        ({"doc_emb": torch.ones(5, 3)}, "doc_emb has 3 dimensions and query_emb 2"),
        ({"doc_emb": torch.full((5, 2), torch.nan)}, "doc_emb: row 0 holds NaN"),
        ({"query_emb": torch.full((2, 2), torch.inf)}, "query_emb: row 0 holds NaN or infinity"),
        ({"top_k": 6}, r"at most the number of documents \(5\), and must be in \[1, 5\]"),
        ({"top_k": 0}, "top_k"),
        ({"query_emb": torch.ones(0, 2), "positives": []}, "there must be a query"),
        ({"positives": [[0], [0, 1, 2, 3, 4]]}, "all 5 documents are positives of query 1"),
        ({"exclude": [[0, 1, 2, 3, 4], []]}, "all 5 documents are positives of query 0, or excluded"),
        ({"exclude": [[7], []]}, "document rows in"),
        ({"exclude": [[1]]}, "one row a query"),
        ({"ranks": (3, 3)}, "must be >= 4"),
        ({"margin": -1.0}, "margin must be in"),
        ({"relative_margin": float("nan")}, "relative_margin must be in"),
        ({"pools": [np.zeros((3, 2), int)]}, "3 rows for 2 queries"),
        ({"pools": [np.full((2, 2), 5)]}, "document rows in"),
        ({"search": lambda query, k: (np.zeros((2, 1)), np.zeros((2, 1), int))}, "search: it must give scores and ids"),
        ({"similarity": "l2"}, "'dot', 'cosine'"),
        ({"similarity": "l2", "search": lambda query, k: None}, "'dot', 'cosine'"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        wrong(**changes)


def test_bad_types():
    for changes in ({"positives": [[0.5], [1]]}, {"ranks": 3}, {"pools": [np.zeros((2, 2))]}, {"top_k": 1.5}):
        with pytest.raises(TypeError):
            wrong(**changes)
