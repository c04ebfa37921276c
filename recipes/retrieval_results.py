"""From rankings to results of the retrieval recipe: measures, paired differences, JSON, CSV, the report, the table."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor
from typing_extensions import override

from samplewise.callbacks.figures import Line, bars, dots, lines
from samplewise.callbacks.page import Page, Picture, Section, Table
from samplewise.loaders.table import Table as Store
from samplewise.plugins.selection import Found
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
from samplewise.recipes.corpus import Collection, Queries, judgements
from samplewise.recipes.retrieval_arms import Arm

if TYPE_CHECKING:
    from samplewise.recipes.retrieval import RetrievalOptions

VERSION = 1
DEPTH = 100
"""Documents that are ranked for each test query."""
METRICS = {"ndcg_10": "nDCG@10", "mrr_10": "MRR@10", "recall_100": "Recall@100"}
BASES = ("random", "in_batch", "in_batch_softmax")
PARTS = ("training", "encoding", "mining", "testing")
GROUPS = ((1, 1), (2, 3), (4, 10), (11, DEPTH), (DEPTH + 1, DEPTH + 1))
SMOOTHED = 10


class Clock:
    """Adds up seconds by part: `with clock("mining"): ...`."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time a block."""
        begin = perf_counter()
        yield
        self.seconds[part] += perf_counter() - begin

    def move(self, seconds: float, source: str, target: str) -> None:
        """Count them for another part."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds


class Losses(Callback):
    """Notes the loss of every step."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(outputs["loss"].detach())


@dataclass(frozen=True)
class Run:
    """One training and its test.

    Attributes:
        arm, seed: which.
        scores: by key of `METRICS`, means over the queries.
        first: int64 `(Q,)`, the rank of each query's first relevant document, `DEPTH + 1` where it was not found.
        seconds: by part.
        losses: of each step.
    """

    arm: Arm
    seed: int
    scores: Mapping[str, float]
    first: np.ndarray
    seconds: Mapping[str, float]
    losses: Sequence[float] = field(default_factory=tuple)

    def line(self) -> str:
        """The run in a line."""
        scores = "  ".join(f"{name} {self.scores[key]:.4f}" for key, name in METRICS.items())
        return f"seed {self.seed}  {self.arm.label:<26} {scores}  {self.seconds['training']:6.1f} s"

    def row(self) -> dict[str, Any]:
        """The run's numbers."""
        seconds = {f"{part}_seconds": value for part, value in self.seconds.items()}
        return {"arm": self.arm.name, "seed": self.seed, "steps": len(self.losses), **self.scores, **seconds}


@dataclass(frozen=True)
class Mined:
    """What the pretrained encoder finds.

    Attributes:
        table: the training queries' negatives.
        documents, queries: `(D, E)` and `(Q, E)`, the collection's and the training queries, embedded.
        seconds: of encoding and mining, by part.
    """

    table: Store
    documents: Tensor
    queries: Tensor
    seconds: Mapping[str, float]


def measure(queries: Queries, document_ids: Sequence[str], found: Found) -> tuple[dict[str, float], np.ndarray]:
    """The metrics of a ranking, by ir_measures, and the rank of the first relevant document of each query `(Q,)`."""
    import ir_measures

    names = np.asarray(document_ids, dtype=object)[found.ids.numpy()]
    ranking = {
        query: dict(zip(documents, scores, strict=True))
        for query, documents, scores in zip(queries.ids, names.tolist(), found.scores.tolist(), strict=True)
    }
    wanted = {"ndcg_10": ir_measures.nDCG @ 10, "mrr_10": ir_measures.RR @ 10, "recall_100": ir_measures.R @ 100}
    values = ir_measures.calc_aggregate(list(wanted.values()), judgements(queries, document_ids), ranking)
    relevant = queries.positives.padded()
    hits = (found.ids.numpy()[:, :, None] == relevant[:, None, :]).any(2)
    first = np.where(hits.any(1), hits.argmax(1) + 1, DEPTH + 1)
    return {key: float(values[metric]) for key, metric in wanted.items()}, first


def summarise(runs: Sequence[Run], arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """One row an arm: means over the seeds, sample standard deviations, differences to `BASES` paired by seed."""
    rows = []
    for arm in arms:
        own = [run for run in runs if run.arm == arm]
        row: dict[str, Any] = {"arm": arm.name, "label": arm.label, "seeds": len(own)}
        row["steps"] = len(own[0].losses)
        for key in METRICS:
            scores = np.array([run.scores[key] for run in own])
            row |= {key: float(scores.mean()), f"{key}_sd": sd(scores)}
            for base in BASES:
                other = np.array([run.scores[key] for run in runs if run.arm.name == base])
                paired = scores - other if len(other) == len(scores) and base != arm.name and arm.trained else None
                row[f"{key}_vs_{base}"] = None if paired is None else float(paired.mean())
                row[f"{key}_vs_{base}_sd"] = None if paired is None else sd(paired)
        row |= {f"{part}_seconds": float(np.mean([run.seconds[part] for run in own])) for part in PARTS}
        rows.append(row)
    return rows


def findings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the rows say, in sentences, whichever way it went."""
    sentences = []
    for row in (row for row in rows if row["steps"]):
        parts = [
            f"{difference(row, f'ndcg_10_vs_{base}')} against {other['label'].lower()} ({_verdict(row, base)})"
            for base in BASES
            for other in rows
            if other["arm"] == base and row[f"ndcg_10_vs_{base}"] is not None
        ]
        if parts:
            sentences.append(f"{row['label']}: nDCG@10 {'; '.join(parts)}.")
    return sentences


def _verdict(row: Mapping[str, Any], base: str) -> str:
    """Whether the paired differences are all but noise: their mean against its standard error."""
    gain, spread, seeds = row[f"ndcg_10_vs_{base}"], row[f"ndcg_10_vs_{base}_sd"], row["seeds"]
    if seeds < 2:
        return "one seed: no spread to judge it by"
    if abs(gain) <= 2 * spread / np.sqrt(seeds):
        return "within two standard errors"
    return "better" if gain > 0 else "worse"


def examples(collection: Collection, mined: Mined, count: int = 8, shown: int = 3) -> list[dict[str, Any]]:
    """Some training queries with their relevant document and their hardest mined negatives.

    A negative looks relevant where the encoder takes it and the relevant document for nearly the same.
    """
    version = mined.table.snapshot()
    found, scores, best = (version.arrays[name] for name in ("negatives", "scores", "positive_scores"))
    train, entries = collection.train, []
    for row in np.linspace(0, len(train) - 1, min(count, len(train))).astype(int).tolist():
        relevant = int(train.positives[row][0])
        negatives = []
        for document, score in zip(found[row, :shown].tolist(), scores[row, :shown].tolist(), strict=True):
            alike = float(mined.documents[document] @ mined.documents[relevant])
            text = collection.documents[document]
            negatives.append({"document": text, "score": score, "suspicious": alike > SAME})
        text = {"query": train.texts[row], "relevant": collection.documents[relevant], "score": float(best[row])}
        entries.append({**text, "negatives": negatives})
    return entries


SAME = 0.9
"""Cosine similarity from which two documents are taken to say the same."""


def write_results(
    runs: Sequence[Run],
    arms: Sequence[Arm],
    collection: Collection,
    mined: Mined,
    options: "RetrievalOptions",
    seconds: float,
    *,
    console: Console,
) -> dict[str, Any]:
    """Write results, CSV files and the report into `options.out`, print the table; gives what `results.json` holds."""
    rows = summarise(runs, arms)
    version = mined.table.snapshot()
    above = float(np.mean(version.arrays["scores"][:, 0] > version.arrays["positive_scores"]))
    note = f"Of the hardest mined negatives, {above:.0%} score above the relevant document before any training."
    parts = {part: len(getattr(collection, part)) for part in ("train", "validation", "test")}
    results: dict[str, Any] = {
        "version": VERSION,
        "metrics": METRICS,
        "data": {"name": collection.name, "source": collection.source, "documents": len(collection.documents), **parts},
        "options": asdict(options),
        "environment": environment(),
        "seconds": seconds,
        "mining": {"seconds": mined.seconds, "above_positive": above, "table": version.meta},
        "findings": [*findings(rows), note],
        "summary": rows,
        "examples": examples(collection, mined),
        "runs": [run.row() | {"losses": list(run.losses)} for run in runs],
    }
    out = Path(options.out)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write_csv(out / "summary.csv", rows)
    write_csv(out / "runs.csv", [run.row() for run in runs])
    page = report_page(results, runs, arms).write(out / "report.html")
    cells = [[row["arm"], *_cells(row)[1:4], *_cells(row)[-3:]] for row in rows]  # the differences are in the findings
    print_table(console, ["arm", *METRICS.values(), "s", "encode s", "mine s"], cells)
    print_end(console, results["findings"], f"{seconds:.0f} s in all. Report: {page.resolve()}")
    return results


def _cells(row: Mapping[str, Any]) -> list[str]:
    scores = [mean_sd(row, key, f"{key}_sd") for key in METRICS]
    differences = [difference(row, f"ndcg_10_vs_{base}") for base in BASES[:2]]  # the third is in the findings
    return [row["label"], *scores, *differences, *(f"{row[f'{part}_seconds']:.1f}" for part in PARTS[:3])]


# --- the report -------------------------------------------------------------------------------------------------------


def report_page(results: Mapping[str, Any], runs: Sequence[Run], arms: Sequence[Arm]) -> Page:
    """The recipe's report."""
    data, options, rows = results["data"], results["options"], results["summary"]
    tested = data[options["evaluate"]]
    lead = [
        f"{data['name']}: {data['documents']:,} documents, {data['train']:,} training queries, {tested:,} queries to "
        f"{options['evaluate']} on; {options['steps']} steps of {options['batch_size']} queries, {options['seeds']} "
        f"seed(s). Source: {data['source']}."
    ]
    header = ["", *METRICS.values(), "nDCG against random", "against in-batch", "training s", "encoding s", "mining s"]
    table = Table(header, [_cells(row) for row in rows])
    sections = [
        Section("Results", [table, _NOTE, *results["findings"]]),
        Section("Every run", [Picture(key, _dots(runs, arms, key), _DOTS) for key in METRICS]),
        Section("Which queries it helps", [Picture("difficulty", _difficulty(runs, arms), _DIFFICULTY)]),
        Section("Losses", [Picture("losses", _losses(runs, arms), _LOSSES)]),
        Section("Where the time went", [Picture("time", _time(rows), _TIME)]),
        Section("Queries and their mined negatives", [_EXAMPLES, _example_table(results["examples"])]),
        Section("How it was run", [settings_table(results)]),
    ]
    return Page("Hard negatives: what they gave, and where they gave nothing", lead, sections)


_NOTE = (
    "± is one standard deviation over the seeds; differences are paired by seed. All arms take as many optimizer "
    "steps from the same weights: ADORE's are STAR's for a first share of the steps, then the query encoder's alone. "
    "Encoding and mining are what an arm needs before or while it trains, for its negatives or its index; what several "
    "arms share is counted for each. Encoding the documents for the test is in none of them."
)
_DOTS = "A dot for each seed, a bar for their mean, a band of one standard deviation to each side."
_DIFFICULTY = (
    "What training changes in MRR@10, for groups of test queries by the rank at which the pretrained encoder finds the "
    "first relevant document (what is first can only fall, what is not found can only rise: compare the arms). "
    + ", ".join(f"{number}: " + (f"rank {low}" if low == high else f"{low} to {high}") for number, (low, high) in
                enumerate(GROUPS[:-1], 1))
    + f", {len(GROUPS)}: not among the first {DEPTH}. Mean over the seeds."
)  # fmt: skip
_LOSSES = (
    f"Mean over {SMOOTHED} steps and the seeds. Each kind of negatives has a loss of its own, so that only the shapes "
    f"of the curves can be compared: random negatives are soon told apart, mined ones are not."
)
_TIME = "Mean seconds of a run; testing includes encoding all documents, except where an index of them is there."
_EXAMPLES = (
    "The hardest three of a query's mined negatives, with cosine similarities of the pretrained encoder. Marked (?): "
    f"to the encoder it says nearly the same as the relevant document (similarity above {SAME}), so that it may be "
    f"relevant too, though nobody judged it so."
)


def _dots(runs: Sequence[Run], arms: Sequence[Arm], key: str) -> bytes:
    points = [[run.scores[key] for run in runs if run.arm == arm] for arm in arms]
    return dots([arm.label for arm in arms], points, [arm.colour for arm in arms], x=METRICS[key])


def _difficulty(runs: Sequence[Run], arms: Sequence[Arm]) -> bytes:
    start = next(run.first for run in runs if not run.arm.trained)
    members = [(low <= start) & (start <= high) for low, high in GROUPS]
    curves = []
    for arm in (arm for arm in arms if arm.trained):
        gains = np.mean([_reciprocal(run.first) - _reciprocal(start) for run in runs if run.arm == arm], axis=0)
        groups = [number for number, rows in enumerate(members) if rows.any()]
        y = [float(gains[members[number]].mean()) for number in groups]
        curves.append(Line(arm.label, [number + 1 for number in groups], y, arm.colour))
    return lines(curves, x="queries, from easy to hard", y="MRR@10 gained", epochs=True)


def _reciprocal(first: np.ndarray) -> np.ndarray:
    """1 over the rank of the first relevant document, 0 beyond rank 10: float64 `(Q,)`."""
    return np.where(first <= 10, 1 / first, 0.0)


def _losses(runs: Sequence[Run], arms: Sequence[Arm]) -> bytes:
    curves = []
    for arm in (arm for arm in arms if arm.trained):
        values = np.array([run.losses for run in runs if run.arm == arm]).mean(0)
        pieces = np.array_split(values, max(1, len(values) // SMOOTHED))
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        curves.append(Line(arm.label, ends, [float(piece.mean()) for piece in pieces], arm.colour))
    return lines(curves, x="optimizer steps", y="loss", epochs=True)


def _time(rows: Sequence[Mapping[str, Any]]) -> bytes:
    parts = {part: [row[f"{part}_seconds"] for row in rows] for part in PARTS}
    return bars([row["label"] for row in rows], parts, x="seconds a run")


def _example_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for entry in entries:
        shown = [f"{n['document']} ({n['score']:.2f}){' (?)' if n['suspicious'] else ''}" for n in entry["negatives"]]
        rows.append([entry["query"], f"{entry['relevant']} ({entry['score']:.2f})", *shown])
    return Table(["query", "relevant", *(f"mined {number}" for number in range(1, len(rows[0]) - 1))], rows, True)
