"""Environments by name, and episodes that are played several at a time."""

import random
import sys
import warnings
from typing import ClassVar

import gymnasium
import minari
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete

from samplewise.recipes.rollouts import action_bounds, bounds_of, make_env, play, random_policy, rollouts, start_seed
from samplewise.recipes.toy_tasks import ENVIRONMENTS

LOW, HIGH = np.array([-1.0, 0.0], np.float32), np.array([1.0, 4.0], np.float32)
SEEDS = [start_seed(3, number) for number in range(12)]


class Countdown(gymnasium.Env):
    """The seed decides how many steps there are and how they end; observations are the seed's mark, and the step."""

    made: ClassVar = []

    def __init__(self):
        self.observation_space, self.action_space = Box(-np.inf, np.inf, (2,)), Box(LOW, HIGH)
        self.closed, self.received, self.options = False, [], None
        self.made.append(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.options, self.received, self.steps = options, [], 0
        self.mark, self.length, self.ends = self.np_random.random(), *self.np_random.integers([1, 0], [6, 2])
        return np.array([self.mark, 0.0]), {}

    def step(self, action):
        self.received.append(np.array(action))
        self.steps += 1
        over = self.steps >= self.length
        reward = np.float32(self.mark + action[0])
        return np.array([self.mark, self.steps]), reward, over and bool(self.ends), over and not self.ends, {}

    def close(self):
        self.closed = True


@pytest.fixture
def countdown(monkeypatch):
    """An environment by the name of `countdown`; gives the list of those that were made."""
    monkeypatch.setattr(Countdown, "made", [])
    monkeypatch.setitem(ENVIRONMENTS, "countdown", Countdown)
    return Countdown.made


@pytest.fixture
def calls():
    """A policy that wants more than is allowed, and what it was asked: see `policy_of`."""
    return []


def policy_of(calls):
    def policy(observations, numbers):
        calls.append((observations, numbers))
        return np.stack([0.1 * observations[:, 1] + 0.3, -5.0 + 10 * (numbers % 2)], axis=1)

    return policy


def test_played_episodes_are_what_happened(calls):
    envs = [Countdown() for _ in SEEDS]
    played = play(envs, policy_of(calls), SEEDS)
    assert {env.ends for env in envs} == {0, 1}
    assert {env.length for env in envs} == {1, 2, 3, 4, 5}
    for number, (env, episode) in enumerate(zip(envs, played, strict=True)):
        steps = np.arange(env.length + 1)
        expected = np.stack([np.full(env.length + 1, env.mark), steps], axis=1).astype(np.float32)
        assert np.array_equal(episode.observations, expected)
        first = (0.1 * steps[:-1] + 0.3).astype(np.float32)
        assert episode.actions == pytest.approx(np.stack([first, np.full(env.length, 4.0 * (number % 2))], axis=1))
        assert np.array_equal(episode.actions, env.received)
        assert episode.rewards == pytest.approx(env.mark + first)
        assert (episode.terminal is True) == bool(env.ends)
        assert (episode.observations.dtype, episode.actions.dtype) == (np.float32, np.float32)
        assert (episode.rewards.dtype, type(episode.terminal)) == (np.float64, bool)


def test_only_those_still_running_are_asked(calls):
    envs = [Countdown() for _ in SEEDS]
    play(envs, policy_of(calls), SEEDS)
    lengths = np.array([env.length for env in envs])
    assert len(calls) == lengths.max()
    for step, (observations, numbers) in enumerate(calls):
        assert (observations.dtype, numbers.dtype) == (np.float32, np.int64)
        assert numbers.tolist() == np.flatnonzero(lengths > step).tolist()
        assert observations[:, 0] == pytest.approx([envs[number].mark for number in numbers])
        assert set(observations[:, 1]) == {step}


class Both(Countdown):
    def step(self, action):
        observation, reward, *_ = super().step(action)
        return observation, reward, True, True, {}


def test_an_end_when_the_time_is_up_is_an_end():
    (episode,) = play([Both()], lambda observations, numbers: np.zeros((1, 2)), [0])
    assert episode.terminal
    assert len(episode.rewards) == 1


class OneBuffer(Countdown):
    """Writes its state anew into the array that it gave before, and scales its action in place."""

    def reset(self, *, seed=None, options=None):
        self.state = super().reset(seed=seed, options=options)[0]
        return self.state, {}

    def step(self, action):
        self.state[:], *rest = super().step(action)
        action *= 0.5
        return self.state, *rest


def test_environments_may_reuse_their_arrays(calls):
    expected = play([Countdown() for _ in SEEDS], policy_of([]), SEEDS)
    for ours, theirs in zip(play([OneBuffer() for _ in SEEDS], policy_of(calls), SEEDS), expected, strict=True):
        assert np.array_equal(ours.observations, theirs.observations)
        assert np.array_equal(ours.actions, theirs.actions)


def test_options_go_to_the_resets():
    envs = [Countdown(), Countdown()]
    play(envs, policy_of([]), SEEDS[:2], {"start": "B"})
    assert [env.options for env in envs] == [{"start": "B"}] * 2
    play(envs, policy_of([]), SEEDS[:2])
    assert [env.options for env in envs] == [None] * 2


def test_a_seed_for_each_environment():
    with pytest.raises(ValueError, match="shorter"):
        play([Countdown(), Countdown()], policy_of([]), SEEDS[:1])


def starts_of(seed, episodes, env_id="Pendulum-v1"):
    """The first observations of rollouts, and their returns."""
    seen = []

    def policy(observations):
        seen.append(observations)
        return np.clip(observations[:, 1:2], -2, 2)

    return rollouts(env_id, policy, episodes=episodes, seed=seed), seen[0]


def test_rollouts_depend_on_the_seed_and_their_number_only():
    returns, starts = starts_of(seed=5, episodes=6)
    assert np.array_equal(starts_of(seed=5, episodes=6)[0], returns)
    fewer, some = starts_of(seed=5, episodes=2)
    assert np.array_equal(fewer, returns[:2])
    assert np.array_equal(some, starts[:2])
    assert len({*returns, *starts_of(seed=6, episodes=6)[0]}) == 12
    assert (returns.dtype, returns.shape) == (np.float64, (6,))


def test_policies_see_the_same_starts(countdown):
    seen = [[], []]
    for calls, action in zip(seen, (-1.0, 1.0), strict=True):

        def policy(observations, calls=calls, action=action):
            calls.append(observations)
            return np.full((len(observations), 2), action)

        rollouts("countdown", policy, episodes=8, seed=0)
    assert np.array_equal(seen[0][0], seen[1][0])
    assert len({*seen[0][0][:, 0]}) == 8


def test_returns_are_not_discounted(countdown):
    returns = rollouts("countdown", lambda observations: np.full((len(observations), 2), 0.5), episodes=9, seed=1)
    assert returns == pytest.approx([env.length * (env.mark + 0.5) for env in countdown])


def test_environments_are_closed_whatever_happens(countdown, monkeypatch):
    def broken(observations):
        raise RuntimeError("no idea")

    with pytest.raises(RuntimeError, match="no idea"):
        rollouts("countdown", broken, episodes=3, seed=0)
    assert [env.closed for env in countdown] == [True] * 3
    rollouts("countdown", lambda observations: np.zeros((len(observations), 2)), episodes=2, seed=0)
    action_bounds("countdown")
    assert [env.closed for env in countdown] == [True] * 6
    monkeypatch.setattr(Countdown, "action_space", Discrete(3), raising=False)
    monkeypatch.setattr(Countdown, "__init__", lambda self: self.made.append(self))
    with pytest.raises(ValueError, match="finite bounds"):
        action_bounds("countdown")
    assert countdown[-1].closed


def test_at_least_one_episode():
    with pytest.raises(ValueError, match=r"rollouts\(episodes=0\): episodes must be >= 1"):
        rollouts("stitch", lambda observations: observations, episodes=0, seed=0)


# --- random actions ---------------------------------------------------------------------------------------------------


def test_random_actions_are_reproducible(countdown):
    policies = [random_policy("countdown", seed) for seed in (0, 0, 1)]
    one, same, other = (np.stack([policy(np.zeros((5, 2))) for _ in range(3)]) for policy in policies)
    assert np.array_equal(one, same)
    assert one.shape == (3, 5, 2)
    assert not np.isclose(one, other).any()
    assert len(np.unique(one)) == one.size


def test_random_actions_are_uniform(countdown):
    count = 40_000
    shares = (random_policy("countdown", 7)(np.zeros((count, 2))) - LOW) / (HIGH - LOW)
    assert 0 <= shares.min() < 20 / count
    assert 1 - 20 / count < shares.max() <= 1
    for tenth in np.arange(1, 10) / 10:
        deviation = np.sqrt(tenth * (1 - tenth) / count)
        assert (shares < tenth).mean(axis=0) == pytest.approx([tenth, tenth], abs=4 * deviation)
    assert abs(np.corrcoef(shares.T)[0, 1]) < 4 / np.sqrt(count)


def test_the_global_generators_are_left_alone():
    def states():
        return random.getstate(), [*map(str, np.random.get_state())], torch.get_rng_state().tolist()  # noqa: NPY002

    before = states()
    rollouts("Pendulum-v1", random_policy("Pendulum-v1", 0), episodes=2, seed=0)
    rollouts("lottery", random_policy("lottery", 0), episodes=2, seed=0)
    assert states() == before


# --- environments by name ---------------------------------------------------------------------------------------------


def test_environments_by_name(countdown):
    assert isinstance(make_env("countdown"), Countdown)
    assert isinstance(make_env("stitch"), ENVIRONMENTS["stitch"])
    env = make_env("Pendulum-v1")
    assert env.spec.id == "Pendulum-v1"
    env.close()


@pytest.mark.parametrize(
    ("env_id", "reason"),
    [
        ("Nothing-v0", "`Nothing` doesn't exist"),
        ("Pendulum-v99", "version `v99` for environment `Pendulum` doesn't exist"),
        ("", "Malformed environment ID"),
        ("stich", "doesn't exist"),
        ("ALE/Pong-v5", "Namespace ALE not found"),
        ("Hopper-v2", "have been moved to the gymnasium-robotics project"),
        ("no_such_module:Env-v0", "No module named 'no_such_module'"),
        ("minari:test/nothing-v0", "not found locally"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*out of date")
def test_environments_that_cannot_be_made_are_named(env_id, reason, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"^make_env\(env_id='") as error:
        make_env(env_id)
    assert f"make_env(env_id={env_id!r}): " in str(error.value)
    assert reason in str(error.value)


def recorded(**about):
    """A data set of Minari's with one step."""
    ends = {"terminations": [True], "truncations": [False]}
    episode = {"observations": np.zeros((2, 2), np.float32), "actions": np.zeros((1, 2), np.float32), "rewards": [1.0]}
    buffers = [minari.data_collector.EpisodeBuffer(**episode, **ends)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # authors and links that are not named
        minari.create_dataset_from_buffers("test/lost-v0", buffers, **about)


def test_the_environment_of_recorded_data_may_be_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    recorded(observation_space=Box(-1, 1, (2,)), action_space=Box(-1, 1, (2,)))
    with pytest.raises(ValueError, match=r"make_env\(env_id='minari:test/lost-v0'\): .* env_spec is None"):
        make_env("minari:test/lost-v0")


def test_the_environment_of_recorded_data_may_not_be_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "gone.py").write_text("from samplewise.recipes.toy_tasks import Stitch\n")
    spec = gymnasium.envs.registration.EnvSpec("Gone-v0", entry_point="gone:Stitch", max_episode_steps=7)
    recorded(env=spec)
    env = make_env("minari:test/lost-v0")
    assert env.spec.max_episode_steps == 7
    (tmp_path / "gone.py").unlink()
    monkeypatch.delitem(sys.modules, "gone")
    with pytest.raises(ValueError, match=r"make_env\(env_id='minari:test/lost-v0'\): No module named 'gone'"):
        make_env("minari:test/lost-v0")


def test_bounds_of_actions():
    for env_id, reach in (("Pendulum-v1", 2.0), ("stitch", 1.0)):
        low, high = action_bounds(env_id)
        size = 2 if env_id == "stitch" else 1
        assert (low.tolist(), high.tolist()) == ([-reach] * size, [reach] * size)
        assert (low.dtype, high.dtype) == (np.float32, np.float32)


@pytest.mark.parametrize(
    "space",
    [
        Discrete(3),
        MultiDiscrete([3, 3]),
        Box(-np.inf, np.inf, (2,)),
        Box(np.array([0, -np.inf], np.float32), np.array([1, 1], np.float32)),
        Box(-1, 1, (2, 2)),
        Box(-1, 1, ()),
    ],
    ids=str,
)
def test_other_actions_are_refused(space):
    env = Countdown()
    env.action_space = space
    with pytest.raises(ValueError, match="actions must be vectors between finite bounds, but are ") as error:
        bounds_of(env)
    assert str(space) in str(error.value)
    assert "Countdown" in str(error.value)
