"""The ops: schemas, agreement of reference and kernel bit for bit, torch.compile. The ledger's meaning: test_ledger."""

import numpy as np
import pytest
import torch

from samplewise.cuda_ext import Ledger, ops, reference
from support import needs_kernels

INF, NAN = float("inf"), float("nan")
FLOAT32 = np.finfo(np.float32)
ODD_LOSSES = [0.0, -0.0, 1e-45, -1e-42, 1.0, 1e18, 1.1e18, -1e18, 3e38, NAN, INF, -INF]


def rng(seed=0):
    return np.random.default_rng(seed)


def ledger_arguments(size, ids, losses=None, scores=None, steps=None):
    ids = torch.as_tensor(np.asarray(ids, dtype=np.int64))
    losses = torch.linspace(0, 3, ids.numel()) if losses is None else losses
    counters = torch.tensor([3, 0, 5])
    return torch.zeros(size, 8), counters, torch.zeros(0, dtype=torch.int32), ids, losses, scores, steps, 0.9


def assert_same_bits(one, other):
    for a, b in zip(one, other, strict=True):
        a, b = (x.view(torch.int32) if x.is_floating_point() else x for x in (a, b))
        assert torch.equal(a, b)


# --- opcheck ----------------------------------------------------------------------------------------------------------

SAMPLES = {
    "ledger_update": [
        ledger_arguments(8, [1, 2, 3]),
        ledger_arguments(8, [1, 1, 1], scores=torch.ones(3)),
        ledger_arguments(8, [], steps=torch.zeros(0, dtype=torch.int64)),
        ledger_arguments(1, [0, 0], steps=torch.tensor([4, 9]), scores=torch.tensor([NAN, 1.0])),
    ],
    "permutation": [(torch.empty(min(n, 5), dtype=torch.int64), n, 3, 0, 1) for n in (1, 10, 70_000)],
    "draw": [
        (torch.empty(k, dtype=torch.int64), torch.empty(1), torch.linspace(0, 1, n), 7)
        for n, k in ((2, 1), (9, 0), (9, 5))
    ],
    "histogram": [
        (torch.empty(5, 2, dtype=torch.int64), torch.tensor([1.0, NAN, 2.0, -1.0]), 1 << 31, 28),
        (torch.empty(1, 2, dtype=torch.int64), torch.zeros(0), 0, 0),
    ],
}


@pytest.mark.parametrize(
    ("name", "arguments"), [(name, arguments) for name, samples in SAMPLES.items() for arguments in samples]
)
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(torch.ops.samplewise, name).default, arguments)


# --- kernel and reference ---------------------------------------------------------------------------------------------

BATCHES = {
    "unique": (1000, rng().permutation(1000)[:300]),
    "from ten ids": (10, rng().integers(0, 10, 3000)),
    "one id": (50, np.full(2000, 7)),
    "one sample": (1, np.zeros(20)),
    "some twice": (10_000, rng().integers(0, 10_000, 4096)),
    "empty": (5, []),
    "beyond 2^24": (2**24 + 9, 2**24 + rng().integers(0, 9, 40)),
}


def odd_losses(count, seed):
    values = rng(seed).lognormal(0, 3, count).astype(np.float32)
    chosen = rng(seed + 1).random(count) < 0.3
    values[chosen] = rng(seed + 2).choice(np.array(ODD_LOSSES, dtype=np.float32), int(chosen.sum()))
    return torch.from_numpy(values)


@needs_kernels
@pytest.mark.parametrize("with_scores", [False, True])
@pytest.mark.parametrize("with_steps", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_ledger_update_kernel_and_reference_agree(name, with_scores, with_steps):
    size, ids = BATCHES[name]
    native, plain = ledger_arguments(size, ids)[:3], ledger_arguments(size, ids)[:3]
    ids = torch.as_tensor(np.asarray(ids, dtype=np.int64))
    for step in range(3):
        losses = odd_losses(ids.numel(), 10 * step)
        scores = odd_losses(ids.numel(), 10 * step + 5) if with_scores else None
        steps = torch.arange(ids.numel()) * 7 - 5 if with_steps else None
        ops.ledger_update(*native, ids, losses, scores, steps, 0.8)
        reference.ledger_update(*plain, ids, losses, scores, steps, 0.8)
        assert_same_bits(native, plain)
    assert native[1][reference.UPDATES] == (5 if with_steps else 8)


@needs_kernels
def test_ledger_update_takes_any_stride():
    ids = torch.from_numpy(rng(4).integers(0, 30, 60))
    spread = torch.full((60, 3), 99.0)
    spread[:, 1] = odd_losses(60, 4)
    strided, dense = (ledger_arguments(30, [])[:3] for _ in range(2))
    wide = torch.stack([ids, -ids], dim=1)
    ops.ledger_update(*strided, wide[:, 0], spread[:, 1], spread[:, 1], wide[:, 0], 0.5)
    ops.ledger_update(*dense, ids, spread[:, 1].clone(), spread[:, 1].clone(), ids, 0.5)
    assert_same_bits(strided, dense)


@pytest.mark.parametrize("bad", [[3, 10], [-1, 2], [2**40, 0], [1, -(2**63)]])
def test_an_id_outside_raises_and_changes_nothing(bad):
    arguments = ledger_arguments(10, bad)
    before = [x.clone() for x in arguments[:2]]
    with pytest.raises(IndexError, match=r"is outside \[0, 10\)"):
        ops.ledger_update(*arguments)
    assert_same_bits(arguments[:2], before)


def draw_of(function, weights, k, seed):
    out, tau = torch.empty(k, dtype=torch.int64), torch.empty(1)
    function(out, tau, weights, seed)
    return out, tau


WEIGHTS = {
    "equal": np.ones(5000),
    "heavy tail": rng().pareto(0.5, 70_001) + 1e-3,
    "two": np.array([1.0, 3.0]),
    "zeros": np.where(rng().random(3000) < 0.9, 0, 1.0),
    "keys that overflow": np.full(300, 1e-45),
    "denormal and not a weight": np.array([1e-40, NAN, -1.0, 1.0, 1e-45, -INF, INF, 2.0] * 50),
    "beyond a cache block": rng(3).random(200_000),
}


@needs_kernels
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 1])
@pytest.mark.parametrize("name", WEIGHTS)
def test_draw_kernel_and_reference_agree(name, share):
    weights = torch.from_numpy(WEIGHTS[name].astype(np.float32))
    k = round(share * (weights.numel() - 1))
    for seed in (0, 1, 2**63 - 1):
        native = draw_of(torch.ops.samplewise.draw, weights, k, seed)
        assert_same_bits(native, draw_of(reference.draw, weights, k, seed))


@needs_kernels
@pytest.mark.parametrize("n", [1, 2, 3, 257, 65_535, 65_536, 65_537, 100_003, 2**24 + 1, 2**31])
def test_permutation_kernel_and_reference_agree(n):
    for start, stride in ((0, 1), (n // 3, 1), (n // 2, 3), (n - 1, 1)):
        length = min(5000, (n - 1 - start) // stride + 1)
        for seed in (0, 12345, 2**63 - 1):
            native, plain = (torch.empty(length, dtype=torch.int64) for _ in range(2))
            torch.ops.samplewise.permutation(native, n, seed, start, stride)
            reference.permutation(plain, n, seed, start, stride)
            assert torch.equal(native, plain)


@needs_kernels
@pytest.mark.parametrize("shift", [0, 3, 12, 16, 23])
@pytest.mark.parametrize("low", [0, 1 << 31, 3_000_000_000])
def test_histogram_kernel_and_reference_agree(low, shift):
    values = torch.cat([odd_losses(5000, 8), -odd_losses(5000, 9), torch.full((300,), 2.5)])
    low = low >> shift << shift
    for part in (values, values[::3], values[:0]):
        native, plain = (torch.full((1024, 2), -1) for _ in range(2))
        torch.ops.samplewise.histogram(native, part, low, shift)
        reference.histogram(plain, part, low, shift)
        assert torch.equal(native, plain)


@needs_kernels
def test_any_number_of_threads_gives_the_same_bits():
    weights = torch.from_numpy(rng(5).lognormal(size=1_500_000).astype(np.float32))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            ids, tau = ops.draw(weights, 400_000, 3)
            counted = ops.histogram(weights)
            bins = torch.from_numpy(np.stack([counted.counts, counted.offsets]))
            results.append((ids, torch.tensor(tau), ops.permutation(1_500_000, 9, 0, 1_500_000), bins))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(results[0], other)


@needs_kernels
@pytest.mark.parametrize(
    ("position", "wrong"),
    [
        (0, torch.zeros(8, 7)),
        (0, torch.zeros(8, 16)[:, ::2]),
        (0, torch.zeros(8, 8, dtype=torch.float64)),
        (1, torch.zeros(1, dtype=torch.int64)),
        (3, torch.tensor([1, 2], dtype=torch.int32)),
        (4, torch.zeros(2, dtype=torch.float16)),
        (4, torch.zeros(1)),
        (5, torch.zeros(3)),
        (6, torch.zeros(2)),
    ],
)
def test_the_kernel_itself_refuses_what_would_leave_its_memory(position, wrong):
    arguments = list(ledger_arguments(8, [1, 2]))
    arguments[position] = wrong
    with pytest.raises(RuntimeError, match=r"records|counters|losses|ids|scores|steps"):
        torch.ops.samplewise.ledger_update(*arguments)


# --- torch.compile ----------------------------------------------------------------------------------------------------


def test_t25_compile_keeps_the_op_in_place():
    ledger = Ledger(8)
    address = ledger.records.data_ptr()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(records, counters, links, ids, losses):
        losses = losses * 2
        torch.ops.samplewise.ledger_update(records, counters, links, ids, losses, None, None, 0.9)
        return losses.mean()

    ids, losses = torch.tensor([2, 2, 5]), torch.tensor([1.0, 2.0, 3.0])
    step(ledger.records, ledger._counters, ledger._links, ids, losses)
    assert ledger.records.data_ptr() == address
    assert ledger.column("loss_last")[[2, 5]].tolist() == [4, 6]
    assert ledger.column("count").tolist() == [0, 0, 2, 0, 0, 1, 0, 0]


def test_t25_a_compiled_step_is_compiled_once():
    ledger, graphs = Ledger(8), []

    def count(graph, example):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=count, fullgraph=True)
    def step(ids, losses):
        torch.ops.samplewise.ledger_update(
            ledger.records, ledger._counters, ledger._links, ids, losses, None, None, 0.9
        )

    for _ in range(10):
        step(torch.tensor([2, 5]), torch.ones(2))
    assert len(graphs) == 1
    assert ledger.column("last_step")[2] == 9
    assert ledger.column("count")[5] == 10


# --- bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.draw(torch.ones(3, dtype=torch.float64), 1, 0), TypeError, "must be float32, not torch.float64"),
        (lambda: ops.draw(torch.ones(2, 2), 1, 0), ValueError, r"shape \(N,\).*\(2, 2\)"),
        (lambda: ops.draw(torch.ones(0), 0, 0), ValueError, "shape"),
        (lambda: ops.draw(torch.ones(3), 3, 0), ValueError, r"k=3.*\[0, 2\]"),
        (lambda: ops.draw(torch.ones(3), -1, 0), ValueError, "k=-1"),
        (lambda: ops.draw(torch.ones(3), 1.5, 0), TypeError, "k=1.5"),
        (lambda: ops.histogram(torch.ones(3, dtype=torch.int64)), TypeError, "float32"),
        (lambda: ops.histogram(torch.ones(3, 1)), ValueError, r"\(3, 1\)"),
        (lambda: ops.histogram(torch.tensor([NAN, INF])), ValueError, "no finite value"),
        (lambda: ops.histogram(torch.ones(3), low=2.0, high=1.0), ValueError, "low"),
        (lambda: ops.histogram(torch.ones(3), bins=8), ValueError, "bins=8"),
        (lambda: ops.order_statistics(torch.tensor([1.0, NAN]), [1]), ValueError, "rank=1"),
        (lambda: ops.permutation(0, 1, 0, 0), ValueError, "permutation"),
        (lambda: ops.permutation(2**31 + 1, 1, 0, 1), ValueError, "permutation"),
        (lambda: ops.permutation(10, 1, -1, 2), ValueError, "permutation"),
        (lambda: ops.permutation(10, 1, 5, 6), ValueError, "permutation"),
        (lambda: ops.permutation(10, 1, 0, -1), ValueError, "permutation"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
