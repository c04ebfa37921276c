"""Arrays of numbers: what is converted, what is refused, and that the check for finite ones goes in pieces."""

import numpy as np
import pytest
import torch
from episodes_support import flat, made, simulated

from samplewise.loaders import numeric


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_floats_that_numpy_lacks(dtype):
    values = torch.tensor([[0.5], [-2.0]]).to(dtype)
    array = numeric.numeric("F", "x", values)
    assert (array.dtype, array.tolist()) == (np.float32, [[0.5], [-2]])


def test_episodes_of_bfloat16():
    observations = torch.from_numpy(flat(simulated())["observations"]).bfloat16()
    data = made(observations=observations)
    assert data.observations.dtype == np.float32
    assert np.array_equal(data.observations, observations.float())


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([[1], [1, 2]], ValueError, "rows of one shape are needed"),
        ([torch.zeros(2), torch.zeros(3)], ValueError, "rows of one shape are needed"),
        ([torch.zeros(2).bfloat16()] * 2, TypeError, "an array of numbers is needed: Got unsupported"),
        ([torch.zeros(2, requires_grad=True)] * 2, TypeError, "an array of numbers is needed: Can't call"),
        (torch.zeros(2).to_sparse(), TypeError, "an array of numbers is needed: can't convert"),
        (["1"], TypeError, "an array of numbers is needed, not of <U1"),
        (np.ma.masked_array([1.0, 2.0], [False, True]), ValueError, "some elements are masked; fill them"),
    ],
)
def test_refused(values, error, message):
    for convert in (numeric.numbers, numeric.numeric):
        with pytest.raises(error, match=rf"F\(x=...\): .*{message}"):
            convert("F", "x", values)


def test_a_mask_without_masked_elements():
    assert numeric.numbers("F", "x", np.ma.masked_array([1, 2])).tolist() == [1, 2]
    assert numeric.numbers("F", "x", np.ma.masked_array([1, 2], [False, False])).tolist() == [1, 2]


@pytest.mark.parametrize("piece", [1, 6, 7, 1000])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_first_row_that_is_not_finite(monkeypatch, piece, dtype):
    monkeypatch.setattr(numeric, "_PIECE", piece)
    for row in range(11):
        values = np.zeros((11, 3), dtype)
        assert numeric.first_not_finite(values) is None
        values[[row, 10], [row % 3, 0]] = np.nan, np.inf
        assert numeric.first_not_finite(values) == row
    for values in (np.zeros((0, 3)), np.zeros((3, 0)), np.arange(4), np.ones(3, bool)):
        assert numeric.first_not_finite(values) is None


def test_it_goes_in_pieces(tmp_path, monkeypatch):
    """Also through a memory-mapped file, from which few numbers are in memory at one time."""
    sizes, is_finite = [], np.isfinite
    monkeypatch.setattr(numeric.np, "isfinite", lambda values: sizes.append(values.size) or is_finite(values))
    np.save(tmp_path / "values.npy", np.ones((3 << 18, 2), np.float16))
    assert numeric.first_not_finite(np.load(tmp_path / "values.npy", mmap_mode="r")) is None
    assert sizes == [1 << 18] * 6
