"""Timing and tables, shared by the benchmarks."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from samplewise.cuda_ext import NATIVE

Key = TypeVar("Key", bound=Hashable)


def best_of(function: Callable[[], object], *, repeat: int = 5, number: int = 1) -> float:
    """Seconds of one call: the best of ``repeat`` runs of ``number`` calls, after one to warm up."""
    function()
    return min(_seconds(function, number) for _ in range(repeat))


def best_of_each(
    functions: Mapping[Key, Callable[[], object]], *, repeat: int = 3, number: int = 1
) -> dict[Key, float]:
    """As :func:`best_of` for several functions that take turns, so that a noisy machine is noisy for all of them.

    The first turn is not thrown away: give a ``repeat`` of 2 or more.
    """
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeat):
        for key, function in functions.items():
            best[key] = min(best[key], _seconds(function, number))
    return best


def _seconds(function: Callable[[], object], number: int) -> float:
    begin = time.perf_counter()
    for _ in range(number):
        function()
    return (time.perf_counter() - begin) / number


def peak_memory(function: Callable[[], object]) -> float:
    """Megabytes that a call adds to this process at its peak, its result included; NaN where that cannot be seen."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what was freed, so that it counts again
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (AttributeError, OSError):  # not Linux with glibc
        return float("nan")
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def judged(
    value: float, unit: str = "x", *, digits: int = 2, most: float | None = None, least: float | None = None
) -> str:
    """The value, and where it has a target whether that is met: ``1.20x (<= 1.3)``, ``1.50x (not <= 1.3)``."""
    text = f"{value:.{digits}f}{unit}"
    if most is not None:
        text += f" ({'' if value <= most else 'not '}<= {most:g})"
    if least is not None:
        text += f" ({'' if value >= least else 'not '}>= {least:g})"
    return text


def header(title: str, *, threads: int = 1) -> None:
    """Say what is measured and on what."""
    torch.set_num_threads(threads)
    threadpool_limits(threads)  # numpy's, which would be at it too
    versions = f"torch {torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}"
    print(f"{title}\n{versions}, {threads} thread{'s'[: threads > 1]}")
    print(f"CPU kernels {NATIVE['CPU'].partition(':')[0]}; in brackets the target and whether it is met\n")


def table(columns: list[str], rows: list[list[str]]) -> None:
    """Print aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells))
    print()
