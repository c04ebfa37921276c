"""Recording a batch of losses: the ledger's kernel against torch, numpy, one float a sample, and the machine's limit.

Every way but the float store changes the same records, so that all of them meet the same memory. The batches are those
of shuffled epochs: no sample twice in one. Between two uses of a batch 4 million other ids are recorded.

    Ledger.update   what a training loop calls
    op              the native kernel under it, called directly
    reference       the same bits from numpy, where no kernel is built
    torch columns   the statistics by indexing one column after another; of a sample's duplicates the last one counts
    torch records   the same on whole records, by index_select and index_copy_: the fastest eager form found
    numpy           whole records, as void scalars of 32 bytes, which is numpy's fastest way
    float store     store[ids] = losses, a single statistic
    limit           add 1 to every word of the 32-byte records in C++ (random_access.cpp)
"""

import argparse
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timing import best_of, best_of_each, header, judged, table
from torch import Tensor

from samplewise.cuda_ext import Ledger, ops, reference
from samplewise.cuda_ext.reference import COUNT, LAST_STEP, LOSS_EMA, LOSS_LAST, LOSS_M2, LOSS_MEAN

BATCHES = (256, 4096, 65_536)
IDS = 1 << 22  # recorded in one turn
RATE = 0.1  # 1 - the decay of the moving average
Way = Callable[[Tensor, Tensor], object]


def torch_columns(records: Tensor, ids: Tensor, losses: Tensor, step: int = 0) -> None:
    integers = records.view(torch.int32)
    count = integers[ids, COUNT] + 1
    mean, ema = records[ids, LOSS_MEAN], records[ids, LOSS_EMA]
    delta = losses - mean
    mean = mean + delta / count
    records[ids, LOSS_M2] = records[ids, LOSS_M2] + delta * (losses - mean)
    records[ids, LOSS_MEAN] = mean
    records[ids, LOSS_EMA] = torch.where(count == 1, losses, ema + RATE * (losses - ema))
    records[ids, LOSS_LAST] = losses
    integers[ids, COUNT] = count
    integers[ids, LAST_STEP] = step


def torch_records(records: Tensor, ids: Tensor, losses: Tensor, step: int = 0) -> None:
    rows = records.index_select(0, ids)
    integers = rows.view(torch.int32)
    count, mean, ema = integers[:, COUNT], rows[:, LOSS_MEAN], rows[:, LOSS_EMA]
    count += 1
    delta = losses - mean
    mean += delta / count
    rows[:, LOSS_M2] += delta * (losses - mean)
    rows[:, LOSS_EMA] = torch.where(count == 1, losses, ema + RATE * (losses - ema))
    rows[:, LOSS_LAST] = losses
    integers[:, LAST_STEP] = step
    records.index_copy_(0, ids, rows)


def by_numpy(records: Tensor, ids: Tensor, losses: Tensor, step: int = 0) -> None:
    whole, rows, values = records.numpy().view("V32")[:, 0], ids.numpy(), losses.numpy()
    some = whole[rows]
    floats = some.view(np.float32).reshape(-1, 8)
    integers = floats.view(np.int32)
    count, mean, ema = integers[:, COUNT], floats[:, LOSS_MEAN], floats[:, LOSS_EMA]
    count += 1
    delta = values - mean
    mean += delta / count.astype(np.float32)
    floats[:, LOSS_M2] += delta * (values - mean)
    floats[:, LOSS_EMA] = np.where(count == 1, values, ema + np.float32(RATE) * (values - ema))
    floats[:, LOSS_LAST] = values
    integers[:, LAST_STEP] = step
    whole[rows] = some


def ways_to_record(ledger: Ledger) -> dict[str, Way]:
    records, store = ledger.records, torch.ones(ledger.size)
    counters, links = torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)

    def op(ids: Tensor, losses: Tensor) -> None:
        torch.ops.samplewise.ledger_update(records, counters, links, ids, losses, None, None, 1 - RATE)

    def by_reference(ids: Tensor, losses: Tensor) -> None:
        reference.ledger_update(records, counters, links, ids, losses, None, None, 1 - RATE)

    return {
        "Ledger.update": ledger.update,
        "op": op,
        "reference": by_reference,
        "torch columns": partial(torch_columns, records),
        "torch records": partial(torch_records, records),
        "numpy": partial(by_numpy, records),
        "float store": store.__setitem__,
    }


def compiled_limit(folder: str) -> Callable[..., None] | None:
    """``add_one`` of random_access.cpp, or None without a compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    library = Path(folder) / "random_access.so"
    source = Path(__file__).with_name("random_access.cpp")
    subprocess.run([compiler, "-O3", "-std=c++17", "-shared", "-fPIC", source, "-o", library], check=True)
    function = ctypes.CDLL(str(library)).add_one
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    function.restype = None
    return function


def shuffled_ids(size: int, batch: int) -> Tensor:
    """Ids of shuffled epochs, int64 (IDS,): each epoch ends with its last whole batch."""
    epoch = min(size // batch * batch, IDS)
    epochs = [ops.permutation(size, seed, 0, epoch) for seed in range(-(-IDS // epoch))]
    return torch.cat(epochs)[:IDS]


def record_all(record: Way, ids: tuple[Tensor, ...], losses: tuple[Tensor, ...]) -> None:
    for some_ids, some_losses in zip(ids, losses, strict=True):
        record(some_ids, some_losses)


def measure(size: int, limit: Callable[..., None] | None, repeat: int) -> None:
    batches = [batch for batch in BATCHES if batch <= size]
    ledger = Ledger(size)
    ids, losses = shuffled_ids(size, batches[-1]), torch.rand(IDS)
    ledger.update(ids, losses)  # touches the memory
    ways = ways_to_record(ledger)
    turns: dict[tuple[int, str], Callable[[], None]] = {}
    for batch in batches:
        split = ids.split(batch), losses.split(batch)
        turns |= {(batch, name): partial(record_all, way, *split) for name, way in ways.items()}
        if limit:
            turns[batch, "limit"] = partial(limit, ledger.records.data_ptr(), ids.data_ptr(), IDS, batch)
    seconds = best_of_each(turns, repeat=repeat)

    rows = []
    for batch in batches:
        ns = {name: seconds[batch, name] / IDS * 1e9 for name in [*ways, "limit"] if (batch, name) in seconds}
        native = ns["Ledger.update"]
        row = [f"{batch:,}", *(f"{ns[name]:.1f}" if name in ns else "-" for name in [*ways, "limit"])]
        most = 1.35 if size >= 10**6 and batch >= 4096 else None
        least = 8 if size == 10**7 else None
        row.append(judged(native / ns["limit"], most=most) if limit else "-")
        row.append(judged(ns["torch columns"] / native, least=least))
        row.append(judged(ns["torch records"] / native, least=least))
        rows.append(row)
    ratios = ["update / limit", "torch columns / update", "torch records / update"]
    table([f"ns an id, N = {size:,}; batch", *ways, "limit", *ratios], rows)


def overhead() -> None:
    """Microseconds of recording a single id: what a call costs."""
    one, loss = torch.zeros(1, dtype=torch.int64), torch.rand(1)
    ways = ways_to_record(Ledger(1000))
    us = {name: best_of(partial(way, one, loss), number=1000) * 1e6 for name, way in ways.items()}
    table(["us a call of one id", *us], [["", *(f"{value:.1f}" for value in us.values())]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, nargs="*", default=[1e5, 1e6, 1e7, 1e8], help="samples, 256 or more")
    parser.add_argument("--repeat", type=int, default=5, help="turns of every way")
    arguments = parser.parse_args()
    header("Recording losses (nanoseconds an id)")
    overhead()
    with tempfile.TemporaryDirectory() as folder:
        limit = compiled_limit(folder)
        for size in map(int, arguments.size):
            measure(size, limit, arguments.repeat)


if __name__ == "__main__":
    main()
