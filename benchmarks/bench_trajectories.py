"""Draws of transitions by the weights of their trajectories, against numpy and torch, and plans with priorities.

`--size` changes the number of transitions (default: 1e7), `--trajectories` that of trajectories (1e4).
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import islice

import numpy as np
import torch
from timing import best_of, best_of_each, header, judged, table
from torch.utils.data import BatchSampler, RandomSampler

from samplewise.plugins import TrajectorySampler, Uniform
from samplewise.plugins.alias import AliasTable

BATCH, BATCHES = 256, 1000
Calls = dict[str, Callable[[], object]]


def trajectories(size: int, count: int) -> dict[str, np.ndarray]:
    """Ragged lengths that sum up to `size`, and returns that nobody can foresee."""
    rng = np.random.default_rng(0)
    lengths = 1 + rng.multinomial(size - count, rng.dirichlet(np.full(count, 2.0)))
    return {"returns": rng.lognormal(size=count), "lengths": lengths}


def batches(data: dict[str, np.ndarray]) -> None:
    """One batch of ids at a time."""
    size, rng = int(data["lengths"].sum()), np.random.default_rng(1)
    sampler = TrajectorySampler(**data, num_samples=BATCH, mode="rw")
    p = np.repeat(sampler.probabilities, data["lengths"])
    p /= p.sum()
    slow = best_of(lambda: rng.choice(size, BATCH, p=p), repeat=3)
    calls: Calls = {
        "TrajectorySampler.draw": lambda: sampler.draw(BATCH, rng),
        "numpy: Generator.integers(N), uniform": lambda: rng.integers(size, size=BATCH),
    }
    seconds = {"numpy: Generator.choice(p=...)": slow, **best_of_each(calls, repeat=20, number=1000)}
    ours, uniform = list(seconds.values())[1:]
    judgements = ["", judged(slow / ours, digits=0, least=100), ""], ["", judged(ours / uniform, most=2), ""]
    rows = [[name, f"{s * 1e6:.1f}", *told] for (name, s), *told in zip(seconds.items(), *judgements, strict=True)]
    title = f"{BATCH} ids of {size:,} transitions, {len(data['lengths']):,} trajectories"
    table([title, "us a batch", "faster than choice", "to uniform"], rows)


def loops(data: dict[str, np.ndarray]) -> None:
    """What a loop waits for: batches from a BatchSampler, planning included."""
    size, draws, epochs = int(data["lengths"].sum()), BATCH * BATCHES, iter(range(1, 10**9))
    samplers = {
        "TrajectorySampler(mode='rw')": TrajectorySampler(**data, num_samples=draws, mode="rw"),
        "TrajectorySampler(mode='uniform')": TrajectorySampler(**data, num_samples=draws, mode="uniform"),
        "Uniform": Uniform(size, epoch_length=draws),
        "torch RandomSampler(replacement=True)": RandomSampler(range(size), replacement=True, num_samples=draws),
    }

    def run(sampler: torch.utils.data.Sampler[int]) -> None:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(next(epochs))
        for _ in islice(BatchSampler(sampler, BATCH, drop_last=False), BATCHES):
            pass

    seconds = best_of_each({name: partial(run, sampler) for name, sampler in samplers.items()}, repeat=5)
    base = seconds["TrajectorySampler(mode='uniform')"]
    rows = [[name, f"{s / BATCHES * 1e6:.1f}", f"{s / base:.2f}x"] for name, s in seconds.items()]
    table([f"a loop of {BATCHES:,} batches of {BATCH}, planning included", "us a batch", "to mode 'uniform'"], rows)


def priorities(size: int, count: int) -> None:
    """Plans by priorities, which all items are looked at for."""
    data, rows = trajectories(size, count), []
    for draws in (size // 100, size):
        sampler = TrajectorySampler(**data, num_samples=draws, mode="rw", priority="loss_last")
        losses = torch.from_numpy(np.random.default_rng(2).lognormal(size=size).astype(np.float32))
        sampler.ledger.update(torch.arange(size), losses)
        times = []
        for epoch in (1, 2, 3):
            sampler.set_epoch(epoch)
            times.append(sampler.plan_seconds)
        rows.append([f"{draws:,} draws", f"{min(times):.3f}", f"{min(times) / draws * 1e9:.0f}"])
    table([f"plan with priorities, N = {size:,}", "s", "ns a draw"], rows)


def tables() -> None:
    rows = []
    for count in (10**4, 10**6, 10**7):
        weights = np.random.default_rng(3).lognormal(size=count)
        seconds = best_of(lambda weights=weights: AliasTable(weights), repeat=3)
        rows.append([f"{count:,}", f"{seconds * 1e3:.1f}", f"{seconds / count * 1e9:.0f}"])
    table(["alias table of so many weights", "ms", "ns each"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, default=1e7)
    parser.add_argument("--trajectories", type=float, default=1e4)
    options = parser.parse_args()
    size, count = int(options.size), int(options.trajectories)
    header("Draws of transitions by the weights of trajectories")
    data = trajectories(size, count)
    batches(data)
    loops(data)
    for items in sorted({size // 10, size}):
        priorities(items, max(1, count * items // size))
    tables()


if __name__ == "__main__":
    main()
