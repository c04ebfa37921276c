"""Table: what a reader sees while another process writes, what a crash leaves, and what is refused."""

import json
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from samplewise.loaders import Table

FORK = multiprocessing.get_context("fork")


def publish(table, value, rows=4, **meta):
    """One version whose every number is ``value``."""
    with table.writing({"a": ((rows, 3), np.int32), "b": ((rows,), np.float32)}, meta={"value": value, **meta}) as out:
        out["a"][:] = value
        out["b"][:] = value


def value_of(version):
    """What :func:`publish` wrote; fails where versions are mixed."""
    (value,) = {version.meta["value"], *version.arrays["a"].ravel().tolist(), *version.arrays["b"].tolist()}
    return value


def folders(table):
    return sorted(path.name.rpartition("-")[0] or path.name for path in table.path.iterdir())


def run_forked(function, *args):
    process = FORK.Process(target=function, args=args)
    process.start()
    process.join(60)
    return process.exitcode


# --- versions ---------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_memory_mapped_and_read_only(tmp_path):
    table = Table(tmp_path / "new" / "table", fingerprint="corpus 1")
    meta = {"top_k": np.int64(3)}
    with table.writing({"ids": ((2, 3), "int32"), "none": ((0, 5), np.float64)}, meta=meta) as out:
        assert not out["ids"].any()
        out["ids"][1] = [7, 8, 9]
        meta["mean"] = np.float32(0.5)
        assert table.version == 0
    version = Table(tmp_path / "new" / "table").snapshot()
    assert (version.number, version.fingerprint, version.meta) == (1, "corpus 1", {"top_k": 3, "mean": 0.5})
    assert version.arrays["ids"].tolist() == [[0, 0, 0], [7, 8, 9]]
    assert version.arrays["none"].shape == (0, 5)
    assert all(isinstance(array, np.memmap) for array in version.arrays.values())
    for array in (version.arrays["ids"], out["ids"], table["ids"]):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1


def test_numbers_go_up_and_only_the_latest_stay(tmp_path):
    table = Table(tmp_path, keep=2)
    assert table.version == 0
    for number in (1, 2, 3):
        publish(table, number * 10)
        assert table.version == number
        assert value_of(table.snapshot()) == number * 10
    assert folders(table) == ["current.json", "version-2", "version-3"]


def test_an_old_snapshot_stays_readable(tmp_path):
    table = Table(tmp_path, keep=1)
    publish(table, 1)
    old = table.snapshot()
    publish(table, 2)
    publish(table, 3)
    assert folders(table) == ["current.json", "version-3"]
    assert value_of(old) == 1
    assert value_of(table.snapshot()) == 3


def test_nothing_written_yet(tmp_path):
    for table in (Table(tmp_path), Table(tmp_path / "missing")):
        assert table.version == 0
        for read in (table.snapshot, lambda table=table: table["a"]):
            with pytest.raises(RuntimeError, match="nothing has been written yet"):
                read()
    assert not (tmp_path / "missing").exists()


def test_one_stat_while_nothing_changes(tmp_path, monkeypatch):
    table = Table(tmp_path)
    publish(table, 1)
    first, calls, stat = table.snapshot(), [], os.stat
    monkeypatch.setattr(os, "stat", lambda path: calls.append(path) or stat(path))
    monkeypatch.setattr("builtins.open", None)
    assert table.snapshot() is first
    assert calls == [str(tmp_path / "current.json")]


def test_a_clock_that_stands_still(tmp_path, monkeypatch):
    """Readers tell versions apart by the time of a file, which many file systems keep in steps of milliseconds."""
    monkeypatch.setattr(time, "time_ns", lambda: 10**18)
    writer, reader = Table(tmp_path), Table(tmp_path)
    times = set()
    for number in range(1, 30):
        publish(writer, number)
        times.add(os.stat(tmp_path / "current.json").st_mtime_ns)
        assert value_of(reader.snapshot()) == number
    assert len(times) == 29


# --- other processes --------------------------------------------------------------------------------------------------


def write_all_the_time(path, keep, seconds):
    """Publish and now and then restore, so that version numbers come again with other contents."""
    table = Table(path, keep=keep)
    end, value = time.monotonic() + seconds, 1
    while time.monotonic() < end:
        value += 1
        publish(table, value, rows=500)
        if keep > 1 and value % 5 == 0:
            table.restore(table.version - 1)
    publish(table, -1, rows=500)


def read_all_the_time(path, out):
    table, seen = Table(path), set()
    while -1 not in seen:
        seen.add(value_of(table.snapshot()))
    out.put(len(seen))


@pytest.mark.parametrize("keep", [1, 2])
def test_readers_see_whole_versions_only_while_another_process_writes(tmp_path, keep):
    table, out = Table(tmp_path), FORK.Queue()
    publish(table, 1, rows=500)
    processes = [FORK.Process(target=write_all_the_time, args=(tmp_path, keep, 1.5))]
    processes += [FORK.Process(target=read_all_the_time, args=(tmp_path, out)) for _ in range(2)]
    for process in processes:
        process.start()
    seen = [out.get(timeout=60) for _ in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert min(seen) > 20


def crash_while_writing(path):
    with Table(path).writing({"a": ((4, 3), np.int32)}):
        os._exit(3)


def test_what_a_crashed_writer_leaves_is_not_seen_and_is_removed_with_the_next_version(tmp_path):
    table = Table(tmp_path)
    publish(table, 1)
    assert run_forked(crash_while_writing, tmp_path) == 3
    assert folders(table) == ["current.json", "version-1", "writing"]
    (tmp_path / f"version-2-{'0' * 32}").mkdir()  # renamed, but never made current
    (tmp_path / f"current-{'0' * 32}").write_text("{")
    (tmp_path / "notes.txt").write_text("the user's own")
    assert value_of(Table(tmp_path).snapshot()) == 1
    publish(table, 2)
    assert folders(table) == ["current.json", "notes.txt", "version-1", "version-2"]
    assert value_of(table.snapshot()) == 2


def test_a_crash_before_the_first_version(tmp_path):
    assert run_forked(crash_while_writing, tmp_path / "table") == 3
    table = Table(tmp_path / "table")
    assert table.version == 0
    publish(table, 5)
    assert folders(table) == ["current.json", "version-1"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_block_leaves_nothing(tmp_path, error):
    table = Table(tmp_path / "table")

    def fail():
        with table.writing({"a": ((4, 3), np.int32)}) as out:
            out["a"][:] = 9
            raise error

    with pytest.raises(error):
        fail()
    assert folders(table) == []
    publish(table, 1)
    with pytest.raises(error):
        fail()
    assert folders(table) == ["current.json", "version-1"]
    assert value_of(table.snapshot()) == 1


def test_a_version_deleted_between_pointer_and_arrays_is_read_again(tmp_path, monkeypatch):
    writer, reader = Table(tmp_path, keep=1), Table(tmp_path)
    publish(writer, 1)
    load, late = np.load, []

    def slow_load(path, **options):
        if len(late) < 2:
            late.append(path)
            publish(writer, 1 + len(late))
        return load(path, **options)

    monkeypatch.setattr(np, "load", slow_load)
    assert value_of(reader.snapshot()) == 3
    assert len(late) == 2


def test_a_number_that_comes_again_while_its_arrays_are_opened_is_not_mixed(tmp_path, monkeypatch):
    writer, reader = Table(tmp_path), Table(tmp_path)
    publish(writer, 1)
    publish(writer, 2)
    load, late = np.load, []

    def slow_load(path, **options):
        if Path(path).name == "b.npy" and not late:
            late.append(path)
            writer.restore(1)
            publish(writer, 22)
        return load(path, **options)

    monkeypatch.setattr(np, "load", slow_load)
    assert value_of(reader.snapshot()) == 22
    assert late


def test_a_version_published_while_the_pointer_is_read_is_seen_next_time(tmp_path, monkeypatch):
    writer, reader = Table(tmp_path), Table(tmp_path)
    publish(writer, 1)
    plain_open, late = open, []

    def slow_open(path, *arguments, **options):
        file = plain_open(path, *arguments, **options)
        if str(path).endswith("current.json") and not late:
            late.append(path)
            publish(writer, 2)
        return file

    monkeypatch.setattr("builtins.open", slow_open)
    reader.snapshot()
    assert late
    assert value_of(reader.snapshot()) == 2


def test_pickled_it_opens_the_same_folder_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = Table("table", fingerprint="f", keep=3)
    publish(table, 1, rows=10_000)
    table.snapshot()
    data = pickle.dumps(table)
    assert len(data) < 1000
    monkeypatch.chdir("/")
    twin = pickle.loads(data)
    assert (twin.path, twin.fingerprint, twin.keep) == (tmp_path / "table", "f", 3)
    assert value_of(twin.snapshot()) == 1
    publish(table, 2)
    assert value_of(twin.snapshot()) == 2


# --- restore ----------------------------------------------------------------------------------------------------------


def test_restore_makes_an_older_version_current_and_deletes_later_ones(tmp_path):
    table, reader = Table(tmp_path, keep=3), Table(tmp_path)
    for value in (10, 20, 30):
        publish(table, value)
    assert value_of(reader.snapshot()) == 30
    table.restore(1)
    assert folders(table) == ["current.json", "version-1"]
    assert (reader.version, value_of(reader.snapshot())) == (1, 10)
    publish(table, 21)
    assert (reader.version, value_of(reader.snapshot())) == (2, 21)
    before = table.snapshot()
    table.restore(2)  # is current already
    assert table.snapshot() is before
    assert folders(table) == ["current.json", "version-1", "version-2"]


def test_restore_what_is_gone(tmp_path):
    table = Table(tmp_path, keep=2)
    with pytest.raises(ValueError, match=r"restore\(1\): versions that are there: none"):
        table.restore(1)
    for value in (1, 2, 3):
        publish(table, value)
    for number in (1, 4):
        with pytest.raises(ValueError, match=rf"restore\({number}\): versions that are there: 2, 3.*larger keep"):
            table.restore(number)
    assert table.version == 3


# --- fingerprints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("written", "opened"), [("f", "f"), ("", "f"), ("f", ""), ("", "")])
def test_fingerprints_that_agree(tmp_path, written, opened):
    publish(Table(tmp_path, fingerprint=written), 1)
    version = Table(tmp_path, fingerprint=opened).snapshot()
    assert (value_of(version), version.fingerprint) == (1, written)


def test_a_table_of_other_data_is_refused(tmp_path):
    reader = Table(tmp_path, fingerprint="mine")
    publish(Table(tmp_path, fingerprint="theirs"), 1)
    for read in (lambda: Table(tmp_path, fingerprint="mine"), reader.snapshot, lambda: reader.version):
        with pytest.raises(ValueError, match=r"fingerprint 'theirs', this data has 'mine'"):
            read()


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_bad_construction(tmp_path):
    for arguments, error, message in [
        ({"keep": 0}, ValueError, "keep"),
        ({"keep": 1.5}, TypeError, "keep"),
        ({"fingerprint": 3}, TypeError, "fingerprint must be a str"),
    ]:
        with pytest.raises(error, match=message):
            Table(tmp_path, **arguments)


def test_folders_that_are_no_tables(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="this is a file"):
        Table(tmp_path / "file")
    with pytest.raises(ValueError, match=r"holds no table, but file; give a new or an empty folder"):
        Table(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden").write_text("")
    publish(Table(tmp_path / "empty"), 1)


def current_folder(path):
    return Path(path, json.loads(Path(path, "current.json").read_text())["versions"][-1][1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "current.json").write_text("{"), "is damaged: current.json"),
        (lambda path: (path / "current.json").write_text("[1]"), "is damaged: current.json"),
        (lambda path: (path / "current.json").write_text('{"format": 1}'), "is damaged: current.json"),
        (lambda path: (path / "current.json").write_text('{"format": 2, "versions": []}'), "format is 2, .* reads 1"),
        (lambda path: (path / "current.json").write_text('{"format": 1, "versions": []}'), "is damaged: current.json"),
        (lambda path: (current_folder(path) / "a.npy").unlink(), r"is damaged: .*a\.npy is missing"),
        (lambda path: (current_folder(path) / "a.npy").write_bytes(b""), "is damaged: version 1 cannot be read"),
        (lambda path: os.truncate(current_folder(path) / "a.npy", 150), "is damaged: version 1 cannot be read"),
        (lambda path: (current_folder(path) / "version.json").write_text("{}"), "is damaged: version 1 cannot be read"),
        (lambda path: (current_folder(path) / "version.json").unlink(), r"is damaged: .*version\.json is missing"),
    ],
)
def test_damaged_tables(tmp_path, damage, message):
    publish(Table(tmp_path), 1)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        Table(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "meta", "error", "message"),
    [
        ({}, None, ValueError, "at least one array"),
        ({"../a": ((1,), np.int32)}, None, ValueError, "must be an identifier"),
        ({"a": ((1,), object)}, None, TypeError, "'a' holds Python objects"),
        ({"a": ((1,), np.int32)}, {"x": object()}, TypeError, r"meta=.*JSON"),
        ({"a": ((1,), np.int32)}, {(1, 2): 3}, TypeError, r"meta=.*JSON"),
    ],
)
def test_bad_versions_are_refused_before_any_work(tmp_path, arrays, meta, error, message):
    table = Table(tmp_path / "table")
    with pytest.raises(error, match=message), table.writing(arrays, meta=meta):
        pytest.fail("the block must not run")
    assert not (tmp_path / "table").exists()


def test_notes_that_become_bad_in_the_block_leave_nothing(tmp_path):
    table, meta = Table(tmp_path), {}
    with pytest.raises(TypeError, match=r"meta=.*JSON"), table.writing({"a": ((1,), np.int32)}, meta=meta):
        meta["x"] = object()
    assert folders(table) == []


def test_arrays_that_are_not_there(tmp_path):
    table = Table(tmp_path)
    publish(table, 1)
    with pytest.raises(KeyError, match=r"no array 'c'; it has a, b"):
        table["c"]
