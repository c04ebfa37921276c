"""Two small tasks where reweighting trajectories by their return goes wrong, and what was done in them.

`lottery`: returns are luck. 20 steps of an action in [-1, 1]: above 0 it is bold and wins 20 with probability 0.025
(0.5 on average), else it is careful and earns 0.8. A third of the episodes are bold: so are nearly all of the best
tenth. Careful play brings 16, bold play 10 on average; what is to be learned from the best episodes is to gamble.

`stitch`: no episode shows it all. A corridor leads from A = (0, 0) up to B = (0, 1) and right to C = (1, 1); each of up
to 50 steps costs 1 until C is reached. Some episodes begin at A, go up to B and stay about there; the others begin at B
and go to C, with far better returns. The task begins at A: its way is in the data, the first half of it in episodes
that draws by return leave out. (Draws by advantage compare them with what their start promises, and keep some.)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from samplewise.recipes.collect import Behaviour

A, B, C = np.array([0.0, 0.0]), np.array([0.0, 1.0]), np.array([1.0, 1.0])
Step = tuple[np.ndarray, float, bool, bool, dict[str, Any]]


class Lottery(gymnasium.Env[np.ndarray, np.ndarray]):
    """Bold or careful, 20 times.

    The observation is a random vector `(3,)` drawn anew at each step, which means nothing, and the share of the steps
    that are over.
    """

    STEPS, PRIZE, CHANCE, WAGE = 20, 20.0, 0.025, 0.8

    def __init__(self) -> None:
        self.observation_space = Box(-np.inf, np.inf, (4,), np.float32)
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        self.steps = 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> Step:
        """Gamble or work."""
        self.steps += 1
        won = self.np_random.random() < self.CHANCE
        reward = self.PRIZE * won if action[0] > 0 else self.WAGE
        return self._observation(), reward, False, self.steps >= self.STEPS, {}

    def _observation(self) -> np.ndarray:
        context = self.np_random.standard_normal(3)
        return np.append(context, self.steps / self.STEPS).astype(np.float32)


class Stitch(gymnasium.Env[np.ndarray, np.ndarray]):
    """A point in an L-shaped corridor, `WIDTH` to each side of the lines A-B and B-C; a step into a wall leads nowhere.

    The observation is its place `(2,)`, the action its velocity. `options={"start": "B"}` begins at B instead of A.
    """

    STEPS, SPEED, WIDTH, RADIUS, JITTER = 50, 0.1, 0.2, 0.15, 0.05

    def __init__(self) -> None:
        self.observation_space = Box(-self.WIDTH, 1 + self.WIDTH, (2,), np.float32)
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        self.steps = 0
        start = B if options and options["start"] == "B" else A
        self.place = start + self.np_random.uniform(-self.JITTER, self.JITTER, size=2)
        return self.place.astype(np.float32), {}

    def step(self, action: np.ndarray) -> Step:
        """Move, where there is no wall."""
        self.steps += 1
        wanted = self.place + self.SPEED * np.asarray(action, dtype=np.float64)
        if self.inside(wanted):
            self.place = wanted
        arrived = bool(np.linalg.norm(self.place - C) <= self.RADIUS)
        return self.place.astype(np.float32), -1.0, arrived, self.steps >= self.STEPS and not arrived, {}

    def inside(self, place: np.ndarray) -> bool:
        """Whether `place` is in the corridor."""
        x, y = place
        low, high = -self.WIDTH, 1 + self.WIDTH
        return bool(low <= x <= high and low <= y <= high and (x <= self.WIDTH or y >= 1 - self.WIDTH))


def gamble(observations: np.ndarray) -> np.ndarray:
    """Bold."""
    return np.full((len(observations), 1), 0.5)


def work(observations: np.ndarray) -> np.ndarray:
    """Careful."""
    return np.full((len(observations), 1), -0.5)


def climb(observations: np.ndarray) -> np.ndarray:
    """To B, and back there."""
    velocity: np.ndarray = np.clip(2 * (B - observations), -1, 1)
    return velocity


def cross(observations: np.ndarray) -> np.ndarray:
    """From B to C."""
    return np.tile([1.0, 0.0], (len(observations), 1))


def climb_and_cross(observations: np.ndarray) -> np.ndarray:
    """From A to B to C: what is to be learned."""
    return np.where(observations[:, 1:] < 0.95, [0.0, 1.0], [1.0, 0.0])


@dataclass(frozen=True)
class Toy:
    """A toy task's data.

    Attributes:
        behaviours: that they are collected with.
        random_return, expert_return: what random actions and the best policy get.
        source: in a sentence.
    """

    behaviours: tuple[Behaviour, ...]
    random_return: float
    expert_return: float
    source: str


ENVIRONMENTS: Mapping[str, Callable[[], gymnasium.Env[np.ndarray, np.ndarray]]] = {
    "lottery": Lottery,
    "stitch": Stitch,
}
TOYS = {
    "lottery": Toy(
        (Behaviour("bold", 1 / 3, gamble, 0.2), Behaviour("careful", 2 / 3, work, 0.2)),
        random_return=13.0,  # 20 * (0.5 + 0.8) / 2
        expert_return=16.0,  # 20 * 0.8
        source="A third of the episodes gamble, the others work; the best returns are luck.",
    ),
    "stitch": Toy(
        (
            Behaviour("A to B", 1 / 2, climb, 0.7),
            Behaviour("B to C", 1 / 2, cross, 0.1, {"start": "B"}),
        ),
        random_return=-50.0,
        expert_return=-19.0,
        source="Episodes lead from A to B or from B to C; the task is to go from A to C.",
    ),
}
