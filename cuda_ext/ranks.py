"""The processes that train together: who is here, and what they tell each other."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of processes of the process group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number in the process group, 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_rows(*tensors: Tensor) -> list[Tensor]:
    """All ranks' rows of each tensor (n_r, ...), in rank order, on the CPU. Collective.

    The tensors of one rank are equally long; the ranks' lengths n_r may differ.
    """
    if world_size() == 1:
        return [rows.cpu() for rows in tensors]
    wire = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")
    length = torch.tensor([tensors[0].shape[0]], device=wire)
    lengths = [torch.empty_like(length) for _ in range(world_size())]
    dist.all_gather(lengths, length)
    counts = [int(n) for n in lengths]
    gathered = []
    for rows in tensors:
        padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=wire)
        padded[: rows.shape[0]] = rows.to(wire)
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        gathered.append(torch.cat([part[:n].cpu() for part, n in zip(parts, counts, strict=True)]))
    return gathered


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of all ranks' values, of any shape, where ``value`` is; the tensor itself without ranks. Collective."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def gather_objects(value: T) -> list[T]:
    """All ranks' values, which can be pickled, by rank, on rank 0; on the others their own. Collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return [value] if values is None else values


def from_first_rank(value: T) -> T:
    """Rank 0's value, which can be pickled, on all ranks. Collective."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
