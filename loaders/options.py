"""The options that every sampler takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from samplewise.cuda_ext.checks import integer

MOST_PLANS = 10_000  # an epoch of fixed length is at most so many times the data set

Arrange = Callable[[NDArray[np.int64], np.random.Generator, int], NDArray[np.int64]]
"""``(ids int64 (k,), rng, ranks) -> order int64 (k,)``, see :class:`SamplerOptions`."""


class SamplerOptions(TypedDict, total=False):
    """The options that every sampler takes.

    Attributes:
        seed: key of all randomness of this sampler; no global generator is read or changed.
        shuffle: whether the planned ids are shuffled anew for each plan. False keeps the plan's order.
        arrange: what puts the ids of an epoch in order in place of the uniform shuffle, for example
            :class:`samplewise.loaders.DistinctBatches`: gets the epoch's ids, a generator keyed by (seed, epoch) and
            the number of ranks, and gives a permutation of 0 ... k - 1. With a fixed ``epoch_length`` the ids are all
            those of the epoch, from one or more plans; which ones is settled by the uniform shuffle of each plan. The
            ids of the epoch are then held in memory, 8 bytes each.
        drop_last: with several ranks, leave the last ids out instead of repeating the first ones, where the plan does
            not divide evenly.
        epoch_length: ``"plan"``: an epoch is one plan, and its length changes with the plan. An int: every epoch has
            that many samples (all ranks together) and runs through consecutive plans; those that begin in one epoch
            are made from the ledger as it stands when the epoch begins.
        ema: decay of the ledger's ``loss_ema``, in [0, 1).
        device: where the ledger lives.
        sharded: with several ranks, deal the ledger's records out to them, each id's to rank ``id % world``
            (:class:`samplewise.cuda_ext.sharded.ShardedLedger`), for more than about 1e8 samples. Each rank plans its
            share, from what is found over all of them, and few ids move so that all have equally many. A sample is
            then nearly always trained on by the rank that holds its record, and each rank shuffles its own share: a
            batch of all ranks together has as many samples of each share, where else that number would scatter. Each
            rank has a state of its own; :func:`samplewise.loaders.shares.saved_state`, which the callbacks use, brings
            them together, and its counterpart deals them out to another number of ranks at an epoch's end. Not with
            ``arrange``, nor with methods that must see all samples at once.
        fingerprint: any text that identifies the data set; a state saved with another one is refused.
        num_replicas: world size; None asks torch.distributed.
        rank: this process's rank; None asks torch.distributed.
    """

    seed: int
    shuffle: bool
    arrange: Arrange | None
    drop_last: bool
    epoch_length: int | Literal["plan"]
    ema: float
    device: str | torch.device
    sharded: bool
    fingerprint: str
    num_replicas: int | None
    rank: int | None


def check_epoch_length(owner: str, epoch_length: int | Literal["plan"], size: int) -> int | Literal["plan"]:
    """``epoch_length``, where it is one for a data set of ``size`` samples.

    Raises:
        TypeError: neither "plan" nor an integer.
        ValueError: less than 1, or very many times the data set.
    """
    if epoch_length == "plan":
        return "plan"
    return integer(
        owner, "epoch_length", epoch_length, 1, MOST_PLANS * size, what="'plan', or the samples of an epoch,"
    )


def check_arrange(owner: str, arrange: Any, shuffle: bool) -> Arrange | None:
    """``arrange``, where it goes with the other options.

    Raises:
        TypeError: nothing that can be called.
        ValueError: with ``shuffle=False``.
    """
    if arrange is None:
        return None
    if not callable(arrange):
        raise TypeError(
            f"{owner}(arrange={arrange!r}): arrange must be callable, (ids, rng, ranks) -> order; for example "
            f"DistinctBatches(keys, batch_size)."
        )
    if not shuffle:
        raise ValueError(
            f"{owner}(arrange=..., shuffle=False): shuffle=False keeps the plan's order and arrange makes another one; "
            f"leave one of them out."
        )
    checked: Arrange = arrange
    return checked


def arrange_name(arrange: Arrange | None) -> str | None:
    """What a saved sampler notes of it: the name of the class or function, and its ``fingerprint`` if it has one."""
    if arrange is None:
        return None
    name = getattr(arrange, "__qualname__", type(arrange).__qualname__)
    return f"{name}({getattr(arrange, 'fingerprint', '')})"
