"""The toy tasks: their rules, and that their data mislead in the way they are said to."""

import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from samplewise.recipes.collect import gather
from samplewise.recipes.rollouts import random_policy, rollouts
from samplewise.recipes.toy_tasks import (
    ENVIRONMENTS,
    TOYS,
    A,
    B,
    C,
    Lottery,
    Stitch,
    climb,
    climb_and_cross,
    cross,
    gamble,
    work,
)


@pytest.fixture(scope="module")
def collected():
    """The data of both, as the recipe has them: episodes and labels."""
    data = {}
    for name, toy in TOYS.items():
        episodes, numbers = gather(name, toy.behaviours, transitions=20_000, seed=0, advance=lambda done: None)
        data[name] = episodes, np.array([toy.behaviours[number].label for number in numbers])
    return data


@pytest.mark.parametrize("name", ["lottery", "stitch"])
def test_gymnasium_accepts_them(name):
    env = ENVIRONMENTS[name]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env)
    allowed = ("not having a spec", "value is -infinity", "value is infinity")
    assert [str(each.message) for each in caught if not any(part in str(each.message) for part in allowed)] == []


def test_toys_are_named_alike():
    assert [*TOYS] == [*ENVIRONMENTS]
    for toy in TOYS.values():
        assert sum(behaviour.share for behaviour in toy.behaviours) == pytest.approx(1)
        assert toy.random_return < toy.expert_return


# --- lottery ----------------------------------------------------------------------------------------------------------


def test_careful_steps_earn_the_same_and_bold_ones_the_prize_or_nothing():
    env = Lottery()
    rewards = {}
    for action in (-1.0, -1e-6, 0.0, 1e-6, 1.0):
        env.reset(seed=0)
        rewards[action] = [env.step(np.array([action], np.float32))[1] for _ in range(2000)]
    assert rewards[-1.0] == rewards[-1e-6] == rewards[0.0] == [0.8] * 2000
    assert rewards[1e-6] == rewards[1.0]  # chance does not depend on how bold
    assert set(rewards[1.0]) == {0.0, 20.0}
    wins = np.mean(np.array(rewards[1.0]) > 0)
    assert wins == pytest.approx(0.025, abs=4 * np.sqrt(0.025 * 0.975 / 2000))


def test_a_lottery_has_20_steps_and_says_nothing_about_chances():
    env = Lottery()
    seen = [env.reset(seed=1)[0]]
    for step in range(1, 21):
        observation, _, ended, cut, _ = env.step(np.array([0.5], np.float32))
        assert (ended, cut) == (False, step == 20)
        seen.append(observation)
    assert np.array(seen)[:, 3] == pytest.approx(np.arange(21) / 20)
    context = []
    for seed in range(300):
        context.append(env.reset(seed=seed)[0][:3])
        context.append(env.step(np.array([0.5], np.float32))[0][:3])
    assert np.mean(context, axis=0) == pytest.approx([0, 0, 0], abs=4 / np.sqrt(600))
    assert np.std(context, axis=0) == pytest.approx([1, 1, 1], abs=4 / np.sqrt(1200))
    again = [env.reset(seed=1)[0], *[env.step(np.array([0.5], np.float32))[0] for _ in range(20)]]
    assert np.array_equal(seen, again)


def test_careful_play_is_best():
    count = 1000
    deviation = 20 * np.sqrt(20 * 0.025 * 0.975)
    careful, bold = (rollouts("lottery", policy, episodes=count, seed=0) for policy in (work, gamble))
    assert careful == pytest.approx(np.full(count, TOYS["lottery"].expert_return))
    assert bold.mean() == pytest.approx(10, abs=4 * deviation / np.sqrt(count))
    assert bold.std() == pytest.approx(deviation, rel=0.2)
    chance = rollouts("lottery", random_policy("lottery", 0), episodes=count, seed=0)
    assert chance.mean() == pytest.approx(TOYS["lottery"].random_return, abs=4 * chance.std() / np.sqrt(count))


def test_the_best_tenth_gambled(collected):
    episodes, labels = collected["lottery"]
    returns = np.array([episode.rewards.sum() for episode in episodes])
    best = np.argsort(-returns)[: len(returns) // 10]
    assert (labels == "bold").mean() == pytest.approx(1 / 3, abs=1 / len(labels))
    assert (labels[best] == "bold").mean() > 0.95
    assert returns[best].min() >= 20
    for label, wrong in (("bold", -1), ("careful", 1)):
        actions = np.concatenate([e.actions[:, 0] for e, mine in zip(episodes, labels, strict=True) if mine == label])
        assert (np.sign(actions) == wrong).mean() < 0.01  # noise of 0.2 on 0.5: 0.6 %
    means = [returns[labels == label].mean() for label in ("bold", "careful")]
    assert means[0] + 3 < means[1]
    assert len(episodes) == 1001  # 20 steps each; 6,667 are no multiple of them


# --- stitch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "action", "expected"),
    [
        ((0.0, 0.5), (0.0, 1.0), (0.0, 0.6)),
        ((0.0, 0.5), (-1.0, -1.0), (-0.1, 0.4)),
        ((0.15, 0.5), (1.0, 0.0), None),  # the inner wall of the first half
        ((0.15, 0.5), (1.0, 0.5), None),  # nor along it
        ((-0.15, 0.5), (-1.0, 0.0), None),
        ((0.0, -0.15), (0.0, -1.0), None),
        ((0.5, 0.85), (0.0, -1.0), None),  # the inner wall of the second half
        ((0.5, 1.15), (0.0, 1.0), None),
        ((0.15, 0.85), (1.0, 0.0), (0.25, 0.85)),  # the bend
        ((0.5, 1.0), (0.5, -0.5), (0.55, 0.95)),
        ((1.15, 0.8), (1.0, 0.0), None),
    ],
)
def test_walls_hold(place, action, expected):
    env = Stitch()
    env.reset(seed=0)
    env.place = np.array(place)
    observation, reward, ended, cut, _ = env.step(np.array(action, np.float32))
    assert observation == pytest.approx(np.array(place if expected is None else expected))
    assert (reward, ended, cut) == (-1.0, False, False)


def test_nobody_leaves_the_corridor(collected):
    for episode in collected["stitch"][0]:
        x, y = episode.observations.T
        assert ((x > -0.2001) & (x < 1.2001) & (y > -0.2001) & (y < 1.2001)).all()
        assert ((x < 0.2001) | (y > 0.7999)).all()


def test_it_ends_at_c_and_when_the_time_is_up():
    env = Stitch()
    env.reset(seed=0)
    env.place = np.array([0.8, 1.0])
    assert not env.step(np.array([0.0, 0.0], np.float32))[2]  # 0.2 away
    assert env.step(np.array([1.0, 0.0], np.float32))[1:4] == (-1.0, True, False)
    env.reset(seed=0)
    ends = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(50)]
    assert ends == [(False, False)] * 49 + [(False, True)]
    env.reset(seed=0)
    env.steps, env.place = 49, np.array([0.8, 1.0])
    assert env.step(np.array([1.0, 0.0], np.float32))[1:4] == (-1.0, True, False)  # arrived in the last step


@pytest.mark.parametrize(
    ("options", "start"), [(None, A), ({}, A), ({"start": "A"}, A), ({"start": "B"}, B)], ids=["no", "none", "A", "B"]
)
def test_starts(options, start):
    env = Stitch()
    apart = np.array([env.reset(seed=seed, options=options)[0] - start for seed in range(400)])
    assert np.abs(apart).max() <= 0.05 + 1e-6
    assert apart.mean(axis=0) == pytest.approx([0, 0], abs=4 * 0.05 / np.sqrt(3 * 400))
    assert np.abs(apart).max(axis=0) == pytest.approx([0.05, 0.05], abs=0.002)


def test_returns_of_the_ways():
    toy = TOYS["stitch"]
    best = rollouts("stitch", climb_and_cross, episodes=500, seed=0)
    assert best.mean() == pytest.approx(toy.expert_return, abs=0.5)
    assert set(best) <= {-18.0, -19.0, -20.0}
    for policy in (climb, cross, random_policy("stitch", 0)):
        assert set(rollouts("stitch", policy, episodes=200, seed=0)) == {toy.random_return}


def test_no_episode_shows_the_whole_way_but_the_pieces_connect(collected):
    episodes, labels = collected["stitch"]

    def near(place, spot):
        return np.linalg.norm(place - spot, axis=-1) < 0.15

    parts = {label: [e for e, mine in zip(episodes, labels, strict=True) if mine == label] for label in {*labels}}
    assert {*parts} == {"A to B", "B to C"}
    for episode in parts["A to B"]:
        assert near(episode.observations[0], A)
        assert near(episode.observations, B).any()
        assert not near(episode.observations, C).any()
        assert not episode.terminal
    for episode in parts["B to C"]:
        assert near(episode.observations[0], B)
        assert not near(episode.observations, A).any()
        assert episode.terminal
    lengths = {label: sum(len(episode.rewards) for episode in part) for label, part in parts.items()}
    assert min(lengths.values()) == pytest.approx(10_000, abs=50)
    assert max(lengths.values()) == pytest.approx(10_000, abs=50)

    # where those from A pass, those from B begin
    starts = np.array([episode.observations[0] for episode in parts["B to C"]])
    passed = np.concatenate([episode.observations for episode in parts["A to B"]])
    nearest = [np.linalg.norm(passed - start, axis=1).min() for start in starts]
    assert np.quantile(nearest, 0.9) < 0.03
    moves = np.concatenate([np.diff(episode.observations, axis=0) for episode in episodes])
    assert np.abs(moves).max() < 0.1001


def test_the_best_episodes_begin_at_b(collected):
    episodes, labels = collected["stitch"]
    returns = np.array([episode.rewards.sum() for episode in episodes])
    assert (returns[labels == "A to B"] == -50).all()
    assert returns[labels == "B to C"].min() > -20
    best = np.argsort(-returns)[: len(returns) // 10]
    assert set(labels[best]) == {"B to C"}
