"""A ledger whose records are dealt out over the ranks, for data sets whose records do not fit on each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import lcm
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from samplewise.cuda_ext import ranks, reference
from samplewise.cuda_ext.checks import integer
from samplewise.cuda_ext.ledger import Entry, Ledger, pack
from samplewise.cuda_ext.totals import Totals, TotalsOverRanks

_CHUNK = 1 << 20  # rows of a rank on the way, and observations merged, at a time


class ShardedLedger(Ledger):
    """A :class:`samplewise.cuda_ext.Ledger` of which rank r of W holds the records of the ids r, r + W, r + 2 W, ...

    Row j here is id ``r + j W``; :meth:`ids_of` and :meth:`rows_of` turn one into the other. What is (N,) of a whole
    ledger is (n,) here, one value a row. After :meth:`sync` the shards together hold the very bytes that a whole ledger
    holds after the same observations, but for ``weight``, which stands where the sample is trained on. Observations of
    other ranks' ids travel, those of a rank's own stay.

    Rank and world size are looked up when they are needed; with one process it is a whole ledger. :attr:`rejected`
    counts those of the other ranks as of the last sync.

    Args:
        size: N, the number of samples on all ranks together, in [1, 2^31], at least one a rank.
        **options: as for :class:`samplewise.cuda_ext.Ledger`.

    Attributes:
        records: float32 (n, 8), those of the rows here.
    """

    _shard: tuple[int, int] | None = None
    _elsewhere = 0  # losses that other ranks rejected
    _foreign: tuple[Tensor, Tensor] | None = None  # other ranks' ids, ascending, that have a weight here, and that

    @override
    def _allocate(self) -> None:
        self._shard = None  # records are made when they are first asked for

    def _settle(self) -> tuple[int, int]:
        """Which shard is here: settled anew as long as nothing was recorded."""
        shard = (ranks.rank(), ranks.world_size()) if self.distributed else (0, 1)
        if shard != self._shard:
            if self._shard is not None and self.updates:
                raise RuntimeError(
                    f"ShardedLedger: shard {self._shard[0]} of {self._shard[1]} was filled here, and this is now rank "
                    f"{shard[0]} of {shard[1]}. Make the process group before the first update()."
                )
            if self.size < shard[1]:
                raise ValueError(f"ShardedLedger(size={self.size}): size must be at least the {shard[1]} ranks.")
            with torch.inference_mode(False):
                self._make_records(len(range(shard[0], self.size, shard[1])))
            self._shard = shard
        return shard

    @property
    @override
    def records(self) -> Tensor:
        """Float32 (n, 8), the records of the rows here."""
        self._settle()
        return self._records

    @records.setter
    def records(self, records: Tensor) -> None:
        self._records = records

    @property
    @override
    def shard(self) -> tuple[int, int]:
        """Rank and world size."""
        return self._settle()

    @property
    @override
    def ids(self) -> range:
        """The ids of the rows here."""
        rank, world = self._settle()
        return range(rank, self.size, world)

    @override
    def ids_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The ids of ``rows`` int64 (k,), places in what :meth:`column` gives: int64 (k,)."""
        rank, world = self._settle()
        if world == 1:
            return rows
        ids = rows * world
        ids += rank
        return ids

    @override
    def rows_of(self, ids: range | NDArray[np.int64]) -> range | NDArray[np.int64]:
        """The rows, places in what :meth:`column` gives, of those of ``ids`` (k,) that are here."""
        rank, world = self._settle()
        if world == 1:
            return ids
        if isinstance(ids, range):
            ids = np.arange(ids.start, ids.stop, ids.step)
        rows: NDArray[np.int64] = ids[ids % world == rank] // world
        return rows

    @property
    @override
    def totals(self) -> Totals:
        """Sums, order statistics and histograms of values that stand in :meth:`column`'s places, over all ranks."""
        return Totals() if self._settle()[1] == 1 else TotalsOverRanks()

    @property
    @override
    def rejected(self) -> int:
        """How many losses were refused because they were not finite, on the other ranks as of the last sync."""
        return super().rejected + self._elsewhere

    # --- weights ------------------------------------------------------------------------------------------------------

    @override
    def set_weights(self, ids: Tensor, weights: Tensor) -> None:
        """Write the weights, float32 (k,) and >= 0, of the ``ids`` int64 (k,) that are trained on here.

        An id may stand there several times with the same weight.
        """
        self.clear_weights()
        rank, world = self._settle()
        foreign = []
        for part, given in zip(ids.cpu().split(_CHUNK), weights.split(_CHUNK), strict=True):
            rows = torch.from_numpy(part.numpy() // world)  # numpy divides by one number much faster than torch
            here = rows * world + rank == part
            self._write_weights(rows[here], given[here])
            foreign.append((part[~here], given[~here]))
        if foreign:
            others, given = (torch.cat(parts) for parts in zip(*foreign, strict=True))
            others, places = others.sort()
            self._foreign = others.to(self.device), given[places].to(self.device, torch.float32)

    @override
    def clear_weights(self) -> None:
        super().clear_weights()
        self._foreign = None

    @override
    def weights(self, ids: Tensor, *, device: torch.device | None = None) -> Tensor:
        """The current plan's weights of ``ids`` (B,), 1 where it gives none here: float32 (B,)."""
        rank, world = self._settle()
        if world == 1:
            return super().weights(ids, device=device)
        own = self._here(self._entries(ids))
        rows = torch.div(own, world, rounding_mode="floor").clamp(0, len(self.records) - 1)
        weights = super().weights(rows, device=self.device)
        weights = weights.where(own % world == rank, 1.0)
        if self._foreign is not None and self._foreign[0].numel():
            others, given = self._foreign
            at = torch.searchsorted(others, own).clamp_(max=others.numel() - 1)
            weights = given[at].where(others[at] == own, weights)
        device = ids.device if device is None else device
        return weights if weights.device == device else weights.to(device, non_blocking=device.type == "cuda")

    # --- ranks --------------------------------------------------------------------------------------------------------

    @override
    def sync(self) -> None:
        """Bring each observation to the rank that holds its record. Collective: every rank calls it, or none.

        One variable-length all-gather of what belongs to other ranks, in rounds that bound the memory: ids and steps
        int64, losses and scores apart from them float32. A rank applies its own observations and those that came in the
        order (step, rank, batch order).

        Raises:
            IndexError: ids outside [0, N) were observed on a GPU; on all ranks then.
        """
        if not self._shared():
            super().sync()
            return
        rank, world = self._settle()
        integers, values, outside = self._others()
        facts = ranks.gather_rows(torch.tensor([[outside, self.updates]]))[0]
        if lost := int(facts[:, 0].sum()):
            self._pending.clear()
            raise IndexError(
                f"ids: {lost} observed ids were outside [0, {self.size}), the rows of the data set that the ledger was "
                f"made for. Build the sampler with len(train_set), and record no other data set's batches."
            )
        sources = gather_wanted((integers, values), lambda source, begin, rows: rows[0][:, 0] % world == rank)
        self._merge(sources)
        self._counters[reference.UPDATES] = int(facts[:, 1].max())
        own = super().rejected
        self._elsewhere = int(ranks.gather_rows(torch.tensor([own]))[0].sum()) - own

    def _others(self) -> tuple[Tensor, Tensor, int]:
        """The observations of other ranks' ids, packed, and how many ids are no rows at all."""
        rank, world = self._settle()
        parts, outside = [pack([])], 0
        for entries in _windows(self._pending):
            integers, values = pack(entries)
            ids = integers[:, 0]
            outside += int(((ids < 0) | (ids >= self.size)).sum())
            foreign = ids % world != rank
            parts.append((integers[foreign], values[foreign]))
        integers, values = (torch.cat(part) for part in zip(*parts, strict=True))
        return integers, values, outside

    def _merge(self, sources: Sequence[Sequence[Tensor]]) -> None:
        """Apply what is pending for the rows here and what came from each rank, by (step, rank, batch order)."""
        rank, world = self._settle()
        integers, values = (torch.cat(part) for part in zip(*sources, strict=True))
        origins = torch.arange(world).repeat_interleave(torch.tensor([len(part[0]) for part in sources]))
        keys = integers[:, 1] * world + origins
        order = torch.from_numpy(np.argsort(keys.numpy(), kind="stable"))
        keys, integers, values = keys[order], integers[order], values[order]
        windows, self._pending[:] = list(_windows(self._pending)), []
        begin = 0
        for number, entries in enumerate(windows):
            own_integers, own_values = pack(entries)
            windows[number] = []  # its memory is not needed any more
            mine = own_integers[:, 0] % world == rank
            own_integers, own_values = own_integers[mine], own_values[mine]
            last = int(entries[-1][3]) * world + rank
            end = int(torch.searchsorted(keys, last))
            self._apply_shard(
                torch.cat([own_integers[:, 1] * world + rank, keys[begin:end]]),
                torch.cat([own_integers, integers[begin:end]]),
                torch.cat([own_values, values[begin:end]]),
            )
            begin = end
        self._apply_shard(keys[begin:], integers[begin:], values[begin:])

    def _apply_shard(self, keys: Tensor, integers: Tensor, values: Tensor) -> None:
        integers[:, 0] //= self._settle()[1]
        self._apply_by(keys, integers, values)

    # --- state --------------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """This rank's share of the state, as live references; save that of every rank, after :meth:`sync`.

        :func:`reshard` deals the saved shares out to another number of ranks.
        """
        state = super().state_dict()
        if self.shard[1] > 1:
            state |= {"shard": list(self.shard), "elsewhere": self._elsewhere}
        return state

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._elsewhere = state.get("elsewhere", 0)


def reshard(states: Sequence[dict[str, Any]], world: int) -> list[dict[str, Any]]:
    """Deal the saved shards of a ledger out to another number of ranks.

    Args:
        states: what ``state_dict`` of each rank's :class:`ShardedLedger` gave after ``sync``, in any order; the state
            of one whole ledger counts as one shard.
        world: number of ranks to deal out to, at most N; with 1 it is a whole ledger's state.

    Returns:
        The state for each rank, by rank, its records on the CPU; what was given stays as it is.

    Raises:
        ValueError: shards are missing, are not of one ledger, or were not synced.
    """
    states = sorted(states, key=lambda state: _shard_of(state)[0])
    if not states or [_shard_of(state) for state in states] != [(rank, len(states)) for rank in range(len(states))]:
        found = ", ".join(f"{rank} of {of}" for rank, of in map(_shard_of, states))
        raise ValueError(
            f"reshard(states=...): states must be all shards of one ledger, each once, not {found or 'none'}."
        )
    first = states[0]
    world = integer("reshard", "world", world, 1, first["size"], what="the number of ranks")
    for key in ("version", "size", "ema", "fingerprint"):
        if any(state[key] != first[key] for state in states):
            raise ValueError(f"reshard(states=...): states must be of one ledger, but their {key} differ.")
    counters = torch.stack([state["counters"].cpu() for state in states])
    updates = counters[:, reference.UPDATES]
    if any(state["pending"] for state in states) or (updates != updates[0]).any():
        raise ValueError("reshard(states=...): states must be synced; call sync() on every rank before state_dict().")
    totals = counters.sum(dim=0)
    totals[reference.UPDATES] = updates[0]
    return [_dealt(states, totals, rank, world) for rank in range(world)]


def _dealt(states: Sequence[dict[str, Any]], totals: Tensor, rank: int, world: int) -> dict[str, Any]:
    """The new state of one rank; rank 0 takes all that was rejected, since nobody knows of which ids it was."""
    size, was = int(states[0]["size"]), len(states)
    records = torch.empty(len(range(rank, size, world)), *states[0]["records"].shape[1:], device="cpu")
    step = lcm(was, world)  # the ids that one old and one new rank share are so far apart
    for same in range(rank, min(step, size), world):
        source = same % was
        records[same // world :: step // world] = states[source]["records"][same // was :: step // was].cpu()
    counters = totals.clone() if rank == 0 else torch.zeros_like(totals)
    counters[reference.UPDATES] = totals[reference.UPDATES]
    state = {**states[0], "records": records, "counters": counters, "pending": [], "rank": [rank, world]}
    state.pop("shard", None)
    state.pop("elsewhere", None)
    if world > 1:
        elsewhere = 0 if rank == 0 else int(totals[reference.REJECTED])
        state |= {"shard": [rank, world], "elsewhere": elsewhere}
    return state


def _shard_of(state: dict[str, Any]) -> tuple[int, int]:
    rank, world = state.get("shard", (0, 1))
    return int(rank), int(world)


def gather_wanted(tensors: Sequence[Tensor], wanted: Callable[[int, int, list[Tensor]], Tensor]) -> list[list[Tensor]]:
    """Of all ranks' rows those that this rank wants, on the CPU. Collective; in rounds, so that memory is bounded.

    Args:
        tensors: this rank's, each (n_r, ...).
        wanted: ``(source, begin, rows) -> bool (m,)``: which of the rows number ``begin`` to ``begin + m`` of each
            tensor of rank ``source`` are wanted here.

    Returns:
        The wanted rows of each tensor, by source rank.
    """
    counts = ranks.gather_rows(torch.tensor([tensors[0].shape[0]]))[0].tolist()
    kept = [[[rows[:0].cpu()] for rows in tensors] for _ in counts]
    for begin in range(0, max(counts), _CHUNK):
        lengths = [min(max(count - begin, 0), _CHUNK) for count in counts]
        gathered = ranks.gather_rows(*(rows[begin : begin + _CHUNK] for rows in tensors))
        for source, rows in enumerate(zip(*(part.split(lengths) for part in gathered), strict=True)):
            mask = wanted(source, begin, list(rows))
            for chunks, part in zip(kept[source], rows, strict=True):
                chunks.append(part[mask])
    return [[torch.cat(chunks) for chunks in of_source] for of_source in kept]


def _windows(pending: Sequence[Entry]) -> Iterator[list[Entry]]:
    """The entries in stretches of about ``_CHUNK`` observations, in their order."""
    window: list[Entry] = []
    length = 0
    for entry in pending:
        window.append(entry)
        length += entry[0].numel()
        if length >= _CHUNK:
            yield window
            window, length = [], 0
    if window:
        yield window
