"""Simulated data: the cache, whose episodes are in a mix, and that they are the same every time."""

import random

import gymnasium
import numpy as np
import pytest
import torch
from episodes_support import is_mapped
from gymnasium.spaces import Box

from samplewise.loaders import Episodes
from samplewise.loaders.seeding import generator
from samplewise.recipes import collect as module
from samplewise.recipes.assets import AssetError
from samplewise.recipes.collect import (
    MIXES,
    SEARCHES,
    Behaviour,
    Found,
    Mix,
    cached,
    collect,
    find_policies,
    gather,
    save,
)
from samplewise.recipes.random_search import LinearPolicy, Search, Snapshot
from samplewise.recipes.rollouts import Played, make_env, random_policy, rollouts, start_seed
from samplewise.recipes.toy_tasks import ENVIRONMENTS

TINY = Search(4, directions=2, top=1, noise=0.1, step=0.2, every=2, episodes=2)
LOW, HIGH = np.array([-10.0, 0.0], np.float32), np.array([30.0, 1000.0], np.float32)


def quiet(line):
    """Says nothing."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Its folder for what is simulated."""
    monkeypatch.setenv("SAMPLEWISE_CACHE", str(tmp_path))
    return tmp_path / "offline_rl"


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_folder_is_built_once(cache):
    built, said = [], []

    def build(folder):
        built.append(folder)
        (folder / "a.txt").write_text("A")

    folders = [cached("thing", {"a": 1, "b": 2}, build, said.append) for _ in range(2)]
    assert folders[0] == folders[1] == cached("thing", {"b": 2, "a": 1}, build, quiet)
    assert len(built) == 1
    assert built[0] != folders[0]
    assert said == [f"thing: cached in {folders[0]}"]
    assert folders[0].parent == cache
    assert folders[0].name.startswith("thing-")
    assert [path.name for path in folders[0].iterdir()] == ["a.txt"]
    assert list(cache.iterdir()) == [folders[0]]
    others = {cached("thing", {"a": 1, "b": 3}, build, quiet), cached("other", {"a": 1, "b": 2}, build, quiet)}
    assert len(others | {*folders}) == len(built) == 3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_build_that_fails_leaves_nothing(cache, error):
    def broken(folder):
        (folder / "half.txt").write_text("")
        raise error("stop")

    with pytest.raises(error, match="stop"):
        cached("thing", {}, broken, quiet)
    assert list(cache.iterdir()) == []
    folder = cached("thing", {}, lambda folder: (folder / "whole.txt").write_text(""), quiet)
    assert [path.name for path in folder.iterdir()] == ["whole.txt"]


def test_another_process_may_be_faster(cache):
    def build(folder):
        (folder / "mine.txt").write_text("")
        theirs = cached("thing", {}, lambda folder: (folder / "theirs.txt").write_text(""), quiet)
        assert theirs.is_dir()

    folder = cached("thing", {}, build, quiet)
    assert [path.name for path in folder.iterdir()] == ["theirs.txt"]
    assert list(cache.iterdir()) == [folder]


def test_a_failed_renaming_is_an_error(cache):
    def build(folder):
        folder.rmdir()

    with pytest.raises(OSError, match="data"):
        cached("thing", {}, build, quiet)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("place", ["cache", "cache/offline_rl"])
def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, place):
    (tmp_path / "cache").mkdir()
    if place == "cache":
        (tmp_path / "cache").rmdir()
    (tmp_path / place).write_text("a file")
    monkeypatch.setenv("SAMPLEWISE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(AssetError, match=r"thing: writing to .*cache/offline_rl: .*set SAMPLEWISE_CACHE to a folder"):
        cached("thing", {}, lambda folder: None, quiet)


# --- whose episodes ---------------------------------------------------------------------------------------------------


class Random(gymnasium.Env):
    """Random observations, 1 to 12 steps, half of the ends by itself."""

    def __init__(self):
        self.observation_space, self.action_space = Box(-np.inf, np.inf, (3,)), Box(LOW, HIGH)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.length = 0, (options or {}).get("length") or int(self.np_random.integers(1, 13))
        self.ends = self.np_random.random() < 0.5
        return self.np_random.normal(size=3), {}

    def step(self, action):
        self.steps += 1
        over, reward = self.steps >= self.length, float(self.np_random.normal() + action.sum())
        return self.np_random.normal(size=3), reward, over and self.ends, over and not self.ends, {}


@pytest.fixture(autouse=True)
def random_env(monkeypatch):
    """An environment by the name of `random`."""
    monkeypatch.setitem(ENVIRONMENTS, "random", Random)


def linear(observations):
    return observations[:, :2] * [3.0, 200.0] + [10.0, 500.0]


def still(observations):
    return np.tile([10.0, 500.0], (len(observations), 1))


LINEAR, STILL = Behaviour("linear", 0.7, linear, 0.3), Behaviour("still", 0.3, still, 0.05)


def gathered(behaviours=(LINEAR, STILL), transitions=600, seed=0):
    told = []
    episodes, numbers = gather("random", behaviours, transitions=transitions, seed=seed, advance=told.append)
    assert sorted(told) == sorted(len(episode.rewards) for episode in episodes)
    return episodes, numbers


def by_hand(behaviour, seed, count):
    """The first episodes of a behaviour, one at a time, with gymnasium's own interface."""
    episodes, env = [], make_env("random")
    for number in range(count):
        noise = generator(seed, "noise", behaviour.label, number)
        seen, actions, rewards, over = [], [], [], False
        options = dict(behaviour.options) if behaviour.options else None
        seen.append(env.reset(seed=start_seed(seed, behaviour.label, number), options=options)[0].astype(np.float32))
        while not over:
            action = behaviour.policy(seen[-1][None])[0] + behaviour.noise * (HIGH - LOW) / 2 * noise.standard_normal(2)
            actions.append(np.clip(action, LOW, HIGH).astype(np.float32))
            observation, reward, ended, cut, _ = env.step(actions[-1])
            seen.append(observation.astype(np.float32))
            rewards.append(reward)
            over = ended or cut
        episodes.append(Played(np.array(seen), np.array(actions), np.array(rewards), bool(ended)))
    return episodes


def key(episode):
    return episode.observations.tobytes()


def assert_same_episodes(ones, others):
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("options", [None, {"length": 4}])
@pytest.mark.parametrize("seed", [0, 1])
def test_an_episode_depends_on_the_seed_its_behaviour_and_its_number_only(seed, options):
    behaviours = [Behaviour("linear", 0.7, linear, 0.3, options), STILL]
    episodes, numbers = gathered(behaviours, seed=seed)
    assert numbers.dtype == np.int64
    in_turn = [
        episode
        for number, behaviour in enumerate(behaviours)
        for episode in by_hand(behaviour, seed, int((numbers == number).sum()))
    ]
    assert {episode.terminal for episode in in_turn} == {False, True}
    order = generator(seed, "order").permutation(len(in_turn))
    assert_same_episodes(episodes, [in_turn[place] for place in order])
    assert numbers.tolist() == np.sort(numbers)[order].tolist()


def test_seeds_give_other_episodes_in_another_order():
    (episodes, numbers), (others, _) = gathered(), gathered(seed=1)
    assert not {*map(key, episodes)} & {*map(key, others)}
    assert len({*map(key, episodes)}) == len(episodes)
    assert 0 < np.flatnonzero(numbers == 1)[0] < (numbers == 0).sum()  # mixed up


@pytest.mark.parametrize("at_once", [1, 5, 64])
def test_how_many_are_played_at_once_changes_nothing(monkeypatch, at_once):
    expected, numbers = gathered()
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    episodes, again = gathered()
    assert_same_episodes(episodes, expected)
    assert again.tolist() == numbers.tolist()


def test_more_transitions_are_more_episodes():
    few, many = ({*map(key, gathered(transitions=count)[0])} for count in (200, 600))
    assert few < many


@pytest.mark.parametrize("transitions", [1, 100, 599, 600])
def test_shares_are_reached_by_whole_episodes(transitions):
    episodes, numbers = gathered(transitions=transitions)
    for number, behaviour in enumerate((LINEAR, STILL)):
        lengths = [len(episode.rewards) for episode in by_hand(behaviour, 0, int((numbers == number).sum()))]
        assert sum(len(e.rewards) for e, n in zip(episodes, numbers, strict=True) if n == number) == sum(lengths)
        assert sum(lengths[:-1]) < behaviour.share * transitions <= sum(lengths)


def test_noise_has_its_deviation():
    episodes, _ = gathered([Behaviour("still", 1.0, still, 0.1)], transitions=4000)
    noise = np.concatenate([episode.actions for episode in episodes]) - [10.0, 500.0]
    expected, count = np.array([2.0, 50.0]), len(noise)
    assert (abs(noise.mean(axis=0)) < 4 * expected / np.sqrt(count)).all()
    assert noise.std(axis=0) == pytest.approx(expected, rel=4 / np.sqrt(2 * count))
    for one, other in ((noise[:, 0], noise[:, 1]), (noise[1:, 0], noise[:-1, 0]), (noise[1:, 1], noise[:-1, 1])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(count)
    assert len(np.unique(noise[:, 0])) > 0.99 * count


def test_no_noise_is_the_policy_itself():
    episodes, _ = gathered([Behaviour("linear", 1.0, linear, 0.0)], transitions=50)
    for episode in episodes:
        assert episode.actions == pytest.approx(np.clip(linear(episode.observations[:-1]), LOW, HIGH), rel=1e-5)


def test_environments_are_closed_whatever_happens(monkeypatch):
    closed = []
    monkeypatch.setattr(Random, "close", lambda env: closed.append(env))

    def broken(observations):
        raise RuntimeError("no idea")

    with pytest.raises(RuntimeError, match="no idea"):
        gathered([Behaviour("broken", 1.0, broken, 0.0)])
    assert len({*closed}) == module.AT_ONCE
    gathered()
    assert len({*closed}) == 2 * module.AT_ONCE


def test_saved_episodes_come_back(tmp_path):
    episodes, numbers = gathered()
    save(tmp_path / "saved", episodes, numbers, ["linear", "still"], {"note": 3})
    opened = Episodes.open(tmp_path / "saved")
    assert opened.meta == {"note": 3, "labels": ["linear", "still"], "behaviour": numbers.tolist()}
    assert opened.lengths.tolist() == [len(episode.rewards) for episode in episodes]
    assert np.array_equal(opened.observations, np.concatenate([episode.observations for episode in episodes]))
    assert np.array_equal(opened.actions, np.concatenate([episode.actions for episode in episodes]))
    assert opened.returns == pytest.approx([episode.rewards.sum() for episode in episodes], rel=1e-5)
    assert opened.terminals[opened.offsets[1:] - 1].tolist() == [episode.terminal for episode in episodes]
    assert opened.terminals.sum() == sum(episode.terminal for episode in episodes)


# --- the whole --------------------------------------------------------------------------------------------------------

MIX = Mix("Pendulum-v1", 0.4, 0.4, 0.2, noise=0.2)


def collected(seed=0, transitions=1500, say=quiet, mix=MIX):
    return collect("pendulum-test", mix, TINY, transitions=transitions, seed=seed, say=say)


def test_a_mix_is_the_same_every_time(cache, tmp_path, monkeypatch):
    said = []
    first = collected(say=said.append)
    assert is_mapped(first.observations)
    assert sorted(path.name.rpartition("-")[0] for path in cache.iterdir()) == ["pendulum-test", "search-Pendulum-v1"]
    assert not any("cached" in line for line in said)
    said.clear()
    again = collected(say=said.append)
    assert len(said) == 1
    assert said[0].startswith(f"pendulum-test: cached in {cache}")
    monkeypatch.setenv("SAMPLEWISE_CACHE", str(tmp_path / "other"))
    anew = collected()
    for data in (again, anew):
        assert np.array_equal(data.observations, first.observations)
        assert np.array_equal(data.actions, first.actions)
        assert data.meta == first.meta
    other = collected(seed=1)
    assert not {*first.first_observations[:, 0]} & {*other.first_observations[:, 0]}
    assert other.meta["random_return"] != first.meta["random_return"]


def test_notes_of_a_mix():
    data = collected()
    labels, behaviour = data.meta["labels"], np.array(data.meta["behaviour"])
    assert labels == ["low", "medium", "expert"]
    assert [data.lengths[behaviour == number].sum() for number in range(3)] == [600, 600, 400]  # episodes have 200
    configuration = data.meta["configuration"]
    assert configuration["mix"] == vars(MIX)
    assert configuration["search"] == vars(TINY)
    assert (configuration["seed"], configuration["transitions"]) == (0, 1500)
    assert configuration["made_with"]["numpy"] == np.__version__
    assert configuration["made_with"]["gymnasium"] == gymnasium.__version__


def test_a_mix_without_medium_behaviour():
    data = collected(mix=Mix("Pendulum-v1", 0.5, 0.0, 0.5), transitions=400)
    assert data.meta["labels"] == ["low", "expert"]
    assert sorted(data.meta["behaviour"]) == [0, 1]


def test_references_are_means_of_twenty_rollouts():
    found = find_policies("Pendulum-v1", TINY, seed=3, say=quiet)
    given = {"episodes": 20, "seed": 3}
    assert found.random_return == rollouts("Pendulum-v1", random_policy("Pendulum-v1", 3), **given).mean()
    assert found.expert_return == rollouts("Pendulum-v1", found.expert, **given).mean()
    assert len(found.snapshots) == 3
    assert max(snapshot.value for snapshot in found.snapshots) == next(
        snapshot.value for snapshot in found.snapshots if snapshot.policy is found.expert
    )


def test_found_policies_are_those_of_the_search():
    found, settings = find_policies("Pendulum-v1", TINY, say=quiet), Search(**{**vars(TINY), "products": True})
    for kept, snapshot in zip(found.snapshots, module.search("Pendulum-v1", TINY, 0, lambda done: None), strict=True):
        assert kept.value == snapshot.value
        for name in ("weights", "mean", "deviation", "low", "high"):
            assert np.array_equal(getattr(kept.policy, name), getattr(snapshot.policy, name))
    other = find_policies("Pendulum-v1", settings, say=quiet)  # not taken from the cache
    assert [entry.policy.weights.shape for entry in (found.snapshots[0], other.snapshots[0])] == [(1, 3), (1, 9)]
    assert other.snapshots[0].policy.products


def test_the_nearest_policy():
    policies = [LinearPolicy(np.full((1, 1), float(number)), *[np.ones(1)] * 4, False) for number in range(5)]
    values = [-90.0, 8.0, 41.0, 150.0, 60.0]
    found = Found([Snapshot(*each) for each in zip(policies, values, strict=True)], -100.0, 100.0)
    for share, number in {-1: 0, 0: 0, 0.3: 1, 0.55: 1, 0.65: 2, 0.74: 2, 0.8: 4, 1.0: 4, 2.0: 3}.items():
        assert found.towards(share) is policies[number], share
    assert found.expert is policies[3]


def test_the_global_generators_are_left_alone():
    def states():
        return random.getstate(), [*map(str, np.random.get_state())], torch.get_rng_state().tolist()  # noqa: NPY002

    before = states()
    collected()
    assert states() == before


# --- the mixes that there are -----------------------------------------------------------------------------------------


def test_shares_of_the_mixes():
    kinds = {"mixed": (0.45, 0.45, 0.1), "low": (0.9, 0.0, 0.1), "medium": (0.0, 0.9, 0.1)}
    expected = {f"{name}-{kind}": shares for name in ("hopper", "pendulum") for kind, shares in kinds.items()}
    assert {name: (mix.low, mix.medium, mix.expert) for name, mix in MIXES.items()} == expected
    assert {mix.env_id for mix in MIXES.values()} == {*SEARCHES}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["pendulum-mixed", "hopper-mixed"])
def test_mixes_have_their_shares_and_get_better(name):
    data = collect(name, MIXES[name], SEARCHES[MIXES[name].env_id], say=quiet)
    behaviour = np.array(data.meta["behaviour"])
    random_return, expert_return = data.meta["random_return"], data.meta["expert_return"]
    parts = [behaviour == number for number in range(3)]
    for part, share in zip(parts, (0.45, 0.45, 0.1), strict=True):
        assert data.lengths[part].sum() / len(data) == pytest.approx(share, abs=data.lengths.max() / len(data))
    means = np.array([data.returns[part].mean() for part in parts])
    errors = np.array([data.returns[part].std(ddof=1) / np.sqrt(part.sum()) for part in parts])
    assert (np.diff(means) > 4 * np.hypot(errors[1:], errors[:-1])).all()
    low, medium, expert = (means - random_return) / (expert_return - random_return)
    assert low < 0.2 < medium < 0.6 < expert
