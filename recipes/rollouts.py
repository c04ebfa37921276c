"""Environments by name, and policies acting in them, several episodes a step at a time."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any, NamedTuple

import numpy as np

from samplewise.cuda_ext.checks import integer, optional_import
from samplewise.loaders.seeding import derive

Policy = Callable[[np.ndarray], np.ndarray]
NumberedPolicy = Callable[[np.ndarray, np.ndarray], np.ndarray]
MINARI = "minari:"
GOAL_KEYS = ("observation", "desired_goal")


class Played(NamedTuple):
    """An episode of T steps.

    Attributes:
        observations: float32 `(T + 1, ...)`, with the one after the last step.
        actions: float32 `(T, a)`, as they were carried out.
        rewards: float64 `(T,)`.
        terminal: whether it ended by itself; False where the environment's time was up.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminal: bool


def make_env(env_id: str) -> Any:
    """An environment: a toy task by its name, the one that `minari:NAME` was recorded in, or one of gymnasium.

    Raises:
        ImportError: gymnasium or minari is not installed.
        ValueError: gymnasium or minari does not know or cannot make it.
    """
    gymnasium = optional_import("make_env", "gymnasium", "recipes")
    minari = optional_import("make_env", "minari", "recipes") if env_id.startswith(MINARI) else None
    from samplewise.recipes.toy_tasks import ENVIRONMENTS

    if env_id in ENVIRONMENTS:
        return ENVIRONMENTS[env_id]()
    try:
        if minari is not None:
            return _with_goal(minari.load_dataset(env_id.removeprefix(MINARI)).recover_environment(eval_env=True))
        return gymnasium.make(env_id, disable_env_checker=True)
    except (gymnasium.error.Error, ImportError, OSError, ValueError) as error:  # ImportError: of its own packages
        raise ValueError(f"make_env(env_id={env_id!r}): {error}") from error


def goal_keys(space: Any) -> tuple[str, ...] | None:
    """What is taken of a dictionary of observations in a task with goals: what is observed, and the goal."""
    return GOAL_KEYS if set(GOAL_KEYS) <= set(getattr(space, "spaces", ())) else None


def _with_goal(env: Any) -> Any:
    """The environment, with `goal_keys` as one vector."""
    keys = goal_keys(env.observation_space)
    if keys is None:
        return env
    from gymnasium.spaces import Box
    from gymnasium.wrappers import TransformObservation

    width = sum(math.prod(env.observation_space[key].shape) for key in keys)
    space = Box(-np.inf, np.inf, (width,), np.float64)
    return TransformObservation(env, lambda seen: np.concatenate([np.ravel(seen[key]) for key in keys]), space)


@contextmanager
def environments(env_id: str, number: int) -> Iterator[list[Any]]:
    """Several environments of a kind, which are closed whatever happens."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(make_env(env_id))) for _ in range(number)]


def bounds_of(env: Any) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest action of an environment, each float32 `(a,)`.

    Raises:
        ValueError: its actions are no vectors between bounds.
    """
    low, high = (np.asarray(getattr(env.action_space, name, np.inf)) for name in ("low", "high"))
    if low.ndim != 1 or not (np.isfinite(low) & np.isfinite(high)).all():
        raise ValueError(f"{env}: actions must be vectors between finite bounds, but are {env.action_space}")
    return low.astype(np.float32), high.astype(np.float32)


def action_bounds(env_id: str) -> tuple[np.ndarray, np.ndarray]:
    """`bounds_of` of an environment by its name."""
    env = make_env(env_id)
    try:
        return bounds_of(env)
    finally:
        env.close()


def play(
    envs: Sequence[Any], policy: NumberedPolicy, seeds: Sequence[int], options: Mapping[str, Any] | None = None
) -> list[Played]:
    """One episode in each environment, all of them a step at a time.

    Args:
        envs: n of a kind.
        policy: gets the observations float32 `(m, ...)` of those still running and their numbers int64 `(m,)`, gives
            the actions `(m, a)`, which are clipped to their bounds.
        seeds: n, for the resets.
        options: for the resets.
    """
    low, high = bounds_of(envs[0])
    given: Any = dict(options) if options else None
    seen = [[np.array(env.reset(seed=seed, options=given)[0])] for env, seed in zip(envs, seeds, strict=True)]
    actions: list[list[np.ndarray]] = [[] for _ in envs]
    rewards: list[list[float]] = [[] for _ in envs]
    terminals = [False] * len(envs)
    running = list(range(len(envs)))
    while running:
        now = np.array([seen[number][-1] for number in running], dtype=np.float32)
        chosen = np.clip(np.asarray(policy(now, np.array(running)), dtype=np.float32), low, high)
        still = []
        for number, action in zip(running, chosen, strict=True):
            observation, reward, terminals[number], cut, _ = envs[number].step(action.copy())
            seen[number].append(np.array(observation))  # a copy, like the action: environments may reuse their arrays
            actions[number].append(action)
            rewards[number].append(float(reward))
            if not (terminals[number] or cut):
                still.append(number)
        running = still
    return [
        Played(np.array(seen[number], np.float32), np.array(actions[number]), np.array(rewards[number]), bool(ended))
        for number, ended in enumerate(terminals)
    ]


def start_seed(seed: int, *key: int | str) -> int:
    """The seed of a reset, 31 bits, which environments in any language take."""
    return derive(seed, *key) >> 32


def rollouts(env_id: str, policy: Policy, *, episodes: int, seed: int) -> np.ndarray:
    """Undiscounted returns of a policy, float64 `(episodes,)`.

    The starts depend on nothing but the seed and the episode's number: policies that are compared see the same ones.

    Args:
        env_id: see `make_env`.
        policy: gets observations float32 `(m, ...)`, once a step for all episodes still running, and gives actions
            `(m, a)`, which are clipped to their bounds.
        episodes: how many, >= 1.
        seed: of the starts.
    """
    integer("rollouts", "episodes", episodes, 1)
    seeds = [start_seed(seed, "rollout", number) for number in range(episodes)]
    with environments(env_id, episodes) as envs:
        played = play(envs, lambda observations, numbers: policy(observations), seeds)
    return np.array([episode.rewards.sum() for episode in played])


def random_policy(env_id: str, seed: int) -> Policy:
    """Actions drawn uniformly between their bounds."""
    low, high = action_bounds(env_id)
    rng = np.random.default_rng(derive(seed, "random policy"))
    return lambda observations: rng.uniform(low, high, size=(len(observations), len(low)))
