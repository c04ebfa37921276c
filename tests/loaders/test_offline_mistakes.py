"""What the adapters refuse, and what they say."""

import datasets
import numpy as np
import pytest
import torch
from episodes_support import LENGTHS, columns, in_hdf5, rows_of, simulated, without

from samplewise.loaders.offline_data import read_arrays, read_d4rl, read_rows

N = sum(LENGTHS)


def shuffled():
    """The rows of one episode in another order."""
    order = [*range(4), 5, 4, *range(6, N)]
    return {name: values[order] if name == "observations" else values for name, values in columns().items()}


def spoilt(name, row):
    given = columns()
    given[name][row, 0] = np.nan
    return given


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            without("next_observations", {**columns(), "actions": np.zeros((5, 2))}),
            ValueError,
            r"actions=...\): one row a",
        ),
        ({**columns(), "terminals": [False]}, ValueError, r"terminals=...\): .*N = 27 .* its shape is \(1,\)"),
        ({**columns(), "timeouts": [False] * 26}, ValueError, r"timeouts=...\): .* its shape is \(26,\)"),
        ({**columns(), "next_observations": np.zeros((2, 2, 2))}, ValueError, r"next_observations=...\): .*N = 27"),
        ({**columns(), "next_observations": np.zeros((N, 2))}, ValueError, r"rows are \(2,\), those .* \(2, 2\)"),
        ({**columns(), "rewards": np.zeros((N, 1))}, ValueError, r"rewards=...\): .* its shape is \(27, 1\)"),
        (
            {**columns(), "rewards": [0.0] * 20 + [np.nan] * 7},
            ValueError,
            r"rewards=...\): .* finite .* row 20, from 0",
        ),
        (spoilt("actions", 5), ValueError, r"actions=...\): all numbers must be finite as float32, .* row 5, from 0"),
        (
            spoilt("observations", 11),
            ValueError,
            r"observations=...\): all numbers must be finite as float32, .* row 11",
        ),
        (spoilt("next_observations", 4), ValueError, "row 4 is not row 5 of the observations"),
        ({**columns(), "observations": np.ma.masked_less(columns()["observations"], 0)}, ValueError, "masks are not"),
        (
            {**columns(), "observations": columns()["observations"].astype(np.float16)},
            ValueError,
            "row 0 is not row 1 .* or numbers were rounded, as the dtypes differ, float32 and float16: cast one to",
        ),
        (
            {**columns(), "observations": torch.from_numpy(columns()["observations"]).bfloat16()},
            ValueError,
            "row 0 is not row 1 .* the dtypes differ, float32 and bfloat16: cast one to",
        ),
        ({**columns(), "terminals": [3] * N}, ValueError, r"terminals=...\): True or False"),
        ({**columns(), "actions": ["left"] * N}, TypeError, r"actions=...\): an array of numbers"),
        ({**columns(), "rewards": None}, TypeError, r"rewards=...\): an array of numbers"),
        ({name: values[:0] for name, values in columns().items()}, ValueError, "there are no transitions"),
        ({**columns(), "unfinished": "cut"}, ValueError, r"unfinished='cut'\): unfinished must be one of"),
        (shuffled(), ValueError, "row 4 is not row 5 of the observations, .* boundaries"),
        ({**columns(), "timeouts": np.zeros(N, bool)}, ValueError, "row 3 is not row 4 of the observations"),
        (
            {**without("next_observations"), "terminals": np.zeros(N, bool), "timeouts": np.ones(N, bool)},
            ValueError,
            "27 of 27 episodes were cut off after one transition, .* nothing remains",
        ),
    ],
)
def test_arrays_that_are_refused(given, error, message):
    with pytest.raises(error, match=rf"read_arrays.*{message}"):
        read_arrays(**given)


def test_d4rl_that_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="read_d4rl: actions, terminals missing; there are observations, rewards, dones"
    ):
        read_d4rl({"observations": [1], "rewards": [1], "dones": [1]})
    with pytest.raises(ValueError, match="read_d4rl: rewards missing; there are actions, infos"):
        read_d4rl(in_hdf5(tmp_path, without("rewards")))
    with pytest.raises(TypeError, match=r"read_d4rl\(list\): a mapping or the path"):
        read_d4rl([1])
    with pytest.raises(FileNotFoundError, match=r"read_d4rl: .*nowhere.hdf5: there is no such file"):
        read_d4rl(tmp_path / "nowhere.hdf5")
    with pytest.raises(ValueError, match=r"read_d4rl\(next_observations=...\): row 4 "):
        read_d4rl(shuffled())


def row(**given):
    return {**rows_of(simulated())[2], **given}


@pytest.mark.parametrize(
    ("second", "error", "message"),
    [
        (row(rewards=[]), ValueError, "row 1 has no rewards; leave empty episodes out"),
        (row(observations=[], actions=[], rewards=[], dones=[]), ValueError, "row 1 has no rewards"),
        (row(rewards=[0.0] * 6 + [np.nan]), ValueError, r"row 1 \(rewards=...\): .* finite .* step 6, from 0"),
        (row(actions=[[0.0, 1e39]] * 7), ValueError, r"row 1 \(actions=...\): .* finite as float32, .* step 0, from 0"),
        (row(observations=[[[np.nan]]] * 8), ValueError, r"row 1 \(observations=...\): .* finite .* observation 0, "),
        (row(rewards=[0.0] * 6), ValueError, r"row 1 must have T .* but has 7, \(6,\), \(7,\) and 8"),
        (row(observations=row()["observations"][:6]), ValueError, r"but has 7, \(7,\), \(7,\) and 6"),
        (row(actions=[[0.0, 0.0]]), ValueError, r"but has 1, "),
        (row(dones=[False]), ValueError, r"\(1,\) and 8"),
        (row(dones=[False, False, True] + [False] * 4), ValueError, r"row 1 is done in step 2 of 7"),
        (without("actions", row()), ValueError, "row 1: actions missing; there are observations, rewards, dones"),
        (row(actions=[["a", "b"]] * 7), TypeError, r"row 1 \(actions=...\): an array of numbers"),
        ([1, 2], TypeError, "row 1 must be a mapping, not list"),
        (row(rewards=1.0), ValueError, "row 1 has a single reward; .* for a transition a row, .* read_arrays"),
    ],
)
def test_rows_that_are_refused(second, error, message):
    with pytest.raises(error, match=f"read_rows: .*{message}"):
        read_rows([row(), second])


def test_empty_hf_rows():
    empty = datasets.Dataset.from_list([row(), row(observations=[], actions=[], rewards=[], dones=[])])
    with pytest.raises(ValueError, match="row 1 has no rewards; leave empty episodes out"):
        read_rows(empty)


def test_rows_of_another_kind():
    with pytest.raises(TypeError, match=r"read_rows\(generator\): a sequence is needed"):
        read_rows(item for item in [row()])
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list([row()]))
    with pytest.raises(TypeError, match=r"read_rows\(DatasetDict\): .* with 'train'; take a split, .* rows\['train'\]"):
        read_rows(splits)
    with pytest.raises(ValueError, match="at least one episode"):
        read_rows([])
    with pytest.raises(ValueError, match="finished missing; there are observations, actions, rewards, dones"):
        read_rows([row()], dones="finished")
    with pytest.raises(ValueError, match="state missing"):
        read_rows(datasets.Dataset.from_list([row()]), observations="state")


@pytest.mark.parametrize("in_file", [False, True])
def test_d4rl_without_anything_that_tells_of_cuts_is_warned_of(tmp_path, in_file):
    given = without("next_observations")
    del given["timeouts"]
    with pytest.warns(UserWarning, match="only terminals end an episode") as caught:
        read_d4rl(in_hdf5(tmp_path, given) if in_file else given, unfinished="keep")
    assert caught[0].filename == __file__
