"""The CUDA kernels on the CPU, their threads and blocks in random order: the same bits as the reference.

What only a GPU runs stays to test_cuda.py: its atomics, its barriers and the sums over a warp in the histogram.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_double, c_int64, c_uint32, c_uint64, c_void_p
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernel_cases import DRAW, HISTOGRAM, LEDGER, PERMUTATION, assert_same, ledger_arguments, results
from samplewise.cuda_ext import reference
from support import compiled_for_the_cpu

ORDERS = 3


class Strided(ctypes.Structure):
    """A column, as the kernels take it."""

    _fields_ = (("data", c_void_p), ("stride", c_int64))

    @classmethod
    def of(cls, values: Tensor | None) -> Strided:
        return cls(None, 0) if values is None else cls(values.data_ptr(), values.stride(0))


ARGUMENTS = {
    "ledger_update": (c_void_p, c_uint64, c_void_p, c_void_p, c_uint64, *[Strided] * 4, c_bool, c_double),
    "permutation": (c_void_p, c_uint64, c_uint32, c_uint64, c_uint64, c_uint64),
    "draw": (c_void_p, c_uint64, c_void_p, c_void_p, c_uint64, c_uint64),
    "histogram": (c_void_p, c_uint32, Strided, c_uint64, c_int64, c_uint32),
}


class Emulated:
    """The ops, run by phases.cpp; every call has another order of threads and blocks."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        self.order = count()
        for name, types in ARGUMENTS.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = (c_uint64, *types), None

    def ledger_update(self, records, counters, links, ids, losses, scores, steps, ema):
        columns = [Strided.of(column) for column in (ids, losses, scores, steps)]
        state = records.data_ptr(), records.shape[0], counters.data_ptr(), links.data_ptr()
        self.library.ledger_update(next(self.order), *state, ids.numel(), *columns, steps is not None, ema)

    def permutation(self, out, n, seed, start, stride):
        self.library.permutation(next(self.order), out.data_ptr(), out.numel(), n, seed, start, stride)

    def draw(self, out, tau, weights, seed):
        memory = out.data_ptr(), out.numel(), tau.data_ptr(), weights.data_ptr(), weights.numel()
        self.library.draw(next(self.order), *memory, seed)

    def histogram(self, bins, values, low, shift):
        column = Strided.of(values), values.numel()
        self.library.histogram(next(self.order), bins.data_ptr(), bins.shape[0], *column, low, shift)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    return Emulated(compiled_for_the_cpu(Path(__file__).with_name("phases.cpp"), tmp_path_factory.mktemp("phases")))


@pytest.mark.parametrize("spread", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("arguments", LEDGER)
def test_ledger_update(emulated, arguments, spread):
    expected = results(reference.ledger_update, arguments, 3, repeat=2)
    for _ in range(ORDERS):
        assert_same(results(emulated.ledger_update, arguments, 3, spread=spread, repeat=2), expected)


@pytest.mark.parametrize("steps", [False, True])
def test_ids_outside_are_counted_and_passed_over(emulated, steps):
    ids = torch.arange(600) % 40 - 10
    ids[::50] = 2**40
    records, counters, links, _, losses, *rest = ledger_arguments(20, ids, steps=steps)
    inside = (ids >= 0) & (ids < 20)
    rest[1] = rest[1][inside] if steps else None
    expected = results(reference.ledger_update, (records, counters, links, ids[inside], losses[inside], *rest), 3)
    expected[1][reference.OUT_OF_RANGE] = (~inside).sum()
    assert_same(results(emulated.ledger_update, ledger_arguments(20, ids, steps=steps), 3), expected)


@pytest.mark.parametrize("arguments", PERMUTATION)
def test_permutation(emulated, arguments):
    assert_same(results(emulated.permutation, arguments, 1), results(reference.permutation, arguments, 1))


@pytest.mark.parametrize("arguments", DRAW)
def test_draw(emulated, arguments):
    assert_same(results(emulated.draw, arguments, 2), results(reference.draw, arguments, 2))


@pytest.mark.parametrize("spread", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("arguments", HISTOGRAM)
def test_histogram(emulated, arguments, spread):
    expected = results(reference.histogram, arguments, 1)
    assert_same(results(emulated.histogram, arguments, 1, spread=spread), expected)
