"""The offline RL recipe's data by name: simulated, toys, Minari's and files."""

import os
import warnings

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from episodes_support import is_mapped

from samplewise.recipes.assets import AssetError
from samplewise.recipes.collect import MIXES, SEARCHES
from samplewise.recipes.offline_data import NAMES, Task, is_known, load_task
from samplewise.recipes.offline_rl import OfflineRlOptions, run
from samplewise.recipes.random_search import Search
from samplewise.recipes.rollouts import random_policy, rollouts
from samplewise.recipes.toy_tasks import TOYS

TINY = Search(2, directions=2, top=1, noise=0.1, step=0.2, every=1, episodes=2)
STEPS = 30


def quiet(line):
    """Says nothing."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Its folder for what is simulated and read; searches take no time."""
    monkeypatch.setenv("SAMPLEWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    for env_id in SEARCHES:
        monkeypatch.setitem(SEARCHES, env_id, TINY)
    return tmp_path / "cache" / "offline_rl"


@pytest.fixture(scope="module", autouse=True)
def short():
    """Pendulum with few steps."""
    gymnasium.register("Short-v0", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=STEPS)
    yield
    del gymnasium.registry["Short-v0"]


def load(name, **given):
    return load_task(name, say=quiet, **given)


# --- simulated --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXES)
def test_mixes(name):
    task, mix = load(name, transitions=500), MIXES[name]
    shares = {label: getattr(mix, label) for label in ("low", "medium", "expert")}
    assert (task.name, task.env_id) == (name, mix.env_id)
    assert task.labels == tuple(label for label, share in shares.items() if share)
    assert (task.behaviour.dtype, len(task.behaviour)) == (np.int64, task.episodes.num_episodes)
    longest = task.episodes.lengths.max()
    for number, label in enumerate(task.labels):
        found = task.episodes.lengths[task.behaviour == number].sum()
        assert shares[label] * 500 <= found < shares[label] * 500 + longest
        assert f"{shares[label]:.0%} {label}" in task.source
    assert mix.env_id in task.source
    assert is_mapped(task.episodes.observations)
    given = {"episodes": 20, "seed": 0}
    assert task.random_return == rollouts(mix.env_id, random_policy(mix.env_id, 0), **given).mean()


def test_mixes_of_one_environment_share_the_search(cache):
    for name in ("pendulum-mixed", "pendulum-low"):
        load(name, transitions=100)
    found = sorted(path.name.rpartition("-")[0] for path in cache.iterdir())
    assert found == ["pendulum-low", "pendulum-mixed", "search-Pendulum-v1"]


@pytest.mark.parametrize("name", TOYS)
def test_toys(name, cache):
    task, toy = load(name, transitions=1000), TOYS[name]
    assert (task.name, task.env_id, task.source) == (name, name, toy.source)
    assert (task.random_return, task.expert_return) == (toy.random_return, toy.expert_return)
    assert task.labels == tuple(behaviour.label for behaviour in toy.behaviours)
    assert len(task.behaviour) == task.episodes.num_episodes
    for number, behaviour in enumerate(toy.behaviours):
        part = task.episodes.lengths[task.behaviour == number].sum()
        assert behaviour.share * 1000 <= part < behaviour.share * 1000 + 50
    said = []
    again = load_task(name, transitions=1000, say=said.append)
    assert np.array_equal(again.episodes.observations, task.episodes.observations)
    assert said == [f"{name}: cached in {next(cache.iterdir())}"]
    assert len(load(name, transitions=2000).episodes) > len(task.episodes)


def test_toys_have_a_largest_size(cache):
    assert 20_000 <= len(load("lottery").episodes) <= 20_040
    load("lottery", transitions=20_000)
    assert len(list(cache.iterdir())) == 1


def test_progress_is_shown():
    counts = {}

    def count(name, total):
        counts[name] = [total, 0]

        def advance(done):
            counts[name][1] += done

        return advance

    lottery, pendulum = (load(name, transitions=400, count=count) for name in ("lottery", "pendulum-low"))
    assert counts == {
        "lottery: collecting": [400, len(lottery.episodes)],
        "Pendulum-v1: policy search": [2, 2],
        "pendulum-low: collecting": [400, len(pendulum.episodes)],
    }


# --- files ------------------------------------------------------------------------------------------------------------


def recorded(seed=0, count=4):
    """Random actions in the short pendulum: lists for each episode."""
    env, rng, episodes = gymnasium.make("Short-v0"), np.random.default_rng(seed), []
    for number in range(count):
        episode = {"observations": [env.reset(seed=seed + number)[0]], "actions": [], "rewards": []}
        for _ in range(STEPS):
            episode["actions"].append(rng.uniform(-2, 2, size=1).astype(np.float32))
            observation, reward, *_ = env.step(episode["actions"][-1])
            episode["observations"].append(observation)
            episode["rewards"].append(float(reward))
        episodes.append(episode)
    env.close()
    return episodes


def returns_of(episodes):
    return [sum(episode["rewards"]) for episode in episodes]


def write_file(path, episodes):
    with h5py.File(path, "w") as file:
        for name in ("actions", "rewards"):
            file[name] = np.concatenate([episode[name] for episode in episodes])
        file["observations"] = np.concatenate([episode["observations"][:-1] for episode in episodes])
        file["next_observations"] = np.concatenate([episode["observations"][1:] for episode in episodes])
        file["terminals"] = np.zeros(len(episodes) * STEPS, bool)
        file["timeouts"] = np.arange(1, len(episodes) * STEPS + 1) % STEPS == 0
    return str(path)


def test_a_file(tmp_path, cache):
    episodes = recorded()
    path = write_file(tmp_path / "swing.hdf5", episodes)
    task = load(path, env="Short-v0")
    assert (task.name, task.env_id, task.labels, task.behaviour) == ("swing", "Short-v0", (), None)
    assert task.episodes.lengths.tolist() == [STEPS] * 4
    assert task.episodes.returns == pytest.approx(returns_of(episodes), rel=1e-6)
    assert is_mapped(task.episodes.observations)
    assert task.random_return == rollouts("Short-v0", random_policy("Short-v0", 0), episodes=20, seed=0).mean()
    assert task.expert_return == pytest.approx(max(returns_of(episodes)), rel=1e-6)
    assert path in task.source
    said = []
    load_task(path, env="Short-v0", say=said.append)
    assert said == [f"swing: cached in {next(cache.iterdir())}"]


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "swing.hdf5"
    before, after = recorded(0), recorded(100)
    assert load(write_file(path, before), env="Short-v0").episodes.returns == pytest.approx(returns_of(before))
    size = path.stat().st_size
    write_file(path, after)
    os.utime(path, ns=(0, 1_700_000_000_000_000_000))
    assert path.stat().st_size == size
    assert load(str(path), env="Short-v0").episodes.returns == pytest.approx(returns_of(after))


def test_files_of_the_same_name_are_two(tmp_path):
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        episodes = recorded(10 * number)
        path = write_file(tmp_path / str(number) / "swing.hdf5", episodes)
        os.utime(path, ns=(0, 0))
        assert load(path, env="Short-v0").episodes.returns == pytest.approx(returns_of(episodes))


def test_a_file_needs_an_environment(tmp_path):
    path = write_file(tmp_path / "swing.hdf5", recorded(count=1))
    with pytest.raises(ValueError, match=r"env=None\): a file needs the name of its environment") as error:
        load(path)
    assert path in str(error.value)
    with pytest.raises(ValueError, match=r"make_env\(env_id='Shrt-v0'\): "):
        load(path, env="Shrt-v0")


@pytest.mark.parametrize("content", [b"", b"plain text, not a data set"])
def test_a_file_of_another_kind(tmp_path, cache, content):
    path = tmp_path / "swing.hdf5"
    path.write_bytes(content)
    with pytest.raises(AssetError, match=r"swing.hdf5: cannot be read as an HDF5 file: "):
        load(str(path), env="Short-v0")
    assert list(cache.iterdir()) == []


def test_a_file_without_the_arrays(tmp_path, cache):
    path = tmp_path / "swing.hdf5"
    with h5py.File(path, "w") as file:
        file["rewards"] = np.zeros(3)
    with pytest.raises(ValueError, match="observations, actions, terminals missing"):
        load(str(path), env="Short-v0")
    assert list(cache.iterdir()) == []


# --- Minari -----------------------------------------------------------------------------------------------------------


def write_minari(episodes, name="test/swing-v0", **about):
    ends = {"terminations": [False] * STEPS, "truncations": [False] * (STEPS - 1) + [True]}
    buffers = [minari.data_collector.EpisodeBuffer(**episode, **ends) for episode in episodes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # authors and links that are not named
        minari.create_dataset_from_buffers(name, buffers, env="Short-v0", **about)
    return f"minari:{name}"


def test_minari(cache):
    episodes = recorded()
    name = write_minari(episodes)
    task = load(name)
    assert (task.name, task.env_id, task.labels, task.behaviour) == (name, name, (), None)
    assert task.episodes.returns == pytest.approx(returns_of(episodes), rel=1e-6)
    assert is_mapped(task.episodes.observations)
    assert task.random_return == rollouts("Short-v0", random_policy("Short-v0", 0), episodes=20, seed=0).mean()
    assert task.expert_return == pytest.approx(max(returns_of(episodes)), rel=1e-6)
    assert "Minari; score 0 is random actions, 100 its best trajectory" in task.source
    said = []
    load_task(name, say=said.append)
    assert said == [f"minari-test--swing-v0: cached in {next(cache.iterdir())}"]
    assert rollouts(name, lambda observations: np.zeros((len(observations), 1)), episodes=2, seed=0).shape == (2,)


def test_minari_with_reference_scores():
    about = {"num_episodes_average_score": 5, "ref_min_score": -400.0, "ref_max_score": -3.0}
    task = load(write_minari(recorded(), **about))
    assert (task.random_return, task.expert_return) == (-400.0, -3.0)
    assert task.source == "From Minari, with its reference scores."
    assert (task.score(-400.0), task.score([-3.0, -3.0])) == (0.0, 100.0)


def test_minari_data_that_were_made_anew_are_read_again():
    before, after = recorded(0), recorded(100)
    assert load(write_minari(before)).episodes.returns == pytest.approx(returns_of(before))
    minari.delete_dataset("test/swing-v0")
    assert load(write_minari(after)).episodes.returns == pytest.approx(returns_of(after))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("no route to host\nand more"), "no route to host"),
        (TimeoutError(), "TimeoutError"),
        (ValueError("  \n"), "ValueError"),
    ],
)
def test_minari_without_a_network(monkeypatch, error, reason):
    asked = []

    def load_dataset(name, download):
        asked.append((name, download))
        raise error

    monkeypatch.setattr(minari, "load_dataset", load_dataset)
    with pytest.raises(AssetError) as caught:
        load("minari:D4RL/door/human-v2")
    assert str(caught.value) == (
        f"minari:D4RL/door/human-v2 is not on this machine and could not be downloaded: {reason}"
    )
    assert caught.value.__cause__ is error
    assert asked == [("D4RL/door/human-v2", True)]


# --- names and scores -------------------------------------------------------------------------------------------------


def test_known_names(tmp_path):
    path = tmp_path / "data.hdf5"
    path.write_text("")
    for name in (*NAMES, "minari:a/b-v0", str(path)):
        assert is_known(name), name
    for name in ("", "hopper", "minari:", "Lottery", str(tmp_path), str(tmp_path / "none.hdf5")):
        assert not is_known(name), name
        with pytest.raises(ValueError, match="neither a data set nor a file of this name") as error:
            load(name)
        assert f"load_task(name={name!r}): there are hopper-mixed, " in str(error.value)
    assert len(NAMES) == 8


@pytest.mark.parametrize(("transitions", "error"), [(0, ValueError), (-5, ValueError), (1.5, TypeError)])
def test_wrong_numbers_of_transitions(transitions, error):
    with pytest.raises(error, match=r"load_task\(transitions="):
        load("lottery", transitions=transitions)


def test_scores():
    task = Task("x", "x", None, -200.0, 300.0, "")
    assert task.score(-200) == 0
    assert task.score(np.array([300.0, 300.0])) == 100
    assert task.score([50.0]) == 50
    assert task.score(np.array([-200.0, 300.0, 800.0])) == pytest.approx(100)
    assert task.score(-300.0) == -20
    halves = np.full(20_000, 299.9, np.float16)
    assert task.score(halves) == pytest.approx(100 * (float(halves[0]) + 200) / 500)


# --- data that do not fit, and through the recipe ---------------------------------------------------------------------


@pytest.mark.parametrize("what", ["observations", "actions"])
def test_data_of_another_environment(tmp_path, what):
    episodes = [{**episode, what: np.repeat(episode[what], 2, axis=1)} for episode in recorded()]
    path = write_file(tmp_path / "swing.hdf5", episodes)
    with pytest.raises(ValueError, match=rf"swing: {what} have the shape \(\d,\) in the data and \(\d,\) in Short-v0"):
        load(path, env="Short-v0")


def test_data_without_anything_better_than_random_actions(tmp_path):
    poor = [{**episode, "rewards": [reward - 100 for reward in episode["rewards"]]} for episode in recorded()]
    with pytest.raises(ValueError, match=r"swing: the return -\d+.* is not above that of score 0, -\d+"):
        load(write_file(tmp_path / "swing.hdf5", poor), env="Short-v0")
    about = {"num_episodes_average_score": 5, "ref_min_score": -3.0, "ref_max_score": -400.0}
    with pytest.raises(ValueError, match="that would be score 100 is not above"):
        load(write_minari(recorded(), **about))


def recipe(tmp_path, data, **changes):
    given = {"steps": 4, "evaluations": 1, "episodes": 1, "hidden": 4, "batch_size": 8, "seeds": 1, "jobs": 1}
    given |= {"data": data, "agents": ["iql"], "arms": ["rw", "aw"], "out": str(tmp_path / "out")}
    return OfflineRlOptions(**{**given, **changes})


def test_a_task_with_goals_through_the_recipe(tmp_path, monkeypatch):
    class WithGoal(gymnasium.ObservationWrapper):
        """Speed to be had, position as it is."""

        def __init__(self, env):
            super().__init__(env)
            box = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
            names = {"achieved_goal": box, "desired_goal": box, "observation": env.observation_space}
            self.observation_space = gymnasium.spaces.Dict(names)

        def observation(self, seen):
            return {"achieved_goal": seen[2:], "desired_goal": np.full(1, 7, np.float32), "observation": seen}

    plain = minari.MinariDataset.recover_environment
    monkeypatch.setattr(minari.MinariDataset, "recover_environment", lambda *a, **given: WithGoal(plain(*a, **given)))
    episodes = [
        {
            **episode,
            "observations": {
                "achieved_goal": np.array(episode["observations"])[:, 2:],
                "desired_goal": np.full((STEPS + 1, 1), 7, np.float32),
                "observation": np.array(episode["observations"]),
            },
        }
        for episode in recorded()
    ]
    name = write_minari(episodes, observation_space=WithGoal(gymnasium.make("Short-v0")).observation_space)
    assert (load(name).episodes.observations[:, 3] == 7).all()
    results = run(recipe(tmp_path, [name]))
    assert [row["data"] for row in results["summary"]] == [name, name]
    assert (tmp_path / "out" / "plots" / "minari-test-swing-v0-returns.png").is_file()
    assert sum(results["data"][0]["shares"]) == pytest.approx(1)
    assert results["data"][0]["shares"] != results["data"][0]["arms"]["aw"]["shares"]


def test_the_recipe_says_what_is_wrong_with_files(tmp_path):
    paths = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        paths.append(write_file(tmp_path / str(number) / "swing.hdf5", recorded()))
    with pytest.raises(AssetError, match="swing, swing: results need different names"):
        run(recipe(tmp_path, paths, env="Short-v0"))
    with pytest.raises(ValueError, match=r"env=None: must be given, it is that of .*swing.hdf5"):
        run(recipe(tmp_path, paths[:1]))
    with pytest.raises(ValueError, match="env='Short-v0': is for D4RL files, and there is none in data"):
        run(recipe(tmp_path, ["lottery"], env="Short-v0"))
    with pytest.raises(AssetError, match=r"swing.hdf5: cannot be used: make_env\(env_id='Shrt-v0'\)"):
        run(recipe(tmp_path, paths[:1], env="Shrt-v0"))
    assert not (tmp_path / "out").exists()
