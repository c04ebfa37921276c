"""From rollouts to results of the offline RL recipe: normalised scores, paired differences, files, report."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from samplewise.callbacks.figures import Line, dots, histogram, lines
from samplewise.callbacks.page import Page, Picture, Section, Table
from samplewise.recipes.common import environment, judged, paired, print_end, print_table, sd, settings_table, write_csv
from samplewise.recipes.offline_agents import LABELS
from samplewise.recipes.offline_arms import ARMS, Arm, distribution
from samplewise.recipes.offline_data import Task
from samplewise.recipes.offline_runs import Run

if TYPE_CHECKING:
    from samplewise.recipes.offline_rl import OfflineRlOptions

VERSION, BINS, BASE = 1, 30, "uniform"
Row = Mapping[str, Any]


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for each data set, agent and arm: means over the seeds, sample deviations, difference to uniform.

    The difference is paired by seed; `error` is its standard error, None with one seed or without a uniform arm.
    """
    rows = []
    for data, agent, arm in dict.fromkeys((run.data, run.agent, run.arm) for run in runs):
        own = {run.seed: run for run in runs if (run.data, run.agent, run.arm) == (data, agent, arm)}
        base = {run.seed: run for run in runs if (run.data, run.agent, run.arm.name) == (data, agent, BASE)}
        scores = np.array([run.score for run in own.values()])
        returns = np.array([run.returns[-1].mean() for run in own.values()])
        row: dict[str, Any] = {"data": data, "agent": agent, "arm": arm.name, "seeds": len(own)}
        row |= {"score": float(scores.mean()), "score_sd": sd(scores), "return": float(returns.mean())}
        row |= {"return_sd": sd(returns), "gain": None, "gain_sd": None, "error": None}
        if arm.name != BASE and base.keys() == own.keys():
            gains = np.array([own[seed].score - base[seed].score for seed in own])
            row |= paired(gains)
        for key in ("seconds", "draw_seconds", "rollout_seconds"):
            row[key] = float(np.mean([getattr(run, key) for run in own.values()]))
        rows.append(row)
    return rows


def verdict(row: Row) -> str:
    """Whether the paired difference to uniform exceeds its standard error, in a word."""
    return "" if row["gain"] is None else judged(row["gain"], row["error"])


def findings(rows: Sequence[Row]) -> list[str]:
    """A sentence for each data set and arm, whichever way it went."""
    sentences = []
    for data, arm in dict.fromkeys((row["data"], row["arm"]) for row in rows if row["gain"] is not None):
        own = [row for row in rows if (row["data"], row["arm"]) == (data, arm)]
        parts = [f"{LABELS[row['agent']]} {_gain(row)} ({verdict(row)})" for row in own]
        sentences.append(f"{data}: {ARMS[arm].label} against uniform draws: {'; '.join(parts)}.")
    return sentences


def distributions(task: Task, arms: Sequence[Arm], options: "OfflineRlOptions") -> dict[str, Any]:
    """How each arm weighs the trajectories of a data set: figures by arm, and shares of the return's bins."""
    returns = task.episodes.returns
    edges = np.histogram_bin_edges(returns, BINS)
    counts = np.histogram(returns, edges)[0]
    found: dict[str, Any] = {"edges": edges.tolist(), "shares": (counts / counts.sum()).tolist(), "arms": {}}
    for arm in arms:
        weights, figures = distribution(arm, task.episodes, options)
        shares = np.histogram(returns, edges, weights=weights)[0]
        found["arms"][arm.name] = {
            **figures,
            "score": task.score(figures["expected_return"]),
            "shares": shares.tolist(),
        }
    return found


def behaviours(task: Task) -> list[dict[str, Any]]:
    """Trajectories, transitions and mean return of each behaviour in the mix."""
    if task.behaviour is None:
        return []
    rows = []
    for number, label in enumerate(task.labels):
        own = task.behaviour == number
        if own.any():
            lengths, returns = task.episodes.lengths[own], task.episodes.returns[own]
            rows.append({
                "behaviour": label, "trajectories": int(own.sum()), "transitions": int(lengths.sum()),
                "return": float(returns.mean()), "return_sd": sd(returns),
            })  # fmt: skip
    return rows


def write_results(
    runs: Sequence[Run], tasks: Sequence[Task], options: "OfflineRlOptions", seconds: float, *, console: Console
) -> dict[str, Any]:
    """Write results, CSV files and the report into `options.out`, print the table; gives what `results.json` holds."""
    arms = [ARMS[name] for name in options.arms]
    place: dict[str, int] = {name: number for number, name in enumerate((*options.agents, *options.arms))}
    names = {task.name: number for number, task in enumerate(tasks)}
    runs = sorted(runs, key=lambda run: (names[run.data], place[run.agent], place[run.arm.name], run.seed))
    rows = summarise(runs)
    results: dict[str, Any] = {
        "version": VERSION,
        "options": asdict(options),
        "environment": environment(),
        "seconds": seconds,
        "data": [
            {
                "name": task.name, "env": task.env_id, "source": task.source,
                "trajectories": task.episodes.num_episodes, "transitions": len(task.episodes),
                "random_return": task.random_return, "expert_return": task.expert_return,
                "behaviours": behaviours(task), **distributions(task, arms, options),
            }
            for task in tasks
        ],
        "findings": findings(rows),
        "summary": rows,
        "runs": [
            run.row() | {"curve": {"steps": run.steps.tolist(), "returns": run.returns.tolist()}} for run in runs
        ],
    }  # fmt: skip
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write_csv(out / "summary.csv", rows)
    write_csv(out / "runs.csv", [run.row() for run in runs])
    page = report_page(results, runs).write(out / "report.html")
    header = ["data", "agent", "arm", "score", "against uniform", "return", "s"]
    print_table(console, header, [_cells(row) for row in rows])
    header = ["data", "arm", "trajectories (ESS)", "expected return", "as a score", "R² of the value"]
    print_table(console, header, [cells for data in results["data"] for cells in _distribution_cells(data)])
    print_end(console, results["findings"], f"{seconds:.0f} s in all. Report: {page.resolve()}")
    return results


def _gain(row: Row) -> str:
    if row["gain"] is None:
        return ""
    return f"{row['gain']:+.1f}" + (f" ± {row['gain_sd']:.1f}" if row["seeds"] > 1 else "")


def _cells(row: Row) -> list[str]:
    spread = [f" ± {row[f'{key}_sd']:.1f}" if row["seeds"] > 1 else "" for key in ("score", "return")]
    return [
        row["data"], LABELS[row["agent"]], row["arm"], f"{row['score']:.1f}{spread[0]}", _gain(row),
        f"{row['return']:.1f}{spread[1]}", f"{row['seconds']:.1f}",
    ]  # fmt: skip


def _distribution_cells(data: Row) -> list[list[str]]:
    return [
        [
            data["name"], arm, f"{f['ess']:.1f} of {data['trajectories']:,}", f"{f['expected_return']:.1f}",
            f"{f['score']:.1f}", f"{f['value_r2']:.2f}" if "value_r2" in f else "",
        ]
        for arm, f in data["arms"].items()
    ]  # fmt: skip


# --- the report -------------------------------------------------------------------------------------------------------


def report_page(results: Row, runs: Sequence[Run]) -> Page:
    """The recipe's report."""
    options = results["options"]
    lead = [
        f"{', '.join(data['name'] for data in results['data'])}; {options['steps']:,} steps of "
        f"{options['batch_size']} transitions, {options['seeds']} seed(s); each policy is rolled out "
        f"{options['episodes']} times. Scores: 0 is what random actions get, "
        "100 the expert, or what is named with the data."
    ]
    sections = [Section("Results", [_NOTE, *results["findings"]])]
    for data in results["data"]:
        sections.append(_data_section(data, results, [run for run in runs if run.data == data["name"]]))
    header = ["data", "agent", "arm", "training s", "of which drawing and bookkeeping s", "rollouts s"]
    cells = [
        [row["data"], LABELS[row["agent"]], row["arm"],
         *(f"{row[key]:.2f}" for key in ("seconds", "draw_seconds", "rollout_seconds"))]
        for row in results["summary"]
    ]  # fmt: skip
    sections += [Section("Where the time went", [Table(header, cells)])]
    sections += [Section("How it was run", [settings_table(results)])]
    return Page("Trajectory reweighting: what the good trajectories gave", lead, sections)


def _data_section(data: Row, results: Row, runs: Sequence[Run]) -> Section:
    name = data["name"]
    file = re.sub(r"[^\w.-]+", "-", name)
    agents = list(dict.fromkeys(run.agent for run in runs))
    arms = [ARMS[arm] for arm in data["arms"]]
    rows = [row for row in results["summary"] if row["data"] == name]
    header = ["agent", "arm", "score", "against uniform, paired", "return", "training s"]
    parts: list[str | Table | Picture] = [
        f"{data['trajectories']:,} trajectories, {data['transitions']:,} transitions of {data['env']}. {data['source']}"
    ]
    if data["behaviours"]:
        made = [
            [
                b["behaviour"], f"{b['trajectories']:,}", f"{b['transitions']:,}",
                f"{b['return']:.1f} ± {b['return_sd']:.1f}",
            ]
            for b in data["behaviours"]
        ]  # fmt: skip
        parts.append(Table(["behaviour", "trajectories", "transitions", "return"], made))
    parts.append(Picture(f"{file}-returns", _histogram(data), _HISTOGRAM))
    above = math.sqrt(next(iter(data["arms"].values()))["positive_variance"])
    parts.append(
        f"Above their mean, the trajectories' returns deviate by {above:.1f} (the root of E[(G - E G)+^2]): where that "
        f"is small, there is nothing to choose."
    )
    header_weights = ["arm", "effective number of trajectories", "expected return", "as a score", "R² of the value"]
    parts.append(Table(header_weights, [cells[1:] for cells in _distribution_cells(data)]))
    parts.append(Table(header, [_cells(row)[1:] for row in rows]))
    for agent in agents:
        own = [run for run in runs if run.agent == agent]
        points = [[run.score for run in own if run.arm == arm] for arm in arms]
        png = dots([arm.label for arm in arms], points, [arm.colour for arm in arms], x=f"{LABELS[agent]}: score")
        parts.append(Picture(f"{file}-{agent}", png, _DOTS))
        parts.append(Picture(f"{file}-{agent}-curves", _curves(own, arms, LABELS[agent]), _CURVES))
    return Section(name, parts)


def _histogram(data: Row) -> bytes:
    shares = {arm: figures["shares"] for arm, figures in data["arms"].items() if arm not in (BASE, "rs2")}
    over = {ARMS[arm].label: values for arm, values in shares.items()}
    colours = [ARMS[arm].colour for arm in shares]
    return histogram(
        data["edges"], data["shares"], over, colours, x="return of a trajectory", y="share of the trajectories"
    )


def _curves(runs: Sequence[Run], arms: Sequence[Arm], label: str) -> bytes:
    curves = []
    for arm in arms:
        own = [run for run in runs if run.arm == arm]
        scores = np.array([run.scores for run in own])
        spread = scores.std(0, ddof=1).tolist() if len(own) > 1 else None
        curves.append(Line(arm.label, own[0].steps.tolist(), scores.mean(0).tolist(), arm.colour, spread))
    return lines(curves, x="gradient steps", y=f"{label}: score", alike=True)


_NOTE = (
    "± is one standard deviation over the seeds; differences to uniform draws are paired by seed, and called better or "
    "worse where they exceed their standard error. All arms take as many gradient steps, from the same weights for the "
    "same seed. With few seeds a standard error is itself uncertain. Expected returns are those of the trajectories "
    "in the data, which may start elsewhere than the rollouts. R² of the value: how much of the returns' variance the "
    "first observations explain, of trajectories held out; at or below 0, RW is the better choice than AW."
)
_HISTOGRAM = (
    "Returns of the trajectories (bars), and how each arm weighs them (lines): the share of its draws if all "
    "trajectories were equally long, and without the priorities of replay."
)
_DOTS = "A dot for each seed, a bar for their mean, a band of one standard deviation to each side."
_CURVES = "Mean of the rollouts as training goes on, and one standard deviation over the seeds."
