"""From runs to results of the quantisation recipe: losses by average width, paired differences, files, report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from samplewise.callbacks.figures import Line, dots, histogram, lines, scatter
from samplewise.callbacks.page import Page, Picture, Section, Table
from samplewise.recipes.common import (
    environment,
    finite,
    judged,
    paired,
    print_end,
    print_table,
    sd,
    settings_table,
    write_csv,
)
from samplewise.recipes.quant_arms import ARMS, Arm

if TYPE_CHECKING:
    from samplewise.recipes.quant import QuantOptions
    from samplewise.recipes.quant_runs import Comparison, Run

VERSION, BASE, BINS = 1, "uniform", 20
Row = Mapping[str, Any]
MEASURES = ("loss", "perplexity", "token_accuracy", "choice_accuracy")


def summarise(runs: Sequence["Run"]) -> list[dict[str, Any]]:
    """One row for each arm and average: means over the seeds, deviations, the loss's difference to uniform draws.

    The difference is paired by seed, negative where the arm is better; `error` is its standard error, None with one
    seed or without an arm of uniform draws.
    """
    every = [row for run in runs for row in run.rows()]
    rows = []
    for arm, average in dict.fromkeys((row["arm"], row["average"]) for row in every):
        own = {row["seed"]: row for row in every if (row["arm"], row["average"]) == (arm, average)}
        base = {row["seed"]: row for row in every if (row["arm"], row["average"]) == (BASE, average)}
        found: dict[str, Any] = {"arm": arm, "average": average, "seeds": len(own)}
        for key in MEASURES:
            values = np.array([row[key] for row in own.values()])
            found |= {key: float(values.mean()), f"{key}_sd": sd(values)}
        found |= {"gain": None, "gain_sd": None, "error": None}
        if arm not in (BASE, "rtn") and base.keys() == own.keys():
            gains = np.array([own[seed]["loss"] - base[seed]["loss"] for seed in own])
            found |= paired(gains)
        rows.append(found)
    return rows


def times(runs: Sequence["Run"]) -> list[dict[str, Any]]:
    """One row for each trained arm: means over the seeds of seconds in all and a step, and the ratio to single's."""
    rows = []
    trained = [run for run in runs if run.steps]
    for arm in dict.fromkeys(run.arm.name for run in trained):
        own = [run for run in trained if run.arm.name == arm]
        keys = ("steps", "seconds", "setup_seconds", "test_seconds")
        row: dict[str, Any] = {"arm": arm, **{key: float(np.mean([getattr(run, key) for run in own])) for key in keys}}
        row["step_seconds"] = row["seconds"] / row["steps"]
        rows.append(row)
    single = next((row["step_seconds"] for row in rows if row["arm"] == "single"), None)
    for row in rows:
        row["against_single"] = None if single is None else row["step_seconds"] / single
    return rows


def low_averages(runs: Sequence["Run"], middle: float) -> dict[str, Any] | None:
    """Balanced against uniform draws where the average is below `middle`: the loss's difference, paired by seed."""
    means: dict[str, dict[int, float]] = {}
    for run in runs:
        losses = [score.loss for score in run.scores if score.average < middle]
        if losses:
            means.setdefault(run.arm.name, {})[run.seed] = float(np.mean(losses))
    balanced, uniform = means.get("balanced", {}), means.get(BASE, {})
    if not balanced or balanced.keys() != uniform.keys():
        return None
    gains = np.array([balanced[seed] - uniform[seed] for seed in balanced])
    return {"middle": middle, **paired(gains)}


def verdict(gain: float, error: float | None) -> str:
    """Whether a difference of losses exceeds its standard error, in a word."""
    return judged(-gain, error)


def findings(rows: Sequence[Row], low: Row | None, spent: Sequence[Row], search: Row | None) -> list[str]:
    """A sentence on each arm, whichever way it went, on the narrow widths, on time, and on the search."""
    sentences = []
    for arm in dict.fromkeys(row["arm"] for row in rows if row["gain"] is not None):
        own = [row for row in rows if row["arm"] == arm]
        parts = [f"{row['average']:g}: {row['gain']:+.3f} ({verdict(row['gain'], row['error'])})" for row in own]
        sentences.append(f"{ARMS[arm].label}, its loss less that of uniform draws at each average: {'; '.join(parts)}.")
    if low is not None:
        sentences.append(
            f"Below {low['middle']:g} bits, balanced less uniform draws: {low['gain']:+.3f}"
            + ("" if low["error"] is None else f" ± {low['gain_sd']:.3f}")
            + f" ({verdict(low['gain'], low['error'])})."
        )
    for row in spent:
        if row["against_single"] is not None and row["arm"] != "single":
            sentences.append(
                f"{ARMS[row['arm']].label}: {row['against_single']:.2f}x the training time of single runs, "
                "whose starts count."
            )
    if search is not None:
        best, even = search["best"], search["even"]
        sentences.append(
            f"Searched for at most {search['budget']:g} bits, of {search['tried']} configurations: test loss "
            f"{best['loss']:.3f} at {best['average']:.2f} bits a weight; widths spread evenly: {even['loss']:.3f} at "
            f"{even['average']:.2f}."
        )
    return sentences


def write_results(
    runs: Sequence["Run"], comparison: "Comparison", options: "QuantOptions", seconds: float, *, console: Console
) -> dict[str, Any]:
    """Write results, CSV files and the report into `options.out`, print the table; gives what `results.json` holds."""
    rows, spent = summarise(runs), times(runs)
    low = low_averages(runs, (options.bits[0] + options.bits[-1]) / 2)
    search = _search(comparison, options)
    results: dict[str, Any] = {
        "version": VERSION,
        "options": asdict(options),
        "environment": environment(),
        "seconds": seconds,
        "data": comparison.splits.source,
        "model": {
            "full_loss": comparison.full.loss, "full_token_accuracy": comparison.full.accuracy,
            "full_choice_accuracy": comparison.full.choices, "layers": len(comparison.layers),
            "stored_bits": comparison.stored_bits,
        },
        "findings": findings(rows, low, spent, search),
        "summary": rows,
        "below_the_middle": low,
        "times": spent,
        "search": search,
        "trained": {
            f"{run.arm.name}, seed {run.seed}": {
                "averages": run.averages.tolist(),
                "counts": run.counts.sum(0).tolist(),
            }
            for run in runs
            if run.steps
        },
        "runs": [row for run in runs for row in run.rows()],
    }  # fmt: skip
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(finite(results), indent=1) + "\n")
    write_csv(out / "summary.csv", rows)
    write_csv(out / "runs.csv", results["runs"])
    if comparison.search is not None:
        write_csv(out / "search.csv", comparison.search[0].rows())
    page = report_page(results, runs, comparison).write(out / "report.html")
    print_table(console, _HEADER, [_cells(row) for row in rows])
    print_table(console, _TIMES, [_time_cells(row) for row in spent])
    print_end(console, results["findings"], f"{seconds:.0f} s in all. Report: {page.resolve()}")
    return results


def _search(comparison: "Comparison", options: "QuantOptions") -> dict[str, Any] | None:
    if comparison.search is None:
        return None
    found, best, even = comparison.search
    return {
        "budget": options.budget, "tried": len(found.configs), "best": asdict(best), "even": asdict(even),
        "validation_loss": found.best_loss, "config": dict(found.best_config),
    }  # fmt: skip


_HEADER = ["arm", "bits", "loss", "perplexity", "tokens right", "questions right", "loss less uniform's"]
_TIMES = ["arm", "steps", "training s", "a step, s", "against single", "making adapters s", "testing s"]


def _spread(row: Row, key: str, digits: int) -> str:
    return _number(row[key], digits) + (f" ± {_number(row[f'{key}_sd'], digits)}" if row["seeds"] > 1 else "")


def _number(value: float, digits: int) -> str:
    """Perplexities of models that were not trained have many digits, which say nothing."""
    return f"{value:,.{digits}f}" if abs(value) < 1e4 else f"{value:.1e}"


def _cells(row: Row) -> list[str]:
    gain = "" if row["gain"] is None else _spread(row, "gain", 3)
    choices = "" if np.isnan(row["choice_accuracy"]) else _spread(row, "choice_accuracy", 3)
    return [
        row["arm"], f"{row['average']:g}", _spread(row, "loss", 3), _spread(row, "perplexity", 1),
        _spread(row, "token_accuracy", 3), choices, gain,
    ]  # fmt: skip


def _time_cells(row: Row) -> list[str]:
    ratio = "" if row["against_single"] is None else f"{row['against_single']:.2f}x"
    return [
        row["arm"], f"{row['steps']:.0f}", f"{row['seconds']:.1f}", f"{row['step_seconds']:.2f}", ratio,
        f"{row['setup_seconds']:.1f}", f"{row['test_seconds']:.1f}",
    ]  # fmt: skip


# --- the report -------------------------------------------------------------------------------------------------------


def report_page(results: Row, runs: Sequence["Run"], comparison: "Comparison") -> Page:
    """The recipe's report."""
    options, model = results["options"], results["model"]
    lead = [
        f"{options['model']}: {model['layers']} layers at {', '.join(map(str, options['bits']))} bits, which take "
        f"{model['stored_bits']:.2f} bits a weight together. {results['data']}.",
        f"{options['steps']:,} optimizer steps of {options['batch_size'] * options['accumulate']} pairs for each arm, "
        f"{options['seeds']} seed(s). Before quantization the model's loss is {model['full_loss']:.3f}.",
    ]
    sections = [
        Section("Results", [_NOTE, *results["findings"]]),
        Section("Loss by average width", _losses(results, runs)),
        Section("What was trained", [Picture("widths", _widths(runs, options["bits"]), _WIDTHS)]),
    ]
    if comparison.search is not None:
        sections.append(Section("Search under a budget", [Picture("search", _searched(comparison), _SEARCH)]))
    sections.append(Section("Where the time went", [Table(_TIMES, [_time_cells(row) for row in results["times"]])]))
    sections.append(Section("How it was run", [settings_table(results)]))
    return Page("One fine-tuning run for every bit width", lead, sections)


def _losses(results: Row, runs: Sequence["Run"]) -> list[str | Table | Picture]:
    arms, rows = list(dict.fromkeys(run.arm for run in runs)), results["summary"]
    labels, colours = [arm.label for arm in arms], [arm.colour for arm in arms]
    parts: list[str | Table | Picture] = [Picture("pareto", _curves(rows, arms), _CURVES)]
    parts.append(Table(_HEADER, [_cells(row) for row in rows]))
    for average in results["options"]["averages"]:
        points = [
            [s.loss for run in runs if run.arm == arm for s in run.scores if s.average == average] for arm in arms
        ]
        png = dots(labels, points, colours, x="loss of held-out responses")
        parts.append(Picture(f"loss-{average:g}", png, f"At {average:g} bits. {_DOTS}"))
    return parts


def _curves(rows: Sequence[Row], arms: Sequence[Arm]) -> bytes:
    curves = []
    for arm in arms:
        own = sorted((row for row in rows if row["arm"] == arm.name), key=lambda row: float(row["average"]))
        x, y = [row["average"] for row in own], [row["loss"] for row in own]
        spread = [row["loss_sd"] for row in own] if own[0]["seeds"] > 1 else None
        curves.append(Line(arm.label, x, y, arm.colour, spread))
    return lines(curves, x="average bits", y="loss of held-out responses", alike=True)


def _widths(runs: Sequence["Run"], bits: Sequence[int]) -> bytes:
    """Average widths of the steps, all seeds of an arm together, beside a level line."""
    edges = np.linspace(bits[0] - 0.05, bits[-1] + 0.05, BINS + 1)
    arms = [arm for arm in dict.fromkeys(run.arm for run in runs) if arm.mapping is not None]
    over, colours = {}, []
    for arm in arms:
        averages = np.concatenate([run.averages for run in runs if run.arm == arm])
        over[arm.label] = (np.histogram(averages, edges)[0] / len(averages)).tolist()
        colours.append(arm.colour)
    names: dict[str, str] = {"x": "average bits of a step", "y": "share of the steps", "label": "all as often"}
    return histogram(edges.tolist(), [1 / BINS] * BINS, over, colours, **names)


def _searched(comparison: "Comparison") -> bytes:
    assert comparison.search is not None
    found = comparison.search[0]
    groups, order = {}, []
    for stage, name in ((1, "random"), (2, "shrunk space")):
        own = np.flatnonzero(found.stage == stage)
        if len(own):
            groups[name] = (found.average[own].tolist(), found.losses[own].tolist())
            order += own.tolist()
    front = [order.index(point) for point in found.front.tolist()]
    return scatter(groups, front, x="average bits a weight", y="loss on validation pairs")


_NOTE = (
    "± is one standard deviation over the seeds; differences to uniform draws are of the loss, paired by seed, and "
    "called better or worse where they exceed their standard error. With few seeds a standard error is itself "
    "uncertain. All arms take as many optimizer steps in all: a run for each average has its share of them."
)
_CURVES = "Mean over the seeds and one standard deviation, against the average width of the configuration tested."
_DOTS = "A dot for each seed, a bar for their mean, a band of one standard deviation to each side."
_WIDTHS = (
    "How often the layers' average width was where, over all steps and seeds (lines). Uniform draws for each layer "
    "concentrate in the middle; a balanced schedule visits every average as often (level)."
)
_SEARCH = (
    "Configurations of the once-for-all model (balanced, first seed) on validation pairs, within the budget: random "
    "ones, and those from the space that was shrunk by correlation."
)
