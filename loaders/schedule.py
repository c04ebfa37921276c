"""What a training step uses, of a few choices ("arms"): drawn as a pure function of (seed, optimizer step, slot).

Bit widths of layers, lengths of sequences, ranks of adapters, resolutions: whatever can differ from step to step. A
slot is one place that has an arm of its own in each step, such as a layer; without slots a step has one arm.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from samplewise.cuda_ext.checks import integer, share
from samplewise.cuda_ext.hashing import hash64
from samplewise.loaders.seeding import derive

VERSION = 1
BINS = 40  # of the histogram over a step's average cost
_ONE_SLOT = ""
_FLUSH = 256  # losses that wait to be read from their device, so that no step waits for it


@dataclass(frozen=True)
class Histogram:
    """Steps that were recorded, by the average cost of their arms.

    Attributes:
        edges: float64 ``(B + 1,)``.
        counts: int64 ``(B,)``, steps in each bin.
        losses: float64 ``(B,)``, the mean of their finite losses, NaN where there is none.
    """

    edges: np.ndarray
    counts: np.ndarray
    losses: np.ndarray


class Schedule(ABC):
    """Chooses an arm for each slot in each optimizer step, and keeps the statistics of those that were trained.

    A method implements :meth:`probabilities`. Draws depend on (seed, step, slot's name) alone, and on the statistics
    where a method uses them: equal on all ranks without communication, constant over the batches that are accumulated
    for a step, the same after a resume, and the same for a slot whatever other slots there are.

    Args:
        arms: K values to choose from; distinct.
        slots: S names; None: one arm a step, which :meth:`draw` gives as it is.
        costs: a number for each arm, ascending, which averages are taken of; None: the arms themselves, where they are
            numbers, else 0 to K - 1.
        seed: of the draws.
        ema: of the statistics by arm, as in the ledger: what the mean keeps of itself when a value is recorded.

    Attributes:
        arms, slots, seed: as given.
        costs: float64 ``(K,)``.
        counts: int64 ``(S, K)``, recorded steps in which a slot had an arm (S = 1 without slots).
        step: the next step to be recorded.

    Raises:
        ValueError: no or equal arms, no or equal slots, costs that do not ascend.
    """

    def __init__(
        self,
        *,
        arms: Sequence[Any],
        slots: Sequence[str] | None = None,
        costs: Sequence[float] | None = None,
        seed: int = 0,
        ema: float = 0.9,
    ):
        owner = type(self).__name__
        self.arms = tuple(arm.item() if isinstance(arm, np.generic | Tensor) else arm for arm in arms)
        if not self.arms or any(arm in self.arms[:k] for k, arm in enumerate(self.arms)):
            raise ValueError(f"{owner}(arms={list(arms)!r}): must hold at least one arm, and none twice.")
        if isinstance(slots, str) or not all(isinstance(slot, str) for slot in slots or ()):
            raise TypeError(f"{owner}(slots={slots!r}): must be a sequence of names, or None for one arm a step.")
        self.slots = None if slots is None else tuple(slots)
        if self.slots is not None and (not self.slots or len(set(self.slots)) < len(self.slots)):
            raise ValueError(f"{owner}(slots): must name at least one slot, and none twice.")
        self.costs = self._check_costs(costs)
        self.seed = integer(owner, "seed", seed, 0)
        self.ema = share(owner, "ema", ema, ends="[)", what="what a running mean keeps of itself")
        # a name and its reverse: one word of 32 bits would be the same for two of many names now and then
        keys = [derive(self.seed, "slot", slot, slot[::-1]) for slot in self._names]
        self._keys = np.array(keys, dtype=np.uint64)
        self.reset()

    def reset(self, step: int = 0) -> None:
        """Forget what was recorded; ``step`` is the next one to be recorded."""
        shape = (len(self._names), len(self.arms))
        self.step, self._rejected = integer(type(self).__name__, "step", step, 0), 0
        self.counts = np.zeros(shape, np.int64)
        self._losses, self._scores = np.full(shape, np.nan), np.full(shape, np.nan)
        self._bins, self._bin_losses = np.zeros((2, BINS), np.int64), np.zeros(BINS)  # steps and finite losses; sums
        self._pending: list[tuple[np.ndarray, Tensor | float | None]] = []

    def _check_costs(self, costs: Sequence[float] | None) -> np.ndarray:
        if costs is None:
            costs = self.arms if _are_numbers(self.arms) else range(len(self.arms))
        array = np.array(costs, dtype=np.float64)
        owner = type(self).__name__
        if array.shape != (len(self.arms),) or not np.isfinite(array).all() or not (np.diff(array) > 0).all():
            raise ValueError(
                f"{owner}(costs={list(costs)!r}): must be one finite number for each of the {len(self.arms)} arms, in "
                f"ascending order; sort the arms, or give costs."
            )
        return array

    @property
    def rejected(self) -> int:
        """Losses that were not finite; the step counts, its loss does not."""
        self._flush()
        return self._rejected

    @property
    def _names(self) -> tuple[str, ...]:
        return (_ONE_SLOT,) if self.slots is None else self.slots

    @abstractmethod
    def probabilities(self, step: int) -> np.ndarray:
        """The arms' probabilities in a step, float64 ``(K,)`` for all slots or ``(S, K)``; they sum to 1."""

    def indices(self, step: int) -> np.ndarray:
        """Which arm each slot has in a step: int64 ``(S,)``, positions in ``arms``."""
        step = integer(type(self).__name__, "step", step, 0, what="the number of optimizer steps before this one")
        shape = (len(self._names), len(self.arms))
        levels = np.cumsum(np.broadcast_to(self.probabilities(step), shape), axis=1)
        bits = hash64(self._keys, derive(self.seed, "step", step)) >> np.uint64(11)
        places = (bits.astype(np.float64) * 2.0**-53)[:, None] * levels[:, -1:]  # uniform in [0, 1), times a sum near 1
        found: np.ndarray = np.minimum((places >= levels).sum(1), len(self.arms) - 1)
        return found

    def draw(self, step: int) -> Any:
        """What step number ``step`` (0 is the first) uses: ``{slot: arm}``, or an arm where there are no slots."""
        return self._as_arms(self.indices(step))

    def _as_arms(self, indices: np.ndarray) -> Any:
        chosen = [self.arms[k] for k in indices]
        return chosen[0] if self.slots is None else dict(zip(self.slots, chosen, strict=True))

    def average(self, step: int) -> float:
        """The mean cost of a step's arms over the slots."""
        return float(self.costs[self.indices(step)].mean())

    needs_loss = needs_scores = False
    """Whether draws depend on what :meth:`record` is given."""

    def check_steps(self, steps: int) -> None:  # noqa: B027  (a method may have nothing to warn of)
        """Warn where a training of so many optimizer steps does not get from this schedule what it is for."""

    # --- what was trained ---

    def record(
        self, step: int, *, loss: Tensor | float | None = None, scores: Mapping[str, Any] | Sequence[Any] | None = None
    ) -> None:
        """Record that a step was trained with the arms that :meth:`draw` gives for it.

        Args:
            step: its number; each is recorded once, in order.
            loss: of the step, a number or a tensor with one element, which is not waited for; with several ranks their
                mean, since the statistics must be equal on all of them.
            scores: a number for each slot, such as the norm of the gradient.

        Raises:
            ValueError: a step before one that was recorded already, or scores of other slots.
        """
        owner = type(self).__name__
        step = integer(owner, "step", step, 0)
        if step < self.step:
            raise ValueError(
                f"{owner}.record(step={step}): step {self.step} is the next one: steps are counted over all epochs; "
                f"load_state_dict goes back, reset begins anew."
            )
        for name, needed, given in (("loss", self.needs_loss, loss), ("scores", self.needs_scores, scores)):
            if needed and given is None:
                raise ValueError(f"{owner}.record({name}=None): its draws depend on it; give it in each step.")
        indices = self.indices(step)
        values = None if scores is None else self._check_scores(scores)  # before anything changes
        value = None if loss is None else _scalar(owner, loss)
        self.counts[np.arange(len(indices)), indices] += 1
        self.step = step + 1
        if values is not None:
            self._average_in(self._scores, indices, values)
        self._pending.append((indices, value))
        if len(self._pending) >= _FLUSH:
            self._flush()

    def _check_scores(self, scores: Mapping[str, Any] | Sequence[Any]) -> np.ndarray:
        if isinstance(scores, Mapping):
            if set(scores) != set(self._names):
                raise ValueError(f"{type(self).__name__}.record(scores): must have a value for each slot, no other.")
            scores = [scores[slot] for slot in self._names]
        values = torch.stack([torch.as_tensor(value, dtype=torch.float64).detach() for value in scores])
        if values.shape != (len(self._names),):
            raise ValueError(
                f"{type(self).__name__}.record(scores): must be {len(self._names)} numbers, one for each slot; got "
                f"shape {tuple(values.shape)}."
            )
        return values.cpu().numpy()

    def _average_in(self, means: np.ndarray, indices: np.ndarray, values: np.ndarray | float) -> None:
        slots = np.arange(len(indices))
        before, after = means[slots, indices], np.broadcast_to(values, len(indices))
        mixed = np.where(np.isnan(before), after, self.ema * before + (1 - self.ema) * after)
        means[slots, indices] = np.where(np.isfinite(after), mixed, before)

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        tensors = [loss for _, loss in pending if isinstance(loss, Tensor)]
        read = iter(torch.stack([loss.double() for loss in tensors]).tolist() if tensors else [])
        for indices, loss in pending:
            value = next(read) if isinstance(loss, Tensor) else loss
            place = self._bin(float(self.costs[indices].mean()))
            self._bins[0, place] += 1
            if value is None or not np.isfinite(value):
                self._rejected += value is not None  # a step without a loss is not one whose loss is bad
                continue
            self._bins[1, place] += 1
            self._bin_losses[place] += value
            self._average_in(self._losses, indices, value)

    def _bin(self, cost: float) -> int:
        low, high = self.costs[0], self.costs[-1]
        return 0 if high == low else min(int((cost - low) / (high - low) * BINS), BINS - 1)

    @property
    def losses(self) -> np.ndarray:
        """The running mean of the losses of steps in which a slot had an arm, ``(S, K)``; NaN where there is none."""
        self._flush()
        return np.array(self._losses)

    @property
    def scores(self) -> np.ndarray:
        """The running mean of the scores of a slot with an arm, float64 ``(S, K)``; NaN where there is none."""
        return np.array(self._scores)

    def histogram(self) -> Histogram:
        """Recorded steps and their losses by the step's average cost, in equal bins from the least to the largest."""
        self._flush()
        with np.errstate(invalid="ignore", divide="ignore"):
            losses = self._bin_losses / self._bins[1]
        return Histogram(np.linspace(self.costs[0], self.costs[-1], BINS + 1), self._bins[0].copy(), losses)

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """All statistics: numbers and lists, so that JSON and ``weights_only`` loading take it."""
        self._flush()
        return {
            "version": VERSION,
            "fingerprint": self._fingerprint(),
            "step": self.step,
            "rejected": self._rejected,
            "counts": self.counts.tolist(),
            "losses": _listed(self._losses),
            "scores": _listed(self._scores),
            "bins": self._bins.tolist(),
            "bin_losses": self._bin_losses.tolist(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: of another version, or of a schedule with other arms, slots or seed. Nothing is changed then.
        """
        owner = type(self).__name__
        if state_dict.get("version") != VERSION:
            raise ValueError(
                f"{owner} state: version {state_dict.get('version')} was saved, this release reads {VERSION}."
            )
        if state_dict["fingerprint"] != self._fingerprint():
            raise ValueError(
                f"{owner} state: it was saved by a schedule with other slots, arms, seed or options, so "
                f"that its draws were others; give this one the same."
            )
        counts, bins = (np.array(state_dict[key], dtype=np.int64) for key in ("counts", "bins"))
        losses, scores = (_array(state_dict[key]) for key in ("losses", "scores"))
        sums = np.array(state_dict["bin_losses"], dtype=np.float64)
        found, own = (counts, losses, scores, bins, sums), (self.counts, self._losses, self._scores, self._bins)
        if [part.shape for part in found] != [part.shape for part in (*own, self._bin_losses)]:
            raise ValueError(f"{owner} state: its statistics have other shapes; it is damaged.")
        self.step, self._rejected, self._pending = int(state_dict["step"]), int(state_dict["rejected"]), []
        self.counts, self._losses, self._scores, self._bins, self._bin_losses = found

    def _fingerprint(self) -> int:
        return derive(self.seed, "schedule", repr(self.arms), repr(self.slots), repr(self.costs.tolist()))


class FixedSchedule(Schedule):
    """A list that is gone through again and again: step t uses entry t mod n.

    Args:
        entries: n arms, or n dictionaries ``{slot: arm}`` with the same slots each; one entry makes a pinned schedule.

    Raises:
        ValueError: no entries, or slots that differ.

    Example::

        FixedSchedule([128, 256, 128, 512]).draw(3)  # 512
    """

    def __init__(self, entries: Sequence[Any]):
        if isinstance(entries, str | Mapping) or not len(entries):
            raise ValueError(f"FixedSchedule(entries={entries!r}): must be a list of at least one arm or dictionary.")
        slots = tuple(entries[0]) if isinstance(entries[0], Mapping) else None
        names = (_ONE_SLOT,) if slots is None else slots
        rows = []
        for number, entry in enumerate(entries):
            if isinstance(entry, Mapping) != (slots is not None) or (slots is not None and set(entry) != set(slots)):
                raise ValueError(f"FixedSchedule(entries): entry {number} has other slots than the first one.")
            row = [entry] if slots is None else [entry[name] for name in names]
            rows.append([arm.item() if isinstance(arm, np.generic | Tensor) else arm for arm in row])
        arms: list[Any] = []
        for arm in (arm for row in rows for arm in row):
            if arm not in arms:
                arms.append(arm)
        super().__init__(arms=sorted(arms) if _are_numbers(arms) else arms, slots=slots)
        self._rows = np.array([[self.arms.index(arm) for arm in row] for row in rows], dtype=np.int64)

    @override
    def indices(self, step: int) -> np.ndarray:
        step = integer(type(self).__name__, "step", step, 0)
        return np.array(self._rows[step % len(self._rows)])

    @override
    def probabilities(self, step: int) -> np.ndarray:
        """One for the entry's arms, zero for the others: float64 ``(S, K)``."""
        rows: np.ndarray = np.eye(len(self.arms))[self.indices(step)]
        return rows

    @override
    def _fingerprint(self) -> int:
        return derive(super()._fingerprint(), "fixed", repr(self._rows.tolist()))


def _are_numbers(arms: Sequence[Any]) -> bool:
    return all(isinstance(arm, Real) and not isinstance(arm, bool) for arm in arms)


def _scalar(owner: str, loss: Tensor | float) -> Tensor | float:
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(f"{owner}.record(loss): must be one number for the step; got shape {tuple(loss.shape)}.")
        return loss.detach().reshape(()).clone()
    return float(loss)


def _listed(values: np.ndarray) -> list[list[float | None]]:
    """NaN as None: JSON has no NaN."""
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]


def _array(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    return np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=np.float64)
