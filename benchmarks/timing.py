"""Timing and tables, shared by the benchmarks."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import numpy as np
import torch


def best_of(function: Callable[[], object], *, repeat: int = 5, number: int = 1) -> float:
    """Seconds of one call: the best of ``repeat`` runs of ``number`` calls, after one to warm up."""
    function()
    runs = []
    for _ in range(repeat):
        begin = time.perf_counter()
        for _ in range(number):
            function()
        runs.append((time.perf_counter() - begin) / number)
    return min(runs)


def header(title: str) -> None:
    """Say what is measured and on what; one thread."""
    torch.set_num_threads(1)
    print(
        f"{title}\ntorch {torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}, one thread\n"
    )


def table(columns: list[str], rows: list[list[str]]) -> None:
    """Print aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells))
    print()
