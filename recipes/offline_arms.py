"""What the offline RL recipe compares: who draws the transitions, and with which weights on their trajectories."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from samplewise.loaders import PlannedSampler
from samplewise.loaders.episodes import Episodes
from samplewise.plugins import RS2, TrajectorySampler
from samplewise.plugins.trajectory_weights import summary

if TYPE_CHECKING:
    from samplewise.recipes.offline_rl import OfflineRlOptions


@dataclass(frozen=True)
class Arm:
    """One way to draw.

    Attributes:
        name: for files.
        label: for people.
        mode: of the trajectories' weights, None: RS2 over transitions.
        replay: whether transitions are prioritised by their temporal-difference error.
    """

    name: str
    label: str
    mode: str | None
    replay: bool = False

    @property
    def colour(self) -> int:
        """Its number in the plots."""
        return list(ARMS).index(self.name)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("uniform", "Uniform", "uniform"),
        Arm("rw", "Return-weighted (RW)", "rw"),
        Arm("aw", "Advantage-weighted (AW)", "aw"),
        Arm("top", "Best trajectories", "top"),
        Arm("rs2", "RS2", None),
        Arm("replay", "Prioritised replay", "uniform", replay=True),
        Arm("replay_aw", "AW with prioritised replay", "aw", replay=True),
    )
}


def make_sampler(arm: Arm, episodes: Episodes, draws: int, seed: int, options: "OfflineRlOptions") -> PlannedSampler:
    """The arm's sampler, `draws` transitions an epoch."""
    if arm.mode is None:
        return RS2(len(episodes), ratio=options.rs2_ratio, seed=seed, epoch_length=draws)
    return trajectory_sampler(arm, episodes, draws, seed, options)


def trajectory_sampler(
    arm: Arm, episodes: Episodes, draws: int, seed: int, options: "OfflineRlOptions"
) -> TrajectorySampler:
    """Of the arms that weigh trajectories."""
    given: dict[str, Any] = {"mode": arm.mode, "priority": "score" if arm.replay else None}
    given |= {name: getattr(options, name) for name in ("alpha", "top", "clip_quantile", "mix")}
    given |= {"returns": episodes.returns, "lengths": episodes.lengths, "first_obs": episodes.first_observations}
    return TrajectorySampler(num_samples=draws, seed=seed, **given)


def distribution(arm: Arm, episodes: Episodes, options: "OfflineRlOptions") -> tuple[np.ndarray, Mapping[str, float]]:
    """How the arm weighs trajectories, float64 `(n,)` that sums to 1, and the figures of it, see `summary`."""
    if arm.mode is None:
        weights = np.ones(episodes.num_episodes)
        return weights / weights.sum(), summary(weights, episodes.returns)
    sampler = trajectory_sampler(arm, episodes, 1, 0, options)
    return sampler.trajectory_weights / sampler.trajectory_weights.sum(), sampler.statistics
