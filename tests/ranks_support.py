"""Ranks as threads of one process: cheap enough for statistics."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from samplewise.cuda_ext import ranks


class _Group(threading.local):
    rank = 0
    world = 1


class Threads:
    """Stands in for the process group: ``run(world, function, *args)`` gives ``function(rank, *args)`` of each rank."""

    def __init__(self, monkeypatch):
        self._here = _Group()
        monkeypatch.setattr(ranks, "rank", lambda: self._here.rank)
        monkeypatch.setattr(ranks, "world_size", lambda: self._here.world)
        monkeypatch.setattr(ranks, "gather_rows", self._gather_rows)

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        self._barrier, self._rows = threading.Barrier(world, timeout=60), [None] * world
        results: list[Any] = [None] * world
        errors: list[BaseException] = []

        def main(rank):
            self._here.rank, self._here.world = rank, world
            try:
                results[rank] = function(rank, *args)
            except threading.BrokenBarrierError:
                pass
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=main, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        assert not self._barrier.broken
        return results

    @contextmanager
    def acting_as(self, rank: int, world: int) -> Iterator[None]:
        """This thread is one of the ranks, for what is not collective."""
        self._here.rank, self._here.world = rank, world
        try:
            yield
        finally:
            self._here.rank, self._here.world = 0, 1

    def _gather_rows(self, *tensors):
        if self._here.world == 1:
            return list(tensors)
        self._rows[self._here.rank] = tensors
        self._barrier.wait()
        gathered = [torch.cat(parts) for parts in zip(*self._rows, strict=True)]
        self._barrier.wait()
        return gathered
