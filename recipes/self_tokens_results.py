"""From runs to results of the recipe of self-generated tokens: means, paired differences, files, report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from samplewise.callbacks.figures import Line, dots, lines
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

if TYPE_CHECKING:
    from samplewise.recipes.self_tokens import SelfTokensOptions
    from samplewise.recipes.self_tokens_runs import Comparison, Run

VERSION, SHOWN = 1, 6
Row = Mapping[str, Any]
MEASURES = (
    "loss", "perplexity", "token_accuracy", "own_loss", "own_accuracy", "excess", "rouge_l", "exact", "repetition",
    "train_seconds", "refresh_seconds",
)  # fmt: skip
GAINS = {
    "loss": (-1, "loss"), "token_accuracy": (1, "right after references"), "own_accuracy": (1, "right in own answers"),
    "excess": (-1, "excess of errors"), "own_loss": (-1, "loss after own answers"), "rouge_l": (1, "ROUGE-L"),
    "repetition": (-1, "repeated"),
}  # fmt: skip
"""What arms are compared by, the sign with which more is better, and its name."""
BASES = ("plain", "timed")
"""Plain fine-tuning that arms are compared with: of as many steps, and as long as the slowest arm of the same kind."""


def summarise(runs: Sequence["Run"]) -> list[dict[str, Any]]:
    """One row for each arm: means over the seeds, deviations, and differences to both plain arms, paired by seed.

    `<measure>_<base>` is the mean difference to the plain arm that `BASES` tells, `..._sd` its deviation, `..._error`
    its standard error, None with one seed or without that arm.
    """
    rows = []
    every = [run.row() for run in runs]
    for arm in dict.fromkeys(run.arm for run in runs):
        own = {row["seed"]: row for row in every if row["arm"] == arm.name}
        steps = [row["steps"] for row in own.values()]
        found: dict[str, Any] = {"arm": arm.name, "kind": arm.kind, "seeds": len(own), "steps": float(np.mean(steps))}
        for key in MEASURES:
            values = np.array([row[key] for row in own.values()])
            found |= {key: float(values.mean()), f"{key}_sd": sd(values)}
        for base in BASES:
            others = {row["seed"]: row for row in every if row["arm"] == _base(arm.kind, base)}
            fits = arm.kind not in ("plain", "untrained") and own.keys() == others.keys()
            for key in GAINS:
                name = f"{key}_{base}"
                found |= {name: None, f"{name}_sd": None, f"{name}_error": None}
                if fits:
                    gains = paired(np.array([own[seed][key] - others[seed][key] for seed in own]))
                    found |= {name: gains["gain"], f"{name}_sd": gains["gain_sd"], f"{name}_error": gains["error"]}
        found["refresh_share"] = found["refresh_seconds"] / found["train_seconds"] if found["train_seconds"] else 0.0
        rows.append(found)
    return rows


def places(runs: Sequence["Run"]) -> list[dict[str, Any]]:
    """One row for each arm and stretch of places: tokens, and the accuracies there, means over the seeds."""
    rows = []
    for arm in dict.fromkeys(run.arm for run in runs):
        own = [run.score.places for run in runs if run.arm == arm]
        for number, first in enumerate(own[0]):
            row: dict[str, Any] = {"arm": arm.name, "place": int(first["place"]), "tokens": int(first["tokens"])}
            for key in ("reference", "own"):
                values = np.array([found[number][key] for found in own])
                row |= {key: float(values.mean()), f"{key}_sd": sd(values)}
            rows.append(row)
    return rows


def verdicts(row: Row, base: str) -> str:
    """The differences to a plain arm, by whether they exceed their standard error; those that do not by name alone."""
    found: dict[str, list[str]] = {word: [] for word in ("better", "worse", "one seed", "within its standard error")}
    for key, (sign, name) in GAINS.items():
        gain, error = row[f"{key}_{base}"], row[f"{key}_{base}_error"]
        word = judged(sign * gain, error)
        spread = "" if error is None else f" ± {row[f'{key}_{base}_sd']:.3f}"
        found[word].append(name if word.startswith("within") else f"{name} {gain:+.3f}{spread}")
    return "; ".join(f"{word}: {', '.join(names)}" for word, names in found.items() if names)


def findings(rows: Sequence[Row], labels: Mapping[str, str]) -> list[str]:
    """A sentence on each arm and plain arm, whichever way it went, and on the time."""
    sentences, named = [], {row["arm"]: row for row in rows}
    for base, cost in zip(BASES, (_steps, _seconds), strict=True):
        for row in rows:
            if row[f"loss_{base}"] is not None:
                arms = f"{labels[row['arm']]} ({cost(row)}), less plain fine-tuning"
                sentences.append(f"{arms} ({cost(named[_base(row['kind'], base)])}): {verdicts(row, base)}.")
    plain = named.get("plain")
    for row in rows:
        if row["refresh_seconds"] and plain is not None:
            sentences.append(
                f"{labels[row['arm']]}: {row['train_seconds'] / plain['train_seconds']:.2f}x the time of plain "
                f"fine-tuning; {row['refresh_share']:.0%} of it wrote the model's own tokens."
            )
    return sentences


def _base(kind: str, base: str) -> str:
    """The arm that arms of a kind are compared with."""
    return "plain" if base == "plain" else f"plain-timed-{kind}"


def _steps(row: Row) -> str:
    return f"{row['steps']:.0f} steps"


def _seconds(row: Row) -> str:
    return _spread(row, "train_seconds", 0 if row["train_seconds"] >= 10 else 2) + " s"


def write_results(
    runs: Sequence["Run"], comparison: "Comparison", options: "SelfTokensOptions", seconds: float, *, console: Console
) -> dict[str, Any]:
    """Write results, CSV files and the report into `options.out`, print the table; gives what `results.json` holds."""
    rows, labels = summarise(runs), {run.arm.name: run.arm.label for run in runs}
    results: dict[str, Any] = {
        "version": VERSION,
        "options": asdict(options),
        "environment": environment(),
        "seconds": seconds,
        "data": comparison.splits.source,
        "findings": findings(rows, labels),
        "summary": rows,
        "places": places(runs),
        "refreshes": {f"{run.arm.name}, seed {run.seed}": list(run.refreshes) for run in runs if run.refreshes},
        "answers": answers(runs, comparison),
        "runs": [run.row() for run in runs],
    }
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(finite(results), indent=1) + "\n")
    for name in ("summary", "runs", "places"):
        write_csv(out / f"{name}.csv", results[name])
    page = report_page(results, runs).write(out / "report.html")
    print_table(console, _HEADER, [_cells(row, labels) for row in rows])
    print_table(console, _MORE, [_more_cells(row, labels) for row in rows])
    print_end(console, results["findings"], f"{seconds:.0f} s in all. Report: {page.resolve()}")
    return results


def answers(runs: Sequence["Run"], comparison: "Comparison") -> list[dict[str, str]]:
    """The first held-out prompts, their references, and what each arm of the first seed answered."""
    first = [run for run in runs if run.seed == 0]
    return [
        {
            "prompt": pair.prompt,
            "reference": pair.response,
            **{run.arm.name: run.score.answers[number] for run in first},
        }
        for number, pair in enumerate(comparison.shown[:SHOWN])
    ]


_HEADER = ["arm", "perplexity", "right, ref.", "right, own", "excess", "ROUGE-L"]
_MORE = ["arm", "loss, own", "exact", "repeated", "steps", "training", "own tokens"]


def _spread(row: Row, key: str, digits: int = 3) -> str:
    return f"{row[key]:.{digits}f}" + (f" ± {row[f'{key}_sd']:.{digits}f}" if row["seeds"] > 1 else "")


def _cells(row: Row, labels: Mapping[str, str]) -> list[str]:
    keys = ("token_accuracy", "own_accuracy", "excess", "rouge_l")
    return [labels[row["arm"]], _spread(row, "perplexity", 2), *(_spread(row, key) for key in keys)]


def _more_cells(row: Row, labels: Mapping[str, str]) -> list[str]:
    cells = [labels[row["arm"]], *(_spread(row, key) for key in ("own_loss", "exact", "repetition"))]
    share = f"{row['refresh_share']:.0%}" if row["refresh_seconds"] else ""
    return [*cells, *((f"{row['steps']:.0f}", _seconds(row), share) if row["steps"] else ("", "", ""))]


# --- the report -------------------------------------------------------------------------------------------------------


def report_page(results: Row, runs: Sequence["Run"]) -> Page:
    """The recipe's report."""
    options, rows = results["options"], results["summary"]
    arms = list(dict.fromkeys(run.arm for run in runs))
    labels = {arm.name: arm.label for arm in arms}
    lead = [
        f"{options['model']}, {results['data']}.",
        f"{options['train_pairs']:,} pairs, {options['epochs']} epochs of batches of {options['batch_size']}, "
        f"{options['seeds']} seed(s). All arms but the timed ones take as many steps.",
    ]
    names, colours = [arm.label for arm in arms], [arm.colour for arm in arms]
    pictures: list[str | Table | Picture] = [
        Table(_HEADER, [_cells(row, labels) for row in rows]),
        Picture("places", _curves(results["places"], arms), _PLACES),
    ]
    for key, axis in (("excess", "excess of errors"), ("rouge_l", "ROUGE-L"), ("loss", "loss of the references")):
        points = [[getattr(run.score, key) for run in runs if run.arm == arm] for arm in arms]
        pictures.append(Picture(key, dots(names, points, colours, x=axis), _DOTS))
    wordy = [[label, *[row[name] for row in results["answers"]]] for name, label in _texts(labels)]
    header = ["", *[f"prompt {number}" for number in range(1, len(results["answers"]) + 1)]]
    sections = [
        Section("Results", [_NOTE, *results["findings"]]),
        Section("Errors that accumulate", pictures),
        Section("Answers", [_ANSWERS, Table(header, wordy, words=True)]),
        Section("Answers in numbers, and the time", [_TIME, Table(_MORE, [_more_cells(row, labels) for row in rows])]),
        Section("How it was run", [settings_table(results)]),
    ]
    return Page("Training on the model's own tokens", lead, sections)


def _texts(labels: Mapping[str, str]) -> list[tuple[str, str]]:
    return [("prompt", "Prompt"), ("reference", "Reference"), *labels.items()]


def _curves(rows: Sequence[Row], arms: Sequence[Any]) -> bytes:
    curves = []
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm.name]
        gap = [row["reference"] - row["own"] for row in own]
        curves.append(Line(arm.label, [row["place"] for row in own], gap, arm.colour))
    return lines(curves, x="place in the response", y="tokens right after references, less after own", alike=True)


_NOTE = (
    "± is one standard deviation over the seeds; differences are paired by seed, and called better or worse where they "
    "exceed their standard error; with three seeds and nothing to be found, 4 in 10 do. Right, ref.: share of the "
    "references' tokens that are the likeliest after the reference's tokens before them; right, own: share that the "
    "model's answers have at the same place; excess: errors of the second kind over those of the first, less 1, which "
    "also falls where those of the first kind grow."
)
_PLACES = (
    "How many more tokens are right after the reference than in the model's own answers, by place in the response: 0 "
    "without accumulating errors. Means over the seeds; a point stands where its stretch of places begins."
)
_DOTS = "A dot for each seed, a bar for their mean, a band of one standard deviation to each side."
_TIME = (
    "Loss, own: of the references' tokens after the model's own; exact: share of answers that equal the reference; "
    "repeated: share of an answer's runs of four tokens that it has had before; own tokens: share of the training time "
    "that wrote the model's own tokens."
)
_ANSWERS = "The first held-out prompts, and what the first seed's models answer, greedily."
