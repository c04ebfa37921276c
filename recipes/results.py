"""From runs to results: means, paired differences, JSON, CSV, the HTML report and the table on the terminal."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from samplewise.callbacks.figures import Line, bars, dots, lines
from samplewise.callbacks.page import Page, Picture, Section, Table
from samplewise.callbacks.report import EpochRecord, run_sections
from samplewise.recipes.arms import Arm
from samplewise.recipes.common import (
    difference,
    environment,
    mean_sd,
    print_end,
    print_table,
    sd,
    settings_table,
    write_csv,
)
from samplewise.recipes.data import Task

if TYPE_CHECKING:
    from samplewise.recipes.prune import PruneOptions

VERSION = 1


@dataclass(frozen=True)
class Run:
    """One training: its arm and seed, the metric at its end, its epochs."""

    arm: Arm
    seed: int
    score: float
    records: Sequence[EpochRecord]

    def total(self, key: str) -> float:
        """Sum over the epochs of `samples`, `steps`, `seconds`, `plan_seconds` or `observe_seconds`."""
        return float(sum(getattr(record, key) for record in self.records))

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return int(self.total("steps"))

    @property
    def ends(self) -> list[int]:
        """Optimizer steps taken at the end of each epoch."""
        return list(accumulate(record.steps for record in self.records))

    def line(self, full: int, metric: str) -> str:
        """The run in a line; `full` is the number of samples of full epochs."""
        used = self.total("samples")
        return (
            f"seed {self.seed}  {self.arm.label:<27} {metric} {self.score:.4f}  {used:>11,.0f} samples"
            f" ({used / full:4.0%})  {self.steps:>7,} steps  {self.total('seconds'):7.1f} s"
        )

    def row(self) -> dict[str, Any]:
        """The run's numbers, without its epochs."""
        sums = {key: self.total(key) for key in ("seconds", "plan_seconds", "observe_seconds")}
        counts = {key: int(self.total(key)) for key in ("samples", "steps")}
        arm = {"arm": self.arm.name, "method": self.arm.method, "equal_steps_to": self.arm.equal_to}
        return {**arm, "seed": self.seed, "score": self.score, **counts, **sums}


def summarise(runs: Sequence[Run], arms: Sequence[Arm], full: int) -> list[dict[str, Any]]:
    """One row an arm: means over the seeds, sample standard deviations, and differences paired by seed.

    Args:
        runs: all runs.
        arms: in the order of the rows.
        full: samples of a run on everything: epochs times data set.
    """
    rows = []
    for arm in arms:
        own = [run for run in runs if run.arm == arm]
        scores = np.array([run.score for run in own])
        row: dict[str, Any] = {"arm": arm.name, "label": arm.label, "seeds": len(own)}
        row |= {"mean": float(scores.mean()), "sd": sd(scores)}
        for key, other in (("vs_uniform", "uniform"), ("vs_equal_steps", f"uniform@{arm.method}")):
            pair = [run.score for run in runs if run.arm.name == other]
            paired = scores - np.array(pair) if pair and other != arm.name and arm.equal_to is None else None
            row[key] = None if paired is None else float(paired.mean())
            row[f"{key}_sd"] = None if paired is None else sd(paired)
        for key in ("samples", "steps", "seconds", "plan_seconds", "observe_seconds"):
            row[key] = float(np.mean([run.total(key) for run in own]))
        row["fewer_samples"] = 1 - row["samples"] / full
        rows.append(row)
    return rows


def findings(rows: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """What the rows say, in sentences, whichever way it went."""
    base = next((row for row in rows if row["arm"] == "uniform"), None)
    sentences = []
    for row in (row for row in rows if "@" not in row["arm"] and row is not base):
        text = f"{row['label']}: {row['fewer_samples']:.0%} fewer samples, {metric} {mean_sd(row)}"
        if base is not None:
            text += f", {_compared(row, base)} uniform on everything ({mean_sd(base)})"
            text += f"; {row['seconds']:.1f} s a run against {base['seconds']:.1f} s"
        if row["vs_equal_steps"] is not None:
            text += f"; {difference(row, 'vs_equal_steps')} against uniform with as many steps"
        sentences.append(f"{text}.")
    return sentences


def not_learnt(runs: Sequence[Run], metric: str, classes: int) -> list[str]:
    """A sentence on each run that ended near chance; it stays in the means, which then say nothing."""
    chance = 1 / classes if metric == "accuracy" else 0.5
    return [
        f"Seed {run.seed} of '{run.arm.label}' did not learn ({metric} {run.score:.4f}, chance is {chance:.2f}): it is "
        f"counted like any other, so comparisons with this row say nothing about the methods."
        for run in runs
        if not run.score > chance + 0.1 * (1 - chance)
    ]


def _compared(row: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    gain = row["mean"] - base["mean"]
    if base["seeds"] < 2:
        return f"{gain:+.4f} (one seed: no spread to judge it by) against"
    if abs(gain) <= base["sd"]:
        return "within one standard deviation of"
    return f"more than one standard deviation {'above' if gain > 0 else 'below'}"


def write_results(
    runs: Sequence[Run],
    arms: Sequence[Arm],
    task: Task,
    options: "PruneOptions",
    seconds: float,
    *,
    console: Console,
    write: bool = True,
) -> dict[str, Any]:
    """Write `results.json`, the CSV files and the report into `options.out`, print the table; gives the JSON's content.

    With `write=False` (all ranks but the first) nothing is written.
    """
    full = options.epochs * len(task.train)
    rows = summarise(runs, arms, full)
    results: dict[str, Any] = {
        "version": VERSION,
        "metric": task.metric,
        "data": {
            "name": task.name, "source": task.source, "train": len(task.train), "test": len(task.test),
            "classes": task.classes, "flipped_labels": task.flipped,
        },
        "options": asdict(options),
        "environment": environment(),
        "seconds": seconds,
        "findings": [*not_learnt(runs, task.metric, task.classes), *findings(rows, task.metric)],
        "summary": rows,
        "runs": [run.row() | {"epochs": [asdict(record) for record in run.records]} for run in runs],
    }  # fmt: skip
    if write:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        write_csv(out / "summary.csv", rows)
        write_csv(out / "runs.csv", [run.row() for run in runs])
        page = report_page(results, runs, arms).write(out / "report.html")
        _print(console, rows, results, page)
    return results


def report_page(results: Mapping[str, Any], runs: Sequence[Run], arms: Sequence[Arm]) -> Page:
    """The recipe's report; the sections on the sampling itself are those of `SamplingReport`."""
    metric, data, options = results["metric"], results["data"], results["options"]
    lead = [
        f"{data['name']}: {data['train']:,} training and {data['test']:,} test samples, {options['epochs']} epochs, "
        f"{options['seeds']} seed(s). Source: {data['source']}.",
    ]
    if data["flipped_labels"]:
        lead.append(f"{data['flipped_labels']:,} training labels were made wrong on purpose.")
    first = [run for run in runs if run.seed == 0 and run.arm.equal_to is None]
    numbers: list[str | Table | Picture] = [_html_table(results["summary"], metric), _NOTE, *results["findings"]]
    sections = [
        Section("Results", numbers),
        Section("Every run", [Picture("scores", _dots(runs, arms, metric), _DOTS)]),
        Section(
            f"{metric.capitalize() if metric == 'accuracy' else metric.upper()} against samples seen",
            [Picture("learning", _learning(runs, arms, metric), _LEARNING)],
        ),
        *run_sections({run.arm.label: run.records for run in first}, "Seed 0."),
        Section("Where the time went", [Picture("time", _time(results["summary"]), _TIME)]),
        Section("How it was run", [settings_table(results)]),
    ]
    return Page("Curriculum pruning: what was trained on, and what it gave", lead, sections)


_NOTE = (
    "± is one standard deviation over the seeds. Seconds are training without validation; planning (choosing the "
    "samples, merging statistics) and bookkeeping (recording losses, applying weights) are part of them. A row "
    "'steps of ...' is a control: the same network trained for exactly as many optimizer steps as that method took, at "
    "the same learning rates step for step."
)
_DOTS = "A dot for each seed, a bar for their mean, a band of one standard deviation to each side."
_LEARNING = (
    "A method's curve ends with its finished schedule; compare it with the controls, not with the middle of another "
    "curve. "
    "Mean over the seeds after each epoch, band of one standard deviation; the first epochs lie below. Squares and "
    "triangles are the controls: uniform sampling and RS2 for as many optimizer steps as the method of the same colour."
)
_TIME = "Mean seconds of a run. Bookkeeping is the time the host spends in it, on a GPU too."


def _html_table(rows: Sequence[Mapping[str, Any]], metric: str) -> Table:
    header = [
        "", metric, "against uniform", "against equal steps", "samples", "fewer", "steps", "seconds", "planning",
        "bookkeeping",
    ]  # fmt: skip
    return Table(header, [_cells(row) for row in rows])


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["label"], mean_sd(row), difference(row, "vs_uniform"), difference(row, "vs_equal_steps"),
        f"{row['samples']:,.0f}",
        f"{row['fewer_samples']:.0%}", f"{row['steps']:,.0f}", f"{row['seconds']:.1f}", f"{row['plan_seconds']:.2f}",
        f"{row['observe_seconds']:.2f}",
    ]  # fmt: skip


def _dots(runs: Sequence[Run], arms: Sequence[Arm], metric: str) -> bytes:
    points = [[run.score for run in runs if run.arm == arm] for arm in arms]
    return dots([arm.label for arm in arms], points, [arm.colour for arm in arms], x=metric)


def _learning(runs: Sequence[Run], arms: Sequence[Arm], metric: str) -> bytes:
    """Curves of the methods; a control, which is measured at its end only, is a point."""
    curves = []
    for arm in arms:
        own = [run for run in runs if run.arm == arm]
        if arm.equal_to is not None:
            x, y = np.array([[run.total("samples")] for run in own]), np.array([[run.score] for run in own])
        else:
            x = np.array([np.cumsum([record.samples for record in run.records]) for run in own])
            y = np.array([[record.metrics[f"val_{metric}"] for record in run.records] for run in own])
        spread = y.std(axis=0, ddof=1).tolist() if len(own) > 1 else None
        marker = "o" if arm.equal_to is None else "s" if arm.method == "uniform" else "^"
        curves.append(Line(arm.label, x.mean(axis=0).tolist(), y.mean(axis=0).tolist(), arm.colour, spread, marker))
    return lines(curves, x="samples seen", y=metric, late=True)


def _time(rows: Sequence[Mapping[str, Any]]) -> bytes:
    own = [row["seconds"] - row["plan_seconds"] - row["observe_seconds"] for row in rows]
    parts = {"training": own, "planning": [r["plan_seconds"] for r in rows]}
    parts["bookkeeping"] = [r["observe_seconds"] for r in rows]
    return bars([row["label"] for row in rows], parts, x="seconds a run")


def _print(console: Console, rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any], page: Path) -> None:
    cells = [[row["arm"], _cells(row)[1], *_cells(row)[4:]] for row in rows]
    print_table(console, ["arm", results["metric"], "samples", "fewer", "steps", "s", "plan s", "book s"], cells)
    last = f"a@b: a for as many steps as b. {results['seconds']:.0f} s in all. Report: {page.resolve()}"
    print_end(console, results["findings"], last)
