"""What several tests share; importable as ``support``, in spawned processes too."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from samplewise.cuda_ext import NATIVE
from samplewise.loaders import Plan, PlannedSampler

NATIVE_SOURCES = Path(__file__).parents[1] / "cuda_ext" / "csrc"


def compiled_for_the_cpu(source: Path, folder: Path) -> ctypes.CDLL:
    """A file of CUDA kernels and what runs them on the CPU, see ``emulate.h``."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++, which compiles the CUDA kernels for the CPU")
    flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror"]
    library = folder / source.with_suffix(".so").name
    subprocess.run([compiler, *flags, f"-I{NATIVE_SOURCES}", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


needs_kernels = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("samplewise::ledger_update", "CPU"),
    reason=f"CPU kernels {NATIVE['CPU']}",
)


class Everything(PlannedSampler):
    """The whole data set, every epoch."""

    def plan(self, epoch, rng):
        return Plan(range(self.size))


class HardHalf(PlannedSampler):
    """Depends on the ledger, has weights and a length of its own each epoch: the hardest case of a method."""

    def plan(self, epoch, rng):
        losses = self.ledger.column("loss_last").numpy()
        seen = self.ledger.seen.numpy()
        if not seen.any():
            return Plan(np.arange(self.size))
        easy = losses < losses[seen].mean()
        keep = ~easy | (rng.random(self.size) < 0.5)
        return Plan(np.flatnonzero(keep), np.where(easy, 2.0, 1.0)[keep].astype(np.float32))


class Lengths(PlannedSampler):
    """Epoch e trains on the first ``lengths[e]`` samples."""

    def __init__(self, size, *, lengths, **common):
        super().__init__(size, **common)
        self.lengths = lengths

    def plan(self, epoch, rng):
        return Plan(np.arange(self.lengths[epoch % len(self.lengths)]))


class Returns(PlannedSampler):
    def __init__(self, size, plan, **common):
        super().__init__(size, **common)
        self.returned = plan

    def plan(self, epoch, rng):
        return self.returned


@contextmanager
def without_marked_lines(recipe: types.ModuleType) -> Iterator[Any]:
    """A recipe's module without the lines that end in ``# samplewise``, in which nothing of samplewise is left."""
    lines = Path(recipe.__file__).read_text().splitlines()
    kept = [line for line in lines if not line.endswith("# samplewise")]
    assert 5 <= len(lines) - len(kept) <= 14
    plain = types.ModuleType(f"{recipe.__name__}_plain")
    sys.modules[plain.__name__] = plain  # dataclasses look their module up
    try:
        exec("\n".join(kept), vars(plain))
        for name in ("SamplingCallback", "BudgetSchedule", "SwitchBits", "RetrievalDataset", "with_ids"):
            assert not hasattr(plain, name)
        yield plain
    finally:
        del sys.modules[plain.__name__]


def loss_of(ids: torch.Tensor, step: int = 0) -> torch.Tensor:
    """A loss that tells its sample: (B,) float32 with a graph."""
    return (1 + torch.sin(ids.float() * 12.9898 + step)).requires_grad_()


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run ``function(rank, *args)`` in ``world`` gloo processes and give what each returned, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank_main, args=(world, port, folder, function, args), nprocs=world, start_method="spawn", join=True
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank_main(rank, world, port, folder, function, args):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
        sys.stdout.flush()
