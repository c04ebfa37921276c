"""The kernels on a GPU, against plain PyTorch and against the time in which a copy moves the bytes that must move.

Times are taken with CUDA events. ``main("cpu")`` runs the same calls on small sizes without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timing import best_of, header, table
from torch import Tensor

from samplewise.cuda_ext import Ledger, ops
from samplewise.cuda_ext.losses import sample_losses

BATCHES = 64  # different ones in turn, so that at large N the records come from memory, not from the cache


def seconds(call: Callable[[], object], device: str, *, number: int = 10) -> float:
    """Seconds of one call: the best of five means over ``number`` calls, after one to warm up."""
    if device == "cpu":
        return best_of(call, number=number)
    call()
    means = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(number):
            call()
        end.record()
        end.synchronize()
        means.append(begin.elapsed_time(end) / 1e3 / number)
    return min(means)


def captured(call: Callable[[], object], device: str) -> Callable[[], object]:
    """The call as a CUDA graph."""
    if device == "cpu":
        return call
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def launches(call: Callable[[], object], device: str) -> str:
    """How many kernels a call starts."""
    if device == "cpu":
        return "-"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return f"{sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())}"


def eager_update(records: Tensor, ids: Tensor, losses: Tensor, ema: float = 0.9) -> None:
    """The ledger's update in plain PyTorch: of an id that stands twice, any one entry is kept."""
    old = records[ids]
    count = old.view(torch.int32)[:, 4] + 1
    delta = losses - old[:, 2]
    mean = old[:, 2] + delta / count
    average = torch.where(count == 1, losses, old[:, 1] + (1 - ema) * (losses - old[:, 1]))
    steps = torch.zeros_like(count)
    m2 = old[:, 3] + delta * (losses - mean)
    kept = torch.stack([losses, average, mean, m2, count.view(torch.float32), steps.view(torch.float32)], dim=1)
    good = losses.abs() <= 1e18
    records[ids] = torch.cat([torch.where(good[:, None], kept, old[:, :6]), old[:, 6:]], dim=1)


def ledger(device: str, sizes: list[int]) -> None:
    rows = []
    for size in sizes:
        book = Ledger(size, device=device)
        for batch in (256, 4096, 65_536):
            losses = torch.rand(batch, device=device)
            drawn = [torch.randint(size, (batch,), device=device) for _ in range(BATCHES)]
            one, plain_one = partial(book.update, losses=losses), partial(eager_update, book.records, losses=losses)
            update, plain = partial(_each, one, drawn), partial(_each, plain_one, drawn)
            calls = {
                "update": (update, launches(partial(one, drawn[0]), device)),
                "update, in a CUDA graph": (captured(update, device), "-"),
                "plain PyTorch": (plain, launches(partial(plain_one, drawn[0]), device)),
            }
            for name, (call, kernels) in calls.items():
                us = seconds(call, device, number=1) / BATCHES * 1e6
                rows.append([name, f"{size:.0e}", f"{batch}", f"{us:.1f}", f"{us / batch * 1e3:.2f}", kernels])
    table(["ledger", "N", "batch", "us", "ns an id", "launches"], rows)


def _each(update: Callable[[Tensor], object], batches: list[Tensor]) -> None:
    for ids in batches:
        update(ids)


def losses_of_logits(device: str, bandwidth: float, rows: int, classes: int) -> None:
    logits = torch.randn(rows, classes, device=device, dtype=torch.bfloat16)
    labels = torch.randint(classes, (rows,), device=device)

    def plain() -> tuple[Tensor, Tensor]:
        error = F.softmax(logits.float(), dim=1)
        error[torch.arange(rows, device=device), labels] -= 1
        return F.cross_entropy(logits, labels, reduction="none"), error.norm(dim=1)

    size = logits.numel() * logits.element_size()
    calls = {"sample_losses": partial(sample_losses, logits, labels), "cross_entropy and softmax's norm": plain}
    times = {name: seconds(call, device, number=3) for name, call in calls.items()}
    columns = [f"losses and norms, ({rows}, {classes}) bfloat16", "ms", "logits' bytes at the copy's speed"]
    table(columns, [[name, f"{t * 1e3:.2f}", f"{size / bandwidth / t:.0%}"] for name, t in times.items()])


def planning(device: str, bandwidth: float, n: int) -> None:
    weights, k = torch.rand(n, device=device), n // 2
    calls = {
        "draw": (partial(ops.draw, weights, k, 1), 16 * n + 8 * k),
        "torch.multinomial": (partial(torch.multinomial, weights, k), 16 * n + 8 * k),
        "permutation": (partial(ops.permutation, n, 1, 0, n, device=device), 8 * n),
        "torch.randperm": (partial(torch.randperm, n, device=device), 8 * n),
        "histogram, 65,536 bins": (partial(ops.histogram, weights, low=0.0, high=1.0), 4 * n),
    }
    rows = []
    for name, (call, least) in calls.items():
        floor = f"{least / bandwidth * 1e3:.2f}"
        try:
            rows.append([name, f"{seconds(call, device, number=1) * 1e3:.2f}", floor])
        except RuntimeError as refusal:  # multinomial takes no more than 2^24 weights
            rows.append([name, str(refusal).splitlines()[0][:60], floor])
    table([f"planning, N = {n:,}, k = {k:,}", "ms", "ms at the copy's speed"], rows)


def main(device: str) -> None:
    gpu = device != "cpu"
    header(f"kernels on {torch.cuda.get_device_name() if gpu else 'the CPU'}, CUDA {torch.version.cuda}")
    source, target = torch.zeros(2, 1 << 28 if gpu else 1 << 20, device=device)
    bandwidth = 8 * source.numel() / seconds(lambda: target.copy_(source), device)
    print(f"copy: {bandwidth / 1e9:.0f} GB/s, read and written\n")
    ledger(device, [10**5, 10**6, 10**7, 10**8] if gpu else [10**5])
    losses_of_logits(device, bandwidth, *((4096, 128 * 1024) if gpu else (64, 1024)))
    planning(device, bandwidth, 10**8 if gpu else 10**5)


if __name__ == "__main__":
    main("cuda") if torch.cuda.is_available() else print("no CUDA device")
