import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from samplewise.loaders.ragged import Ragged
from samplewise.plugins.adore import AdoreLoss, rank_weights
from samplewise.plugins.search import search
from support import Everything, run_ranks

F64 = torch.float64
WIDTH = 5
POSITIVES = [[3], [8, 3], [0, 5, 9, 14], [7, 2], [11], [1, 4, 6, 8, 10], [12, 13], [2]]
SETTINGS = [  # top_k, metric_cut, similarity, temperature
    (5, 200, "dot", 1.0),
    (5, 5, "dot", 0.05),
    (5, 2, "cosine", 0.05),
    (1, 200, "cosine", 1.0),
    (15, 200, "dot", 1.0),
    (15, 7, "cosine", 2.0),
]
NAMES = ("top_k", "metric_cut", "similarity", "temperature")


def vectors(count, seed, dtype=F64):
    return torch.randn(count, WIDTH, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


DOCUMENTS, QUERIES, IDS = vectors(15, 0), vectors(8, 1), torch.tensor([2, 5, 0, 7, 1, 3, 3, 6])


def by_hand(queries, documents, positives, top_k, metric_cut, similarity, temperature, retrieve=None):
    """The formulas, pair by pair, in float64: the loss of each query."""

    def score(q, d):
        return q @ d / (q.norm() * d.norm() if similarity == "cosine" else 1)

    losses = []
    for q, relevant in zip(queries.double(), positives, strict=True):
        scores = [score(q, d) for d in documents.double()]
        ranked = sorted(range(len(documents)), key=lambda j, s=scores: (-s[j].item(), j))
        retrieved = ranked[:top_k] if retrieve is None else retrieve(ranked)
        rank = {j: place for place, j in enumerate(retrieved, start=1)}
        for place, j in enumerate([p for p in relevant if p not in rank], start=top_k + 1):
            rank[j] = place
        value = {j: 1 / place if place <= metric_cut else 0 for j, place in rank.items()}
        pairs = [(p, n) for p in relevant for n in retrieved if n not in relevant]
        loss = q.sum() * 0
        for p, n in pairs:
            difference = (scores[n] - scores[p]) / temperature
            softplus = difference.clamp_min(0) + torch.log1p(torch.exp(-difference.abs()))
            loss = loss + softplus * abs(value[p] - value[n]) / len(pairs)
        losses.append(loss)
    return torch.stack(losses)


def assert_close(got, expected, tolerance):
    expected = expected.detach().to(got.dtype)
    torch.testing.assert_close(got.detach(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def positives_of(ids):
    return [POSITIVES[i] for i in ids.tolist()]


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_and_gradient_are_those_of_the_formulas(setting, dtype, tolerance):
    documents, queries = DOCUMENTS.to(dtype), QUERIES.to(dtype, copy=True).requires_grad_()
    loss = AdoreLoss(documents, POSITIVES, **dict(zip(NAMES, setting, strict=True)))
    losses, mean = loss(queries, IDS, reduction="none"), loss(queries, IDS)
    expected = by_hand(queries, documents, positives_of(IDS), *setting)
    assert (losses.shape, losses.dtype, mean.shape) == ((8,), dtype, ())
    assert_close(losses, expected, tolerance)
    assert_close(mean, expected.mean(), tolerance)
    (wanted,) = torch.autograd.grad(expected.mean(), queries)
    for got in (losses.mean(), mean):
        assert_close(torch.autograd.grad(got, queries)[0], wanted, tolerance)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_gradcheck(similarity):
    loss = AdoreLoss(DOCUMENTS, POSITIVES, top_k=6, similarity=similarity, temperature=0.5)
    assert torch.autograd.gradcheck(lambda q: loss(q, IDS, reduction="none"), QUERIES.clone().requires_grad_())


@pytest.mark.parametrize(
    ("retrieved", "positives", "metric_cut", "expected"),
    [
        ([7, 4, 9], [4], 200, [[1 / 2, 0, 1 / 6]]),
        ([7, 4, 9], [5], 200, [[3 / 4, 1 / 4, 1 / 12]]),  # not retrieved: rank 4
        ([7, 4, 9], [5], 3, [[1, 1 / 2, 1 / 3]]),  # beyond the cut
        ([7, 4, 9], [6, 5], 200, [[3 / 4, 1 / 4, 1 / 12], [4 / 5, 3 / 10, 2 / 15]]),  # ranks 4 and 5
        ([7, 4, 9], [5, 9, 6], 200, [[3 / 4, 1 / 4, 0], [2 / 3, 1 / 6, 0], [4 / 5, 3 / 10, 0]]),
        ([7, 4, 9], [4, -1], 1, [[1, 0, 0], [0, 0, 0]]),  # padded
        ([7, 4, 9], [9, 7, 4], 200, [[0, 0, 0]] * 3),  # all positives
        ([7, -1, -1], [-1, 5], 200, [[0, 0, 0], [3 / 4, 0, 0]]),  # one was found
    ],
)
def test_rank_weights_by_hand(retrieved, positives, metric_cut, expected):
    weights, pairs = rank_weights(
        torch.tensor([retrieved]), torch.tensor([positives]), metric_cut=metric_cut, dtype=F64
    )
    torch.testing.assert_close(weights, torch.tensor([expected], dtype=F64))
    assert pairs.tolist() == [[[p >= 0 and n >= 0 and n not in positives for n in retrieved] for p in positives]]


def test_a_query_that_retrieves_positives_only_has_loss_zero_with_a_graph():
    query = DOCUMENTS[[4]].clone().requires_grad_()
    loss = AdoreLoss(DOCUMENTS, [list(range(15))], top_k=5)(query, torch.tensor([0]))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, query)[0].tolist() == [[0] * WIDTH]


def test_a_positive_that_is_listed_twice_counts_once():
    twice = [[*row, row[0]] for row in POSITIVES]
    assert AdoreLoss(DOCUMENTS, twice, top_k=5)(QUERIES, IDS) == AdoreLoss(DOCUMENTS, POSITIVES, top_k=5)(QUERIES, IDS)


def test_the_gradient_reaches_the_queries_only():
    documents, queries = DOCUMENTS.clone().requires_grad_(), QUERIES.clone().requires_grad_()
    AdoreLoss(documents, POSITIVES, top_k=5)(queries, IDS).backward()
    assert documents.grad is None
    assert bool(queries.grad.any())


def test_index_of_any_kind_is_not_copied(tmp_path):
    memory_map = np.memmap(tmp_path / "index", dtype=np.float32, mode="w+", shape=(15, WIDTH))
    memory_map[:] = DOCUMENTS.numpy()
    memory_map.flush()
    read_only = np.memmap(tmp_path / "index", dtype=np.float32, mode="r", shape=(15, WIDTH))
    array, queries = DOCUMENTS.float().numpy(), QUERIES.float()
    expected = AdoreLoss(DOCUMENTS.float(), POSITIVES, top_k=5)(queries, IDS)
    for index in (memory_map, read_only, array):
        loss = AdoreLoss(index, Ragged.from_lists(POSITIVES), top_k=5)
        assert loss.documents.data_ptr() == index.ctypes.data
        assert loss(queries, IDS.int()) == expected
    half = DOCUMENTS.half()
    assert AdoreLoss(half, POSITIVES, top_k=5)(queries, IDS) == AdoreLoss(half.float(), POSITIVES, top_k=5)(
        queries, IDS
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_counts_in_float32(dtype):
    loss = AdoreLoss(DOCUMENTS.float(), POSITIVES, top_k=5, temperature=0.05)
    queries = QUERIES.to(dtype).requires_grad_()
    wide = queries.detach().float().requires_grad_()
    expected = loss(wide, IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(queries, IDS)
        assert loss(wide, IDS) == expected
    assert (got.dtype, got) == (torch.float32, expected)
    gradient, wanted = torch.autograd.grad(got, queries)[0], torch.autograd.grad(expected, wide)[0]
    torch.testing.assert_close(gradient, wanted.to(dtype))


def test_zero_queries_have_cosine_zero_and_finite_gradients():
    queries = torch.zeros(1, WIDTH, requires_grad=True)
    loss = AdoreLoss(DOCUMENTS.float(), POSITIVES, top_k=3, similarity="cosine")(queries, torch.tensor([6]))
    weights = sum(1 / n - 1 / p for p in (4, 5) for n in (1, 2, 3)) / 6  # equal scores: documents 0, 1, 2
    assert loss.item() == pytest.approx(np.log(2) * weights, rel=1e-6)
    assert float(torch.autograd.grad(loss, queries)[0].abs().max()) < 10


# --- retrievers -------------------------------------------------------------------------------------------------------


def test_another_retriever_takes_the_place_of_exact_search():
    asked = []

    def lists(query, k):
        asked.append((query.requires_grad, torch.is_grad_enabled(), k))
        found = search(DOCUMENTS, query, 6)
        ids = found.ids[:, 1::2].numpy()  # every second document, and one fewer than asked for
        return None, np.concatenate([ids, np.full((len(ids), 1), -1)], axis=1)

    queries = QUERIES.clone().requires_grad_()
    losses = AdoreLoss(DOCUMENTS, POSITIVES, top_k=4, search=lists)(queries, IDS, reduction="none")
    expected = by_hand(queries, DOCUMENTS, positives_of(IDS), 4, 200, "dot", 1.0, retrieve=lambda ranked: ranked[1:6:2])
    assert_close(losses, expected, 1e-6 if losses.dtype == torch.float32 else 1e-10)
    assert asked == [(False, False, 4)]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.zeros(8, 3, dtype=torch.int64), "ids torch.int64 (8, 3), which must be integers (8, 4)"),
        (torch.zeros(7, 4, dtype=torch.int64), "(7, 4), which must be"),
        (torch.zeros(8, 4), "ids torch.float32"),
        (torch.full((8, 4), 15), "gave document 15 of 15; the index must be that of doc_emb"),
    ],
)
def test_what_a_retriever_gives_is_checked(ids, words):
    loss = AdoreLoss(DOCUMENTS, POSITIVES, top_k=4, search=lambda query, k: (None, ids))
    with pytest.raises(ValueError, match="AdoreLoss") as raised:
        loss(QUERIES, IDS)
    assert words in str(raised.value)


# --- in a training loop -----------------------------------------------------------------------------------------------


def test_no_checkpoint_holds_the_index():
    model = nn.Linear(2, 2)
    model.loss = AdoreLoss(DOCUMENTS, POSITIVES, top_k=5)
    assert set(model.state_dict()) == {"weight", "bias"}
    assert len(list(model.buffers())) == 0
    again = pickle.loads(pickle.dumps(model.loss))
    assert again(QUERIES, IDS) == model.loss(QUERIES, IDS)


def test_a_sampler_records_the_difficulty_of_each_query():
    sampler, ids = Everything(8), torch.tensor([4, 0, 6])
    loss = AdoreLoss(DOCUMENTS.float(), POSITIVES, top_k=5)
    queries = QUERIES[:3].float().requires_grad_()
    torch.testing.assert_close(sampler.observe(ids, loss(queries, ids, reduction="none")), loss(queries, ids))
    assert torch.equal(sampler.ledger.column("loss_last")[ids], loss(queries, ids, reduction="none").detach())


def test_training_moves_the_positives_up():
    torch.manual_seed(0)
    encoder = nn.Linear(WIDTH, WIDTH).double()
    loss, optimizer = AdoreLoss(DOCUMENTS, POSITIVES, top_k=10), torch.optim.Adam(encoder.parameters(), lr=0.03)
    history = []
    for _ in range(60):
        history.append(loss(encoder(QUERIES), torch.arange(8)))
        optimizer.zero_grad()
        history[-1].backward()
        optimizer.step()
    assert history[-1].item() < history[0].item() / 2


def encoder_gradients(model, rows):
    loss = AdoreLoss(DOCUMENTS, POSITIVES, top_k=5, metric_cut=4, temperature=0.5)
    loss(model(QUERIES[rows]), IDS[rows]).backward()
    return [parameter.grad for parameter in model.parameters()]


def linear_encoder():
    torch.manual_seed(0)
    return nn.Linear(WIDTH, WIDTH).double()


def under_ddp(rank):
    return encoder_gradients(DistributedDataParallel(linear_encoder()), slice(rank * 4, rank * 4 + 4))


def test_two_ranks_together_are_one_process_with_the_joined_batch():
    expected = encoder_gradients(linear_encoder(), slice(None))
    for got in run_ranks(2, under_ddp):
        for one, other in zip(got, expected, strict=True):
            assert_close(one, other, 1e-10)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((DOCUMENTS, POSITIVES), {}, ValueError, "top_k is how many documents are retrieved and must be in [1, 15]"),
        ((DOCUMENTS, POSITIVES), {"top_k": 0}, ValueError, "top_k=0"),
        ((DOCUMENTS, POSITIVES), {"top_k": 2.0}, TypeError, "top_k=2.0"),
        ((DOCUMENTS, POSITIVES), {"top_k": 5, "metric_cut": 0}, ValueError, "metric_cut must be >= 1"),
        ((DOCUMENTS, POSITIVES), {"top_k": 5, "temperature": 0}, ValueError, "temperature must be in (0, inf)"),
        ((DOCUMENTS, POSITIVES), {"top_k": 5, "similarity": "l2"}, ValueError, "must be one of 'dot', 'cosine'"),
        ((DOCUMENTS[:0], POSITIVES), {"top_k": 5}, ValueError, "the corpus is empty"),
        ((DOCUMENTS.long(), POSITIVES), {"top_k": 5}, TypeError, "AdoreLoss(doc_emb=torch.int64)"),
        ((DOCUMENTS[0], POSITIVES), {"top_k": 5}, ValueError, "must have two dimensions"),
        ((DOCUMENTS, [[3], []]), {"top_k": 5}, ValueError, "AdoreLoss(positives=...): every query needs a positive"),
        ((DOCUMENTS, [[3], [15]]), {"top_k": 5}, ValueError, "AdoreLoss(positives=...)"),
        ((DOCUMENTS, [[3], [-1]]), {"top_k": 5}, ValueError, "AdoreLoss(positives=...)"),
        ((DOCUMENTS, [[3], [1.5]]), {"top_k": 5}, TypeError, "AdoreLoss(positives=...)"),
    ],
)
def test_bad_arguments(arguments, options, error, words):
    with pytest.raises(error) as raised:
        AdoreLoss(*arguments, **options)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("queries", "ids", "options", "error", "words"),
    [
        (QUERIES[:, :4], IDS, {}, ValueError, "query_emb=(8, 4)): query_emb must be (B, 5)"),
        (QUERIES[0], IDS[:1], {}, ValueError, "query_emb must be (B, 5)"),
        (QUERIES[:0], IDS[:0], {}, ValueError, "B >= 1"),
        (QUERIES.long(), IDS, {}, TypeError, "query_emb=torch.int64"),
        (QUERIES.numpy(), IDS, {}, TypeError, "query_emb=ndarray"),
        (QUERIES.index_fill(0, torch.tensor([6]), torch.nan), IDS, {}, ValueError, "row 6 holds NaN or infinity"),
        (QUERIES.index_fill(0, torch.tensor([6]), torch.inf), IDS, {}, ValueError, "row 6 holds NaN or infinity"),
        (QUERIES, IDS[:7], {}, ValueError, "one id for each of the 8 rows"),
        (QUERIES, IDS.float(), {}, TypeError, "query_ids=torch.float32"),
        (QUERIES, IDS.tolist(), {}, TypeError, "query_ids=list"),
        (QUERIES, IDS + 1, {}, IndexError, "ids must be in [0, 8)"),
        (QUERIES, IDS - 1, {}, IndexError, "ids must be in [0, 8)"),
        (QUERIES, IDS, {"reduction": "sum"}, ValueError, "reduction must be one of 'mean', 'none'"),
    ],
)
def test_bad_batches(queries, ids, options, error, words):
    with pytest.raises(error) as raised:
        AdoreLoss(DOCUMENTS, POSITIVES, top_k=5)(queries, ids, **options)
    assert words in str(raised.value)
