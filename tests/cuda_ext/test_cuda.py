"""The kernels on a GPU: the reference's bits in every run, nothing that waits for it, CUDA graphs, torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from kernel_cases import DRAW, HISTOGRAM, LEDGER, PERMUTATION, assert_same, draw_arguments, odd_values, results, rng
from samplewise.cuda_ext import NATIVE, Ledger, ops, reference
from samplewise.cuda_ext.losses import sample_losses
from samplewise.plugins import InfoBatch, Uniform

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

OPS = ("ledger_update", "permutation", "draw", "histogram", "sample_losses", "sample_losses_backward")


@contextmanager
def never_waiting() -> Iterator[None]:
    """Raise where torch waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def batches(size: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Ids with duplicates, losses and scores, on the CPU."""
    draws = [torch.from_numpy(rng(seed).integers(0, size, 700)) for seed in range(count)]
    return [(ids, odd_values(700, seed), odd_values(700, seed + 100)) for seed, ids in enumerate(draws)]


@pytest.mark.parametrize("name", OPS)
def test_the_kernel_is_there(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"samplewise::{name}", "CUDA"), NATIVE["CUDA"]


# --- the reference's bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("arguments", LEDGER)
def test_ledger_update(arguments, spread):
    got = results(torch.ops.samplewise.ledger_update, arguments, 3, device="cuda", spread=spread, repeat=2)
    assert_same(got, results(reference.ledger_update, arguments, 3, repeat=2))


@pytest.mark.parametrize("arguments", PERMUTATION)
def test_permutation(arguments):
    got = results(torch.ops.samplewise.permutation, arguments, 1, device="cuda")
    assert_same(got, results(reference.permutation, arguments, 1))


@pytest.mark.parametrize("arguments", DRAW)
def test_draw(arguments):
    got = results(torch.ops.samplewise.draw, arguments, 2, device="cuda")
    assert_same(got, results(reference.draw, arguments, 2))


@pytest.mark.parametrize("spread", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("arguments", HISTOGRAM)
def test_histogram(arguments, spread):
    got = results(torch.ops.samplewise.histogram, arguments, 1, device="cuda", spread=spread)
    assert_same(got, results(reference.histogram, arguments, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sample_losses_of_sequences(dtype):
    """Rows: test_losses."""
    generator, shape = torch.Generator().manual_seed(0), (3, 17, 4099)
    logits = (4 * torch.randn(shape, generator=generator)).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    labels.view(-1)[::5] = -100
    found = []
    for device in ("cpu", "cuda"):
        leaf = logits.detach().to(device, copy=True).requires_grad_()
        losses, norms = sample_losses(leaf, labels.to(device))
        losses.sum().backward()
        found.append([x.detach().cpu().float().view(torch.int32) for x in (losses, norms, leaf.grad)])
    assert_same(*found)


def test_every_run_gives_the_same():
    """Two million items, so that all multiprocessors work at once, in an order that differs from run to run."""
    weights, ids = draw_arguments("heavy tail", 2_000_003, 700_000)[2].cuda(), torch.arange(500_000).cuda() % 1013
    first = None
    for _ in range(10):
        ledger = Ledger(1013, device="cuda")
        ledger.update(ids, weights[: ids.numel()])
        drawn, tau = ops.draw(weights, 700_000, 3)
        counted = ops.histogram(weights)
        counts, offsets = torch.from_numpy(counted.counts), torch.from_numpy(counted.offsets)
        found = [ledger.records.view(torch.int32).cpu(), drawn.cpu(), torch.tensor(tau), counts, offsets]
        first = first or found
        assert_same(found, first)


# --- the ledger and the samplers --------------------------------------------------------------------------------------


def test_a_ledger_on_the_gpu_holds_what_one_on_the_cpu_does():
    here, there = Ledger(500), Ledger(500, device="cuda")
    for ids, losses, scores in batches(500, 5):
        here.update(ids, losses, scores=scores)
        on_gpu = [x.cuda() for x in (ids, losses, scores)]
        with never_waiting():
            there.update(on_gpu[0], on_gpu[1], scores=on_gpu[2])
    assert_same([there.records.cpu().view(torch.int32)], [here.records.view(torch.int32)])
    assert (there.rejected, there.updates) == (here.rejected, here.updates)


def test_ids_outside_are_passed_over_and_sync_raises():
    ledger = Ledger(10, device="cuda")
    ledger.update(torch.tensor([3, 10, -1, 2**40, 3], device="cuda"), torch.ones(5, device="cuda"))
    assert ledger.column("count").tolist() == [0, 0, 0, 2, 0, 0, 0, 0, 0, 0]
    with pytest.raises(IndexError, match=r"3 observed ids were outside \[0, 10\)"):
        ledger.sync()


@pytest.mark.parametrize("ledger_on", ["cpu", "cuda"])
@pytest.mark.parametrize("ids_on", ["cpu", "cuda"])
def test_ids_losses_and_ledger_may_live_apart(ids_on, ledger_on):
    """A plain loop moves the model's batch to the GPU and leaves the ids where the loader put them."""
    found = []
    for devices in (("cpu", "cpu", "cpu"), (ledger_on, ids_on, "cuda")):
        sampler, losses = InfoBatch(40, epochs=8, device=devices[0]), torch.linspace(0, 3, 40)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            ids = torch.from_numpy(np.array(sampler.current_plan.ids))
            leaf = losses[ids].to(devices[2]).requires_grad_()
            loss = sampler.observe(ids.to(devices[1]), leaf)
            loss.backward()
        assert sampler.current_plan.weights is not None
        found.append([sampler.ledger.records.view(torch.int32).cpu(), leaf.grad.cpu()])
    assert_same(*found)


def test_observe_of_ids_outside_does_not_end_the_process():
    sampler = InfoBatch(10, epochs=8, device="cuda")
    sampler.observe(torch.arange(10).cuda(), torch.linspace(0, 1, 10).cuda().requires_grad_())
    sampler.set_epoch(1)
    sampler.observe(torch.tensor([3, 99]).cuda(), torch.ones(2).cuda().requires_grad_()).backward()
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="1 observed ids were outside"):
        sampler.set_epoch(2)


def test_a_captured_graph_follows_the_weights_of_later_plans():
    """InfoBatch has none in epoch 0, where the graph is captured, weights from then on and none at the end."""
    sampler = InfoBatch(400, epochs=4, device="cuda")
    sampler.observe(torch.arange(400).cuda(), torch.linspace(0, 1, 400).cuda().requires_grad_())
    ids, losses = torch.zeros(8, dtype=torch.int64).cuda(), torch.ones(8).cuda().requires_grad_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mean = sampler.observe(ids, losses)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        plan = sampler.current_plan
        ids.copy_(torch.from_numpy(np.array(plan.ids[:8])))
        graph.replay()
        expected = 1.0 if plan.weights is None else float(plan.weights[:8].mean())
        assert (plan.weights is None) == (epoch in (0, 3))
        assert mean.item() == pytest.approx(expected)


@pytest.mark.parametrize("build", [Uniform, lambda size, **options: InfoBatch(size, epochs=4, **options)])
def test_observe_never_waits(build):
    sampler = build(500, device="cuda")
    for epoch in range(2):
        sampler.set_epoch(epoch)
        len(sampler)
        for ids, losses, _ in batches(500, 3):
            ids, losses = ids.cuda(), losses.nan_to_num(1.0, 1.0, 1.0).cuda().requires_grad_()
            with never_waiting():
                sampler.observe(ids, losses).backward()
    assert sampler.ledger.updates == 6


def test_a_captured_graph_observes_with_every_replay():
    sampler, mirror = Uniform(8, device="cuda"), Ledger(8)
    ids, losses = torch.tensor([1, 1, 3], device="cuda"), torch.zeros(3, device="cuda", requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        sampler.observe(ids, losses)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mean = sampler.observe(ids, losses)
    mirror.update(ids.cpu(), torch.zeros(3))
    for replay in range(1, 4):
        ids.fill_(replay)
        losses.data.copy_(torch.tensor([1.0, 2.0, 3.0]) * replay)
        graph.replay()
        assert mean.item() == 2 * replay
        mirror.update(ids.cpu(), losses.detach().cpu())
    assert_same([sampler.ledger.records.cpu().view(torch.int32)], [mirror.records.view(torch.int32)])
    assert sampler.ledger.updates == 4
    assert sampler.ledger.column("last_step").tolist() == [-1, 1, 2, 3, -1, -1, -1, -1]


def test_the_other_ops_can_be_captured():
    weights, tau = torch.rand(100_000, device="cuda"), torch.zeros(1, device="cuda")
    drawn, bins = (
        torch.zeros(100, dtype=torch.int64, device="cuda"),
        torch.zeros(64, 2, dtype=torch.int64, device="cuda"),
    )
    order = torch.zeros(1000, dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.samplewise.draw(drawn, tau, weights, 3)
        torch.ops.samplewise.histogram(bins, weights, 3_187_671_040, 20)
        torch.ops.samplewise.permutation(order, 1000, 3, 0, 1)
    weights.copy_(torch.rand(100_000))
    graph.replay()
    assert torch.equal(drawn, ops.draw(weights, 100, 3)[0])
    assert torch.equal(order.cpu(), ops.permutation(1000, 3, 0, 1000))
    expected = torch.zeros(64, 2, dtype=torch.int64)
    reference.histogram(expected, weights.cpu(), 3_187_671_040, 20)
    assert torch.equal(bins.cpu(), expected)


def test_in_and_beside_a_compiled_step():
    ledger, sampler = Ledger(8, device="cuda"), Uniform(8, device="cuda")
    ids, values = torch.tensor([2, 2, 5], device="cuda"), torch.tensor([1.0, 2.0, 3.0], device="cuda")

    @torch.compile(fullgraph=True)
    def inside(ids, losses):
        losses = losses * 2
        torch.ops.samplewise.ledger_update(
            ledger.records, ledger._counters, ledger._links, ids, losses, None, None, 0.9
        )
        return losses.mean()

    beside = torch.compile(lambda x: x * 2, mode="reduce-overhead")
    for _ in range(4):
        inside(ids, values)
        torch.compiler.cudagraph_mark_step_begin()
        sampler.observe(ids, beside(values).clone().requires_grad_())
    for records in (ledger, sampler.ledger):
        assert records.column("loss_last")[[2, 5]].tolist() == [4, 6]
        assert records.column("count").tolist() == [0, 0, 8, 0, 0, 4, 0, 0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_ledger_on_a_device_that_is_not_the_current_one():
    ledger = Ledger(10, device="cuda:1")
    ledger.update(torch.tensor([4], device="cuda:1"), torch.ones(1, device="cuda:1"))
    assert ledger.column("count")[4] == 1
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("wrong", range(1, 5), ids=["counters", "links", "ids", "losses"])
def test_arguments_elsewhere_are_refused(wrong):
    arguments = list(LEDGER[0].values[0])
    arguments = [x.cuda() if isinstance(x, torch.Tensor) and i != wrong else x for i, x in enumerate(arguments)]
    with pytest.raises(RuntimeError, match="another device or type"):
        torch.ops.samplewise.ledger_update(*arguments)
