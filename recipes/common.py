"""What the recipes share: settings while one runs, means and differences in words, files, the terminal's table."""

import contextlib
import csv
import logging
import os
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from samplewise.callbacks.page import Table

Row = Mapping[str, Any]
Rule = tuple[str, bool, str]
"""The name of an option, whether its rule holds, and the rule."""


@contextlib.contextmanager
def surroundings(threads: int) -> Iterator[None]:
    """Torch's threads (0: left alone), and no hints from Lightning, which are for single trainings; then as before."""
    log, before = logging.getLogger("lightning.pytorch"), torch.get_num_threads()
    level = log.level
    log.setLevel(logging.ERROR)
    torch.set_num_threads(threads or before)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        log.setLevel(level)
        torch.set_num_threads(before)


def check_options(options: Any, rules: Sequence[Rule]) -> None:
    """Check a recipe's `rules`, and those that all recipes have, of `seeds`, `accelerator` and `out`.

    Raises:
        ValueError: one line for each option that breaks its rule.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    shared: list[Rule] = [
        ("seeds", options.seeds >= 1, "is the number of repeats and must be >= 1"),
        ("accelerator", options.accelerator != "gpu" or cuda, "torch finds no GPU; use cpu"),
        ("accelerator", options.accelerator != "mps" or mps, "torch finds no MPS device; use cpu"),
        ("out", is_writable(Path(options.out)), "is no folder that can be written"),
    ]
    errors = [f"{name}={getattr(options, name)!r}: {rule}" for name, holds, rule in [*rules, *shared] if not holds]
    if errors:
        raise ValueError("\n".join(errors))


def is_writable(folder: Path) -> bool:
    """Whether results can be written there: the folder is made, or the nearest one above it that exists is writable."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


def environment() -> dict[str, str]:
    """Versions and the machine."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "lightning": lightning.__version__}
    return {**versions, "machine": platform.machine(), "gpu": gpu, "torch threads": str(torch.get_num_threads())}


def sd(values: np.ndarray) -> float:
    """Sample standard deviation; 0 for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def paired(gains: np.ndarray) -> dict[str, float | None]:
    """Of differences, one for each seed: mean and deviation, and the mean's standard error, None with one seed."""
    error = sd(gains) / float(np.sqrt(len(gains))) if len(gains) > 1 else None
    return {"gain": float(gains.mean()), "gain_sd": sd(gains), "error": error}


def judged(gain: float, error: float | None) -> str:
    """Whether a difference, positive where things improve, exceeds its standard error, in a word."""
    if error is None:
        return "one seed"
    if abs(gain) <= error:
        return "within its standard error"
    return "better" if gain > 0 else "worse"


def mean_sd(row: Row, key: str = "mean", spread: str = "sd") -> str:
    """A row's mean, and its standard deviation where there are several seeds."""
    return f"{row[key]:.4f}" + (f" ± {row[spread]:.4f}" if row["seeds"] > 1 else "")


def difference(row: Row, key: str) -> str:
    """A row's paired difference, with sign, and the standard deviation of the differences; "" where there is none."""
    if row[key] is None:
        return ""
    return f"{row[key]:+.4f}" + (f" ± {row[f'{key}_sd']:.4f}" if row["seeds"] > 1 else "")


def settings_table(results: Row) -> Table:
    """Options and environment, for the report."""
    pairs = {**results["options"], **results["environment"], "seconds in all": f"{results['seconds']:.0f}"}
    return Table(
        [],
        [[key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)] for key, value in pairs.items()],
        True,
    )


def finite(value: Any) -> Any:
    """Results with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line a row, under the keys of the first one."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def print_table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column to the left, numbers to the right."""
    table = RichTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row, end_section=row is rows[-1])
    console.print(table)


def print_end(console: Console, findings: Sequence[str], last: str) -> None:
    """The findings, a line each, and the last line."""
    for sentence in findings:
        console.print(f"- {sentence}", highlight=False, markup=False)
    console.print(last, highlight=False, markup=False, soft_wrap=True)
