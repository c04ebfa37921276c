"""PlannedSampler: from a plan to a DataLoader's sampler, and from the losses back to the next plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter
from typing import Any, Literal, TypedDict

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DistributedSampler

from samplewise.cuda_ext import Ledger
from samplewise.loaders.order import Order, OrderIterator, Segment
from samplewise.loaders.plan import Plan, write_weights
from samplewise.loaders.seeding import generator

VERSION = 1


class SamplerOptions(TypedDict, total=False):
    """The options that every sampler takes; :class:`PlannedSampler` says what they mean."""

    seed: int
    shuffle: bool
    drop_last: bool
    epoch_length: int | Literal["plan"]
    ema: float
    device: str | torch.device
    fingerprint: str
    num_replicas: int | None
    rank: int | None


class PlannedSampler(DistributedSampler[int], ABC):
    """Base of every method: a subclass writes :meth:`plan`, this class does the rest.

    It is a :class:`torch.utils.data.DistributedSampler`, which frameworks leave alone: the plan is the same on every
    rank (from seed, epoch and synced ledger), and each rank takes its stride of it. Rank and world size are looked up
    when they are needed, since a sampler is usually built before the process group.

    Args:
        size: N, the number of samples: ``len(dataset)``.
        seed: key of all randomness of this sampler; no global generator is read or changed.
        shuffle: whether the planned ids are shuffled anew for each plan. False keeps the plan's order.
        drop_last: with several ranks, leave the last ids out instead of repeating the first ones, where the plan does
            not divide evenly.
        epoch_length: ``"plan"``: an epoch is one plan, and its length changes with the plan. An int: every epoch has
            that many samples (all ranks together) and runs through consecutive plans; those that begin in one epoch
            are made from the ledger as it stands when the epoch begins.
        ema: decay of the ledger's ``loss_ema``, in [0, 1).
        device: where the ledger lives.
        fingerprint: any text that identifies the data set; a state saved with another one is refused.
        num_replicas: world size; None asks torch.distributed.
        rank: this process's rank; None asks torch.distributed.

    Attributes:
        ledger: the per-sample statistics, :class:`samplewise.cuda_ext.Ledger`.
        epoch: the current epoch, from 0.
        recording: set it to False while losses must not be recorded (validation).
        epoch_samples: samples of the current epoch, all ranks together, after which the loop ends it, where that is not
            all of them (a loader that drops its last batch, a limit on the batches); each new epoch sets it to None.
        plan_seconds: seconds that the last planning took, the ledger's sync included.
    """

    accepts_batch_loss = False
    """Whether :meth:`observe` takes a batch's mean loss, to be recorded for each of its samples."""

    def __init__(
        self,
        size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        epoch_length: int | Literal["plan"] = "plan",
        ema: float = 0.9,
        device: str | torch.device = "cpu",
        fingerprint: str = "",
        num_replicas: int | None = None,
        rank: int | None = None,
    ):
        # DistributedSampler's own constructor asks for the process group, which need not exist yet.
        name = type(self).__name__
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"{name}(seed={seed!r}): seed must be an int >= 0.")
        if epoch_length != "plan" and (
            isinstance(epoch_length, bool) or not isinstance(epoch_length, int) or epoch_length < 1
        ):
            raise ValueError(
                f"{name}(epoch_length={epoch_length!r}): an epoch is as long as its plan ('plan') or has a fixed "
                f"number of samples (an int >= 1)."
            )
        for argument, value, least in (("num_replicas", num_replicas, 1), ("rank", rank, 0)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name}({argument}={value!r}): {argument} must be an int >= {least}, or None.")
        if rank is not None and rank >= (num_replicas or rank + 1):
            raise ValueError(f"{name}(rank={rank}): rank must be below num_replicas={num_replicas}.")
        self.ledger = Ledger(size, ema=ema, device=device, fingerprint=fingerprint)
        self.size = self.ledger.size
        self.dataset: Any = range(self.size)  # DistributedSampler's attribute; only its length is known here
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.epoch_length = epoch_length
        self.epoch = 0
        self.recording = True
        self.plan_seconds = 0.0
        self._num_replicas, self._rank = num_replicas, rank
        self._segments: tuple[Segment, ...] = ()
        self._latest: OrderIterator | None = None
        self._previous_order: Order | None = None
        self._batch = 0  # the largest batch observed in this epoch, all ranks together
        self.epoch_samples: int | None = None
        self._planned = False
        self._weighted = False
        self._new_cursor(consumed=0, step=0)

    # --- what a method writes -----------------------------------------------------------------------------------------

    @abstractmethod
    def plan(self, epoch: int, rng: np.random.Generator) -> Plan:
        """Decide what to train on next.

        Args:
            epoch: the plan's number, from 0: the epoch, or with a fixed ``epoch_length`` the number of plans before
                this one (``self.epoch`` is then the training epoch in which the plan begins).
            rng: keyed by (seed, number of the plan); the only source of randomness a plan may use.
        """

    # --- epochs -------------------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Go to ``epoch``. The same epoch again changes nothing; a new one syncs the ledger and makes a new plan.

        With several ranks a new epoch is collective: call it on all of them, or on none (an epoch that was trained to
        its end is followed by the next one when the sampler is iterated again).
        """
        if epoch == self.epoch:
            return
        if epoch < 0:
            raise ValueError(f"{type(self).__name__}.set_epoch({epoch}): an epoch is an int >= 0.")
        begin = perf_counter()
        self.ledger.sync()
        self.epoch = epoch
        self._planned = False
        self._new_cursor(consumed=0, step=self.step)
        self._make_epoch(begin)

    @property
    def current_plan(self) -> Plan:
        """What the current epoch trains on; with a fixed ``epoch_length``, the stretches of plans it consists of."""
        self._ensure_planned()
        whole = [segment.start == 0 and segment.stop == len(segment.plan) for segment in self._segments]
        if whole == [True]:
            return self._segments[0].plan
        parts = [s.ids(0, s.stop - s.start, 1, self.seed, self.shuffle) for s in self._segments]
        ids = np.concatenate(parts)
        weights = self.ledger.weights(torch.from_numpy(ids)).numpy() if self._weighted else None
        return Plan(ids, weights)

    def _ensure_planned(self) -> None:
        if not self._planned:
            self._make_epoch(perf_counter())

    def _make_epoch(self, begin: float) -> None:
        if self.epoch_length == "plan":
            plan = self._make_plan(self.epoch)
            self._segments = (Segment(plan, self.epoch, 0, len(plan)),)
        else:
            self._segments = self._fill_epoch(int(self.epoch_length))
        self._finish_epoch()
        self.plan_seconds = perf_counter() - begin

    def _fill_epoch(self, length: int) -> tuple[Segment, ...]:
        """Stretches of consecutive plans, the first going on where the last epoch's last plan was left."""
        segments: list[Segment] = []
        last = self._segments[-1] if self._segments else None
        while length:
            if last is None or last.stop == len(last.plan):
                number = self.epoch if last is None else last.number + 1
                last = Segment(self._make_plan(number), number, 0, 0)
            count = min(length, len(last.plan) - last.stop)
            last = replace(last, start=last.stop, stop=last.stop + count)
            segments.append(last)
            length -= count
        return tuple(segments)

    def _make_plan(self, number: int) -> Plan:
        plan = self.plan(number, generator(self.seed, number, "plan"))
        if not isinstance(plan, Plan):
            raise TypeError(f"{type(self).__name__}.plan: must return a Plan, not {type(plan).__name__}.")
        return plan.check(self.size, f"{type(self).__name__}.plan({number})")

    def _finish_epoch(self) -> None:
        plans = [segment.plan for segment in self._segments]
        self._weighted = any(plan.weights is not None for plan in plans)
        if self._weighted:
            write_weights(self.ledger, plans)
        self._planned = True

    # --- the DataLoader's side ----------------------------------------------------------------------------------------

    @property
    def num_replicas(self) -> int:
        """World size, looked up when it is asked for."""
        return _distributed("get_world_size", 1) if self._num_replicas is None else self._num_replicas

    @num_replicas.setter
    def num_replicas(self, value: int | None) -> None:
        self._num_replicas = value

    @property
    def rank(self) -> int:
        """This process's rank, looked up when it is asked for."""
        return _distributed("get_rank", 0) if self._rank is None else self._rank

    @rank.setter
    def rank(self, value: int | None) -> None:
        self._rank = value

    @property
    def total_size(self) -> int:  # type: ignore[override]
        """Samples of the current epoch on all ranks together, a multiple of the world size."""
        self._ensure_planned()
        length = sum(segment.stop - segment.start for segment in self._segments)
        shares = length // self.num_replicas if self.drop_last else -(-length // self.num_replicas)
        if shares == 0:
            raise ValueError(
                f"{type(self).__name__}(drop_last=True): the plan of {length} samples leaves none for each of "
                f"{self.num_replicas} ranks."
            )
        return shares * self.num_replicas

    @property
    def num_samples(self) -> int:  # type: ignore[override]
        """Samples that this rank gets in the current epoch."""
        return self.total_size // self.num_replicas

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        if self._planned and self._epoch_is_over():
            self.set_epoch(self.epoch + 1)
        start = self._start // self.num_replicas
        self._latest = OrderIterator(self._order(), self.epoch, start, self._previous_order)
        return self._latest

    def _order(self) -> Order:
        total = self.total_size  # makes the plan where there is none yet
        return Order(self._segments, total, self.rank, self.num_replicas, self.seed, self.shuffle)

    def _epoch_is_over(self) -> bool:
        """Whether the model has trained on all of the epoch, but for a last batch that the loader dropped."""
        left = self._epoch_end() - self.consumed
        drawn = self._latest is not None and self._latest.exhausted
        return left <= 0 or (drawn and left < self._batch)

    def _epoch_end(self) -> int:
        return self.total_size if self.epoch_samples is None else max(1, min(self.epoch_samples, self.total_size))

    # --- the model's side ---------------------------------------------------------------------------------------------

    def observe(self, ids: Tensor, losses: Tensor, *, scores: Tensor | None = None) -> Tensor:
        """Record a batch's losses and give the scalar to backpropagate, ``mean(weights * losses)``.

        The weights are the current plan's; ``losses`` itself is never changed. Without gradients
        (``torch.no_grad()``) or while :attr:`recording` is False, nothing is recorded and the plain mean is returned,
        so that evaluation leaves no trace.

        Args:
            ids: integer (B,), the ids that came with the batch.
            losses: floating point (B,), one loss a sample, with its graph: ``reduction="none"``.
            scores: floating point (B,), optional, kept as the ledger's ``score``.

        Returns:
            The weighted mean loss, a scalar with its graph.

        Raises:
            TypeError: ids that are no integers, or losses that are no floating-point tensor.
            ValueError: losses of another shape than (B,): a scalar, or one loss a token.
            IndexError: an id outside the data set.
        """
        if self.accepts_batch_loss and losses.ndim == 0:
            losses = losses.expand(ids.numel())
        if not (self.recording and torch.is_grad_enabled()):
            return losses.mean()
        self.ledger.update(ids, losses, step=self.step, scores=scores)
        batch = ids.numel() * self.num_replicas
        self._cursor[0] += batch
        self._cursor[1] += 1
        self._batch = max(self._batch, batch)
        if self._weighted:
            return (self.ledger.weights(ids) * losses).mean()
        return losses.mean()

    @property
    def consumed(self) -> int:
        """Samples of the current epoch that the model has trained on, all ranks together."""
        return int(self._cursor[0])

    @property
    def step(self) -> int:
        """Training batches observed so far, in all epochs."""
        return int(self._cursor[1])

    @property
    def progress(self) -> float:
        """Epochs done, with the share of the current one: 2.5 is the middle of the third epoch."""
        return self.epoch + min(1.0, self.consumed / self._epoch_end())

    def advance_to(self, consumed: int) -> None:
        """Say how many samples of this epoch the model has trained on (all ranks together).

        :meth:`observe` counts them; a framework's callback, which knows of batches that were not observed, corrects it.
        0 begins the epoch anew: the next iterator starts at its first sample, also after a resume.
        """
        self._cursor[0] = min(max(int(consumed), 0), self.total_size)
        if self._cursor[0] == 0:
            self._start = 0

    # --- state --------------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Merge the ranks' observations into every rank's ledger. Collective; do it before :meth:`state_dict`."""
        self.ledger.sync()

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs, as live references (like a module's): save it at once, or deepcopy it.

        It holds tensors, numbers and strings only (``torch.load(..., weights_only=True)``): 32 bytes a sample, 8 a
        planned one (12 with weights; none for a ``range``), and a few integers. With several ranks call :meth:`sync` on
        all of them first.
        """
        self._ensure_planned()
        return {
            "version": VERSION,
            "sampler": type(self).__name__,
            "size": self.size,
            "seed": self.seed,
            "epoch": self.epoch,
            "cursor": torch.from_numpy(self._cursor),
            "end": self._epoch_end(),
            "batch": self._batch,
            "segments": [segment.state() for segment in self._segments],
            "ledger": self.ledger.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was saved: the next iterator starts behind the consumed samples.

        A state that was saved when its epoch was over continues with the next epoch.

        Raises:
            ValueError: the state is of another version, method, seed or data set. Nothing is changed then.
        """
        name = type(self).__name__
        if state.get("version") != VERSION:
            raise ValueError(f"{name} state: version {state.get('version')} was saved, this release reads {VERSION}.")
        for key, own in (("sampler", name), ("seed", self.seed)):
            if state[key] != own:
                raise ValueError(
                    f"{name} state: it was saved by a sampler with {key}={state[key]!r}, this one has {own!r}; "
                    f"resume with the same {key}."
                )
        self.ledger.load_state_dict(state["ledger"])
        self.epoch = state["epoch"]
        self._segments = tuple(Segment.from_state(part) for part in state["segments"])
        consumed, step = state["cursor"].tolist()
        if consumed >= state["end"]:  # the epoch was over: what comes next is a plan of the ledger just loaded
            if state["ledger"]["pending"]:
                self.ledger.sync()
            self._planned = True
            previous = self._order()
            self.epoch += 1
            self._new_cursor(consumed=0, step=step)
            self._make_epoch(perf_counter())
            self._previous_order = previous
        else:
            self._finish_epoch()
            self._new_cursor(consumed=consumed, step=step)
        self._batch = state["batch"]

    def _new_cursor(self, *, consumed: int, step: int) -> None:
        """A cursor of its own for each epoch, so that a state taken in an earlier one stays what it was."""
        self._cursor = np.array([consumed, step], dtype=np.int64)
        self._start = consumed
        self.epoch_samples = self._latest = self._previous_order = None
        self._batch = 0


def _distributed(question: str, otherwise: int) -> int:
    return int(getattr(dist, question)()) if dist.is_available() and dist.is_initialized() else otherwise
