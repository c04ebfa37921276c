"""Very large data: N = 1e8 samples on one machine, 1e9 over ranks, and whether time and memory grow in proportion.

Each measurement runs in a process of its own, so that its peak memory is its own. With ``--quick`` it
takes a minute and stops at 1e7; without, some minutes and 12 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timing import header, judged, table
from torch.utils.data import DataLoader

from samplewise.cuda_ext import ranks, reference
from samplewise.loaders import collate_with_ids, with_ids
from samplewise.plugins import RS2, InfoBatch, SeTa, Uniform

METHODS = {
    "Uniform": lambda size: Uniform(size),
    "RS2 10 %": lambda size: RS2(size, ratio=0.1),
    "InfoBatch": lambda size: InfoBatch(size, epochs=10),
    "SeTa": lambda size: SeTa(size, epochs=10),
    "Uniform, sharded": lambda size: Uniform(size, sharded=True),
    "RS2 10 %, sharded": lambda size: RS2(size, ratio=0.1, mode="hash", sharded=True),
    "InfoBatch, sharded": lambda size: InfoBatch(size, epochs=10, sharded=True),
    "SeTa, sharded": lambda size: SeTa(size, epochs=10, sharded=True),
}
BATCH = 1024
RANKS = 16
_PIECE = 1_000_000


class Rows:
    """A data set that holds one float a row and fetches whole batches."""

    def __init__(self, size: int):
        self.x = torch.from_numpy(np.arange(size, dtype=np.float32))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.x[index]

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        return self.x[indices]


class Nothing(Rows):
    """As many rows without memory."""

    def __init__(self, size: int):
        self.x = range(size)

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        return torch.empty(len(indices))


def same(batch: torch.Tensor) -> torch.Tensor:
    return batch


def fill(ledger: object, seed: int = 0) -> None:
    """A loss for every row, as an epoch of training leaves it, without the hours that this would take."""
    rng = np.random.default_rng(seed)
    records = ledger.records.numpy()
    for start in range(0, len(records), _PIECE):
        part = records[start : start + _PIECE]
        losses = rng.standard_exponential(len(part), dtype=np.float32)
        for column in (reference.LOSS_LAST, reference.LOSS_EMA, reference.LOSS_MEAN):
            part[:, column] = losses
        part.view(np.int32)[:, reference.COUNT] = 1


def peak() -> float:
    """Peak memory of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def seconds(function: object) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def one_machine(method: str, size: int) -> dict[str, float]:
    """Memory and times of one sampler between two epochs."""
    base = peak()
    sampler = METHODS[method](size)
    fill(sampler.ledger)
    ledger = peak() - base
    plan = seconds(lambda: sampler.set_epoch(1))
    loader = DataLoader(with_ids(Nothing(size)), batch_size=BATCH, sampler=sampler, collate_fn=collate_with_ids(same))
    batches = iter(loader)
    first = seconds(lambda: next(batches))
    losses = torch.rand(BATCH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    times = []
    for ids, _ in islice(batches, 90):
        part = losses[: len(ids)]
        times.append(seconds(lambda ids=ids, part=part: sampler.observe(ids, part)) / len(ids))
    total = peak() - base
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.pt"
        save = seconds(lambda: torch.save(sampler.state_dict(), file))
        written = file.stat().st_size / 1e9
    return {
        "ledger": ledger,
        "peak": total,
        "plan": plan,
        "first": first,
        "observe": float(np.median(times)),
        "save": save,
        "written": written,
    }


def pretend(world: int) -> None:
    """This process is the first of so many ranks, and hears from the others what it says itself: they are alike."""
    ranks.rank, ranks.world_size = lambda: 0, lambda: world
    ranks.gather_rows = lambda *tensors: [torch.cat([rows.cpu()] * world) for rows in tensors]


def share(method: str, size: int, world: int) -> dict[str, float]:
    """As ``one_machine``, of one rank's share of a ledger that is dealt out over ``world`` ranks."""
    pretend(world)
    return one_machine(f"{method}, sharded", size)


def real_ranks(size: int) -> dict[str, float]:
    """Two ranks that do talk: the time of planning, of moving ids to equal lengths, and of a sync."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_one_of_two, args=(size, folder), nprocs=2, start_method="spawn")
        return json.loads((Path(folder) / "0.json").read_text())


def _one_of_two(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    base = peak()
    sampler = METHODS["InfoBatch, sharded"](size)
    fill(sampler.ledger, seed=rank)
    dist.barrier()
    plan = seconds(lambda: sampler.set_epoch(1))
    ids = torch.from_numpy(sampler.current_plan.ids[: size // 10])
    losses = torch.ones(len(ids), requires_grad=True)
    for part, values in zip(ids.split(BATCH), losses.split(BATCH), strict=True):
        sampler.observe(part, values)
    dist.barrier()
    sync = seconds(sampler.sync)
    found = {"plan": plan, "sync": sync, "observed": len(ids), "peak": peak() - base, "ids": len(sampler)}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def loading(kind: str, size: int) -> dict[str, float]:
    """Peak memory of a whole pass over rows in memory."""
    data = Rows(size)
    base = peak()
    if kind == "bare":
        loader = DataLoader(data, batch_size=BATCH, collate_fn=same)
    elif kind == "shuffle=True":
        loader = DataLoader(data, batch_size=BATCH, shuffle=True, collate_fn=same)
    else:
        loader = DataLoader(with_ids(data), batch_size=BATCH, sampler=Uniform(size), collate_fn=collate_with_ids(same))
    took = seconds(lambda: [None for _ in loader])
    return {"peak": peak() - base, "seconds": took}


CASES = {"one_machine": one_machine, "share": share, "real_ranks": real_ranks, "loading": loading}


def measured(case: str, *arguments: object) -> dict[str, float]:
    """A case in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps([case, *arguments])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case}{arguments}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def named(size: int) -> str:
    return f"{size:.0e}".replace("e+0", "e")


def show_samplers(case: str, title: str, sizes: list[int], *arguments: int) -> None:
    rows = []
    for method in ("Uniform", "RS2 10 %", "InfoBatch", "SeTa"):
        before: dict[str, float] | None = None
        for size in sizes:
            now = measured(case, method, size, *arguments)
            growth = ["", ""] if before is None else [f"{now[name] / before[name]:.1f}x" for name in ("plan", "peak")]
            rows.append(
                [
                    f"{method}, {named(size)}",
                    f"{now['ledger']:.2f}",
                    f"{now['peak']:.2f}",
                    growth[1],
                    f"{now['plan']:.2f}",
                    growth[0],
                    judged(now["first"], " s", most=1, digits=3),
                    f"{now['observe'] * 1e9:.0f}",
                    f"{now['written']:.2f}",
                    f"{now['save']:.1f}",
                ]
            )
            before = now
    columns = [title, "ledger GB", "peak GB", "growth", "plan s", "growth", "first batch after"]
    table([*columns, "observe ns an id", "checkpoint GB", "s"], rows)


def show_real_ranks(size: int) -> None:
    found = measured("real_ranks", size)
    cells = [f"{found['plan']:.2f}", f"{found['sync']:.2f}", f"{found['observed']:,}", f"{found['peak']:.2f}"]
    table(["two ranks", "plan s", "sync s", "observed a rank", "peak GB"], [[f"InfoBatch, {named(size)}", *cells]])


def show_loading(size: int) -> None:
    results = {kind: measured("loading", kind, size) for kind in ("bare", "shuffle=True", "with_ids + Uniform")}
    rows = []
    for kind, found in results.items():
        more = found["peak"] - results["bare"]["peak"]
        target = {"most": 1.0} if kind.startswith("with_ids") else {}
        rows.append([kind, f"{found['peak']:.2f}", judged(more, " GB", **target), f"{found['seconds']:.1f}"])
    table([f"a pass over {named(size)} rows", "GB beside the data", "more than bare", "s"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case, *arguments = json.loads(options.case)
        torch.set_num_threads(1)
        print(json.dumps(CASES[case](*arguments)))
        return
    header("Very large data")
    largest = 10**7 if options.quick else 10**8
    show_loading(largest // 10)
    show_samplers("one_machine", "one machine, N", [largest // 100, largest // 10, largest])
    show_samplers("share", f"one of {RANKS} ranks, N of all", [largest, 10 * largest], RANKS)
    show_real_ranks(largest)


if __name__ == "__main__":
    main()
