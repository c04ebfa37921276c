"""Really simulated data for offline RL: a search for policies, and mixes of what the good and the bad ones do.

Both are kept in the cache, in `offline_rl/<name>-<hash of the configuration>`; a folder there is always complete.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from samplewise.loaders.episodes import Episodes
from samplewise.loaders.seeding import generator
from samplewise.recipes.assets import AssetError, Say, cache_folder
from samplewise.recipes.random_search import LinearPolicy, Search, Snapshot, search
from samplewise.recipes.rollouts import (
    Played,
    Policy,
    bounds_of,
    environments,
    play,
    random_policy,
    rollouts,
    start_seed,
)

VERSION = 1
REFERENCE_EPISODES = 20
AT_ONCE = 16


class Count(Protocol):
    """Begins to show the progress of something; gives what is to be told how much more is done."""

    def __call__(self, name: str, total: int, /) -> Callable[[int], Any]:
        """`name` of the work, and its `total` amount."""


@dataclass(frozen=True)
class Mix:
    """What a data set is made of.

    Attributes:
        env_id: the environment, one of `SEARCHES`.
        low, medium, expert: shares of the transitions.
        noise: standard deviation of the noise on actions, in halves of their range.
    """

    env_id: str
    low: float
    medium: float
    expert: float
    noise: float = 0.1


SEARCHES = {
    "Hopper-v5": Search(96, directions=8, top=4, noise=0.02, step=0.01, shift=1.0, every=4),
    "Pendulum-v1": Search(120, directions=16, top=8, noise=0.1, step=0.05, products=True, episodes=20),
}
MIXES = {
    f"{name}-{kind}": Mix(env_id, *shares)
    for name, env_id in (("hopper", "Hopper-v5"), ("pendulum", "Pendulum-v1"))
    for kind, shares in (("mixed", (0.45, 0.45, 0.1)), ("low", (0.9, 0.0, 0.1)), ("medium", (0.0, 0.9, 0.1)))
}
TOWARDS_EXPERT = {"low": 0.1, "medium": 0.4}


@dataclass(frozen=True)
class Behaviour:
    """A policy that data are collected with.

    Attributes:
        label: what it is called.
        share: of the transitions.
        policy: observations float32 `(m, ...)` to actions `(m, a)`.
        noise: standard deviation of the normal noise on its actions, in halves of their range.
        options: of the environment's resets.
    """

    label: str
    share: float
    policy: Policy
    noise: float
    options: Mapping[str, Any] | None = None


def silent(name: str, total: int) -> Callable[[int], Any]:
    """A `Count` that shows nothing."""
    return lambda done: None


def cached(name: str, configuration: Mapping[str, Any], build: Callable[[Path], Any], say: Say) -> Path:
    """The folder in the cache that `build` filled from this configuration, now or earlier.

    It is built beside its place and renamed, so that nothing counts that was interrupted.

    Raises:
        AssetError: the cache cannot be written.
    """
    digest = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:8]
    target = cache_folder() / "offline_rl" / f"{name}-{digest}"
    if target.is_dir():
        say(f"{name}: cached in {target}")
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent)
    except OSError as error:
        hint = "set SAMPLEWISE_CACHE to a folder that can be written"
        raise AssetError(f"{name}: writing to {target.parent}: {error} ({hint})") from error
    with temporary as parent:
        folder = Path(parent) / "data"
        folder.mkdir()
        build(folder)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster, and its data are the same
                raise
    return target


def gather(
    env_id: str, behaviours: Sequence[Behaviour], *, transitions: int, seed: int, advance: Callable[[int], Any]
) -> tuple[list[Played], np.ndarray]:
    """Whole episodes of several behaviours in a random order, and the number of each one's behaviour, int64 `(n,)`.

    A behaviour plays until its share of the transitions is reached, and its last episode to the end.

    Args:
        env_id: see `samplewise.recipes.rollouts.make_env`.
        behaviours: who acts.
        transitions: in all.
        seed: of starts, noise and order; an episode depends on nothing but this, its behaviour and its number.
        advance: told how many more transitions there are.
    """
    episodes, numbers = [], []
    with environments(env_id, AT_ONCE) as envs:
        for behaviour in behaviours:
            found = 0
            for episode in _episodes_of(behaviour, envs, seed):
                if found >= behaviour.share * transitions:
                    break
                episodes.append(episode)
                numbers.append(behaviours.index(behaviour))
                found += len(episode.rewards)
                advance(len(episode.rewards))
    order = generator(seed, "order").permutation(len(episodes))
    return [episodes[number] for number in order], np.array(numbers, dtype=np.int64)[order]


def _episodes_of(behaviour: Behaviour, envs: Sequence[Any], seed: int) -> Iterator[Played]:
    """One after another, without end."""
    low, high = bounds_of(envs[0])
    deviation = behaviour.noise * (high - low) / 2
    begin = 0
    while True:
        keys = [(behaviour.label, number) for number in range(begin, begin + len(envs))]
        noise = [generator(seed, "noise", *key) for key in keys]

        def act(observations: np.ndarray, numbers: np.ndarray, noise: list[np.random.Generator] = noise) -> np.ndarray:
            draws = np.array([noise[number].standard_normal(len(deviation)) for number in numbers])
            actions: np.ndarray = behaviour.policy(observations) + deviation * draws
            return actions

        yield from play(envs, act, [start_seed(seed, *key) for key in keys], behaviour.options)
        begin += len(envs)


def save(
    folder: Path, episodes: Sequence[Played], numbers: np.ndarray, labels: Sequence[str], meta: Mapping[str, Any]
) -> None:
    """Write episodes as :class:`Episodes`, whose notes are `meta`, the behaviours' labels and each episode's number."""
    terminals = np.zeros(sum(len(episode.rewards) for episode in episodes), dtype=np.bool_)
    lengths = np.array([len(episode.rewards) for episode in episodes])
    terminals[np.cumsum(lengths) - 1] = [episode.terminal for episode in episodes]
    Episodes(
        observations=np.concatenate([episode.observations for episode in episodes]),
        actions=np.concatenate([episode.actions for episode in episodes]),
        rewards=np.concatenate([episode.rewards for episode in episodes]),
        terminals=terminals,
        lengths=lengths,
        meta={**meta, "labels": list(labels), "behaviour": numbers.tolist()},
    ).save(folder)


@dataclass(frozen=True)
class Found:
    """What a search gave: its snapshots, and the mean return of random actions and of the best snapshot."""

    snapshots: Sequence[Snapshot]
    random_return: float
    expert_return: float

    @property
    def expert(self) -> LinearPolicy:
        """The policy of the best snapshot."""
        return max(self.snapshots, key=lambda snapshot: snapshot.value).policy

    def towards(self, share: float) -> LinearPolicy:
        """The policy that is nearest to this share of the way from random to expert."""
        wanted = self.random_return + share * (self.expert_return - self.random_return)
        return min(self.snapshots, key=lambda snapshot: abs(snapshot.value - wanted)).policy


def find_policies(env_id: str, settings: Search, *, seed: int = 0, say: Say = print, count: Count = silent) -> Found:
    """Search for policies, or take those of an earlier search with the same settings."""
    configuration = {"version": VERSION, "env": env_id, "search": asdict(settings), "seed": seed}

    def build(folder: Path) -> None:
        say(f"{env_id}: searching for policies ({settings.iterations} iterations; kept for the next time)")
        snapshots = search(env_id, settings, seed, count(f"{env_id}: policy search", settings.iterations))
        names = ("weights", "mean", "deviation")
        arrays: Any = {name: np.array([getattr(s.policy, name) for s in snapshots]) for name in names}
        best = max(snapshots, key=lambda snapshot: snapshot.value).policy
        references: list[Policy] = [random_policy(env_id, seed), best]
        returns = [rollouts(env_id, policy, episodes=REFERENCE_EPISODES, seed=seed).mean() for policy in references]
        values = np.array([snapshot.value for snapshot in snapshots])
        np.savez(folder / "search.npz", values=values, bounds=(best.low, best.high), references=returns, **arrays)
        notes = {**configuration, "made_with": made_with()}
        (folder / "configuration.json").write_text(json.dumps(notes, indent=1) + "\n")

    folder = cached(f"search-{env_id.replace('/', '--')}", configuration, build, say)
    with np.load(folder / "search.npz") as file:
        weights, mean, deviation, values = (file[name] for name in ("weights", "mean", "deviation", "values"))
        (low, high), (random_return, expert_return) = file["bounds"], file["references"].tolist()
    snapshots = [
        Snapshot(LinearPolicy(w, m, d, low, high, settings.products), float(value))
        for w, m, d, value in zip(weights, mean, deviation, values, strict=True)
    ]
    return Found(snapshots, random_return, expert_return)


def collect(
    name: str,
    mix: Mix,
    settings: Search,
    *,
    transitions: int = 100_000,
    seed: int = 0,
    say: Say = print,
    count: Count = silent,
) -> Episodes:
    """A mix of low, medium and expert behaviour, collected now or taken from the cache; memory-mapped.

    Its `meta` has `configuration`, `random_return` and `expert_return` (means of 20 rollouts), the `labels` of the
    behaviours and, for each episode, the number of its label (`behaviour`).

    Args:
        name: of the cache's folder.
        mix: shares and environment.
        settings: of the search for the policies.
        transitions: about how many; whole episodes only.
        seed: of everything random.
        say: gets a line on each step.
        count: shows the progress of a step.

    Raises:
        AssetError: the cache cannot be written.
        ImportError: gymnasium is not installed.
    """
    configuration = {
        "version": VERSION,
        "mix": asdict(mix),
        "search": asdict(settings),
        "transitions": transitions,
        "seed": seed,
    }

    def build(folder: Path) -> None:
        found = find_policies(mix.env_id, settings, seed=seed, say=say, count=count)
        policies = {label: found.towards(share) for label, share in TOWARDS_EXPERT.items()} | {"expert": found.expert}
        behaviours = [
            Behaviour(label, share, policy, mix.noise)
            for label, policy in policies.items()
            if (share := getattr(mix, label)) > 0
        ]
        say(f"{name}: collecting {transitions:,} transitions in {mix.env_id}")
        given: dict[str, Any] = {"transitions": transitions, "seed": seed}
        episodes, numbers = gather(mix.env_id, behaviours, advance=count(f"{name}: collecting", transitions), **given)
        meta: dict[str, Any] = {"configuration": {**configuration, "made_with": made_with()}}
        meta |= {"random_return": found.random_return, "expert_return": found.expert_return}
        save(folder, episodes, numbers, [behaviour.label for behaviour in behaviours], meta)

    return Episodes.open(cached(name, configuration, build, say))


def made_with() -> dict[str, str]:
    """Versions of what simulates."""
    return {name: version(name) for name in ("gymnasium", "mujoco", "numpy")}
