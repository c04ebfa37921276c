"""The offline RL data of the recipe: one name or file in, episodes and what they are measured by out.

- `hopper-mixed` (of the transitions 45 % are low, 45 % medium and 10 % expert behaviour), `hopper-low` (90 % low, 10 %
  expert), `hopper-medium` (90 % medium, 10 % expert), and the same three of `pendulum`: simulated once, see `collect`;
- `lottery` and `stitch`: see `toy_tasks`;
- `minari:NAME`: a data set of Minari, downloaded if need be; of tasks with goals, what is observed and the goal;
- the path of an HDF5 file in D4RL's layout, with the environment's name.

All are memory-mapped from the cache, so that processes can share them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from samplewise.cuda_ext.checks import integer, optional_import
from samplewise.loaders.episodes import Episodes
from samplewise.loaders.offline_data import read_d4rl, read_minari
from samplewise.recipes.assets import AssetError, Say
from samplewise.recipes.collect import (
    MIXES,
    REFERENCE_EPISODES,
    SEARCHES,
    VERSION,
    Count,
    cached,
    collect,
    gather,
    save,
    silent,
)
from samplewise.recipes.rollouts import MINARI, bounds_of, environments, goal_keys, random_policy, rollouts

TOY_NAMES, TOY_TRANSITIONS = ("lottery", "stitch"), 20_000
NAMES = (*MIXES, *TOY_NAMES)
"""What `load_task` knows by name."""


@dataclass(frozen=True)
class Task:
    """What there is to learn, and from what.

    Attributes:
        name: as the report calls it.
        env_id: for `samplewise.recipes.rollouts.make_env`.
        episodes: the data.
        random_return: mean undiscounted return of random actions, score 0.
        expert_return: that of the expert, score 100.
        source: where the data came from, a sentence.
        labels: of the behaviours in a mix; empty where there is no telling.
        behaviour: int64 `(n,)`, the number of each episode's label, None without labels.
    """

    name: str
    env_id: str
    episodes: Episodes
    random_return: float
    expert_return: float
    source: str
    labels: tuple[str, ...] = ()
    behaviour: np.ndarray | None = None

    def score(self, returns: Any) -> float:
        """Normalised score of undiscounted returns, a number or `(m,)`: 0 as random actions, 100 as the expert."""
        reach = self.expert_return - self.random_return
        return float(100 * (np.mean(returns, dtype=np.float64) - self.random_return) / reach)


def is_known(name: str) -> bool:
    """Whether `load_task` can make something of a name."""
    return name in NAMES or (name.startswith(MINARI) and name != MINARI) or Path(name).is_file()


def load_task(
    name: str, *, transitions: int = 100_000, env: str | None = None, say: Say = print, count: Count = silent
) -> Task:
    """Find or simulate the data.

    Args:
        name: see the module's docstring.
        transitions: to simulate, about; toy tasks have 20,000 at most, recorded data are taken as they are.
        env: the gymnasium environment of a D4RL file.
        say: gets a line on each step.
        count: shows the progress of a step.

    Raises:
        AssetError: the data could not be had or kept.
        ImportError: gymnasium or minari is not installed.
        ValueError: an unknown name, a file without `env`, an unknown environment, or data that are not understood.
    """
    integer("load_task", "transitions", transitions, 1)
    if name in MIXES:
        return _simulated(name, transitions, say, count)
    if name in TOY_NAMES:
        return _toy(name, min(transitions, TOY_TRANSITIONS), say, count)
    if name.startswith(MINARI) and name != MINARI:
        return _minari(name, say)
    if Path(name).is_file():
        return _d4rl(Path(name), env, say)
    raise ValueError(
        f"load_task(name={name!r}): there are {', '.join(NAMES)}, minari:NAME and paths of HDF5 files, but neither a "
        f"data set nor a file of this name."
    )


def _simulated(name: str, transitions: int, say: Say, count: Count) -> Task:
    mix = MIXES[name]
    episodes = collect(name, mix, SEARCHES[mix.env_id], transitions=transitions, say=say, count=count)
    shares = [f"{share:.0%} {label}" for label in ("low", "medium", "expert") if (share := getattr(mix, label))]
    source = f"Simulated in {mix.env_id}: {', '.join(shares)} behaviour, by transitions."
    return _of_mix(name, mix.env_id, episodes, source)


def _toy(name: str, transitions: int, say: Say, count: Count) -> Task:
    optional_import("load_task", "gymnasium", "recipes")
    from samplewise.recipes.toy_tasks import TOYS

    toy = TOYS[name]
    behaviours = [(each.label, each.share, each.noise) for each in toy.behaviours]
    configuration = {"version": VERSION, "toy": name, "behaviours": behaviours, "transitions": transitions, "seed": 0}

    def build(folder: Path) -> None:
        advance = count(f"{name}: collecting", transitions)
        episodes, numbers = gather(name, toy.behaviours, transitions=transitions, seed=0, advance=advance)
        meta = {"configuration": configuration, "random_return": toy.random_return, "expert_return": toy.expert_return}
        save(folder, episodes, numbers, [each.label for each in toy.behaviours], meta)

    return _of_mix(name, name, Episodes.open(cached(name, configuration, build, say)), toy.source)


def _of_mix(name: str, env_id: str, episodes: Episodes, source: str) -> Task:
    meta = episodes.meta
    numbers = np.array(meta["behaviour"], dtype=np.int64)
    references = (meta["random_return"], meta["expert_return"])
    return Task(name, env_id, episodes, *references, source, tuple(meta["labels"]), numbers)


def _minari(name: str, say: Say) -> Task:
    minari = optional_import("load_task", "minari", "recipes")
    try:
        dataset = minari.load_dataset(name.removeprefix(MINARI), download=True)
    except Exception as error:  # its clients' errors have no common base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AssetError(f"{name} is not on this machine and could not be downloaded: {reason}") from error
    sizes = {"transitions": int(dataset.total_steps), "episodes": int(dataset.total_episodes)}
    place = Path(dataset.storage.data_path)
    changed = max(file.stat().st_mtime_ns for file in place.rglob("*"))
    configuration = {"version": VERSION, "data": name, "path": str(place), "time": changed, **sizes}
    label = name.replace(":", "-").replace("/", "--")
    keys = goal_keys(dataset.observation_space)
    folder = cached(
        label, configuration, lambda folder: read_minari(dataset, observation_keys=keys, folder=folder), say
    )
    episodes = Episodes.open(folder)
    given = [dataset.storage.metadata.get(key) for key in ("ref_min_score", "ref_max_score")]
    if None not in given:
        source = "From Minari, with its reference scores."
        return _checked(Task(name, name, episodes, float(given[0]), float(given[1]), source))
    return _measured(name, name, episodes, "From Minari")


def _d4rl(path: Path, env: str | None, say: Say) -> Task:
    if env is None:
        raise ValueError(f"load_task(name={str(path)!r}, env=None): a file needs the name of its environment in env.")
    about = path.stat()
    configuration = {"version": VERSION, "file": str(path.resolve()), "size": about.st_size, "time": about.st_mtime_ns}

    def build(folder: Path) -> None:
        try:
            read_d4rl(path, folder=folder)
        except OSError as error:
            raise AssetError(f"{path}: cannot be read as an HDF5 file: {error}") from error

    episodes = Episodes.open(cached(path.stem, configuration, build, say))
    return _measured(path.stem, env, episodes, f"The file {path}")


def _measured(name: str, env_id: str, episodes: Episodes, source: str) -> Task:
    """With the return of random actions for 0, and the best of the data for 100."""
    returns = rollouts(env_id, random_policy(env_id, 0), episodes=REFERENCE_EPISODES, seed=0)
    source = f"{source}; score 0 is random actions, 100 its best trajectory."
    return _checked(Task(name, env_id, episodes, float(returns.mean()), float(episodes.returns.max()), source))


def _checked(task: Task) -> Task:
    """Recorded data, if they can be those of their environment.

    Raises:
        ValueError: actions that are no bounded vectors, other shapes, or nothing better than random actions.
    """
    with environments(task.env_id, 1) as (env,):
        bounds_of(env)
        for what, space in (("observations", env.observation_space), ("actions", env.action_space)):
            there = getattr(task.episodes, what).shape[1:]
            if there != space.shape:
                raise ValueError(
                    f"{task.name}: {what} have the shape {there} in the data and {space.shape} in {task.env_id}: these "
                    f"are not data of that environment."
                )
    if task.expert_return <= task.random_return:
        raise ValueError(
            f"{task.name}: the return {task.expert_return:g} that would be score 100 is not above that of score 0, "
            f"{task.random_return:g}: there is nothing in the data that is better than random actions."
        )
    return task
