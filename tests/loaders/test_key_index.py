import multiprocessing
import pickle
import tarfile
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from ranks_support import Threads
from streams_support import keys_of, write_shards, write_tar

from samplewise.cuda_ext import ranks
from samplewise.loaders import key_index
from samplewise.loaders.key_index import KeyIndex, _attached
from samplewise.loaders.keys import PIECE, key_digest, shard_keys
from samplewise.loaders.streams import keep
from support import Everything


@pytest.mark.parametrize(
    ("keys", "rows"),
    [
        (["b", "a", "b", "c", "a"], [0, 1, 0, 2, 1]),
        ([1, "1", b"1", -1, 1 << 70, 1], [0, 1, 2, 3, 4, 0]),
        ([np.int64(7), 7, torch.tensor(7), np.str_("7"), "7"], [0, 0, 0, 1, 1]),
        (np.array([30, 10, 30]), [0, 1, 0]),
        (torch.tensor([30, 10, 30]), [0, 1, 0]),
        (np.array(["x", "y", "x"]), [0, 1, 0]),
        (["\udcff", "ü", "ÿ", ""], [0, 1, 2, 3]),
        ((str(number // 2) for number in range(6)), [0, 0, 1, 1, 2, 2]),
        ([], []),
    ],
)
def test_the_first_key_gets_row_0_the_next_one_1(keys, rows):
    index = KeyIndex(capacity=5)
    given = index.add(keys)
    assert given.dtype == np.int64
    assert given.tolist() == rows
    assert len(index) == len(set(rows))


def test_one_key_at_a_time_and_many_at_once_are_the_same():
    one, many = KeyIndex(capacity=200), KeyIndex(capacity=200)
    rng = np.random.default_rng(0)
    for _ in range(20):
        keys = [f"k{number}" for number in rng.integers(0, 200, 30)]
        assert many.rows(keys).tolist() == [one.row(key) for key in keys]
        assert many.add(keys).tolist() == [one.row_or_new(key) for key in keys]
        assert [key in many for key in ("k3", "k300")] == [one.row("k3") >= 0, False]
    assert one.fingerprint == many.fingerprint
    assert (many._slot_rows > 0).sum() == (one._slot_rows > 0).sum() == len(one)


def test_many_keys_agree_with_a_dict():
    keys = [f"{number % 97}/{number}" for number in range(2 * PIECE + 1000)]
    rng = np.random.default_rng(1)
    index, expected = KeyIndex(capacity=len(keys)), {}
    for _ in range(2):  # the table is nearly full in the end, and many of a piece's keys stand twice
        drawn = rng.integers(0, len(keys), 2 * len(keys)).tolist()
        for number in drawn:
            expected.setdefault(keys[number], len(expected))
        assert index.add(keys[number] for number in drawn).tolist() == [expected[keys[number]] for number in drawn]
    assert len(index) == len(expected)
    assert index.rows(keys).tolist() == [expected.get(key, -1) for key in keys]


def test_colliding_slots_do_not_mix_keys_up(monkeypatch):
    monkeypatch.setattr("samplewise.loaders.keys.key_digest", lambda key: b"\x03" * 8 + key.to_bytes(8, "little"))
    monkeypatch.setattr("samplewise.loaders.key_index.key_digest", lambda key: b"\x03" * 8 + key.to_bytes(8, "little"))
    index = KeyIndex(capacity=50)
    assert index.add(range(30)).tolist() == list(range(30))
    assert [index.row_or_new(key) for key in range(50)] == list(range(50))
    assert index.rows([49, 0, 99]).tolist() == [49, 0, -1]


def test_full_and_growing():
    index = KeyIndex(capacity=3)
    index.add(["a", "b"])
    with pytest.raises(RuntimeError, match=r"KeyIndex\(capacity=3\): it is full.*grow"):
        index.add(["c", "d"])
    assert len(index) == 2
    assert index.row_or_new("c") == 2
    with pytest.raises(RuntimeError, match="it is full"):
        index.row_or_new("d")
    assert index.add(["c", "a"]).tolist() == [2, 0]
    before = index.fingerprint
    index.grow(PIECE * 3)
    assert (index.capacity, index.fingerprint) == (PIECE * 3, before)
    assert index.add(["d", "a"]).tolist() == [3, 0]
    with pytest.raises(ValueError, match=r"KeyIndex.grow\(capacity=3\)"):
        index.grow(3)


def test_who_holds_the_memory_of_before_a_growth_cannot_add_to_it():
    index = KeyIndex(capacity=2)
    worker = _attached(index._lock, index._control, index._digests, index._slots)
    assert worker.row_or_new("a") == index.row("a") == 0
    index.grow(4)
    assert worker.row("a") == 0
    with pytest.raises(RuntimeError, match="it was grown after this worker was started"):
        worker.row_or_new("b")


def add_all(index, seed, keys, rows):
    keys = np.random.default_rng(seed).permutation(keys).tolist()
    rows.put(
        (seed, {key: index.row_or_new(key) if number % 2 else index.add([key])[0] for number, key in enumerate(keys)})
    )


def test_processes_add_to_one_index():
    """Spawned ones do in ``test_workers_see_each_epochs_plan_and_share_new_keys``."""
    context = multiprocessing.get_context("fork")
    index, rows, keys = KeyIndex(capacity=2000), context.Queue(), [f"key {number}" for number in range(2000)]
    workers = [context.Process(target=add_all, args=(index, seed, keys, rows)) for seed in range(2)]
    for worker in workers:
        worker.start()
    given = [rows.get(timeout=120)[1] for _ in workers]
    for worker in workers:
        worker.join()
    own = dict(zip(keys, index.rows(keys).tolist(), strict=True))
    assert given == [own] * 2
    assert sorted(own.values()) == list(range(2000))


def test_a_plain_copy_has_memory_of_its_own():
    index = KeyIndex(capacity=5)
    index.add(["a", "b"])
    other = pickle.loads(pickle.dumps(index))
    assert (other.capacity, other.fingerprint) == (5, index.fingerprint)
    other.add(["c"])
    assert (len(index), len(other)) == (2, 3)


# --- state ------------------------------------------------------------------------------------------------------------


def test_state_round_trips(tmp_path):
    index = KeyIndex(capacity=300)
    index.add(f"k{number}" for number in range(200))
    torch.save(index.state_dict(), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 200 * 16 + 3000
    loaded = KeyIndex(capacity=1000)
    loaded.add(["something else"])
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    index.save(tmp_path / "index")
    for other in (loaded, KeyIndex.load(tmp_path / "index")):
        assert other.fingerprint == index.fingerprint
        assert other.rows(["k199", "something else"]).tolist() == [199, -1]
        assert other.add(["k5", "new"]).tolist() == [5, 200]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "state.pt"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"version": 9}, "version 9 was saved, this release reads 1"),
        ({"digests": torch.zeros(3, 2)}, "damaged"),
        ({"digests": torch.zeros(3, 3, dtype=torch.int64)}, "damaged"),
        ({"digests": None}, "damaged"),
        ({"capacity": 9, "digests": torch.arange(12).reshape(6, 2)}, "6 keys were saved.* room for 5.* capacity=9"),
    ],
)
def test_states_that_do_not_fit_change_nothing(change, error):
    index = KeyIndex(capacity=5)
    index.add(["a"])
    with pytest.raises(ValueError, match=error):
        index.load_state_dict({**index.state_dict(), **change})
    assert index.rows(["a"]).tolist() == [0]


def test_an_index_that_goes_back_gives_rows_to_other_shards():
    """What a stage remembers of its rows' shards is not held against them."""
    index = KeyIndex(capacity=5)
    stage = keep(Everything(5), index)
    list(stage([{"__key__": "a", "__url__": "x.tar"}]))
    state = index.state_dict()
    list(stage([{"__key__": "b", "__url__": "y.tar"}]))
    index.load_state_dict(state)
    assert [sample["sample_id"] for sample in stage([{"__key__": "c", "__url__": "z.tar"}])] == [1]
    with pytest.raises(ValueError, match=r"the key 'c' in y.tar is also that of a sample in another shard"):
        list(stage([{"__key__": "c", "__url__": "y.tar"}]))


def test_fingerprint_tells_keys_and_their_order():
    prints = {KeyIndex.from_keys(keys).fingerprint for keys in (["a", "b"], ["b", "a"], ["a"], [1, 2], ["a", "b"])}
    assert len(prints) == 4
    assert KeyIndex.from_keys(["a", "b"], capacity=77).fingerprint in prints


# --- from keys and shards ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [range(PIECE + 10), (key for key in range(PIECE + 10)), np.arange(PIECE + 10)])
def test_from_keys(keys):
    index = KeyIndex.from_keys(keys)
    assert len(index) == index.capacity == PIECE + 10
    assert index.rows([0, PIECE, PIECE + 10]).tolist() == [0, PIECE, -1]


def test_room_for_more():
    index = KeyIndex.from_keys(["a", "b"], capacity=10)
    assert (len(index), index.capacity) == (2, 10)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: KeyIndex(capacity=0), ValueError, r"KeyIndex\(capacity=0\)"),
        (lambda: KeyIndex.from_keys(["a", "b", "c", "b"]), ValueError, "'b' stands twice"),
        (lambda: KeyIndex.from_keys([]), ValueError, "there is no key"),
        (lambda: KeyIndex.from_keys("abc"), TypeError, r"one key.*give \['abc'\]"),
        (lambda: KeyIndex.from_keys({"a", "b"}), TypeError, r"from_keys: a set's order is another one in each process"),
        (lambda: KeyIndex().add([1.5]), TypeError, "str, bytes or int, not float"),
        (lambda: KeyIndex().rows([True]), TypeError, "str, bytes or int, not bool"),
        (lambda: KeyIndex().row(None), TypeError, "str, bytes or int, not NoneType"),
    ],
)
def test_mistakes(make, error, message):
    with pytest.raises(error, match=message):
        make()


NAMES = [
    "a.jpg", "a.cls", "b.c.jpg", "b.JSON", "folder/", "dotted.x/",
    "folder/a.jpg", "folder.x/a.jpg", "./d.jpg", "no_suffix",
    ".hidden", "__meta__", "__meta__/e.jpg", "__f.jpg", "g/.hidden.txt", "h.", "ü.jpg", "i.1.jpg", "i.2.jpg",
]  # fmt: skip


def test_keys_of_shards_are_webdatasets(tmp_path):
    shards = [write_tar(tmp_path / "x.tar", NAMES), *write_shards(tmp_path, 2, 3)]
    keys = [sample["__key__"] for sample in wds.WebDataset(shards, shardshuffle=False)]
    assert len(keys) >= 15
    assert [key for path in shards for key in shard_keys(path)] == keys
    for index in (KeyIndex.from_shards(shards), KeyIndex.from_shards(Path(path) for path in shards)):
        assert index.rows(keys).tolist() == list(range(len(keys)))
        assert len(index) == index.capacity == len(keys)


def test_shards_in_braces_and_by_url(tmp_path):
    paths = write_shards(tmp_path, 2, 3)
    for urls in (
        f"{tmp_path}/00{{0..1}}.tar",
        [f"pipe:cat {path}" for path in paths],
        [f"file:{path}" for path in paths],
    ):
        assert KeyIndex.from_shards(urls).rows(keys_of(2, 3)).tolist() == list(range(6))
    assert len(KeyIndex.from_shards(Path(paths[0]))) == 3


def test_two_samples_with_one_key(tmp_path):
    shards = [write_tar(tmp_path / "x.tar", ["a.jpg", "b.jpg"]), write_tar(tmp_path / "y.tar", ["b.jpg", "c.jpg"])]
    with pytest.raises(ValueError, match=r"'b' stands twice \(the second time in .*y.tar\)"):
        KeyIndex.from_shards(shards)
    assert len(KeyIndex.from_keys(f"{path}/{key}" for path in shards for key in shard_keys(path))) == 4


def test_no_payload_is_read(tmp_path):
    counter = Path("/proc/self/io")
    if not counter.exists():
        pytest.skip("the system does not count what a process reads")
    with tarfile.open(tmp_path / "large.tar", "w") as tar:
        for number in range(4):
            with (tmp_path / "payload").open("wb") as file:
                file.truncate(4 << 20)
            tar.add(tmp_path / "payload", f"{number}.bin")
    before = int(counter.read_text().split()[1])
    assert list(shard_keys(tmp_path / "large.tar")) == ["0", "1", "2", "3"]
    assert int(counter.read_text().split()[1]) - before < 1 << 20


# --- ranks ------------------------------------------------------------------------------------------------------------


def merged(rank, keys):
    index = KeyIndex.from_keys(keys[rank])
    index.merge_ranks()
    return index.rows(["a", "b", "c", "d"]).tolist(), len(index), index.capacity, index.fingerprint


def test_ranks_that_merge_have_the_same_rows(monkeypatch):
    threads = Threads(monkeypatch)
    monkeypatch.setattr(key_index, "gather_rows", ranks.gather_rows)
    results = threads.run(2, merged, [["c", "a"], ["b", "a", "d"]])
    assert results[0] == results[1]
    assert results[0][:3] == ([1, 2, 0, 3], 4, 4)


def test_one_process_merges_nothing():
    index = KeyIndex.from_keys(["a", "b"], capacity=9)
    before = index.fingerprint
    index.merge_ranks()
    assert (index.fingerprint, index.capacity, index.rows(["b"]).tolist()) == (before, 9, [1])


@pytest.mark.parametrize(
    ("key", "text"), [("ü", b"s\xc3\xbc"), (b"\xff", b"b\xff"), (-12, b"i-12"), (np.int8(3), b"i3")]
)
def test_digests_stay_what_they_are_in_saved_indexes(key, text):
    assert key_digest(key) == blake2b(text, digest_size=16).digest()
