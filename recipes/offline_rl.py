"""Offline RL on mixed data, with and without reweighting: what the good trajectories give, and when they lie.

    python -m samplewise.recipes.offline_rl          # Hopper and Pendulum, 3 seeds, half an hour on 2 CPU cores
    samplewise run offline_rl --data minari:mujoco/hopper/medium-v0 --accelerator gpu --steps 200000
    samplewise run offline_rl --data '[lottery, stitch]' --steps 1000 --evaluations 1 --episodes 100   # where it fails

Simulates a few good and many bad trajectories of each environment (once: they are kept in the cache), or loads those of
Minari or D4RL, and trains BC, TD3+BC and IQL on batches that are drawn uniformly (and by RS2), by return (RW), by
advantage (AW) and from the best trajectories alone, for as many optimizer steps each, seed by seed. Policies are judged
by rollouts. Writes `results.json`, `runs.csv`, `summary.csv`, `report.html` and `plots/*.png` into `--out`, and prints
a table: normalised score (0: random actions, 100: the expert; mean, sd), the difference to uniform paired by seed, and
for each way of drawing the effective number of trajectories and their expected return.

`offline_agents.py` and `train` are an ordinary training script: delete the lines marked `# samplewise` and it still is
one, with uniformly drawn batches.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from samplewise.callbacks import SamplingCallback  # samplewise
from samplewise.loaders import collate_with_ids, with_ids  # samplewise
from samplewise.recipes.assets import AssetError
from samplewise.recipes.common import Rule, check_options, surroundings
from samplewise.recipes.offline_agents import AGENTS, Agent, Scaling
from samplewise.recipes.offline_arms import ARMS
from samplewise.recipes.offline_data import NAMES, Task, is_known, load_task
from samplewise.recipes.offline_results import write_results
from samplewise.recipes.offline_runs import Job, Run, run_all
from samplewise.recipes.progress import Bars
from samplewise.recipes.rollouts import action_bounds

AgentName = Literal["bc", "td3_bc", "iql"]
ArmName = Literal["uniform", "rw", "aw", "top", "rs2", "replay", "replay_aw"]


@dataclass
class OfflineRlOptions:
    """What to compare, on what, and how.

    Args:
        data: some of hopper-mixed, hopper-low, hopper-medium, the same three of pendulum, lottery, stitch,
            minari:NAME, or the path of a D4RL HDF5 file
        env: the gymnasium environment of the D4RL files
        transitions: simulated for each data set
        agents: bc, td3_bc, iql
        arms: uniform, rw, aw, top, rs2; replay (transitions prioritised by their TD error) and replay_aw (both) for
            td3_bc and iql
        alpha: temperature of RW and AW
        top: share of the trajectories that top draws from, in (0, 1]
        clip_quantile: RW and AW: returns are clipped to their quantiles clip_quantile and 1 - clip_quantile first
        mix: RW, AW and top: their share of the draws, the rest is uniform, in [0, 1]
        rs2_ratio: RS2: share of the transitions in a round, in (0, 1]
        steps: gradient steps of each run
        seeds: number of repeats; repeat s uses seed s for weights, draws and rollouts
        batch_size: transitions in a batch
        hidden: width of the two hidden layers
        lr: learning rate, of Adam
        discount: of the TD targets, in [0, 1)
        evaluations: of each run, evenly spaced; the last one is its score
        episodes: rollouts of an evaluation
        accelerator: cpu, gpu or mps
        jobs: trainings at the same time, each with one thread; 0: one for each core on the CPU, else 1
        out: folder for the results
    """

    data: list[str] = field(default_factory=lambda: ["hopper-mixed", "pendulum-mixed"])
    env: str | None = None
    transitions: int = 100_000
    agents: list[AgentName] = field(default_factory=lambda: ["bc", "td3_bc", "iql"])
    arms: list[ArmName] = field(default_factory=lambda: ["uniform", "rs2", "rw", "aw", "top"])
    alpha: float = 0.1
    top: float = 0.1
    clip_quantile: float = 0.0
    mix: float = 1.0
    rs2_ratio: float = 0.1
    steps: int = 5000
    seeds: int = 3
    batch_size: int = 256
    hidden: int = 128
    lr: float = 1e-3
    discount: float = 0.99
    evaluations: int = 5
    episodes: int = 10
    accelerator: Literal["cpu", "gpu", "mps"] = "cpu"
    jobs: int = 0
    out: str = "runs/offline_rl"

    def validate(self) -> None:
        """Check all options.

        Raises:
            ValueError: one line for each option that breaks its rule.
        """
        files = [name for name in self.data if Path(name).is_file() and name not in NAMES]
        unknown = [name for name in self.data if not is_known(name)]
        replay = {name for name in self.arms if name in ARMS and ARMS[name].replay}
        rules: list[Rule] = [
            ("data", bool(self.data), f"needs at least one of {', '.join(NAMES)}, minari:NAME or an HDF5 file"),
            ("data", not unknown, f"there are {', '.join(NAMES)}, minari:NAME and paths of HDF5 files"),
            ("data", len(set(self.data)) == len(self.data), "names a data set twice"),
            ("env", self.env is not None or not files, f"must be given, it is that of {', '.join(files)}"),
            ("env", self.env is None or bool(files), "is for D4RL files, and there is none in data"),
            ("transitions", self.transitions >= 1000, "must be >= 1000"),
            ("agents", bool(self.agents) and set(self.agents) <= set(AGENTS), f"there are {', '.join(AGENTS)}"),
            ("agents", len(set(self.agents)) == len(self.agents), "names an agent twice"),
            ("agents", not replay or "bc" not in self.agents, "bc has no TD error: leave it or the replay arms out"),
            ("arms", bool(self.arms) and set(self.arms) <= set(get_args(ArmName)), f"there are {', '.join(ARMS)}"),
            ("arms", len(set(self.arms)) == len(self.arms), "names an arm twice"),
            ("alpha", self.alpha > 0, "is a temperature and must be > 0"),
            ("top", 0 < self.top <= 1, "is a share of the trajectories and must be in (0, 1]"),
            ("clip_quantile", 0 <= self.clip_quantile < 0.5, "must be in [0, 0.5)"),
            ("mix", 0 <= self.mix <= 1, "is a share of the draws and must be in [0, 1]"),
            ("rs2_ratio", 0 < self.rs2_ratio <= 1, "is a share of the transitions and must be in (0, 1]"),
            ("evaluations", self.evaluations >= 1, "must be >= 1"),
            (
                "steps",
                self.steps >= 1 and self.steps % max(1, self.evaluations) == 0,
                "must be a multiple of evaluations",
            ),
            ("batch_size", self.batch_size >= 1, "must be >= 1"),
            ("hidden", self.hidden >= 1, "must be >= 1"),
            ("lr", self.lr > 0, "must be > 0"),
            ("discount", 0 <= self.discount < 1, "must be in [0, 1)"),
            ("episodes", self.episodes >= 1, "must be >= 1"),
            ("jobs", self.jobs >= 0, "must be >= 0; 0 chooses"),
        ]
        check_options(self, rules)

    @property
    def processes(self) -> int:
        """Trainings at the same time."""
        return self.jobs or (os.cpu_count() or 1 if self.accelerator == "cpu" else 1)


def train(
    agent: type[Agent],
    task: Task,
    options: OfflineRlOptions,
    seed: int,
    *,
    callbacks: Sequence[Callback] = (),
    sampler: Any = None,
    observe: Any = None,
) -> Agent:
    """Train one agent for `options.steps` steps, in `options.evaluations` epochs."""
    torch.manual_seed(seed)
    module = agent(Scaling.of(task, *action_bounds(task.env_id)), options, observe)
    loader: Any = DataLoader(task.episodes, options.batch_size, shuffle=True, collate_fn=lambda batch: batch)
    loading: dict[str, Any] = {"sampler": sampler, "collate_fn": collate_with_ids()}  # samplewise
    loader = DataLoader(with_ids(task.episodes), options.batch_size, **loading)  # samplewise
    callbacks = list(callbacks)
    callbacks.insert(0, SamplingCallback(sampler))  # samplewise
    trainer = Trainer(
        accelerator=options.accelerator,
        devices=1,
        max_epochs=options.evaluations,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, loader)
    return module


def _load(name: str, **given: Any) -> Task:
    try:
        return load_task(name, **given)
    except ValueError as error:
        raise AssetError(f"{name}: cannot be used: {error}") from error


def run(options: OfflineRlOptions) -> dict[str, Any]:
    """Train everything, write the results, print the table; gives what `results.json` holds.

    Raises:
        ValueError: wrong options, all of them at once.
        AssetError: a data set could not be had, or is not what it should be.
    """
    options.validate()
    begin = perf_counter()
    runs: list[Run] = []
    total = len(options.data) * len(options.agents) * len(options.arms) * options.seeds
    with surroundings(0), Bars(total) as bars:
        given: dict[str, Any] = {"env": options.env, "say": bars.say, "count": bars.count}
        tasks = {name: _load(name, transitions=options.transitions, **given) for name in options.data}
        names = [task.name for task in tasks.values()]
        if len(set(names)) < len(names):
            raise AssetError(f"data: {', '.join(names)}: results need different names: rename one of the files")
        for task in tasks.values():
            size = f"{task.episodes.num_episodes:,} trajectories, {len(task.episodes):,} transitions"
            bars.say(f"{task.name}: {size}. {task.source}")
        jobs = [
            Job(tasks[name], agent, ARMS[arm], seed, options)
            for seed in range(options.seeds)
            for name in options.data
            for agent in options.agents
            for arm in options.arms
        ]
        for done in run_all(jobs, train, bars):
            runs.append(done)
            bars.finish(done.line())
    return write_results(runs, list(tasks.values()), options, perf_counter() - begin, console=bars.console)


if __name__ == "__main__":
    from samplewise.recipes.cli import run_command

    sys.exit(run_command(["offline_rl", *sys.argv[1:]]))
