"""Episodes that come one after another: the same as all at once, not all in memory, and what does not fit."""

import weakref

import numpy as np
import pytest
from episodes_support import LENGTHS, assert_same, is_mapped, made, simulated

from samplewise.loaders import Episodes


@pytest.mark.parametrize("folder", [None, "episodes"])
def test_from_iterable(tmp_path, folder):
    data = Episodes.from_iterable(iter(simulated()), LENGTHS, folder=folder and tmp_path / folder, meta={"a": 1})
    assert is_mapped(data.observations) == bool(folder)
    assert_same(data, made(meta={"a": 1}))
    given = [{**episode, "returns": i} for i, episode in enumerate(simulated())]
    data = Episodes.from_iterable(given, LENGTHS, folder=folder and tmp_path / folder)
    assert_same(data, made(returns=range(7)))


def test_from_iterable_does_not_hold_all_episodes(tmp_path):
    """The first, the one before and the new one are there while one is made."""
    made_so_far, most = [], []

    def episodes():
        for number in range(len(LENGTHS)):
            episode = simulated()[number]
            made_so_far.append(weakref.ref(episode["observations"]))
            most.append(sum(reference() is not None for reference in made_so_far))
            yield episode
            del episode

    Episodes.from_iterable(episodes(), LENGTHS, folder=tmp_path)
    assert max(most) <= 3


def without(name):
    return {key: value for key, value in simulated()[1].items() if key != name}


@pytest.mark.parametrize(
    ("second", "lengths", "error", "message"),
    [
        ({}, LENGTHS[:-1], ValueError, "6 lengths, but more episodes"),
        ({}, [*LENGTHS, 4], ValueError, "8 lengths, but 7 episodes"),
        (
            {},
            [3, 2, *LENGTHS[2:]],
            ValueError,
            r"episode 1, of 2 trans.* needs rewards float32\(2,\), .* float32\(1,\)",
        ),
        (
            {"observations": np.zeros((1, 2, 2), np.float32)},
            LENGTHS,
            ValueError,
            r"episode 1, .* observations float32\(2, 2",
        ),
        (
            {"actions": np.zeros((1, 3), np.float32)},
            LENGTHS,
            ValueError,
            r"needs actions float32\(1, 2\), .* float32\(1, 3",
        ),
        ({"terminals": [True, False]}, LENGTHS, ValueError, r"needs terminals bool\(1,\)"),
        ({"actions": [["a", "b"]]}, LENGTHS, TypeError, r"episode 1 \(actions=...\): an array of numbers"),
        ({"rewards": [np.nan]}, LENGTHS, ValueError, r"episode 1 \(rewards=...\): .* finite as float32, .* row 0"),
        (
            {"actions": [[0.0, 1e200]]},
            LENGTHS,
            ValueError,
            r"episode 1 \(actions=...\): .* finite as float32, .* row 0",
        ),
        (
            {"observations": np.float32([[[1, 2], [3, 4]], [[5, 6], [7, np.inf]]])},
            LENGTHS,
            ValueError,
            r"episode 1 \(observations=...\): .* finite as float32, .* row 1, from 0; correct",
        ),
        ({"rewards": None}, LENGTHS, TypeError, "episode 1 .*numbers"),
        ({"returns": np.nan}, LENGTHS, ValueError, r"episode 1 \(returns=...\): .* finite as float64"),
        ({"returns": "1"}, LENGTHS, TypeError, r"episode 1 \(returns=...\): an array of numbers"),
        ({"returns": 1e308}, LENGTHS, ValueError, "at most 3.4e.38, but in episode 1, step 0 of 1"),
        (None, LENGTHS, ValueError, "episode 1 has no actions"),
    ],
)
@pytest.mark.parametrize("folder", [None, "episodes"])
def test_episodes_that_do_not_fit(tmp_path, folder, second, lengths, error, message):
    episodes = simulated()
    episodes[1] = without("actions") if second is None else {**episodes[1], **second}
    with pytest.raises(error, match=message):
        Episodes.from_iterable(episodes, lengths, folder=folder and tmp_path / folder)
    if folder:
        assert not (tmp_path / folder / "current.json").exists()
        assert not list((tmp_path / folder).glob("*"))


def test_dtypes_that_do_not_fit():
    episodes = simulated([1, 1], [True, True])
    episodes[1]["actions"] = np.array([[1, 2]])  # whole numbers in a list
    assert Episodes.from_iterable(episodes, [1, 1]).actions[1].tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"episode 1, .* needs actions int64\(1, 2\), .* not float32"):
        Episodes.from_iterable(episodes[::-1], [1, 1])
    episodes[0]["actions"] = np.float16([[1, 2]])
    episodes[1]["actions"] = np.array([[1, 70000]])
    with pytest.raises(ValueError, match=r"episode 1 \(actions=...\): all numbers must be finite as float16"):
        Episodes.from_iterable(episodes, [1, 1])
    with pytest.raises(ValueError, match="2 lengths, but no episode"):
        Episodes.from_iterable([], [1, 1])
