"""Windows and whole trajectories against a slow direct evaluation."""

import pickle

import numpy as np
import pytest
import torch
from episodes_support import ENDED, LENGTHS, made, simulated
from torch.utils.data import DataLoader

from samplewise.loaders import SAMPLE_ID, Episodes, collate_with_ids, with_ids
from support import Everything

N, DATA = sum(LENGTHS), simulated()
PLACES = [(number, step) for number, length in enumerate(LENGTHS) for step in range(length)]  # of each transition


def piece(number, first, horizon):
    """Steps ``first`` .. of an episode, step by step."""
    episode = DATA[number]
    out = {
        "observations": np.zeros((horizon, 2, 2), np.float32),
        "actions": np.zeros((horizon, 2), np.float32),
        "rewards": np.zeros(horizon, np.float32),
        "terminals": np.zeros(horizon, bool),
        "returns_to_go": np.zeros(horizon, np.float32),
        "timesteps": np.zeros(horizon, np.int64),
        "mask": np.zeros(horizon, bool),
    }
    for place in range(horizon):
        step = first + place
        if 0 <= step < len(episode["rewards"]):
            for name in ("observations", "actions", "rewards", "terminals"):
                out[name][place] = episode[name][step]
            out["returns_to_go"][place] = sum(map(float, episode["rewards"][step:]))
            out["timesteps"][place], out["mask"][place] = step, True
    return out


def assert_batch(batch, expected):
    assert set(batch) - {SAMPLE_ID} == set(expected[0])
    for name in expected[0]:
        want = torch.from_numpy(np.stack([one[name] for one in expected]))
        assert (batch[name].dtype, batch[name].shape) == (want.dtype, want.shape)
        torch.testing.assert_close(batch[name], want, rtol=1e-6 if name == "returns_to_go" else 0, atol=0)


def window(row, horizon, align):
    number, step = PLACES[row]
    return piece(number, step - (horizon - 1 if align == "end" else 0), horizon)


@pytest.mark.parametrize("align", ["start", "end"])
@pytest.mark.parametrize("horizon", [1, 2, 5, 12, 20])
def test_windows(horizon, align):
    windows = made().windows(horizon, align=align)
    assert len(windows) == N
    for rows in (list(range(N)), [26, 0, 0, 11], np.array([N - 1])):
        assert_batch(windows.__getitems__(rows), [window(row, horizon, align) for row in rows])
    item = {name: values[None] for name, values in windows[7].items()}
    assert_batch(item, [window(7, horizon, align)])


def test_windows_end_at_their_transition():
    data = made()
    windows = data.windows(3).__getitems__(range(N))
    assert torch.equal(windows["actions"][:, -1], torch.from_numpy(data.actions))
    assert windows["mask"][:, -1].all()
    assert windows["mask"].sum(dim=1).tolist() == [min(step + 1, 3) for _, step in PLACES]
    starting = data.windows(3, align="start").__getitems__(range(N))
    assert torch.equal(starting["actions"][:, 0], torch.from_numpy(data.actions))
    assert starting["mask"].sum(dim=1).tolist() == [min(LENGTHS[number] - step, 3) for number, step in PLACES]


@pytest.mark.parametrize("numbers", [[2, 0, 2], [1], [1, 3, 6], list(range(7)), [5, 1]])
def test_trajectories(numbers):
    trajectories = made().trajectories()
    assert len(trajectories) == 7
    longest = max(LENGTHS[number] for number in numbers)
    assert_batch(trajectories.__getitems__(numbers), [piece(number, 0, longest) for number in numbers])
    item = {name: values[None] for name, values in trajectories[numbers[0]].items()}
    assert_batch(item, [piece(numbers[0], 0, LENGTHS[numbers[0]])])


def test_no_rows():
    for data, horizon in ((made().windows(3), 3), (made().trajectories(), 0)):
        batch = data.__getitems__([])
        assert batch["observations"].shape == (0, horizon, 2, 2)
        assert batch["mask"].shape == (0, horizon)


@pytest.mark.parametrize(
    ("row", "size", "wrap"),
    [
        (-1, N, lambda data: data.windows(2)),
        (N, N, lambda data: data.windows(2, align="start")),
        (-1, 7, lambda data: data.trajectories()),
        (7, 7, lambda data: data.trajectories()),
    ],
)
def test_rows_outside(row, size, wrap):
    for read in (lambda data: data[row], lambda data: data.__getitems__([0, row])):
        with pytest.raises(IndexError, match=rf"rows in \[0, {size}\) are needed, not \[{row}\]"):
            read(wrap(made()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"horizon": 0}, ValueError, r"Episodes.windows\(horizon=0\): horizon is how many .* must be >= 1"),
        ({"horizon": 2.0}, TypeError, "must be an int"),
        ({"horizon": 2, "align": "middle"}, ValueError, r"align='middle'\): align must be one of 'end', 'start'"),
    ],
)
def test_mistakes(arguments, error, message):
    with pytest.raises(error, match=message):
        made().windows(**arguments)


@pytest.mark.parametrize("kind", ["windows", "trajectories"])
def test_t23_spawned_workers(tmp_path, kind):
    made().save(tmp_path)
    data = Episodes.open(tmp_path)
    pieces = data.windows(4) if kind == "windows" else data.trajectories()
    assert len(pickle.dumps(pieces)) < 1000
    loader = DataLoader(
        with_ids(pieces),
        batch_size=4,
        sampler=Everything(len(pieces)),
        num_workers=2,
        multiprocessing_context="spawn",
        collate_fn=collate_with_ids(),
    )
    for batch in loader:
        ids = batch[SAMPLE_ID].tolist()
        longest = max(LENGTHS[number] for number in ids) if kind == "trajectories" else 0
        assert_batch(batch, [window(i, 4, "end") if kind == "windows" else piece(i, 0, longest) for i in ids])


def test_whole_numbers_are_padded_too():
    data = made(actions=np.arange(1, N + 1, dtype=np.uint8))
    batch = data.windows(3).__getitems__([1])
    assert batch["actions"].dtype == torch.uint8
    assert batch["actions"].tolist() == [[0, 1, 2]]
    assert ENDED[0]
    assert data.windows(3).__getitems__([2])["terminals"].tolist() == [[False, False, True]]
