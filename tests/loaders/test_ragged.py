import numpy as np
import pytest
import torch

from samplewise.loaders import Ragged

ROWS = [[3, 5], [], [7], [1, 0, 2]]


def as_lists(ragged):
    return [row.tolist() for row in ragged]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (ROWS, ROWS),
        ([(3, 5), np.array([], np.int32), 7, np.array([1, 0, 2], np.uint8)], ROWS),
        ([4, 2], [[4], [2]]),
        (np.array([4, 2], np.int32), [[4], [2]]),
        (np.array([[4, 2], [1, 1]]), [[4, 2], [1, 1]]),
        ([], []),
        (np.empty((2, 0), np.int64), [[], []]),
    ],
    ids=str,
)
def test_from_lists(rows, expected):
    ragged = Ragged.from_lists(rows)
    assert len(ragged) == len(expected)
    assert as_lists(ragged) == expected
    assert ragged.values.dtype == ragged.offsets.dtype == np.int64
    assert ragged.lengths.tolist() == [len(row) for row in expected]
    assert Ragged.from_lists(ragged) is ragged


@pytest.mark.parametrize("row", [[0.5], ["a"], [[1, 2]], [None]])
def test_rows_that_are_no_integers(row):
    with pytest.raises(TypeError, match=r"mine\(positives\): row 1 must hold integers"):
        Ragged.from_lists([[1], row], "mine(positives)")


@pytest.mark.parametrize("rows", [{0: [3], 1: [2]}, "12", 5, None])
def test_what_has_no_rows(rows):
    with pytest.raises(TypeError, match=r"mine\(positives\): a list of lists of integers is needed"):
        Ragged.from_lists(rows, "mine(positives)")


@pytest.mark.parametrize("rows", [[np.int64(3), {2, 1}], torch.tensor([[3], [1]]), [torch.tensor([3]), (1,)]])
def test_rows_of_other_kinds(rows):
    assert Ragged.from_lists(rows)[0].tolist() == [3]


def test_take_and_padded():
    ragged = Ragged.from_lists(ROWS)
    taken = ragged.take(np.array([3, 1, 0, 3]))
    assert as_lists(taken) == [ROWS[3], ROWS[1], ROWS[0], ROWS[3]]
    assert taken.row_numbers().tolist() == [0, 0, 0, 2, 2, 3, 3, 3]
    assert ragged.padded().tolist() == [[3, 5, -1], [-1, -1, -1], [7, -1, -1], [1, 0, 2]]
    assert ragged.padded(9)[1].tolist() == [9, 9, 9]
    assert ragged.take(np.array([1])).padded().tolist() == [[-1]]
    assert as_lists(ragged.take(np.empty(0, np.int64))) == []


@pytest.mark.parametrize("row", [-1, 4])
def test_rows_outside(row):
    with pytest.raises(IndexError, match=f"row {row} of 4"):
        Ragged.from_lists(ROWS)[row]
