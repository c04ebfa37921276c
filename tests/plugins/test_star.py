import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from samplewise.loaders import with_ids
from samplewise.loaders.negatives import CollateRetrieval, RetrievalDataset
from samplewise.plugins.star import star_loss
from support import Everything, run_ranks

F64 = torch.float64
WIDTH = 6
# Six queries. Documents 3 and 8 are the positive of two queries each; 5 is also known to query 0, 8 to query 3.
POSITIVES = torch.tensor([3, 8, 3, 5, 9, 8])
NEGATIVES = torch.tensor([[7, 8, 1], [3, 2, 9], [5, 4, 4], [8, 0, 3], [6, 9, 5], [1, 7, 8]])
KNOWN = torch.tensor([[3, 5], [8, -1], [3, -1], [8, 5], [9, -1], [-1, -1]])  # the last one's own positive is not listed
SETTINGS = [  # pooling, alpha, temperature, similarity
    ("pairs", 1.0, 1.0, "dot"),
    ("pairs", 0.3, 0.05, "dot"),
    ("pairs", 2.5, 0.05, "cosine"),
    ("pairs", 0.0, 1.0, "cosine"),
    ("split", 1.0, 1.0, "dot"),
    ("split", 0.3, 0.05, "cosine"),
    ("split", 2.5, 0.05, "dot"),
    ("split", 0.0, 2.0, "dot"),
]
NAMES = ("pooling", "alpha", "temperature", "similarity")
WITH_PAIRS = [(setting, count) for setting in SETTINGS for count in (0, 1, 3) if count or setting[1]]


def vectors(*shape, seed=0, dtype=F64):
    values = torch.randn(*shape, WIDTH, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).requires_grad_()


def batch(size=6, count=3, dtype=F64):
    q, d, h = vectors(size, dtype=dtype), vectors(size, seed=1, dtype=dtype), vectors(size, count, seed=2, dtype=dtype)
    return q, d, h if count else None


def id_arguments(size=6, count=3):
    return {"positive_ids": POSITIVES[:size], "negative_ids": NEGATIVES[:size, :count], "known": KNOWN[:size]}


def softplus(x):
    return x.clamp_min(0) + torch.log1p(torch.exp(-x.abs()))


def by_hand(q, d, h, ids, pooling, alpha, temperature, similarity):
    """The formulas, pair by pair, in float64: the loss and what each query adds to it."""

    def score(a, b):
        return a @ b / (a.norm() * b.norm() if similarity == "cosine" else 1) / temperature

    q, d, h = (None if part is None else part.double() for part in (q, d, h))
    size, count = len(q), 0 if h is None else h.shape[1]
    pairs = {"in-batch": [], "hard": []}  # (query, loss)
    for i in range(size):
        positives = {int(ids["positive_ids"][i]), *ids["known"][i].tolist()} if ids else set()
        own = score(q[i], d[i])
        for j in range(size):
            if i != j and not (ids and int(ids["positive_ids"][j]) in positives):
                pairs["in-batch"].append((i, softplus(score(q[i], d[j]) - own)))
        for j, k in itertools.product(range(size), range(count)):
            if not (ids and int(ids["negative_ids"][j, k]) in positives):
                pairs["hard"].append((i, softplus(score(q[i], h[j, k]) - own)))
    norms = {kind: len(rows) for kind, rows in pairs.items()}
    if pooling == "pairs":
        norms = dict.fromkeys(pairs, alpha * norms["in-batch"] + norms["hard"])
    losses = [q[0, 0] * 0 for _ in range(size)]
    for kind, weight in (("in-batch", alpha), ("hard", 1)):
        for i, loss in pairs[kind]:
            losses[i] = losses[i] + weight * loss / norms[kind]
    return sum(losses), torch.stack(losses)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, [tensor for tensor in tensors if tensor is not None])


def assert_close(got, expected, tolerance):
    expected = expected.to(got.dtype)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(("setting", "count"), WITH_PAIRS)
def test_loss_and_gradients_are_those_of_the_formulas(setting, count, with_ids, dtype, tolerance):
    options = dict(zip(NAMES, setting, strict=True))
    tensors = batch(count=count, dtype=dtype)
    ids = id_arguments(count=count) if with_ids else {}
    loss = star_loss(*tensors, **ids, **options)
    losses = star_loss(*tensors, **ids, **options, reduction="none")
    expected, rows = by_hand(*tensors, ids, *setting)
    assert (loss.shape, losses.shape, loss.dtype, losses.dtype) == ((), (6,), dtype, dtype)
    assert_close(loss, expected, tolerance)
    assert_close(losses, 6 * rows, tolerance)
    wanted = gradients(expected, *tensors)
    for got in (loss, losses.mean()):
        for gradient, exact in zip(gradients(got, *tensors), wanted, strict=True):
            assert_close(gradient, exact, tolerance)


@pytest.mark.parametrize("pooling", ["pairs", "split"])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_gradcheck(pooling, similarity):
    def loss(q, d, h):
        return star_loss(q, d, h, **id_arguments(4, 2), pooling=pooling, alpha=0.5, similarity=similarity)

    tensors = batch(4, 2)
    assert torch.autograd.gradcheck(loss, tensors)
    assert torch.autograd.gradgradcheck(loss, tensors)


# --- masks ------------------------------------------------------------------------------------------------------------

APART = torch.eye(3, dtype=F64) * 2  # q_i . d_i = 4, all other scores 0: softplus(-4) for each pair


@pytest.mark.parametrize(
    ("positive_ids", "known", "pairs"),
    [
        (None, None, [2, 2, 2]),
        ([1, 2, 3], None, [2, 2, 2]),
        ([1, 1, 3], None, [1, 1, 2]),  # a document that two queries share
        ([1, 2, 3], [[1, 3], [2, -1], [3, -1]], [1, 2, 2]),  # one that only query 0 has too
        ([1, 2, 3], [[1, 3, 2], [2, -1, -1], [3, 2, -1]], [0, 2, 1]),
        ([7, 7, 7], None, [0, 0, 0]),
    ],
)
def test_pairs_left_in_the_batch(positive_ids, known, pairs):
    ids = {name: None if ids is None else torch.tensor(ids) for name, ids in
           (("positive_ids", positive_ids), ("known", known))}  # fmt: skip
    losses = star_loss(APART, APART, **ids, reduction="none")
    expected = torch.tensor(pairs, dtype=F64) * math.log1p(math.exp(-4)) * 3 / max(1, sum(pairs))
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize(
    ("negative_ids", "pairs"),
    [
        ([[7], [8], [9]], [3, 3, 3]),
        ([[2], [8], [9]], [3, 2, 3]),  # query 0's negative is query 1's positive
        ([[4], [4], [9]], [1, 3, 3]),  # two copies of a document known to query 0
        ([[1], [2], [3]], [2, 2, 2]),  # each is its own query's positive
    ],
)
@pytest.mark.parametrize("options", [{"alpha": 0}, {"pooling": "split", "alpha": 0}])
def test_pairs_left_of_the_hard_negatives(negative_ids, pairs, options):
    ids = {"positive_ids": torch.tensor([1, 2, 3]), "known": torch.tensor([[1, 4], [2, -1], [3, -1]])}
    negatives = torch.zeros(3, 1, 3, dtype=F64)
    losses = star_loss(
        APART, APART, negatives, **ids, negative_ids=torch.tensor(negative_ids), reduction="none", **options
    )
    torch.testing.assert_close(losses, torch.tensor(pairs, dtype=F64) * math.log1p(math.exp(-4)) * 3 / sum(pairs))


@pytest.mark.parametrize("pooling", ["pairs", "split"])
def test_nothing_left_gives_zero_with_a_graph(pooling):
    same = torch.full((4,), 5)
    for size, count in ((1, 0), (4, 0), (4, 2)):
        tensors = batch(size, count)
        ids = {"positive_ids": same[:size], "negative_ids": same[:size, None].expand(size, count)}
        losses = star_loss(*tensors, **ids, pooling=pooling, reduction="none")
        assert losses.tolist() == [0] * size
        assert all(bool((gradient == 0).all()) for gradient in gradients(losses.sum(), *tensors))


def test_split_keeps_the_mean_of_the_side_that_is_left():
    q, d, h = batch(4, 1)
    hard_only = star_loss(q, d, h, alpha=0)
    ids = {"positive_ids": torch.full((4,), 5), "negative_ids": torch.tensor([[1], [2], [3], [4]])}
    assert_close(star_loss(q, d, h, **ids, pooling="split", alpha=0.7), hard_only, 1e-12)
    ids = {"positive_ids": torch.tensor([1, 2, 3, 4]), "known": torch.full((4, 1), 5)}
    ids["negative_ids"] = torch.full((4, 1), 5)
    assert_close(star_loss(q, d, h, **ids, pooling="split", alpha=0.7), 0.7 * star_loss(q, d), 1e-12)


def test_no_hard_negatives_as_an_empty_tensor():
    q, d, h = batch()
    empty = {"positive_ids": POSITIVES, "negative_ids": NEGATIVES[:, :0]}
    assert star_loss(q, d, h[:, :0], **empty) == star_loss(q, d, **empty) == star_loss(q, d, positive_ids=POSITIVES)


def test_in_batch_pairs_alone_are_pooled_whatever_their_weight():
    q, d, _ = batch(2, 0)
    torch.testing.assert_close(star_loss(q, d, alpha=0.01), star_loss(q, d))


def test_ids_of_any_integer_type():
    tensors, ids = batch(), id_arguments()
    assert star_loss(*tensors, **ids) == star_loss(*tensors, **{name: rows.int() for name, rows in ids.items()})


# --- numerics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_counts_in_float32(dtype):
    tensors = batch(dtype=dtype)
    wide = [tensor.detach().float().requires_grad_() for tensor in tensors]
    expected = star_loss(*wide, **id_arguments(), temperature=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = star_loss(*tensors, **id_arguments(), temperature=0.05)
        assert star_loss(*wide, **id_arguments(), temperature=0.05) == expected
    assert loss.dtype == torch.float32
    assert loss == expected
    for gradient, wanted in zip(gradients(loss, *tensors), gradients(expected, *wide), strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, wanted.to(dtype))


def test_large_scores_neither_overflow_nor_round_to_zero():
    q = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]], requires_grad=True)
    far = star_loss(q, q.detach().flip(0))
    assert far.item() == 1e6
    near = star_loss(q / 100, q.detach() / 100).item()
    assert near == pytest.approx(math.exp(-100), rel=1e-5)
    assert gradients(far, q)[0].tolist() == [[500, -500], [-500, 500]]


def test_zero_vectors_have_cosine_zero_and_finite_gradients():
    q, d, h = (tensor.detach().float() for tensor in batch(3, 1))
    q[0], d[1], h[2] = 0, 0, 0
    tensors = [tensor.requires_grad_() for tensor in (q, d, h)]
    losses = star_loss(*tensors, similarity="cosine", reduction="none")
    assert losses[0].item() == pytest.approx(math.log(2) * 5 * 3 / 15, rel=1e-6)
    assert all(float(gradient.abs().max()) < 10 for gradient in gradients(losses.sum(), *tensors))


def test_nan_is_not_hidden():
    q, d, h = batch()
    assert star_loss(q.detach().index_fill(0, torch.tensor([2]), math.nan), d, h).isnan()
    losses = star_loss(q.detach().index_fill(0, torch.tensor([2]), math.nan), d, h, reduction="none")
    assert losses.isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize(("alpha", "documents"), [(1.0, 15), (0.0, 10)])
def test_one_matrix_of_scores_is_kept_for_backward(alpha, documents):
    q, d, h = batch(5, 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        star_loss(q, d, h, **id_arguments(5, 2), alpha=alpha, temperature=0.5)
    matrices = [tensor for tensor in kept if tensor.shape in ((5, 5), (5, 10), (5, 15))]
    assert [(tensor.dtype, tensor.shape[1]) for tensor in matrices] == [(torch.bool, documents), (F64, documents)]


@pytest.mark.parametrize("count", [0, 2])
def test_batches_of_a_loader_train_and_a_sampler_records_the_difficulty_of_each_query(count):
    queries, documents = vectors(6, dtype=torch.float32).detach(), vectors(10, seed=1, dtype=torch.float32).detach()
    positives = [[3, 5], [8], [3], [5, 8], [9], [8]]
    sampler = Everything(6)
    data = RetrievalDataset(queries, documents, positives, NEGATIVES.numpy() if count else None, count=count)
    collate = CollateRetrieval(torch.stack)
    encoder, seen = nn.Linear(WIDTH, WIDTH), torch.zeros(6)
    for items in DataLoader(with_ids(data), batch_size=3, sampler=sampler, collate_fn=collate):
        ids, q, d = items["sample_id"], encoder(items["queries"]), encoder(items["documents"])
        names = {"positive_ids": items["positive_ids"], "negative_ids": items["negative_ids"]}
        negatives = d[len(q) :].unflatten(0, items["negative_ids"].shape)
        losses = star_loss(q, d[: len(q)], negatives, **names, known=items["positives"], reduction="none")
        sampler.observe(ids, losses).backward()
        seen[ids] = losses.detach()
        expected, _ = by_hand(q, d[: len(q)], negatives, {**names, "known": items["positives"]}, *SETTINGS[0])
        assert_close(losses.mean(), expected.detach(), 1e-5)
    assert torch.equal(sampler.ledger.column("loss_last"), seen)
    assert bool(encoder.weight.grad.any())


# --- ranks ------------------------------------------------------------------------------------------------------------

CASES = [  # setting, hard negatives, with ids
    *((setting, 2, with_ids) for setting in SETTINGS[::2] for with_ids in (False, True)),
    *((setting, 0, True) for setting in (SETTINGS[1], SETTINGS[5])),
    *((SETTINGS[number], 2, True) for number in (3, 7)),
]


def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH)).double()


def encoded_loss(model, rows, setting, count, with_ids, **options):
    """The loss of the queries ``rows``, all texts encoded in one forward pass."""
    q, d, h = (tensor.detach()[rows] for tensor in batch(6, 2))
    out = model(torch.cat([q, d, h.flatten(0, 1)]))
    q, d, h = out.split([len(q), len(q), 2 * len(q)])
    ids = {name: values[rows] for name, values in id_arguments(6, count).items()} if with_ids else {}
    negatives = h.unflatten(0, (len(q), 2)) if count else None
    return star_loss(q, d, negatives, **ids, **dict(zip(NAMES, setting, strict=True)), **options)


def parameter_gradients(model, losses):
    model.zero_grad()
    losses.mean().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def under_ddp(rank, world):
    """For each case, the losses of this rank's queries and the gradients after DDP took their mean; then the errors."""
    share = slice(rank * 6 // world, (rank + 1) * 6 // world)
    results = []
    for case in CASES:
        model = DistributedDataParallel(encoder())
        losses = encoded_loss(model, share, *case, reduction="none")
        results.append((losses.detach(), parameter_gradients(model, losses)))
    alone = encoded_loss(encoder(), share, *CASES[1], gather=False).item()
    faults = []
    for rows, known in ((slice(0, 2 + (rank == 1)), True), (slice(0, 2), rank == 0)):
        try:
            encoded_loss(encoder(), rows, SETTINGS[0], 2, known)
        except ValueError as error:
            faults.append(str(error))
    return results, alone, faults


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_are_one_process_with_the_joined_batch(world):
    ranks = run_ranks(world, under_ddp, world)
    for number, case in enumerate(CASES):
        model = encoder()
        losses = encoded_loss(model, slice(None), *case, reduction="none")
        got = [results[number] for results, _, _ in ranks]
        assert_close(torch.cat([rows for rows, _ in got]), losses.detach(), 1e-10)
        wanted = parameter_gradients(model, losses)
        for _, gradient in got:
            for one, other in zip(gradient, wanted, strict=True):
                assert_close(one, other, 1e-10)
    for rank, (_, alone, faults) in enumerate(ranks):
        rows = slice(rank * 6 // world, (rank + 1) * 6 // world)
        assert alone == pytest.approx(encoded_loss(encoder(), rows, *CASES[1]).item(), rel=1e-12)
        assert "rank 0: B=2 n=2 E=6 float64 with ids, rank 1: B=3 n=2" in faults[0]
        assert "rank 0: B=2 n=2 E=6 float64 with ids, rank 1: B=2 n=2 E=6 float64 without ids" in faults[1]


# --- bad input --------------------------------------------------------------------------------------------------------

Q, D, H = (tensor.detach() for tensor in batch())
IDS = id_arguments()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((Q, D[:5]), {}, ValueError, r"queries (6, 6) and positives (5, 6) must both be (B, E)"),
        ((Q, D[:, :4]), {}, ValueError, "must both be (B, E)"),
        ((Q[:0], D[:0]), {}, ValueError, "B >= 1"),
        ((Q[0], D[0]), {}, ValueError, "must both be (B, E)"),
        ((Q, D, D), {}, ValueError, "negatives must be (B, n, E) with queries' (B, E), (6, 6)"),
        ((Q, D, H[:5]), {}, ValueError, "negatives=(5, 3, 6)"),
        ((Q, D, H[..., :5]), {}, ValueError, "negatives=(6, 3, 5)"),
        ((Q.long(), D), {}, TypeError, "queries=torch.int64"),
        ((Q, D.numpy()), {}, TypeError, "positives=ndarray"),
        ((Q, D, H.int()), {}, TypeError, "negatives=torch.int32"),
        ((Q, D), {"positive_ids": POSITIVES[:5]}, ValueError, "positive_ids must have shape (6,)"),
        ((Q, D), {"positive_ids": POSITIVES.float()}, TypeError, "positive_ids=torch.float32"),
        ((Q, D), {"positive_ids": POSITIVES.tolist()}, TypeError, "positive_ids=list"),
        ((Q, D, H), {**IDS, "negative_ids": NEGATIVES[:, :2]}, ValueError, "negative_ids must have shape (6, 3)"),
        ((Q, D), IDS, ValueError, "negative_ids must have shape (6, 0)"),
        ((Q, D, H), {**IDS, "known": KNOWN[:, 0]}, ValueError, "known must have shape (6, P)"),
        ((Q, D, H), {**IDS, "known": KNOWN.double()}, TypeError, "known=torch.float64"),
        ((Q, D, H), {"negative_ids": NEGATIVES}, ValueError, "masks need positive_ids too"),
        ((Q, D, H), {"known": KNOWN}, ValueError, "masks need positive_ids too"),
        ((Q, D, H), {"positive_ids": POSITIVES}, ValueError, "would not be masked: give their ids"),
        ((Q, D, H), {"alpha": -0.1}, ValueError, "alpha is the weight of the in-batch pairs and must be in [0, inf)"),
        ((Q, D, H), {"alpha": math.nan}, ValueError, "alpha=nan"),
        ((Q, D, H), {"alpha": "1"}, TypeError, "alpha='1'"),
        ((Q, D), {"alpha": 0}, ValueError, "no pairs are left"),
        ((Q, D), {"temperature": 0}, ValueError, "temperature is what divides scores and must be in (0, inf)"),
        ((Q, D), {"temperature": math.inf}, ValueError, "temperature=inf"),
        ((Q, D), {"pooling": "sum"}, ValueError, "pooling='sum'): pooling must be one of 'pairs', 'split'"),
        ((Q, D), {"similarity": "l2"}, ValueError, "similarity must be one of 'dot', 'cosine'"),
        ((Q, D), {"reduction": "sum"}, ValueError, "reduction must be one of 'mean', 'none'"),
    ],
)
def test_bad_input(arguments, options, error, words):
    with pytest.raises(error) as raised:
        star_loss(*arguments, **options)
    assert words in str(raised.value)
