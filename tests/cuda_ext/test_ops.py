"""The ops: schemas, agreement of reference and kernel bit for bit, torch.compile. The ledger's meaning: test_ledger."""

import numpy as np
import pytest
import torch

from kernel_cases import DRAW, HISTOGRAM, LEDGER, PERMUTATION, assert_same, ledger_arguments, results, rng
from samplewise.cuda_ext import Ledger, ops, reference
from support import needs_kernels

INF, NAN = float("inf"), float("nan")

# --- opcheck ----------------------------------------------------------------------------------------------------------

SAMPLES = {
    "ledger_update": [
        ledger_arguments(8, [1, 2, 3]),
        ledger_arguments(8, [1, 1, 1], scores=True),
        ledger_arguments(8, [], steps=True),
        ledger_arguments(1, [0, 0], steps=True, scores=True),
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


# --- kernel and reference: test_phases does the same for the CUDA kernels ---------------------------------------------


@needs_kernels
@pytest.mark.parametrize("spread", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("arguments", LEDGER)
def test_ledger_update(arguments, spread):
    kernel, plain = torch.ops.samplewise.ledger_update, reference.ledger_update
    assert_same(results(kernel, arguments, 3, spread=spread, repeat=3), results(plain, arguments, 3, repeat=3))


@needs_kernels
@pytest.mark.parametrize("arguments", PERMUTATION)
def test_permutation(arguments):
    assert_same(results(torch.ops.samplewise.permutation, arguments, 1), results(reference.permutation, arguments, 1))


@needs_kernels
@pytest.mark.parametrize("arguments", DRAW)
def test_draw(arguments):
    assert_same(results(torch.ops.samplewise.draw, arguments, 2), results(reference.draw, arguments, 2))


@needs_kernels
@pytest.mark.parametrize("spread", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("arguments", HISTOGRAM)
def test_histogram(arguments, spread):
    kernel, plain = torch.ops.samplewise.histogram, reference.histogram
    assert_same(results(kernel, arguments, 1, spread=spread), results(plain, arguments, 1))


@needs_kernels
def test_ledger_update_beyond_float_precision():
    arguments = ledger_arguments(2**24 + 9, 2**24 + rng().integers(0, 9, 40))
    assert_same(
        results(torch.ops.samplewise.ledger_update, arguments, 2), results(reference.ledger_update, arguments, 2)
    )


@pytest.mark.parametrize("bad", [[3, 10], [-1, 2], [2**40, 0], [1, -(2**63)]])
def test_an_id_outside_raises_and_changes_nothing(bad):
    arguments = ledger_arguments(10, bad)
    before = [x.clone() for x in arguments[:2]]
    with pytest.raises(IndexError, match=r"is outside \[0, 10\)"):
        ops.ledger_update(*arguments)
    assert_same(list(arguments[:2]), before)


@needs_kernels
def test_any_number_of_threads_gives_the_same_bits():
    weights = torch.from_numpy(rng(5).lognormal(size=1_500_000).astype(np.float32))
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            ids, tau = ops.draw(weights, 400_000, 3)
            counted = ops.histogram(weights)
            bins = torch.from_numpy(np.stack([counted.counts, counted.offsets]))
            found.append([ids, torch.tensor(tau), ops.permutation(1_500_000, 9, 0, 1_500_000), bins])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same(found[0], other)


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


@needs_kernels
@pytest.mark.parametrize(("start", "stride"), [(0, 2**63 - 1), (2**63 - 1, 1), (0, 2**62), (9, 1), (-1, 1), (0, 0)])
def test_the_kernel_itself_refuses_positions_outside(start, stride):
    with pytest.raises(RuntimeError, match="positions must lie in"):
        torch.ops.samplewise.permutation(torch.empty(3, dtype=torch.int64), 10, 0, start, stride)


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
        (
            lambda: ops.draw(torch.ones(3, dtype=torch.float64), 1, 0),
            TypeError,
            "must be a float32 tensor, not torch.float64",
        ),
        (lambda: ops.draw(torch.ones(2, 2), 1, 0), ValueError, r"shape \(N,\).*\(2, 2\)"),
        (lambda: ops.draw(torch.ones(0), 0, 0), ValueError, "shape"),
        (lambda: ops.draw(torch.ones(3), 3, 0), ValueError, r"k=3.*\[0, 2\]"),
        (lambda: ops.draw(torch.ones(3), -1, 0), ValueError, "k=-1"),
        (lambda: ops.draw(torch.ones(3), 1.5, 0), TypeError, "k=1.5"),
        (lambda: ops.histogram(torch.ones(3, dtype=torch.int64)), TypeError, "float32"),
        (lambda: ops.histogram([1.0]), TypeError, "not list"),
        (lambda: ops.permutation(5.0, 1, 0, 1), TypeError, "n=5.0"),
        (lambda: ops.permutation(5, 2**64, 0, 1), ValueError, "seed=18446744073709551616"),
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
