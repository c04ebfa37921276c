"""Augmented random search: its parts by hand, and that it finds something."""

import random

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from samplewise.loaders.seeding import generator
from samplewise.recipes import random_search
from samplewise.recipes.random_search import LinearPolicy, Moments, Search, features, search
from samplewise.recipes.rollouts import bounds_of, play, start_seed
from samplewise.recipes.toy_tasks import ENVIRONMENTS

LOW, HIGH = np.array([-1.0, 0.0], np.float32), np.array([3.0, 10.0], np.float32)
SMALL = Search(7, directions=5, top=3, noise=0.3, step=0.2, every=3, episodes=4)


class Regulator(gymnasium.Env):
    """A place that is to be brought to 0 within 10 steps; it ends sooner, far away. Its second feature says nothing."""

    def __init__(self):
        self.observation_space, self.action_space = Box(-np.inf, np.inf, (2,)), Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.place = 0, self.np_random.uniform(-1, 1)
        return self.seen(), {}

    def step(self, action):
        self.steps += 1
        self.place += 0.4 * float(action[0])
        return self.seen(), 1 - self.place**2, abs(self.place) > 1.5, self.steps >= 10, {}

    def seen(self):
        return np.array([self.place, 5.0], np.float32)


@pytest.fixture(autouse=True)
def regulator(monkeypatch):
    """An environment by the name of `regulator`."""
    monkeypatch.setitem(ENVIRONMENTS, "regulator", Regulator)


def found(settings=SMALL, seed=0, advance=lambda done: None):
    return search("regulator", settings, seed, advance)


# --- moments and features ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_are_those_of_all_rows(offset):
    rng = np.random.default_rng(0)
    parts = [offset + rng.normal(size=(count, 4)) * [1, 10, 1e-3, 1] for count in (1, 5, 2, 300, 1)]
    moments = Moments(4)
    for number, part in enumerate(parts):
        moments.add(part)
        rows = np.concatenate(parts[: number + 1])
        assert moments.count == len(rows)
        assert moments.mean == pytest.approx(rows.mean(axis=0), rel=1e-12)
        if number:
            assert moments.deviation == pytest.approx(rows.std(axis=0, ddof=1), rel=1e-6)


def test_moments_before_there_is_a_deviation():
    moments = Moments(2)
    assert (moments.mean.tolist(), moments.deviation.tolist()) == ([0, 0], [1, 1])
    moments.add(np.array([[3.0, 4.0]]))
    assert (moments.mean.tolist(), moments.deviation.tolist()) == ([3, 4], [1, 1])
    moments.add(np.array([[3.0, 6.0]]))
    assert moments.deviation.tolist() == [np.inf, pytest.approx(np.sqrt(2))]


def test_features():
    given = np.array([[2.0, 3.0, 5.0], [1.0, 0.0, -1.0]], np.float32)
    assert features(given, products=False).tolist() == given.tolist()
    assert features(given, products=True).tolist() == [
        [2, 3, 5, 4, 6, 10, 9, 15, 25],
        [1, 0, -1, 1, 0, -1, 0, 0, 1],
    ]
    third = np.full((1, 1), 1 / 3, np.float32)
    assert features(third, products=True).tolist() == [[float(third[0, 0]), float(third[0, 0]) ** 2]]


@pytest.mark.parametrize("size", [1, 4, 11])
def test_count_of_the_features(size):
    assert features(np.zeros((3, size)), products=True).shape == (3, size + size * (size + 1) // 2)


# --- the policy -------------------------------------------------------------------------------------------------------


def policy(weights, mean=(1.0, 1.0), deviation=(2.0, 4.0), products=False):
    return LinearPolicy(np.array(weights), np.array(mean), np.array(deviation), LOW, HIGH, products)


@pytest.mark.parametrize(
    ("observation", "action"),
    [
        ([1.0, 1.0], [1.0, 5.0]),  # z = (0, 0), the middle
        ([2.0, 1.0], [2.0, 5.0]),  # z = (0.5, 0): unit (0.5, 0)
        ([2.0, 2.0], [1.0, 6.25]),  # z = (0.5, 0.25): unit (0, 0.25)
        ([101.0, 1.0], [3.0, 5.0]),  # z = (50, 0): clipped
        ([-99.0, -99.0], [1.0, 0.0]),  # z = (-50, -25): unit (0, -1)
    ],
)
def test_actions_by_hand(observation, action):
    chosen = policy([[1.0, -2.0], [0.0, 1.0]])(np.array([observation], np.float32))
    assert chosen.tolist() == [pytest.approx(action)]


def test_actions_with_products_and_with_features_that_never_varied():
    nothing = np.zeros((2, 5))
    nothing[0, 3] = 0.25  # the product of both
    chosen = policy(nothing, np.zeros(5), np.ones(5), products=True)(np.array([[1.0, -2.0], [0.5, 0.5]], np.float32))
    assert chosen.tolist() == [[pytest.approx(0.0), 5.0], [pytest.approx(1.125), 5.0]]
    chosen = policy([[1.0, 1.0], [1.0, 1.0]], deviation=(np.inf, 4.0))(np.array([[1e6, 1.0]], np.float32))
    assert chosen.tolist() == [[1.0, 5.0]]


def test_each_row_may_have_weights_of_its_own():
    rng = np.random.default_rng(0)
    observations, weights = rng.normal(size=(6, 2)).astype(np.float32), rng.normal(size=(6, 2, 2))
    expected = [policy(weights[row])(observations[row : row + 1])[0].tolist() for row in range(6)]
    assert policy(np.zeros((2, 2))).act(observations, weights) == pytest.approx(np.array(expected))


# --- the search -------------------------------------------------------------------------------------------------------


def return_of(linear, weights, seed, shift):
    """An episode of one policy, played with gymnasium's own interface: its return, and what was seen before steps."""
    env = Regulator()
    observation, total, over, seen = env.reset(seed=seed)[0], 0.0, False, []
    while not over:
        seen.append(observation)
        z = (observation.astype(np.float64) - linear.mean) / linear.deviation
        action = np.clip(np.sum(weights * z, axis=1), -1, 1)
        observation, reward, ended, cut, _ = env.step(action.astype(np.float32))
        total, over = total + reward - shift, ended or cut
    return total, seen


@pytest.mark.parametrize("shift", [0.0, 2.0])
@pytest.mark.parametrize("top", [1, 3, 5])
def test_a_step_is_that_of_the_paper(shift, top):
    settings = Search(1, directions=5, top=top, noise=1.5, step=0.2, shift=shift)
    moments = Moments(2)
    moments.add(np.random.default_rng(0).normal(size=(20, 2)))
    rows = moments.count
    weights = np.array([[0.3, -0.2]])
    linear = LinearPolicy(weights, moments.mean, moments.deviation, *bounds_of(Regulator()), False)
    change = random_search._improvement([Regulator() for _ in range(10)], linear, moments, settings, (7, 4))

    drawn = generator(7, 4, "directions").standard_normal((5, 1, 2))
    pairs, seen = [], []
    for number, direction in enumerate(drawn):
        for sign in (1, -1):
            total, rows_seen = return_of(
                linear, weights + sign * 1.5 * direction, start_seed(7, 4, "start", number), shift
            )
            pairs.append(total)
            seen += rows_seen
    pairs = np.reshape(pairs, (5, 2))
    best = sorted(range(5), key=lambda number: -max(pairs[number]))[:top]
    deviation = np.std([pairs[number] for number in best])
    expected = sum((pairs[k][0] - pairs[k][1]) * drawn[k] for k in best) * 0.2 / (top * deviation)
    assert change == pytest.approx(expected, rel=1e-5)
    assert len({len(seen), 50, 100}) == 3  # some ended sooner, so that the shift matters
    assert moments.count == rows + len(seen)
    earlier = np.random.default_rng(0).normal(size=(20, 2))
    assert moments.mean == pytest.approx(np.concatenate([earlier, seen]).mean(axis=0))


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("weights", "mean", "deviation"))


def test_a_search_depends_on_its_seed_only():
    told = []
    first, again, other = found(advance=told.append), found(), found(seed=1)
    assert told == [1] * 7
    assert [snapshot.value for snapshot in first] == [snapshot.value for snapshot in again]
    assert all(same(one.policy, two.policy) for one, two in zip(first, again, strict=True))
    assert not same(first[1].policy, other[1].policy)
    assert first[0].value != other[0].value  # other starts


@pytest.mark.parametrize(("iterations", "expected"), [(7, [0, 3, 6, 7]), (6, [0, 3, 6]), (2, [0, 2]), (0, [0])])
def test_snapshots_are_the_policies_on_the_way(iterations, expected):
    snapshots = found(Search(**{**vars(SMALL), "iterations": iterations}))
    assert len(snapshots) == len(expected)
    for snapshot, count in zip(snapshots, expected, strict=True):
        shorter = found(Search(**{**vars(SMALL), "iterations": count, "every": 100}))
        assert same(snapshot.policy, shorter[-1].policy)
        assert snapshot.value == shorter[-1].value
    assert not snapshots[0].policy.weights.any()
    assert len({snapshot.policy.weights.tobytes() for snapshot in snapshots}) == len(expected)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_snapshot_is_judged_by_its_true_return(shift):
    for snapshot in found(Search(**{**vars(SMALL), "shift": shift, "episodes": 12})):
        envs, starts = [Regulator() for _ in range(12)], [start_seed(0, "judge", number) for number in range(12)]
        played = play(envs, lambda observations, numbers, act=snapshot.policy: act(observations), starts)
        assert snapshot.value == pytest.approx(np.mean([episode.rewards.sum() for episode in played]))


@pytest.mark.parametrize("products", [False, True])
def test_a_search_finds_something(products):
    settings = Search(60, directions=8, top=4, noise=0.2, step=0.1, products=products, every=15, episodes=20)
    snapshots = found(settings)
    envs, starts = [Regulator() for _ in range(20)], [start_seed(0, "judge", number) for number in range(20)]
    best = play(envs, lambda observations, numbers: -2.5 * observations[:, :1], starts)
    optimum = np.mean([episode.rewards.sum() for episode in best])
    lost = [optimum - snapshot.value for snapshot in snapshots]
    assert lost[0] > 2  # standing still
    assert lost[-1] < 0.1 * lost[0]


def test_environments_are_closed_whatever_happens(monkeypatch):
    closed = []
    monkeypatch.setattr(Regulator, "close", lambda env: closed.append(env))

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        found(advance=stop)
    assert len(closed) == 10
    found()
    assert len({*closed}) == 20


def test_the_global_generators_are_left_alone():
    def states():
        return random.getstate(), [*map(str, np.random.get_state())], torch.get_rng_state().tolist()  # noqa: NPY002

    before = states()
    found()
    assert states() == before
