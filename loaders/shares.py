"""Shares: how a plan is served of which each rank made only its part, from the part of the ledger that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from samplewise.cuda_ext import Ledger, ranks
from samplewise.cuda_ext.sharded import ShardedLedger, gather_wanted, reshard
from samplewise.loaders.cursor import Cursor
from samplewise.loaders.epoch_plan import EpochPlan
from samplewise.loaders.order import Order, Segment, write_weights
from samplewise.loaders.plan import Plan
from samplewise.loaders.seeding import derive, generator
from samplewise.loaders.state import VERSION

if TYPE_CHECKING:
    from samplewise.loaders.sampler import PlannedSampler

IntArray = NDArray[np.int64]
Weights = NDArray[np.float32]


@dataclass(frozen=True)
class ShareOrder(Order):
    """One epoch of which every rank shuffles its own part: rank r takes all of the ids that its segments hold."""

    def ids(self, start: int, stop: int) -> IntArray:
        """This rank's ids number ``start`` to ``stop``: int64 (stop - start,)."""
        return Order(self.segments, self.length, 0, 1, self.seed, self.shuffle).ids(start, stop)


@dataclass
class SharePlan(EpochPlan):
    """This rank's part of what an epoch serves; all ranks' parts are equally long.

    Attributes:
        shard: which part, and how many there are.
    """

    shard: tuple[int, int] = (0, 1)

    def total(self, world: int) -> int:
        """Samples of the epoch on all ranks together.

        Raises:
            ValueError: the sampler deals out to another number of ranks than there are processes.
        """
        if world != self.shard[1]:
            raise ValueError(
                f"{self.owner}(sharded=True, num_replicas={world}): each of the {self.shard[1]} processes trains on "
                f"what it plans; leave num_replicas out."
            )
        return sum(map(len, self.segments)) * world

    def begin_for(self, world: int) -> int:
        """0: an epoch cannot go on with another number of ranks."""
        return 0

    def order(self, world: int, rank: int | None) -> Order:
        """What this rank gets.

        Raises:
            ValueError: with rank None, what all get together, which no rank knows.
        """
        if rank is None:
            raise ValueError(
                f"{self.owner}(sharded=True): the loader wants all ranks' ids to deal them out, but each rank plans "
                f"its own only; use a loader that leaves the dealing out to the sampler, or sharded=False."
            )
        return ShareOrder(self.segments, self.total(world), self.shard[0], world, self.seed, self.shuffle)


class EarlyPlan(EpochPlan):
    """What an epoch serves while there is no process group: the one process that is here."""

    def total(self, world: int) -> int:
        """Samples of the epoch.

        Raises:
            RuntimeError: the process group came after the plan, which has no shares.
        """
        if ranks.world_size() > 1:
            raise RuntimeError(
                f"{self.owner}(sharded=True): epoch {self.number} was planned before the process group was made, so no "
                f"rank has its share; ask for the plan or the length (also the loader's) only after "
                f"torch.distributed.init_process_group()."
            )
        return super().total(world)


def plan_generator(seed: int, number: int, ledger: Ledger) -> np.random.Generator:
    """The generator for plan ``number``: where each rank plans its share, each has one of its own."""
    rank, world = ledger.shard
    return generator(seed, number, "plan", *((rank,) if world > 1 else ()))


def settled(ledger: Ledger, now: EpochPlan) -> EpochPlan:
    """What this rank serves of an epoch whose plan was made, its weights written into the ledger."""
    rank, world = ledger.shard
    if world == 1:
        if now.weighted:
            write_weights(ledger, now.segments, now.seed, now.shuffle)
        return EarlyPlan(**vars(now)) if isinstance(ledger, ShardedLedger) and ledger.distributed else now
    seed = derive(now.seed, rank, "share order")  # with one key all ranks would go through their ids in step
    share = SharePlan(now.owner, now.segments, now.number, seed, now.shuffle, now.drop_last, None, shard=ledger.shard)
    if share.weighted:
        write_share_weights(ledger, share.segments, seed, share.shuffle)
    return share


def length_of_share(length: int, ledger: Ledger, drop_last: bool) -> int:
    """Ids of each rank, where an epoch has ``length`` of all ranks together."""
    world = ledger.shard[1]
    return max(1, length // world) if drop_last else -(-length // world)


def write_share_weights(ledger: Ledger, segments: tuple[Segment, ...], seed: int, shuffle: bool) -> None:
    """Write one epoch's weights; a sample that it shows several times gets the mean of them."""
    parts = [segment.shown(seed, shuffle) for segment in segments]
    ids, weights = (np.concatenate(arrays) for arrays in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]
    again = ids[1:] == ids[:-1]
    if (ids[1:] < ids[:-1]).any() or (weights[1:][again] != weights[:-1][again]).any():
        ids, places, times = np.unique(ids, return_inverse=True, return_counts=True)
        weights = (np.bincount(places, weights=weights) / times).astype(np.float32)
    ledger.set_weights(torch.from_numpy(ids), torch.from_numpy(weights))


def balanced(owner: str, plan: Plan, number: int, seed: int, ledger: Ledger, drop_last: bool) -> Plan:
    """This rank's share of a plan, equally long on all ranks. Collective.

    Ids move, with their weights, from ranks that planned more than their share to those that planned less. What is
    missing to equal lengths, fewer ids than there are ranks, is repeated; with ``drop_last`` the surplus is left out.
    Which ids move, are repeated or left out is drawn by lot.

    Args:
        owner: the sampler's class, for errors.
        plan: what this rank planned; it may be empty where another rank's is not.
        number: the plan's.
        seed: the sampler's.
        ledger: says which rank this is; a whole ledger's plan is given back as it is.
        drop_last: see :class:`samplewise.loaders.SamplerOptions`.

    Raises:
        TypeError: no plan.
        ValueError: as :meth:`Plan.check`, or no rank planned anything, or there is less than one id for each rank.
    """
    rank, world = ledger.shard
    name = f"{owner}.plan({number})"
    if not isinstance(plan, Plan):
        raise TypeError(f"{owner}.plan: must return a Plan, not {type(plan).__name__}.")
    if world == 1:
        return plan.check(ledger.size, name)
    plan = plan.check(ledger.size, name) if len(plan) else Plan(np.empty(0, dtype=np.int64))
    totals = ledger.totals
    lengths = totals.each(len(plan))
    if sum(lengths) == 0:
        raise ValueError(f"{name}: the plan is empty on all ranks, so the epoch would train on nothing.")
    length = sum(lengths) // world if drop_last else -(-sum(lengths) // world)
    if length == 0:
        raise ValueError(f"{owner}(drop_last=True): the plan of {sum(lengths)} samples leaves none for each rank.")
    if set(lengths) == {length}:
        return plan
    weighted = totals.total(plan.weights is not None) > 0
    return _exchanged(plan, lengths, length, weighted, number, seed, rank)


def _exchanged(
    plan: Plan, lengths: Sequence[int], length: int, weighted: bool, number: int, seed: int, rank: int
) -> Plan:
    """The plan with ``length`` ids, ascending where it was; all surplus ids form a ring, cut into the ranks' needs."""
    rng, common = generator(seed, number, "share", rank), generator(seed, number, "share")
    ids = np.arange(plan.ids.start, plan.ids.stop, plan.ids.step) if isinstance(plan.ids, range) else plan.ids
    weights = np.ones(ids.size, dtype=np.float32) if plan.weights is None else plan.weights
    spare = rng.integers(0, ids.size, min(1, ids.size))
    leaving = np.zeros(ids.size, dtype=np.bool_)
    leaving[rng.choice(ids.size, max(0, ids.size - length), replace=False, shuffle=False)] = True
    surplus, needs = (np.maximum(sign * (np.array(lengths) - length), 0) for sign in (1, -1))
    starts, firsts = np.cumsum(surplus) - surplus, np.cumsum(needs) - needs
    ring, first, stop = int(surplus.sum()), int(firsts[rank]), int(firsts[rank] + needs[rank])
    turn = int(common.integers(max(1, ring)))

    def mine(source: int, begin: int, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        place = (int(starts[source]) + begin + torch.arange(len(rows[0])) + turn) % ring
        return (place >= first) & (place < stop)

    def sent(chosen: Any) -> tuple[torch.Tensor, ...]:
        return torch.from_numpy(ids[chosen]), torch.from_numpy(weights[chosen])

    received = [gather_wanted(sent(leaving), mine)] if ring else []
    if int(needs.sum()) > ring:
        spares = gather_wanted(sent(spare), lambda source, begin, rows: torch.ones(len(rows[0]), dtype=torch.bool))
        at = np.arange(max(first, ring), stop) - ring + int(common.integers(len(lengths)))
        received.append([[part[at % len(part)] for part in (torch.cat(rows) for rows in zip(*spares, strict=True))]])
    if leaving.any():
        ids, weights = ids[~leaving], weights[~leaving]
    came = [torch.cat([source[part] for sources in received for source in sources]).numpy() for part in (0, 1)]
    order = np.argsort(came[0], kind="stable")
    places = np.searchsorted(ids, came[0][order])
    ids = np.insert(ids, places, came[0][order])
    return Plan(ids, np.insert(weights, places, came[1][order]) if weighted else None)


def reshard_samplers(states: Sequence[dict[str, Any]], world: int) -> list[dict[str, Any]]:
    """Deal the saved states of a sharded sampler's ranks out to another number of ranks, at the end of an epoch.

    Args:
        states: what ``state_dict`` of each rank's sampler gave after ``sync`` and after the last batch of an epoch, in
            any order; the state of one sampler with a whole ledger counts as one rank's.
        world: number of ranks to deal out to.

    Returns:
        The state for each rank, by rank: it goes on with the next epoch, which those ranks plan.

    Raises:
        ValueError: the states are not of the end of an epoch, or their ledgers do not belong together
            (:func:`samplewise.cuda_ext.sharded.reshard`), or the sampler has epochs of fixed length.
    """
    for state in states:
        if state["version"] != VERSION or state["epoch_length"] != "plan":
            raise ValueError(
                f"reshard_samplers(states=...): states must be of version {VERSION} and epoch_length='plan'; an epoch "
                f"of fixed length goes on in the middle of a plan."
            )
        if not Cursor.from_tensor(state["cursor"]).is_complete(state["total"]):
            raise ValueError(
                f"reshard_samplers(states=...): states must be of the end of an epoch, and epoch {state['epoch']} is "
                f"not over; go on with as many ranks as saved it, and deal out when it ends."
            )
    over = Cursor.at_start(Cursor.from_tensor(states[0]["cursor"]).step).tensor
    nothing = Segment(Plan(range(1)), 0, 0, 1).state()
    changed = {"sharded": True, "cursor": over, "total": 0, "world": world, "ranks": world, "segments": [nothing]}
    ledgers = reshard([state["ledger"] for state in states], world)
    return [{**states[0], **changed, "ledger": ledger} for ledger in ledgers]


def saved_state(sampler: PlannedSampler) -> dict[str, Any]:
    """What a checkpoint that one rank writes must hold, so that all ranks can resume from it. Collective.

    Of a sharded sampler the first rank gets all ranks' states, and with them the whole ledger; the others their own.
    """
    sampler.sync()
    state = sampler.state_dict()
    if sampler.ledger.shard[1] == 1:
        return state
    return {"shards": ranks.gather_objects(state)}


def load_saved_state(sampler: PlannedSampler, state: dict[str, Any]) -> None:
    """Load what :func:`saved_state` gave the first rank.

    A sharded sampler goes on with another number of ranks if an epoch was over, see :func:`reshard_samplers`.

    Raises:
        ValueError: as :meth:`PlannedSampler.load_state_dict`, or as :func:`reshard_samplers`.
    """
    if "shards" in state or sampler.sharded:
        rank, world = sampler.ledger.shard
        states = state.get("shards", [state])
        state = (states if len(states) == world else reshard_samplers(states, world))[rank]
    sampler.load_state_dict(state)


def make_ledger(owner: str, size: int, sharded: bool, plans_shares: bool, arranged: bool, **options: Any) -> Ledger:
    """The ledger of a sampler.

    Raises:
        TypeError: ``sharded`` is no bool.
        ValueError: the method cannot plan by shares, or ``arrange`` needs all ids.
    """
    if not isinstance(sharded, bool):
        raise TypeError(f"{owner}(sharded={sharded!r}): sharded must be True or False.")
    if sharded and not plans_shares:
        raise ValueError(
            f"{owner}(sharded=True): with these options it plans for all samples at once and cannot plan by shares; "
            f"leave sharded out."
        )
    if sharded and arranged:
        raise ValueError(f"{owner}(sharded=True, arrange=...): arrange orders all ranks' ids; leave one of them out.")
    return (ShardedLedger if sharded else Ledger)(size, **options)
