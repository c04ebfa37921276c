"""What `observe` adds to a training step, against storing one float a sample and against taking the mean alone.

First in a tight loop, then inside a training step of a small network, which leaves the caches cold.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from timing import best_of, header, judged, table

from samplewise.cuda_ext import Ledger, reference
from samplewise.plugins import InfoBatch, Uniform

N = 1_000_000


def main() -> None:
    header(f"observe, N = {N:,} samples (microseconds a batch; ratio to one indexed store of a float a sample)")
    rows = []
    for batch in (64, 256, 4096):
        ids = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:batch]
        twice = torch.cat([ids[: batch // 2], ids[: batch // 2]])
        losses = torch.rand(batch, requires_grad=True)
        plain, weighted = Uniform(N), InfoBatch(N, epochs=10)
        weighted.observe(torch.arange(N), torch.rand(N))
        for sampler in (plain, weighted):
            sampler.set_epoch(1)
        store, ledger, detached, norms = torch.zeros(N), Ledger(N), losses.detach(), torch.rand(batch)
        counters, links = torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
        arguments = (ledger.records, counters, links, ids, detached, None, None, ledger.ema)
        calls = {
            "losses.mean()": losses.mean,
            "store[ids] = losses": partial(store.__setitem__, ids, detached),
            "Ledger.update": partial(ledger.update, ids, losses),
            "reference op": partial(reference.ledger_update, *arguments),
            "observe, no weights (mean included)": partial(plain.observe, ids, losses),
            "observe, scores=norms (mean included)": partial(plain.observe, ids, losses, scores=norms),
            "observe, with weights (mean included)": partial(weighted.observe, ids, losses),
            "observe, every id twice (mean included)": partial(plain.observe, twice, losses),
        }
        times = {name: best_of(call, number=max(20, 200_000 // batch // 20)) for name, call in calls.items()}
        mean, base = times["losses.mean()"], times["store[ids] = losses"]
        for name, seconds in times.items():
            added = seconds - mean if "observe" in name else seconds
            most = 15 if batch == 256 and "no weights" in name else None
            more = judged(added * 1e6, "", digits=1, most=most)
            rows.append([name, f"{batch}", f"{seconds * 1e6:.1f}", more, f"{seconds / base:.1f}x"])
    table(["call", "batch", "us", "us added to mean()", "ratio"], rows)


def in_a_step(batch: int = 256, steps: int = 150) -> None:
    """Median microseconds of each way to get the scalar loss, taking turns in one training run."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 5, 2, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(10)
    )
    x, y, order = torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,)), torch.randperm(N)
    optimizer = torch.optim.SGD((network(x), network.parameters())[1], 0.01)
    plain, store = Uniform(N), torch.zeros(N)
    len(plain)

    def stored(ids: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        store[ids] = losses.detach()
        return losses.mean()

    ways: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "losses.mean()": lambda ids, losses: losses.mean(),
        "store[ids] = losses; losses.mean()": stored,
        "observe, no weights": plain.observe,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(steps):
        ids = order[step * batch : (step + 1) * batch]
        losses = F.cross_entropy(network(x), y, reduction="none")
        name = list(ways)[step % len(ways)]
        begin = time.perf_counter()
        loss = ways[name](ids, losses)
        times[name].append(time.perf_counter() - begin)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    medians = {name: float(np.median(values)) * 1e6 for name, values in times.items()}
    mean = medians["losses.mean()"]
    table(
        [f"inside a training step, batch {batch}", "us (median)", "us added to mean()"],
        [[name, f"{us:.0f}", f"{us - mean:.0f}"] for name, us in medians.items()],
    )


if __name__ == "__main__":
    main()
    in_a_step()
