"""The runs of the offline RL recipe: train, roll out, keep time; several at once, each in a process of its own."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from samplewise.callbacks.report import Stopwatch
from samplewise.recipes.common import surroundings
from samplewise.recipes.offline_agents import AGENTS, LABELS
from samplewise.recipes.offline_arms import Arm, make_sampler
from samplewise.recipes.offline_data import Task
from samplewise.recipes.progress import Bars
from samplewise.recipes.rollouts import rollouts

if TYPE_CHECKING:
    from samplewise.recipes.offline_rl import OfflineRlOptions

Train = Callable[..., Any]


@dataclass(frozen=True)
class Job:
    """One training that is to be done."""

    task: Task
    agent: str
    arm: Arm
    seed: int
    options: "OfflineRlOptions"

    @property
    def name(self) -> str:
        """In words."""
        return f"seed {self.seed}: {self.task.name}, {LABELS[self.agent]}, {self.arm.label}"


@dataclass(frozen=True)
class Run:
    """One training and its rollouts.

    Attributes:
        data, agent, arm, seed: which.
        steps: int `(E,)`, gradient steps at each evaluation.
        returns: float64 `(E, episodes)`, undiscounted.
        scores: float64 `(E,)`, normalised; the last one counts.
        seconds: of training, with drawing and bookkeeping.
        draw_seconds: planning of the draws and bookkeeping of the losses alone.
        rollout_seconds: of the evaluations.
    """

    data: str
    agent: str
    arm: Arm
    seed: int
    steps: np.ndarray
    returns: np.ndarray
    scores: np.ndarray
    seconds: float
    draw_seconds: float
    rollout_seconds: float

    @property
    def score(self) -> float:
        """Of the trained policy."""
        return float(self.scores[-1])

    def line(self) -> str:
        """The run in a line."""
        return (
            f"seed {self.seed}  {self.data:<16} {LABELS[self.agent]:<7} {self.arm.label:<26} score {self.score:6.1f}  "
            f"return {self.returns[-1].mean():8.1f}  {self.seconds:6.1f} s"
        )

    def row(self) -> dict[str, Any]:
        """The run's numbers."""
        return {
            "data": self.data, "agent": self.agent, "arm": self.arm.name, "seed": self.seed,
            "steps": int(self.steps[-1]), "score": self.score, "return": float(self.returns[-1].mean()),
            "train_seconds": self.seconds, "draw_seconds": self.draw_seconds, "rollout_seconds": self.rollout_seconds,
        }  # fmt: skip


class Evaluation(Callback):
    """Rolls the policy out at the end of each epoch.

    Attributes:
        steps, returns: of each evaluation so far.
        seconds: they took.
    """

    def __init__(self, task: Task, episodes: int, seed: int):
        self.task, self.episodes, self.seed = task, episodes, seed
        self.steps: list[int] = []
        self.returns: list[np.ndarray] = []
        self.seconds, self._done = 0.0, 0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._done += 1

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        begin, agent = perf_counter(), pl_module
        act: Any = agent.act
        self.returns.append(rollouts(self.task.env_id, act, episodes=self.episodes, seed=self.seed))
        self.steps.append(self._done)
        self.seconds += perf_counter() - begin


class PlanTimer(Callback):
    """Adds up the seconds of planning."""

    def __init__(self, sampler: Any):
        self.sampler, self.seconds = sampler, 0.0

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds += self.sampler.plan_seconds


def run_one(job: Job, train: Train, callbacks: Sequence[Callback] = ()) -> Run:
    """Train and evaluate, in this process."""
    options, task = job.options, job.task
    draws = options.batch_size * (options.steps // options.evaluations)
    sampler = make_sampler(job.arm, task.episodes, draws, job.seed, options)
    observe = Stopwatch(sampler.observe)
    evaluation, planning = Evaluation(task, options.episodes, job.seed), PlanTimer(sampler)
    given: dict[str, Any] = {"callbacks": [planning, evaluation, *callbacks], "sampler": sampler, "observe": observe}
    begin = perf_counter()
    train(AGENTS[job.agent], task, options, job.seed, **given)
    seconds = perf_counter() - begin - evaluation.seconds
    returns = np.stack(evaluation.returns)
    scores = np.array([task.score(values) for values in returns])
    spent = planning.seconds + observe.seconds
    which = (task.name, job.agent, job.arm, job.seed)
    return Run(*which, np.array(evaluation.steps), returns, scores, seconds, spent, evaluation.seconds)


def run_all(jobs: Sequence[Job], train: Train, bars: Bars) -> Iterator[Run]:
    """All jobs, each as it is done; several at a time where the options say so. Results do not depend on how many."""
    processes = min(jobs[0].options.processes, len(jobs))
    if processes == 1:
        with surroundings(1 if jobs[0].options.accelerator == "cpu" else 0):
            for job in jobs:
                yield run_one(job, train, [bars.begin(job.name)])
        return
    others = set(multiprocessing.active_children())
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=_end_with_parent)
    try:
        for future in as_completed([pool.submit(_run_alone, job, train) for job in jobs]):
            yield future.result()
    except BaseException:  # an interrupt too: nobody waits for what is being trained
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """So that a worker does not train on when the process that wants its results was killed."""
    parent: Any = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_alone(job: Job, train: Train) -> Run:
    with surroundings(1):
        return run_one(job, train)
