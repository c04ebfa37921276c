"""Episodes: what a batch holds, the arrays that are computed, the folder they travel as, and what is refused."""

import copy
import pickle
import shutil

import numpy as np
import pytest
import torch
from episodes_support import LENGTHS, assert_same, flat, is_mapped, made, simulated
from torch.utils.data import DataLoader, Subset

from samplewise.loaders import SAMPLE_ID, Episodes, Table, collate_with_ids, episode_arrays, with_ids
from support import Everything

N = sum(LENGTHS)


def transitions(episodes):
    """One dict a transition, slowly."""
    for episode in episodes:
        for t in range(len(episode["rewards"])):
            yield {
                "observations": episode["observations"][t],
                "actions": episode["actions"][t],
                "rewards": episode["rewards"][t],
                "terminals": episode["terminals"][t],
                "next_observations": episode["observations"][t + 1],
            }


def assert_batch(batch, expected):
    assert set(batch) - {SAMPLE_ID} == set(expected[0])
    for name in expected[0]:
        want = torch.from_numpy(np.stack([one[name] for one in expected]))
        assert batch[name].dtype == want.dtype
        assert torch.equal(batch[name], want)


@pytest.fixture(params=["memory", "disk"])
def episodes(request, tmp_path):
    if request.param == "memory":
        return made()
    made().save(tmp_path / "episodes")
    return Episodes.open(tmp_path / "episodes")


# --- what is read -----------------------------------------------------------------------------------------------------


def test_batches(episodes):
    expected = list(transitions(simulated()))
    assert len(episodes) == N
    for rows in ([5, 0, 26, 5], list(range(N)), np.array([3]), torch.tensor([1, 2])):
        assert_batch(episodes.__getitems__(rows), [expected[row] for row in rows])
    for row in (0, N - 1, np.int64(4)):
        item = episodes[row]
        assert_batch({name: value[None] for name, value in item.items()}, [expected[row]])
    assert {name: tuple(value.shape) for name, value in episodes.__getitems__([]).items()} == {
        "observations": (0, 2, 2),
        "actions": (0, 2),
        "rewards": (0,),
        "terminals": (0,),
        "next_observations": (0, 2, 2),
    }


def test_a_batch_is_a_copy(episodes):
    episodes[3]["observations"][:] = 7
    episodes.__getitems__([3])["rewards"][:] = 7
    assert_batch(episodes.__getitems__([3]), [list(transitions(simulated()))[3]])


def test_attributes(episodes):
    data = simulated()
    assert episodes.num_episodes == 7
    assert episodes.lengths.tolist() == LENGTHS
    assert episodes.offsets.tolist() == [0, 3, 4, 11, 12, 14, 26, 27]
    assert episodes.returns.dtype == np.float64
    assert episodes.returns == pytest.approx([sum(map(float, e["rewards"])) for e in data], rel=1e-14)
    assert np.array_equal(episodes.first_observations, [e["observations"][0] for e in data])
    assert episodes.returns_to_go.dtype == np.float32
    to_go = [sum(map(float, e["rewards"][t:])) for e in data for t in range(len(e["rewards"]))]
    assert episodes.returns_to_go == pytest.approx(to_go, rel=1e-6)
    assert episodes.episode_of(range(N)).tolist() == [i for i, length in enumerate(LENGTHS) for _ in range(length)]
    assert episodes.episode_of([26, 0]).dtype == np.int64


def test_sums_are_exact_beside_an_outlier():
    """A running float32 sum, or one over all episodes, would lose the small ones."""
    rewards = np.array([1e30, 1e-3, 2e-3, 2**24, 1, 1], dtype=np.float32)
    observations = np.zeros((9, 1))
    data = Episodes(
        observations=observations, actions=np.zeros(6), rewards=rewards, terminals=[False] * 6, lengths=[1, 2, 3]
    )
    assert data.returns.tolist() == [float(rewards[0]), float(rewards[1]) + float(rewards[2]), 2**24 + 2]
    assert data.returns_to_go[1:].tolist() == [np.float32(data.returns[1]), rewards[2], 2**24 + 2, 2, 1]


def test_given_returns_count_what_is_not_stored():
    data = made(returns=np.arange(7))
    assert data.returns.tolist() == list(range(7))
    assert data.returns_to_go[data.offsets[:-1]] == pytest.approx(range(7), abs=1e-6)
    stored = [float(e["rewards"].sum(dtype=np.float64)) for e in simulated()]
    ends = data.offsets[1:] - 1
    assert data.returns_to_go[ends] == pytest.approx(data.rewards[ends] + np.arange(7) - stored, abs=1e-6)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (np.float64, torch.float32),
        (np.float32, torch.float32),
        (np.float16, torch.float16),
        (np.uint8, torch.uint8),
        (np.int64, torch.int64),
        (np.bool_, torch.bool),
        (">f4", torch.float32),
        (">i2", torch.int16),
    ],
)
def test_dtypes(given, kept):
    wanted = (flat(simulated())["observations"] > 0).astype(given)
    data = made(observations=wanted, actions=wanted[:N, 0, 0], rewards=np.arange(N))
    batch = data.__getitems__([2, 3])
    assert (batch["observations"].dtype, batch["actions"].dtype) == (kept, kept)
    assert (batch["rewards"].dtype, batch["terminals"].dtype) == (torch.float32, torch.bool)
    assert batch["rewards"].tolist() == [2, 3]
    assert batch["observations"].double().tolist() == wanted[[2, 4]].astype(float).tolist()


def test_lists_and_tensors():
    data = flat(simulated())
    assert_same(made(), Episodes(**{name: torch.as_tensor(values) for name, values in data.items()}))
    lists = {name: np.asarray(values).tolist() for name, values in data.items()}
    assert_same(made(), Episodes(**{**lists, "terminals": [int(end) for end in lists["terminals"]]}))


@pytest.mark.parametrize("rows", [[-1], [0, N], [N + 5]])
def test_rows_outside(episodes, rows):
    for read in (episodes.__getitems__, episodes.episode_of, lambda rows: episodes[rows[-1]]):
        with pytest.raises(IndexError, match=rf"rows in \[0, {N}\) are needed"):
            read(rows)


@pytest.mark.parametrize("rows", [[0.5], [[1, 2]], ["1"], [True]])
def test_rows_that_are_none(episodes, rows):
    with pytest.raises(TypeError, match="rows must be integers"):
        episodes.__getitems__(rows)


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_saved_and_opened(tmp_path):
    data = made(meta={"seed": 3, "shares": [0.5, 0.5]})
    data.save(tmp_path)
    opened = Episodes.open(tmp_path)
    assert_same(opened, data)
    assert opened.meta == {"seed": 3, "shares": [0.5, 0.5]}
    for name in ("observations", "actions", "rewards", "terminals", "returns_to_go"):
        assert is_mapped(getattr(opened, name))
        with pytest.raises(ValueError, match="read-only"):
            getattr(opened, name)[0] = 0


def test_saved_again_it_is_replaced(tmp_path):
    made().save(tmp_path)
    old = Episodes.open(tmp_path)
    Episodes.open(tmp_path).save(tmp_path / "copy")
    assert_same(Episodes.open(tmp_path / "copy"), old)
    made(simulated(seed=1)).save(tmp_path)
    assert_same(Episodes.open(tmp_path), made(simulated(seed=1)))
    assert_same(old, made())  # still readable
    assert len([path for path in tmp_path.iterdir() if path.name.startswith("version")]) == 1


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: data.windows(4), lambda data: data.trajectories()])
def test_t23_opened_it_travels_as_its_path(tmp_path, wrap):
    made(simulated([5000] * 4, [True] * 4)).save(tmp_path)
    opened = wrap(Episodes.open(tmp_path))
    packed = pickle.dumps(opened)
    assert len(packed) < 1000
    for twin in (pickle.loads(packed), copy.deepcopy(opened)):
        rows = [0, 3, 2]
        for name, values in twin.__getitems__(rows).items():
            assert torch.equal(values, opened.__getitems__(rows)[name])
    assert is_mapped(getattr(twin, "episodes", twin).observations)


def test_pickled_from_memory():
    assert_same(pickle.loads(pickle.dumps(made(meta={"a": 1}))), made(meta={"a": 1}))


def test_a_folder_that_changed_is_refused(tmp_path):
    made().save(tmp_path)
    packed = pickle.dumps(Episodes.open(tmp_path))
    made().save(tmp_path)
    with pytest.raises(RuntimeError, match="holds others by now; open it anew"):
        pickle.loads(packed)
    shutil.rmtree(tmp_path)
    with pytest.raises(RuntimeError, match="nothing has been written yet, or the folder is gone"):
        pickle.loads(packed)


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_t23_workers(tmp_path, method, kind):
    made().save(tmp_path)
    data = made() if kind == "memory" else Episodes.open(tmp_path)
    sampler, expected, seen = Everything(N, seed=3), list(transitions(simulated())), []
    loader = DataLoader(
        with_ids(data),
        batch_size=5,
        sampler=sampler,
        num_workers=2,
        multiprocessing_context=method,
        collate_fn=collate_with_ids(),
    )
    for batch in loader:
        ids = batch[SAMPLE_ID].tolist()
        assert_batch(batch, [expected[row] for row in ids])
        seen += ids
    assert seen == list(sampler)
    assert sorted(seen) == list(range(N))


def test_in_other_loaders():
    expected = list(transitions(simulated()))
    batch = next(iter(DataLoader(made(), 4, collate_fn=lambda batch: batch)))
    assert_batch(batch, expected[:4])
    batch = next(iter(DataLoader(Subset(made(), [7, 3]), 2, collate_fn=lambda batch: batch)))
    assert_batch(batch, [expected[7], expected[3]])


# --- what is refused --------------------------------------------------------------------------------------------------


def changed(name, index, value):
    array = flat(simulated())[name].copy()
    array[index] = value
    return {name: array}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"lengths": []}, ValueError, r"lengths=\[\]\): at least one episode"),
        (
            {"lengths": [3, 0, 7, 0, 2, 12, 3]},
            ValueError,
            "at least one transition, but episodes 1, 3 have none; leave",
        ),
        ({"lengths": [3.0] * 9}, TypeError, r"ints \(n,\) are needed, not float64\(9,\)"),
        ({"lengths": [N - 1, 2]}, ValueError, r"observations=...\): .* n = 2 .* N = 28 .* N \+ n = 30 rows, one more"),
        ({"observations": np.zeros((N, 3))}, ValueError, r"need N \+ n = 34 rows, .* not \(27, 3\)"),
        ({"actions": np.zeros((N + 7, 2))}, ValueError, r"actions=...\): .* actions need N rows, not \(34, 2\)"),
        ({"actions": np.float32(1)}, ValueError, r"actions need N rows, not \(\)"),
        ({"rewards": np.zeros((N, 1))}, ValueError, r"rewards must be \(27,\), not \(27, 1\)"),
        ({"terminals": [False] * 5}, ValueError, r"terminals must be \(27,\), not \(5,\)"),
        ({"terminals": [2] * N}, ValueError, "terminals=...*True or False"),
        (
            changed("rewards", [5, 8], np.nan),
            ValueError,
            r"rewards=...\): all numbers must be finite as float32, .* first in episode 2, step 1 of 7, from 0",
        ),
        (changed("rewards", 26, -np.inf), ValueError, r"rewards=...\): .* finite .* first in episode 6, step 0 of 1"),
        ({"rewards": [1e300] * N}, ValueError, r"rewards=...\): .* finite .* first in episode 0, step 0 of 3"),
        (
            changed("actions", (5, 1), np.nan),
            ValueError,
            r"actions=...\): .* finite .* first in episode 2, step 1 of 7",
        ),
        (changed("observations", (0, 1, 1), np.inf), ValueError, "first in episode 0, observation 0 of 4, from 0"),
        (changed("observations", 3, np.nan), ValueError, "first in episode 0, observation 3 of 4"),  # after a terminal
        ({"observations": [[0.0]] * 33 + [[1e200]]}, ValueError, "as float32, .* in episode 6, observation 1 of 2"),
        ({"actions": np.full(N, np.inf, np.float16)}, ValueError, r"actions=...\): .* finite as float16"),
        (
            changed("terminals", [1, 13], True),
            ValueError,
            "1 are before .* first in episode 0, step 1 of 3, .* boundaries",
        ),
        ({"returns": [0] * 6}, ValueError, r"7 episodes need returns \(7,\), not \(6,\)"),
        (
            {"returns": [0, 1, np.nan, 3, 4, np.inf, 6]},
            ValueError,
            r"returns=...\): those of episodes 2, 5 are not finite",
        ),
        ({"returns": ["1"] * 7}, TypeError, r"returns=...\): an array of numbers is needed, not of <U1"),
        ({"returns": [[1.0], [1.0, 2.0]]}, ValueError, r"returns=...\): rows of one shape"),
        (
            {"returns": [0.0] * 6 + [1e308]},
            ValueError,
            r"at most 3.4e\+38, .* episode 6, step 0 of 1, .*; scale",
        ),
        (
            {"rewards": [-3e38] * N},
            ValueError,
            r"returns=...\): returns_to_go are .* float32, .* episode 0, step 0",
        ),
        ({"lengths": [[1], [1, 2]]}, ValueError, r"lengths=...\): rows of one shape"),
        ({"lengths": np.ma.masked_equal(LENGTHS, 7)}, ValueError, r"lengths=...\): masks are not kept"),
        ({"actions": ["left"] * N}, TypeError, "an array of numbers is needed, not of <U4"),
        ({"observations": [[1], [1, 2]]}, ValueError, "rows of one shape are needed"),
        ({"observations": None}, TypeError, r"observations=...\): an array of numbers is needed, not of object"),
    ],
)
def test_refused(given, error, message):
    with pytest.raises(error, match=message):
        made(**given)


def test_opened_it_is_not_looked_at_again(tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(episode_arrays, "check_finite", lambda owner, name, *rest: looks.append(name))
    made().save(tmp_path)
    assert looks == ["rewards", "observations", "actions"]
    Episodes.open(tmp_path)
    assert len(looks) == 3


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="nothing has been written yet"):
        Episodes.open(tmp_path / "none")
    with Table(tmp_path).writing({"negatives": ((2, 3), np.int32)}):
        pass
    for use in (Episodes.open, made().save, lambda folder: Episodes.from_iterable(simulated(), LENGTHS, folder=folder)):
        with pytest.raises(ValueError, match="holds negatives, not episodes; take another folder"):
            use(tmp_path)
    assert Table(tmp_path).version == 1
    with pytest.raises(TypeError, match="meta must be what JSON can hold"):
        made(meta={"a": object()}).save(tmp_path / "new")
