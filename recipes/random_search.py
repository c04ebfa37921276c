"""Augmented random search for linear policies (Mania, Guy and Recht, NeurIPS 2018), in numpy.

Each iteration tries `directions` random changes D_k of the weights M, forwards and backwards, on standardised features:

    M <- M + step / (top * sd) * sum over the best `top` directions of (R(M + noise D_k) - R(M - noise D_k)) D_k

where R is the return of one episode and sd the standard deviation of the returns that are in the sum.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from samplewise.loaders.seeding import generator
from samplewise.recipes.rollouts import Played, bounds_of, environments, play, start_seed


@dataclass(frozen=True)
class Search:
    """Settings.

    Attributes:
        iterations: how many.
        directions: tried in an iteration, each forwards and backwards from the same start.
        top: directions that count.
        noise: size of the changes that are tried.
        step: size of the change that is made.
        shift: subtracted from each reward while searching: a bonus for being alive teaches to stand still.
        products: whether products of two observations are features too.
        every: iterations between two snapshots.
        episodes: that judge a snapshot.
    """

    iterations: int
    directions: int
    top: int
    noise: float
    step: float
    shift: float = 0.0
    products: bool = False
    every: int = 3
    episodes: int = 5


@dataclass(frozen=True)
class LinearPolicy:
    """Actions `centre + reach * clip(weights @ z, -1, 1)` of standardised features z.

    Attributes:
        weights: float64 `(a, D)`.
        mean, deviation: float64 `(D,)`, of the features.
        low, high: `(a,)`, bounds of the actions.
        products: whether products of two observations are features too.
    """

    weights: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    low: np.ndarray
    high: np.ndarray
    products: bool

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """Actions `(m, a)` for observations `(m, d)`."""
        return self.act(observations, self.weights)

    def act(self, observations: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The same with other weights, `(a, D)` or `(m, a, D)`."""
        standard = (features(observations, self.products) - self.mean) / self.deviation
        unit = np.clip((weights @ standard[:, :, None])[..., 0], -1, 1)
        actions: np.ndarray = (self.low + self.high) / 2 + (self.high - self.low) / 2 * unit
        return actions


@dataclass(frozen=True)
class Snapshot:
    """A policy on the way, and the mean return of a few episodes."""

    policy: LinearPolicy
    value: float


def features(observations: np.ndarray, products: bool) -> np.ndarray:
    """Float64 `(m, D)`: the observations `(m, d)`, and perhaps their products of two."""
    values = observations.astype(np.float64)
    if not products:
        return values
    rows, columns = np.triu_indices(values.shape[1])
    return np.concatenate([values, values[:, rows] * values[:, columns]], axis=1)


class Moments:
    """Running mean and deviation of rows: `(D,)` each; a feature that never varied has an infinite deviation."""

    def __init__(self, size: int):
        self.count, self.mean, self.squares = 0, np.zeros(size), np.zeros(size)

    def add(self, rows: np.ndarray) -> None:
        """Rows `(m, D)`, merged as by Chan, Golub and LeVeque."""
        apart, total = rows.mean(axis=0) - self.mean, self.count + len(rows)
        self.squares = self.squares + rows.var(axis=0) * len(rows) + apart**2 * (self.count * len(rows) / total)
        self.mean = self.mean + apart * (len(rows) / total)
        self.count = total

    @property
    def deviation(self) -> np.ndarray:
        """Sample deviation, 1 before there are rows."""
        if self.count < 2:
            return np.ones_like(self.mean)
        deviation = np.sqrt(self.squares / (self.count - 1))
        return np.where(deviation < 1e-7, np.inf, deviation)


def search(env_id: str, settings: Search, seed: int, advance: Callable[[int], Any]) -> list[Snapshot]:
    """Search, and keep a snapshot of the first policy, every few iterations, and of the last one.

    Args:
        env_id: see `samplewise.recipes.rollouts.make_env`.
        settings: of the search.
        seed: of everything random.
        advance: told 1 after each iteration.
    """
    snapshots = []
    with environments(env_id, max(2 * settings.directions, settings.episodes)) as envs:
        low, high = bounds_of(envs[0])
        size = features(np.zeros((1, *envs[0].observation_space.shape)), settings.products).shape[1]
        weights, moments = np.zeros((len(low), size)), Moments(size)
        for iteration in range(settings.iterations + 1):
            policy = LinearPolicy(weights, moments.mean, moments.deviation, low, high, settings.products)
            if iteration % settings.every == 0 or iteration == settings.iterations:
                snapshots.append(Snapshot(policy, _judge(envs[: settings.episodes], policy, seed)))
            if iteration == settings.iterations:
                break
            trying = envs[: 2 * settings.directions]
            weights = weights + _improvement(trying, policy, moments, settings, (seed, iteration))
            advance(1)
    return snapshots


def _improvement(
    envs: Sequence[Any], policy: LinearPolicy, moments: Moments, settings: Search, key: tuple[int, int]
) -> np.ndarray:
    """The change of the weights in one iteration, `(a, D)`; the moments take in what was seen."""
    changes = generator(*key, "directions").standard_normal((settings.directions, *policy.weights.shape))
    tried = policy.weights + settings.noise * np.concatenate([changes, -changes])
    starts = [start_seed(*key, "start", number) for number in range(settings.directions)]
    played = play(envs, lambda observations, numbers: policy.act(observations, tried[numbers]), starts * 2)
    moments.add(features(np.concatenate([episode.observations[:-1] for episode in played]), settings.products))
    forwards, backwards = np.reshape([_shifted(episode, settings.shift) for episode in played], (2, -1))
    best = np.argsort(-np.maximum(forwards, backwards), kind="stable")[: settings.top]
    deviation = np.concatenate([forwards[best], backwards[best]]).std() + 1e-8
    total = np.tensordot(forwards[best] - backwards[best], changes[best], axes=1)
    change: np.ndarray = total * (settings.step / (settings.top * deviation))
    return change


def _shifted(episode: Played, shift: float) -> float:
    return float((episode.rewards - shift).sum())


def _judge(envs: Sequence[Any], policy: LinearPolicy, seed: int) -> float:
    starts = [start_seed(seed, "judge", number) for number in range(len(envs))]
    played = play(envs, lambda observations, numbers: policy(observations), starts)
    return float(np.mean([episode.rewards.sum() for episode in played]))
