"""Arguments for the ops, on which kernels are compared with the reference; importable as ``kernel_cases``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

INF, NAN = float("inf"), float("nan")
ODD = np.array([0.0, -0.0, 1e-45, -1e-42, 1.0, 1e18, 1.1e18, -1e18, 1e30, 3e38, NAN, INF, -INF], dtype=np.float32)
SEEDS = (0, 12345, 2**63 - 1)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def odd_values(count: int, seed: int = 0) -> Tensor:
    """Positive values over many orders of magnitude, a third of them odd."""
    values = rng(seed).lognormal(0, 3, count).astype(np.float32)
    chosen = rng(seed + 1).random(count) < 0.3
    values[chosen] = rng(seed + 2).choice(ODD, int(chosen.sum()))
    return torch.from_numpy(values)


def results(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    written: int,
    *,
    device: str = "cpu",
    spread: bool = False,
    repeat: int = 1,
) -> list[Tensor]:
    """The bits that ``function`` leaves in copies of the first ``written`` arguments.

    Args:
        function: an op, its reference or an emulation.
        arguments: on the CPU; they stay as they are.
        written: how many of them are written.
        device: where the op runs.
        spread: put the elements of the arguments that are only read at a distance of two.
        repeat: number of calls, on the same copies.
    """
    copies = [x.to(device, copy=True) if isinstance(x, Tensor) else x for x in arguments]
    if spread:
        copies[written:] = [torch.stack([x, -x], 1)[:, 0] if isinstance(x, Tensor) else x for x in copies[written:]]
    for _ in range(repeat):
        function(*copies)
    return [x.cpu().view(torch.int32 if x.is_floating_point() else x.dtype) for x in copies[:written]]


def assert_same(ones: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert torch.equal(one, other)


# --- ledger_update: records, counters, links, ids, losses, scores, steps, ema -----------------------------------------


def ledger_arguments(size: int, ids: Any, *, scores: bool = False, steps: bool = False, odd: bool = True) -> tuple:
    ids = torch.as_tensor(np.asarray(ids, dtype=np.int64))
    losses = odd_values(ids.numel(), 7) if odd else torch.linspace(0, 3, ids.numel())
    return (
        torch.zeros(size, 8),
        torch.tensor([3, 0, 5]),
        torch.zeros(size, dtype=torch.int32),
        ids,
        losses,
        odd_values(ids.numel(), 8) if scores else None,
        torch.arange(ids.numel()) * 7 - 5 if steps else None,
        0.8,
    )


BATCHES = {
    "unique": (1000, rng().permutation(1000)[:300]),
    "one id": (50, np.full(5000, 7)),
    "lists of eight": (9, rng().permutation(np.repeat(np.arange(9), 8))),
    "lists of nine": (9, rng().permutation(np.repeat(np.arange(9), 9))),
    "lists of one to twenty": (21, rng().permutation(np.repeat(np.arange(21), np.arange(21)))),
    "from ten ids": (10, rng().integers(0, 10, 3000)),
    "some twice": (10_000, rng().integers(0, 10_000, 4096)),
    "one sample": (1, [0]),
    "empty": (5, []),
}
LEDGER = [
    pytest.param(
        ledger_arguments(*batch, scores=scores, steps=steps), id=f"{name}{scores * ', scores'}{steps * ', steps'}"
    )
    for name, batch in BATCHES.items()
    for scores in (False, True)
    for steps in (False, True)
]


# --- permutation: out, n, seed, start, stride -------------------------------------------------------------------------


def permutation_arguments(n: int, start: int, stride: int, seed: int) -> tuple:
    length = min(5000, (n - 1 - start) // stride + 1)
    return torch.full((length,), -1), n, seed, start, stride


PERMUTATION = [
    pytest.param(permutation_arguments(n, start, stride, seed), id=f"{n} from {start} by {stride}")
    for n in (1, 2, 257, 5000, 65_537, 100_003, 2**31)
    for (start, stride), seed in zip(((0, 1), (n // 2, 3), (n // 3, 1), (n - 1, 2**40)), (*SEEDS, 1), strict=True)
]
PERMUTATION.append(pytest.param((torch.full((65_536,), -1), 65_536, 3, 0, 1), id="65536"))
PERMUTATION.append(pytest.param((torch.full((0,), -1), 100, 3, 0, 1), id="nothing"))


# --- draw: out, tau, weights, seed ------------------------------------------------------------------------------------

WEIGHTS: dict[str, Callable[[int], np.ndarray]] = {
    "equal": np.ones,
    "heavy tail": lambda n: rng(1).pareto(0.5, n) + 1e-3,
    "mostly zeros": lambda n: np.where(rng(2).random(n) < 0.9, 0, 1.0),
    "all zeros": np.zeros,
    "keys that overflow": lambda n: np.full(n, 1e-45),
    "denormal and no weights": lambda n: np.resize([1e-40, NAN, -1.0, 1.0, 1e-45, -INF, INF, 2.0], n),
}


def draw_arguments(name: str, n: int, k: int, seed: int = 5) -> tuple:
    weights = torch.from_numpy(WEIGHTS[name](n).astype(np.float32))
    return torch.full((k,), -1), torch.zeros(1), weights, seed


DRAW = [
    pytest.param(draw_arguments(name, n, k), id=f"{k} of {n} {name}")
    for name in WEIGHTS
    for n in (2, 5, 4096, 100_003)
    for k in sorted({0, 1, n // 2, n - 1})
]
DRAW.append(pytest.param(draw_arguments("heavy tail", 4_500_000, 1_000_000), id="more tiles than threads"))


# --- histogram: bins, values, low, shift ------------------------------------------------------------------------------

VALUES = {
    "odd": torch.cat([odd_values(5000, 8), -odd_values(5000, 9)]),
    "ties": torch.from_numpy(rng(3).choice(np.array([0.5, -0.0, 0.0, 2.5], dtype=np.float32), 20_000)),
    "many": torch.from_numpy(rng(4).lognormal(size=100_003).astype(np.float32)),
    "none": torch.zeros(0),
}
HISTOGRAM = [
    pytest.param(
        (torch.full((1024, 2), -1), values, low >> shift << shift, shift), id=f"{name} from {low} shift {shift}"
    )
    for name, values in VALUES.items()
    for low in (0, 1 << 31, 3_000_000_000)
    for shift in (0, 3, 12, 16, 28)
]


# --- sample_losses ----------------------------------------------------------------------------------------------------

IGNORED = -100
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def labelled_logits(rows, classes, dtype=torch.float32, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, classes, generator=generator) * scale).to(dtype)
    return logits, torch.randint(classes, (rows,), generator=generator)


def assert_same_but_for_nan(ours, theirs):
    """The same bits, apart from those of a NaN."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.isnan(), b.isnan())
        bits = torch.int32 if a.dtype == torch.float32 else torch.int16
        a, b = a.masked_fill(a.isnan(), 0), b.masked_fill(b.isnan(), 0)
        assert torch.equal(a.view(bits), b.view(bits))
