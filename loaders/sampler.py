"""PlannedSampler: from a plan to a DataLoader's sampler, and from the losses back to the next plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from samplewise.cuda_ext import ledger, ranks
from samplewise.cuda_ext.checks import integer
from samplewise.cuda_ext.ops import MAX_SIZE
from samplewise.loaders import shares
from samplewise.loaders.cursor import Cursor
from samplewise.loaders.epoch import SharedEpoch
from samplewise.loaders.epoch_plan import EpochPlan
from samplewise.loaders.guard import DueWatch, ReshardingWatch, begin_again
from samplewise.loaders.options import Arrange, arrange_name, check_arrange, check_epoch_length
from samplewise.loaders.order import Order, OrderIterator, Segment, next_stretches
from samplewise.loaders.plan import Plan
from samplewise.loaders.state import VERSION, checked_state


class PlannedSampler(DistributedSampler[int], ABC):
    """Base of every method: a subclass writes :meth:`plan`, this class does the rest.

    It is a :class:`torch.utils.data.DistributedSampler`, which frameworks leave alone: the plan is the same on every
    rank (from seed, epoch and synced ledger), and each rank takes its stride of it. Rank and world size are looked up
    when they are needed, since a sampler is usually built before the process group.

    Args:
        size: N, the number of samples: ``len(dataset)``.
        **options: keyword-only, those of every sampler, see :class:`samplewise.loaders.SamplerOptions`.

    Attributes:
        ledger: the per-sample statistics, :class:`samplewise.cuda_ext.Ledger`.
        shared_epoch: the current epoch, :attr:`epoch`, for data sets that draw by it in worker processes.
        recording: set it to False while losses must not be recorded (validation).
        sharding: who deals the ids out to the ranks: "sampler", or "loader" (accelerate's), which then gets all of
            them on every rank. Losses are counted and merged over the ranks in both cases.
        set_epoch_called: whether the loop says itself which epoch it is in.
        step_samples: to a multiple of so many ids an epoch is filled up for a loader that deals them out.
        watch: looks at the first batches that are observed, whether they are the sampler's.
        on_plan: called, without arguments, whenever the plan of an epoch is settled.
        plan_seconds: seconds that the last planning took, the ledger's sync included.
    """

    accepts_batch_loss = False  # whether observe() takes a batch's mean loss, to be recorded for each of its samples
    uses_losses = True  # whether plans depend on what observe() records
    plans_shares = False  # whether plan() gives this rank's share, where the ledger is sharded

    def __init__(
        self,
        size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        arrange: Arrange | None = None,
        drop_last: bool = False,
        epoch_length: int | Literal["plan"] = "plan",
        ema: float = 0.9,
        device: str | torch.device = "cpu",
        sharded: bool = False,
        fingerprint: str = "",
        num_replicas: int | None = None,
        rank: int | None = None,
    ):
        # DistributedSampler's own constructor asks for the process group, which need not exist yet.
        name = type(self).__name__
        size = ledger.check_size(name, size)
        self.seed = integer(name, "seed", seed, 0)
        self.epoch_length = check_epoch_length(name, epoch_length, size)
        rows = {"ema": ema, "device": device, "fingerprint": fingerprint}
        self.ledger = shares.make_ledger(name, size, sharded, self.plans_shares, arrange is not None, **rows)
        self.sharded = sharded
        self.num_replicas = None if num_replicas is None else integer(name, "num_replicas", num_replicas, 1)
        self._rank = None if rank is None else integer(name, "rank", rank, 0, (num_replicas or MAX_SIZE) - 1)
        self.size = self.ledger.size
        self.dataset: Any = range(self.size)  # DistributedSampler's attribute; only its length is known here
        self.shuffle = shuffle
        self.arrange = check_arrange(name, arrange, shuffle)
        self.drop_last = drop_last
        self.shared_epoch = SharedEpoch()
        self.recording = True
        self.sharding: Literal["sampler", "loader"] = "sampler"
        self.step_samples = 1
        self.on_plan: Callable[[], None] | None = None
        self.plan_seconds = 0.0
        self._epoch_plan: EpochPlan | None = None  # of the current epoch, once it is made
        self._last: Segment | None = None  # the last stretch of any plan so far
        self._previous_order: Order | None = None
        self._weighted = self.set_epoch_called = False
        self._cursor = Cursor.at_start(step=0)
        self.watch: ReshardingWatch | DueWatch = ReshardingWatch()

    # --- what a method writes -----------------------------------------------------------------------------------------

    @abstractmethod
    def plan(self, epoch: int, rng: np.random.Generator) -> Plan:
        """Decide what to train on next.

        Args:
            epoch: the plan's number, from 0: the epoch, or with a fixed ``epoch_length`` the number of plans before
                this one (``self.epoch`` is then the training epoch in which the plan begins).
            rng: keyed by (seed, number of the plan), and by the rank where the ledger is sharded; with generators keyed
                by (seed, number of the plan), the only source of randomness a plan may use.
        """

    # --- epochs -------------------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Go to ``epoch``. The same epoch again changes nothing; a new one syncs the ledger and makes a new plan.

        With several ranks a new epoch is collective: call it on all of them. A loop that never calls it, on any rank,
        goes to the next epoch when it iterates the sampler again after it trained on the whole of the last one.
        """
        epoch = integer(f"{type(self).__name__}.set_epoch", "epoch", epoch, 0)
        self.set_epoch_called = True
        if epoch != self.epoch:
            self._go_to(epoch)

    def _go_to(self, epoch: int) -> None:
        begin = perf_counter()
        self.sync()
        self.epoch = epoch
        self._epoch_plan = None
        self._cursor = Cursor.at_start(self.step)
        self._previous_order = None
        self._make_epoch(begin)

    @property
    def current_plan(self) -> Plan:
        """What the current epoch trains on; with a fixed ``epoch_length``, the stretches of plans it consists of."""
        return self._settled().plan

    def _settled(self) -> EpochPlan:
        """The current epoch's plan, made now where there is none yet."""
        if self._epoch_plan is None:
            self._make_epoch(perf_counter())
        assert self._epoch_plan is not None
        return self._epoch_plan

    def _make_epoch(self, begin: float) -> None:
        if self.epoch_length == "plan":
            plan = self._make_plan(self.epoch)
            segments: tuple[Segment, ...] = (Segment(plan, self.epoch, 0, len(plan)),)
        else:
            length = shares.length_of_share(int(self.epoch_length), self.ledger, self.drop_last)
            segments = next_stretches(length, self._last, self.epoch, self._make_plan)
        self._settle(segments)
        self.plan_seconds = perf_counter() - begin

    def _make_plan(self, number: int) -> Plan:
        plan = self.plan(number, shares.plan_generator(self.seed, number, self.ledger))
        return shares.balanced(type(self).__name__, plan, number, self.seed, self.ledger, self.drop_last)

    def _settle(self, segments: tuple[Segment, ...], **resumed: Any) -> None:
        options = self.seed, self.shuffle, self.drop_last, self.arrange
        now = EpochPlan(type(self).__name__, segments, self.epoch, *options, **resumed)
        now = shares.settled(self.ledger, now)
        if self._weighted and not now.weighted:
            self.ledger.clear_weights()
        self._weighted, self._last, self._epoch_plan = now.weighted, segments[-1], now
        if self.on_plan is not None:
            self.on_plan()

    def grow(self, size: int) -> None:
        """Make room for the samples of a data set that grew; from the next plan on they are planned, as unseen ones."""
        self._settled()
        self.ledger.grow(size)
        self.size = self.ledger.size
        self.dataset = range(self.size)

    # --- the DataLoader's side ----------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return self.shared_epoch.value

    @epoch.setter
    def epoch(self, value: int) -> None:
        self.shared_epoch.value = value

    @property
    def num_replicas(self) -> int:
        """World size, looked up when it is asked for."""
        return ranks.world_size() if self._num_replicas is None else self._num_replicas

    @num_replicas.setter
    def num_replicas(self, value: int | None) -> None:
        self._num_replicas = value
        self.ledger.distributed = value != 1

    @property
    def rank(self) -> int:
        """This process's rank, looked up when it is asked for."""
        if self._num_replicas == 1:
            return 0
        return ranks.rank() if self._rank is None else self._rank

    @rank.setter
    def rank(self, value: int | None) -> None:
        self._rank = value

    @property
    def total_size(self) -> int:  # type: ignore[override]
        """Samples of the current epoch on all ranks together.

        A multiple of the world size, unless the epoch was begun by another number of ranks.
        """
        total = self._settled().total(self.num_replicas)
        return total if self.sharding == "sampler" else total + (self.begin - total) % self.step_samples

    @property
    def begin(self) -> int:
        """Where the current epoch's dealing out to the ranks begins: 0, unless others had begun the epoch."""
        return self._settled().begin_for(self.num_replicas)

    @property
    def num_samples(self) -> int:  # type: ignore[override]
        """Samples that this rank gets in the current epoch."""
        return -(-self.begin // self.num_replicas) + (self.total_size - self.begin) // self.num_replicas

    def __len__(self) -> int:
        return self.num_samples if self.sharding == "sampler" else self.total_size

    def __iter__(self) -> Iterator[int]:
        # Never behind the back of a loop that calls set_epoch(): it may just look at a batch, or evaluate.
        if not self.set_epoch_called and self._cursor.is_left(self.total_size):
            self._go_to(self.epoch + 1)
        order = self.order()
        self._cursor.begin()
        start = order.index_of(self._cursor.start)
        return OrderIterator(order, self.epoch, start, self._previous_order, self._cursor.mark_drawn)

    def order(self) -> Order:
        """The current epoch's ids as the loader gets them."""
        if self.sharding == "sampler":
            return self._settled().order(self.num_replicas, self.rank)
        return replace(self._settled().order(self.num_replicas, None), total=self.total_size)

    # --- the model's side ---------------------------------------------------------------------------------------------

    def observe(self, ids: Tensor, losses: Tensor, *, scores: Tensor | None = None) -> Tensor:
        """Record a batch's losses and give the scalar to backpropagate, ``mean(weights * losses)``.

        The weights are the current plan's; ``losses`` itself is never changed. Without gradients
        (``torch.no_grad()``) or while :attr:`recording` is False, nothing is recorded and the plain mean is returned,
        so that evaluation leaves no trace.

        With ledger (``device="cuda"``) and batch on the GPU, nothing waits for it. In a captured CUDA graph each replay
        records and weighs anew, but what was consumed only the host counts: call :meth:`advance_to` after replays.

        Args:
            ids: integer (B,), the ids that came with the batch.
            losses: floating point (B,), one loss a sample, with its graph: ``reduction="none"``, or
                :func:`samplewise.cuda_ext.sample_losses`.
            scores: floating point (B,), optional, kept as the ledger's ``score``.

        Returns:
            The weighted mean loss, a scalar with its graph.

        Raises:
            TypeError: ids that are no integers, or losses that are no floating-point tensor.
            ValueError: losses of another shape than (B,): a scalar, or one loss a token.
            IndexError: an id outside the data set.
        """
        if self.accepts_batch_loss and isinstance(losses, Tensor) and losses.ndim == 0:
            losses = losses.expand(ids.numel())
        if not (self.recording and torch.is_grad_enabled()):
            return losses.mean()
        self._settled()
        self.ledger.update(ids, losses, scores=scores)
        if self._cursor.iterated_again:
            begin_again(type(self).__name__, ids, self.order(), self._cursor, self._first_of(ids))
        if not self.watch.done:
            self.watch.look(self, ids)
        self._cursor.count(ids.numel() * self.num_replicas)
        if self._weighted or self.ledger.is_captured:
            return (self.ledger.weights(ids, device=losses.device) * losses).mean()
        return losses.mean()

    def _first_of(self, ids: Tensor) -> int:
        """Where this rank's first batch stands in the order that the loader deals out."""
        return self.rank * ids.numel() if self.sharding == "loader" else 0

    @property
    def consumed(self) -> int:
        """Samples of the current epoch that the model has trained on, all ranks together."""
        return self._cursor.consumed

    @property
    def step(self) -> int:
        """Training batches observed so far, in all epochs."""
        return self._cursor.step

    @property
    def progress(self) -> float:
        """Epochs done, with the share of the current one: 2.5 is the middle of the third epoch."""
        return self.epoch + min(1.0, self.consumed / self._cursor.end(self.total_size))

    @property
    def epoch_samples(self) -> int | None:
        """Samples of the current epoch, all ranks together, after which the loop ends it; None: all of them.

        A loop sets it that leaves the rest out (a limit on the batches, a loader that drops its last one), so that
        :attr:`progress` and a state of the last batch are right. Each new epoch sets it to None.
        """
        return self._cursor.limit

    @epoch_samples.setter
    def epoch_samples(self, samples: int | None) -> None:
        self._cursor.limit = samples

    def advance_to(self, consumed: int) -> None:
        """Say how many samples of this epoch the model has trained on (all ranks together).

        :meth:`observe` counts them; a framework's callback, which knows of batches that were not observed, corrects it.
        0 begins the epoch anew: the next iterator starts at its first sample, also after a resume.
        """
        self._cursor.consumed = min(max(int(consumed), 0), self.total_size)

    # --- state --------------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Merge the ranks' observations into every rank's ledger. Collective; do it before :meth:`state_dict`."""
        world = ranks.world_size()
        if world > 1 and self.num_replicas not in (1, world):
            raise ValueError(
                f"{type(self).__name__}(num_replicas={self.num_replicas}): there are {world} processes. Use None (each "
                f"process trains on its share) or 1 (each has a ledger of its own and trains on everything)."
            )
        self.ledger.sync()

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs, as live references (like a module's): save it at once, or deepcopy it.

        It holds tensors, numbers and strings only (``torch.load(..., weights_only=True)``): 32 bytes a sample, 8 a
        planned one (12 with weights; none for a ``range``), and a few integers. With several ranks call :meth:`sync` on
        all of them first.
        """
        now = self._settled()
        return {
            "version": VERSION,
            **self._identity(),
            "size": self.size,
            "epoch": self.epoch,
            "cursor": self._cursor.tensor,
            **now.state(self.num_replicas),
            "ledger": self.ledger.state_dict(),
        }

    def _identity(self) -> dict[str, Any]:
        """What a state must agree on."""
        options = {key: getattr(self, key) for key in ("seed", "shuffle", "drop_last", "epoch_length", "sharded")}
        return {"sampler": type(self).__name__, "arrange": arrange_name(self.arrange), **options}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was saved: the next iterator starts behind the consumed samples.

        A state that was saved when its epoch was over continues with the next epoch. One that was saved by another
        number of ranks goes on with its epoch: what is left of it is dealt out to those that are here now.

        Raises:
            ValueError: the state is damaged, or of another version, method, seed or data set; nothing is changed then.
        """
        state = checked_state(type(self).__name__, state, self._identity())
        segments = tuple(Segment.from_state(part, state["size"]) for part in state["segments"])
        cursor = Cursor.from_tensor(state["cursor"])
        self.ledger.load_state_dict(state["ledger"])
        self.epoch, self._cursor = state["epoch"], cursor
        self._previous_order = None
        left = {"begin": state["begin"], "world": state["world"], "left_at": cursor.consumed} if cursor.consumed else {}
        self._settle(segments, arranged_for=state["ranks"] if cursor.consumed else None, **left)
        if self._cursor.is_complete(state["total"]):  # what comes next is a plan of the ledger just loaded
            if state["ledger"]["pending"]:
                self.ledger.sync()
            previous = self.order()
            self.epoch += 1
            self._cursor = Cursor.at_start(self.step)
            self._make_epoch(perf_counter())
            self._previous_order = previous
        elif state["world"] not in (None, self.num_replicas):
            cursor.limit = None  # it was that of the other ranks' loaders
