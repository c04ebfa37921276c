"""What users give as arrays of numbers: how it is converted, and what is refused, in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

_PIECE = 1 << 18  # numbers that are looked at in one go: few enough for the cache, and for what is larger than memory
_FLOATS_OF_NUMPY = (torch.float16, torch.float32, torch.float64)


def numbers(owner: str, name: str, values: Any) -> Array:
    """``values`` as an array of numbers of the dtype that they have; bfloat16, which numpy lacks, as float32.

    Raises:
        TypeError: anything but numbers.
        ValueError: rows of different shapes, or masked elements.
    """
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise ValueError(
            f"{owner}({name}=...): masks are not kept, but some elements are masked; fill them (numpy.ma.filled), or "
            f"leave their episodes out."
        )
    try:
        array = _of_tensor(values) if isinstance(values, Tensor) else np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{owner}({name}=...): rows of one shape are needed: {error}") from error
    except (TypeError, RuntimeError) as error:  # tensors that cannot be arrays, for example in a list
        raise TypeError(f"{owner}({name}=...): an array of numbers is needed: {error}") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{owner}({name}=...): an array of numbers is needed, not of {array.dtype}.")
    return array


def _of_tensor(values: Tensor) -> Array:
    values = values.detach().cpu()
    if values.is_floating_point() and values.dtype not in _FLOATS_OF_NUMPY:
        values = values.float()
    array: Array = values.numpy()
    return array


def numeric(owner: str, name: str, values: Any) -> Array:
    """``values`` as an array of numbers that torch knows; float64 as float32.

    Numbers beyond float32 become inf, which :func:`check_finite` refuses.

    Raises:
        TypeError, ValueError: see :func:`numbers`.
    """
    array = numbers(owner, name, values)
    wide = array.dtype.kind == "f" and array.dtype.itemsize > 4
    with np.errstate(over="ignore"):
        return array.astype(np.float32 if wide else array.dtype.newbyteorder("="), copy=False)


def as_rewards(owner: str, values: Any) -> NDArray[np.float32]:
    """``values`` as float32, see :func:`numeric`."""
    return numeric(owner, "rewards", values).astype(np.float32, copy=False)


def as_flags(owner: str, name: str, values: Any) -> NDArray[np.bool_]:
    """``values`` as bool.

    Raises:
        TypeError: anything but numbers.
        ValueError: a number that is neither 0 nor 1.
    """
    array = numeric(owner, name, values)
    if array.dtype.kind != "b" and not ((array == 0) | (array == 1)).all():
        raise ValueError(f"{owner}({name}=...): True or False (1 or 0) is needed for each transition.")
    return array.astype(np.bool_, copy=False)


def first_not_finite(values: Array) -> int | None:
    """The first row of (rows, ...) with a number that is not finite, None where there is none.

    It goes piece by piece, so that of a memory-mapped array little is in memory.
    """
    if values.dtype.kind != "f" or not values.size:
        return None
    rows = max(1, _PIECE * len(values) // values.size)
    for start in range(0, len(values), rows):
        finite = np.isfinite(values[start : start + rows])
        if not finite.all():
            return start + int(finite.reshape(len(finite), -1).all(axis=1).argmin())
    return None


def check_finite(owner: str, name: str, values: Array, place: Callable[[int], str] = "row {}".format) -> None:
    """Look at each number of an array (rows, ...), in the dtype that is kept; ``place`` names a row for the error.

    Raises:
        ValueError: some are not finite.
    """
    row = first_not_finite(values)
    if row is not None:
        raise ValueError(
            f"{owner}({name}=...): all numbers must be finite as {values.dtype}, but not all are, the first in "
            f"{place(row)}, from 0; correct them, or leave that episode out."
        )
