"""The adapters agree on the same episodes, whatever format they come in."""

import warnings

import datasets
import gymnasium
import h5py
import minari
import numpy as np
import pytest
import torch
from episodes_support import ENDED, LENGTHS, assert_same, columns, flat, in_hdf5, made, rows_of, simulated, without

from samplewise.loaders.offline_data import read_arrays, read_d4rl, read_minari, read_rows

N = sum(LENGTHS)
LEFT_OUT = [1]  # cut off after one transition


def without_last_observations():
    """What is left where formats leave the observation after the last transition out."""
    episodes, returns = [], []
    for number, episode in enumerate(simulated()):
        if number not in LEFT_OUT:
            returns.append(float(episode["rewards"].sum(dtype=np.float64)))
            if ENDED[number]:
                episode["observations"][-1] = episode["observations"][-2]
            else:
                stop = len(episode["rewards"]) - 1
                episode = {name: values[: stop + (name == "observations")] for name, values in episode.items()}
            episodes.append(episode)
    return made(episodes, returns=returns)


BOX = gymnasium.spaces.Box(-9, 9, (2,), np.float32)
OBSERVATIONS = gymnasium.spaces.Box(-9, 9, (2, 2), np.float32)
DICT = gymnasium.spaces.Dict({"position": OBSERVATIONS, "goal": BOX})


@pytest.fixture
def in_minari(tmp_path, monkeypatch):
    """Writes episodes, given as keyword arguments of Minari's buffer, as a data set of Minari's."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def write(buffers, name="test/episodes-v0", observations=OBSERVATIONS, **about):
        about = about or {"observation_space": observations, "action_space": BOX}
        buffers = [minari.data_collector.EpisodeBuffer(**buffer) for buffer in buffers]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # authors and links that are not named
            return minari.create_dataset_from_buffers(name, buffers, **about)

    return write


def buffer(episode, **given):
    ends = episode["terminals"]
    truncations = ~ends & (np.arange(len(ends)) == len(ends) - 1)
    return {
        **{name: list(episode[name]) for name in ("observations", "actions", "rewards")},
        "terminations": list(ends),
        "truncations": list(truncations),
        **given,
    }


# --- one result from all formats --------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "disk"])
def folder(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "episodes"


def test_with_the_last_observations(tmp_path, folder, in_minari):
    assert_same(read_arrays(**columns(), folder=folder), made())
    assert_same(read_d4rl({**columns(), "infos/qpos": np.zeros(3)}, folder=folder), made())
    path = in_hdf5(tmp_path, columns())
    assert_same(read_d4rl(path, folder=folder), made())
    assert_same(read_d4rl(str(path), folder=folder), made())
    with h5py.File(path) as file:
        assert_same(read_d4rl(file, folder=folder), made())
        assert_same(read_arrays(**{name: file[name] for name in columns()}, folder=folder), made())
    data = in_minari([buffer(episode) for episode in simulated()])
    assert_same(read_minari(data, folder=folder), made())
    assert_same(read_minari("test/episodes-v0", folder=folder), made())
    rows = rows_of(simulated())
    assert_same(read_rows(rows, folder=folder), made())
    assert_same(read_rows(datasets.Dataset.from_list(rows), folder=folder), made())


def test_without_the_last_observations(tmp_path, folder):
    expected, given, warning = without_last_observations(), without("next_observations"), "1 of 7 episodes were cut off"
    rows = rows_of(simulated(), last=False)
    for read in (
        lambda: read_arrays(**given, folder=folder),
        lambda: read_arrays(**{name: torch.from_numpy(values) for name, values in given.items()}, folder=folder),
        lambda: read_arrays(**{name: values.tolist() for name, values in given.items()}, folder=folder),
        lambda: read_d4rl(given, folder=folder),
        lambda: read_d4rl(in_hdf5(tmp_path, given), folder=folder),
        lambda: read_rows(rows, folder=folder),
        lambda: read_rows(datasets.Dataset.from_list(rows), folder=folder),
    ):
        with pytest.warns(UserWarning, match=warning):
            assert_same(read(), expected)


def test_hand_case():
    """Two episodes, of rewards 1 2 3 with a terminal, and 4 5 6 that is cut off; then 7 without an end."""
    given = {
        "observations": np.arange(7) * 10.0,
        "actions": np.arange(7),
        "rewards": np.arange(1, 8),
        "terminals": [0, 0, 1, 0, 0, 0, 0],
        "timeouts": [0, 0, 0, 0, 0, 1, 0],
    }
    with pytest.warns(UserWarning, match=r"unfinished='drop'\): the last 1 of 7 transitions .* left out") as caught:
        data = read_arrays(**given)
    assert caught[0].filename == __file__
    assert data.observations.tolist() == [0, 10, 20, 20, 30, 40, 50]
    assert data.actions.tolist() == [0, 1, 2, 3, 4]
    assert data.terminals.tolist() == [False, False, True, False, False]
    assert data.lengths.tolist() == [3, 2]
    assert data.returns.tolist() == [6, 15]
    assert data.returns_to_go.tolist() == [6, 5, 3, 15, 11]
    batch = data.__getitems__([3, 4])
    assert batch["next_observations"].tolist() == [40, 50]


def test_both_flags_are_a_terminal():
    data = read_arrays(
        observations=np.zeros(2), actions=np.zeros(2), rewards=np.ones(2), terminals=[0, 1], timeouts=[0, 1]
    )
    assert (data.lengths.tolist(), data.terminals.tolist()) == ([2], [False, True])


@pytest.mark.parametrize("following", [True, False])
def test_unfinished(following):
    episodes = simulated([3, 4], [True, False])
    given = columns(episodes)
    given["timeouts"][-1] = False
    given = given if following else without("next_observations", given)
    with pytest.raises(ValueError, match=r"unfinished='error'\): the last 4 of 7 transitions .* give timeouts"):
        read_arrays(**given, unfinished="error")
    with pytest.warns(UserWarning, match=r"read_d4rl\(unfinished='drop'\): the last 4 of 7"):
        assert read_d4rl(given).lengths.tolist() == [3]
    data = read_arrays(**given, unfinished="keep")
    assert data.lengths.tolist() == [3, 4 if following else 3]
    assert data.terminals.sum() == 1
    assert data.returns == pytest.approx([float(e["rewards"].sum(dtype=np.float64)) for e in episodes])
    alone = {name: values[3:] for name, values in given.items()}
    with pytest.raises(ValueError, match=r"neither terminals nor timeouts has a True, .* episode of 4 .*'keep'"):
        read_arrays(**alone)
    assert read_arrays(**alone, unfinished="keep").lengths.tolist() == [4 if following else 3]


def test_wide_numbers_are_compared_as_they_are_kept():
    given = {
        name: values.astype(np.float64) if values.dtype.kind == "f" else values for name, values in columns().items()
    }
    given["next_observations"] = given["next_observations"].astype(np.float32)
    assert_same(read_arrays(**given), made())


def test_images_stay_bytes(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    ends = np.arange(6) % 3 == 2
    data = read_arrays(
        observations=images, actions=np.arange(6), rewards=np.ones(6), terminals=ends, folder=tmp_path / "images"
    )
    batch = data.__getitems__([4, 0])
    assert batch["observations"].dtype == torch.uint8
    assert np.array_equal(batch["observations"], images[[4, 0]])
    assert batch["actions"].tolist() == [4, 0]


def test_after_a_terminal_the_last_observation_stands_in_for_nan(folder, in_minari):
    """With float64 it is beyond float32 that counts; nothing given is written into."""
    expected = simulated()
    for episode, terminal in zip(expected, ENDED, strict=True):
        if terminal:
            episode["observations"][-1] = episode["observations"][-2]
    episodes = simulated()
    for number, bad in ((0, np.nan), (2, np.inf), (3, 1e200), (6, np.nan)):
        episodes[number]["observations"] = episodes[number]["observations"].astype(np.float64)
        episodes[number]["observations"][-1, 0, 1] = bad
    for read in (
        lambda: read_arrays(**columns(episodes), folder=folder),
        lambda: read_d4rl(columns(episodes), folder=folder),
        lambda: read_rows(rows_of(episodes), folder=folder),
        lambda: read_minari(in_minari([buffer(episode) for episode in episodes]), folder=folder),
    ):
        assert_same(read(), made(expected))
    assert np.isnan(episodes[0]["observations"][-1, 0, 1])
    spoilt = columns(episodes)
    spoilt["next_observations"][3] = np.nan  # episode 1 was cut off there
    with pytest.raises(ValueError, match=r"next_observations=...\): .* finite as float32, .* in row 3, from 0"):
        read_arrays(**spoilt)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_with_other_names_and_columns():
    names = ("state", "act", "reward", "terminal")
    rows = [{**row, "text": "x", "returns": 3.0} for row in rows_of(simulated(), names=names)]
    given = dict(zip(("observations", "actions", "rewards", "dones"), names, strict=True))
    assert_same(read_rows(rows, **given), made())
    assert_same(read_rows(datasets.Dataset.from_list(rows), **given), made())


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list])
def test_rows_without_dones_were_cut_off(make):
    rows = [without("dones", row) for row in rows_of(simulated())]
    data = read_rows(make(rows))
    assert not data.terminals.any()
    assert_same(data, made(terminals=[False] * N))


# --- Minari -----------------------------------------------------------------------------------------------------------


def test_minari_records_of_a_real_environment(tmp_path, in_minari):
    env = gymnasium.make("Pendulum-v1", max_episode_steps=20)
    env.action_space.seed(0)
    buffers = []
    for seed in range(3):
        observations, actions, rewards, over = [env.reset(seed=seed)[0]], [], [], False
        while not over:
            actions.append(env.action_space.sample())
            observation, reward, _, over, _ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
        ends = {"terminations": [False] * 20, "truncations": [False] * 19 + [True]}
        buffers.append({"observations": observations, "actions": actions, "rewards": rewards, **ends})
    dataset = in_minari(buffers, env=env)
    env.close()
    data = read_minari("test/episodes-v0", folder=tmp_path / "folder")
    assert data.lengths.tolist() == [20] * 3
    assert not data.terminals.any()
    assert np.array_equal(data.observations, np.concatenate([one["observations"] for one in buffers]))
    assert np.array_equal(data.actions, np.concatenate([one["actions"] for one in buffers]))
    assert data.returns == pytest.approx([sum(one["rewards"]) for one in buffers], rel=1e-6)
    some = dataset.filter_episodes(lambda episode: episode.id != 1)
    assert np.array_equal(read_minari(some).returns, data.returns[[0, 2]])


def test_minari_dicts_of_observations(in_minari):
    buffers = [
        buffer(e, observations={"position": e["observations"], "goal": e["observations"][:, 0]}) for e in simulated()
    ]
    data = in_minari(buffers, observations=DICT)
    flat_observations = flat(simulated())["observations"]
    expected = np.concatenate((flat_observations[:, 0], flat_observations.reshape(-1, 4)), axis=1)
    assert_same(read_minari(data, observation_keys=["goal", "position"]), made(observations=expected))
    assert_same(read_minari(data, observation_keys=["goal"]), made(observations=expected[:, :2]))
    for keys, message in (
        (None, r"observation_keys=None\): the observations are dicts; say which of goal, position make up"),
        ([], r"say which of goal, position"),
        (["goal", "speed"], r"speed missing; there are goal, position"),
    ):
        with pytest.raises(ValueError, match=message):
            read_minari(data, observation_keys=keys)
    with pytest.raises(TypeError, match="a list of keys is needed"):
        read_minari(data, observation_keys="goal")


def test_minari_dicts_that_disagree(in_minari):
    episode = simulated()[0]
    observations = {"position": episode["observations"], "goal": episode["observations"][:-1, 0]}
    data = in_minari([buffer(episode, observations=observations)], observations=DICT)
    with pytest.raises(ValueError, match=r"an episode has \[3, 4\] observations of \['goal', 'position'\]"):
        read_minari(data, observation_keys=["goal", "position"])


def test_minari_mistakes(in_minari):
    episodes = simulated()
    data = in_minari([buffer(episode) for episode in episodes])
    with pytest.raises(ValueError, match=r"observation_keys=\['x'\]\): the observations are arrays; leave it out"):
        read_minari(data, observation_keys=["x"])
    with pytest.raises(FileNotFoundError, match="not found locally"):
        read_minari("test/missing-v0")
    short = buffer(episodes[2], observations=list(episodes[2]["observations"][:-1]))
    with pytest.raises(ValueError, match=r"episode 1, of 7 transitions, needs observations float32\(8, 2, 2\)"):
        read_minari(in_minari([buffer(episodes[0]), short], "test/short-v0"))
    early = buffer(episodes[0], terminations=[False, True, False])
    with pytest.raises(ValueError, match="first in episode 0, step 1 of 3"):
        read_minari(in_minari([early], "test/early-v0"))


def test_minari_tuples(in_minari):
    episode = simulated()[2]  # as many parts as observations would pass for an array of them
    space = gymnasium.spaces.Tuple([BOX, BOX])
    data = in_minari([buffer(episode, observations=(episode["observations"][:, 0],) * 2)], observations=space)
    with pytest.raises(TypeError, match="observations must be arrays or dicts of them, but are tuples"):
        read_minari(data)
    data = in_minari([buffer(episode)], "test/other-v0")
    data.iterate_episodes = lambda: iter([minari.EpisodeData(0, None, (episode["actions"],) * 2, [], [], [], {})])
    with pytest.raises(TypeError, match="actions must be an array, but are a tuple of them"):
        read_minari(data)
