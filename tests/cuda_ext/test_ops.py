import numpy as np
import pytest
import torch
from scipy import stats

from samplewise.cuda_ext import Ledger, ops
from samplewise.loaders.seeding import derive

LARGE = [65_537, 100_003, 2**20, 1_000_003]


def ledger_sample(ids, scores=False):
    ids = torch.tensor(ids, dtype=torch.int64)
    losses = torch.linspace(0, 3, ids.numel())
    return torch.zeros(8, 8), torch.zeros(1, dtype=torch.int64), ids, losses, losses if scores else None, 3, 0.9


@pytest.mark.parametrize("sample", [[1, 2, 3], [1, 1, 1], [], [0]])
@pytest.mark.parametrize("scores", [True, False])
def test_opcheck_ledger_update(sample, scores):
    torch.library.opcheck(torch.ops.samplewise.ledger_update.default, ledger_sample(sample, scores))


@pytest.mark.parametrize("n", [1, 10, 70_000])
def test_opcheck_permutation(n):
    out = torch.empty(min(n, 5), dtype=torch.int64)
    torch.library.opcheck(torch.ops.samplewise.permutation.default, (out, n, 3, 0, 1))


def test_t25_compile_keeps_the_op_in_place():
    ledger = Ledger(8)
    address = ledger.records.data_ptr()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(records, rejected, ids, losses):
        losses = losses * 2
        torch.ops.samplewise.ledger_update(records, rejected, ids, losses, None, 1, 0.9)
        return losses.mean()

    step(ledger.records, ledger._rejected, torch.tensor([2, 2, 5]), torch.tensor([1.0, 2.0, 3.0]))
    assert ledger.records.data_ptr() == address
    assert ledger.column("loss_last")[[2, 5]].tolist() == [4, 6]
    assert ledger.column("count").tolist() == [0, 0, 2, 0, 0, 1, 0, 0]


def test_t25_a_compiled_step_is_not_compiled_again_for_every_step_number():
    ledger, graphs = Ledger(8), []

    def count(graph, example):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=count, fullgraph=True)
    def step(ids, losses, number):
        ops.ledger_update(ledger.records, ledger._rejected, ids, losses, None, number, 0.9)

    for number in range(10):
        step(torch.tensor([2, 5]), torch.ones(2), number)
    assert len(graphs) <= 3  # 0 and 1 are special to dynamo
    assert ledger.column("last_step")[2] == 9
    assert ledger.column("count")[5] == 10


@pytest.mark.parametrize("n", [1, 2, 3, 10, 257, 65_535, 65_536, *LARGE])
def test_permutation_is_one(n):
    values = ops.permutation(n, 42, 0, n)
    assert values.dtype == torch.int64
    assert torch.equal(values.sort().values, torch.arange(n))


@pytest.mark.parametrize("n", [1000, 65_536, *LARGE])
def test_any_chunk_and_stride_is_part_of_the_whole(n):
    whole = ops.permutation(n, 7, 0, n)
    for start, stride in [(0, 1), (n // 3, 1), (5, 2), (2, 3), (n - 1, 1), (1, 7)]:
        length = -(-(n - start) // stride)
        assert torch.equal(ops.permutation(n, 7, start, length, stride=stride), whole[start::stride])
    assert ops.permutation(n, 7, 3, 0).numel() == 0


def test_no_limit_at_2_24_and_no_list():
    n = 2**31
    some = ops.permutation(n, 5, n - 1000, 1000)
    assert some.unique().numel() == 1000
    assert 0 <= int(some.min()) < int(some.max()) < n
    assert int(some.max()) > 2**24


def test_keys_give_different_orders():
    assert not torch.equal(ops.permutation(100, 1, 0, 100), ops.permutation(100, 2, 0, 100))
    assert not torch.equal(ops.permutation(70_000, 1, 0, 100), ops.permutation(70_000, 2, 0, 100))


@pytest.mark.parametrize(("n", "keys"), [(5, 60_000), (70_000, 3_000)])
def test_every_place_is_equally_likely(n, keys):
    """Chi-square of where elements land, over many keys; fails for a right permutation once in 10^4 runs of a seed."""
    cells = 5
    for position in (0, 1, n - 1):
        where = [int(ops.permutation(n, derive(0, key), position, 1)) * cells // n for key in range(keys)]
        assert stats.chisquare(np.bincount(where, minlength=cells)).pvalue > 1e-4


def test_all_orders_of_four_are_equally_likely():
    keys = 24_000
    orders = [tuple(ops.permutation(4, derive(1, key), 0, 4).tolist()) for key in range(keys)]
    counts = np.unique(np.array(orders), axis=0, return_counts=True)[1]
    assert counts.size == 24
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("n", [2_000, 200_000])
def test_neighbours_are_not_kept_together(n):
    """For a random permutation, |p(i+1) - p(i)| has mean (n^2 - 1) / (3 n) and lag correlation 0 +- 1/sqrt(n)."""
    values = ops.permutation(n, 11, 0, n).double()
    steps = (values[1:] - values[:-1]).abs()
    sd = n / np.sqrt(18)  # of one |difference| of two uniforms
    assert abs(float(steps.mean()) - n / 3) < 5 * sd / np.sqrt(n) * np.sqrt(2)
    for lag in (1, 2, 256, 448):
        r = np.corrcoef(values[lag:], values[:-lag])[0, 1]
        assert abs(r) < 5 / np.sqrt(n)
    r = np.corrcoef(values, np.arange(n))[0, 1]
    assert abs(r) < 5 / np.sqrt(n)


@pytest.mark.parametrize(
    "arguments", [(0, 1, 0, 0), (2**31 + 1, 1, 0, 1), (10, 1, -1, 2), (10, 1, 5, 6), (10, 1, 0, -1)]
)
def test_bad_arguments_of_permutation(arguments):
    with pytest.raises(ValueError, match="permutation"):
        ops.permutation(*arguments)
