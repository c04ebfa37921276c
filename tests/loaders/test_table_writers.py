"""Table: versions of other runs, and more than one writer."""

import numpy as np
import pytest

from samplewise.loaders import Table


def write(table):
    with table.writing({"a": ((2,), np.int32)}):
        pass


def test_restore_tells_versions_of_another_run_apart(tmp_path):
    table = Table(tmp_path / "one", keep=3)
    write(table)
    write(table)
    first = Table(tmp_path / "one")
    token = first.snapshot().token
    write(table)
    table.restore(2, token=token)
    assert table.version == 2
    with pytest.raises(ValueError, match="versions that are there: 1, 2"):
        table.restore(2, token="0" * 32)


def test_two_writers_at_once(tmp_path):
    table = Table(tmp_path)
    with (
        pytest.raises(RuntimeError, match="another writer has removed this version; only one may write"),
        table.writing({"a": ((2,), np.int32)}),
        Table(tmp_path).writing({"a": ((2,), np.int32)}),
    ):
        pass
