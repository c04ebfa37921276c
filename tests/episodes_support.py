"""Small simulated episodes for the tests of offline data; importable as ``episodes_support``."""

import h5py
import numpy as np
import pytest

from samplewise.loaders import Episodes

LENGTHS = [3, 1, 7, 1, 2, 12, 1]
ENDED = [True, False, True, True, False, False, True]  # by itself; the others were cut off


def simulated(lengths=LENGTHS, ended=ENDED, seed=0):
    """Episodes as dicts: observations (T + 1, 2, 2) that are all different, actions (T, 2), rewards, terminals (T,)."""
    rng, episodes = np.random.default_rng(seed), []
    for length, terminal in zip(lengths, ended, strict=True):
        terminals = np.zeros(length, dtype=bool)
        terminals[-1] = terminal
        episodes.append(
            {
                "observations": rng.normal(size=(length + 1, 2, 2)).astype(np.float32),
                "actions": rng.normal(size=(length, 2)).astype(np.float32),
                "rewards": rng.normal(size=length).astype(np.float32),
                "terminals": terminals,
            }
        )
    return episodes


def flat(episodes):
    """Their arrays one after another, and the lengths: what the constructor takes."""
    arrays = {name: np.concatenate([episode[name] for episode in episodes]) for name in episodes[0]}
    return {**arrays, "lengths": [len(episode["rewards"]) for episode in episodes]}


def made(episodes=None, **given):
    return Episodes(**{**flat(episodes or simulated()), **given})


def assert_same(one, other):
    for name in ("observations", "actions", "rewards", "terminals", "lengths", "offsets", "returns_to_go"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert np.array_equal(mine, theirs)
    assert one.returns == pytest.approx(other.returns, rel=1e-14, abs=1e-14)
    assert one.meta == other.meta


def is_mapped(array):
    while array is not None and not isinstance(array, np.memmap):
        array = getattr(array, "base", None)
    return array is not None


def columns(episodes=None):
    """The episodes as D4RL has them, with next observations."""
    episodes = episodes or simulated()
    ends = [np.arange(1, len(e["rewards"]) + 1) == len(e["rewards"]) for e in episodes]
    return {
        **{name: np.concatenate([e[name] for e in episodes]) for name in ("actions", "rewards", "terminals")},
        "observations": np.concatenate([e["observations"][:-1] for e in episodes]),
        "next_observations": np.concatenate([e["observations"][1:] for e in episodes]),
        "timeouts": np.concatenate([end & ~e["terminals"] for e, end in zip(episodes, ends, strict=True)]),
    }


def without(name, given=None):
    return {key: values for key, values in (given or columns()).items() if key != name}


def rows_of(episodes, last=True, names=("observations", "actions", "rewards", "dones")):
    keys = ("observations", "actions", "rewards", "terminals")
    return [
        {
            name: e[key][: None if last or name != names[0] else -1].tolist()
            for name, key in zip(names, keys, strict=True)
        }
        for e in episodes
    ]


def in_hdf5(folder, given):
    path = folder / "data.hdf5"
    with h5py.File(path, "w") as file:
        for name, values in given.items():
            file[name] = values
        file["infos/qpos"] = np.zeros((4, 3))
        file["metadata/version"] = 2
    return path
