"""Ledger: what is known of each sample, one 32-byte record a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samplewise.cuda_ext import ops, ranks, reference
from samplewise.cuda_ext.checks import integer, share
from samplewise.cuda_ext.totals import Totals

VERSION = 2
_WIDTH = 8  # columns of a record
_SYNC_CHUNK = 1 << 20  # entries applied at a time
Entry = tuple[Tensor, Tensor, Tensor | None, Tensor]  # ids, losses, scores, step (1,) of one batch
_COLUMNS = {
    "loss_last": reference.LOSS_LAST,
    "loss_ema": reference.LOSS_EMA,
    "loss_mean": reference.LOSS_MEAN,
    "loss_m2": reference.LOSS_M2,
    "count": reference.COUNT,
    "last_step": reference.LAST_STEP,
    "weight": reference.WEIGHT,
    "score": reference.SCORE,
}


class Ledger:
    """Per-sample statistics of a data set of ``size`` samples.

    With several ranks (an initialised process group), each rank keeps what it observed aside until :meth:`sync`, which
    applies all ranks' observations in the order (step, rank, batch order): all ranks then hold the same bytes, also
    where several ranks saw the same sample. With one process an update is visible at once.

    Args:
        size: N, the number of samples, in [1, 2^31].
        ema: decay of ``loss_ema``, in [0, 1): ``ema <- ema * old + (1 - ema) * loss``, started at the first loss.
        device: where the records live.
        fingerprint: any text that identifies the data set; a state saved with another one is refused.
        distributed: False where each process keeps a ledger of its own, though there is a process group.

    A ledger is made for one thread: the one that trains.

    Attributes:
        records: float32 (N, 8), the records; columns in the order of :meth:`column`'s names.
    """

    def __init__(
        self,
        size: int,
        *,
        ema: float = 0.9,
        device: str | torch.device = "cpu",
        fingerprint: str = "",
        distributed: bool = True,
    ):
        self.size = check_size("Ledger", size)
        self.ema = share("Ledger", "ema", ema, ends="[)", what="the decay of the moving average")
        if not isinstance(fingerprint, str):
            raise TypeError(f"Ledger(fingerprint={fingerprint!r}): fingerprint must be a str.")
        self.fingerprint = fingerprint
        self.distributed = distributed
        with torch.inference_mode(False):  # what is made in inference mode could not be changed outside
            self._counters = torch.zeros(3, dtype=torch.int64, device=device)
            self.device = self._counters.device  # with its index
            self._allocate()
        self._pending: list[Entry] = []

    def update(self, ids: Tensor, losses: Tensor, *, scores: Tensor | None = None) -> None:
        """Record one loss per entry; a sample that stands several times is updated that often, in batch order.

        A loss that is not finite (or beyond 1e18, whose square overflows float32) is counted in :attr:`rejected` and
        never stored. ``last_step`` becomes the number of updates before this one.

        Nothing waits for a GPU where the ledger and the arguments live on it, and a captured CUDA graph records anew
        with each replay (with one process).

        Args:
            ids: integer (B,), rows in [0, N).
            losses: floating point (B,), any precision.
            scores: floating point (B,), kept as ``score`` (a gradient norm, a margin, a reward); non-finite ones are
                ignored.

        Raises:
            TypeError: ids that are no integers, or losses that are no floating-point tensor.
            ValueError: another shape than (B,), or lengths that differ.
            IndexError: an id outside [0, N). Nothing is recorded then. A ledger on a GPU passes over such ids instead,
                counts them, and :meth:`sync` raises.
            RuntimeError: a CUDA graph is captured with several ranks.
        """
        ids = self._entries(ids)
        losses = _vector("losses", losses, ids)
        if scores is not None:
            scores = _vector("scores", scores, ids)
        if self._shared():
            self._keep_aside(ids, losses, scores)
        else:
            self._apply(ids, losses, scores, None)

    def _allocate(self) -> None:
        self._make_records(self.size)

    def _make_records(self, rows: int) -> None:
        self.records = _zeros(rows, self.device)
        # The CUDA kernel's scratch memory: a word a sample.
        self._links = torch.zeros(rows if self.device.type == "cuda" else 0, dtype=torch.int32, device=self.device)

    @property
    def shard(self) -> tuple[int, int]:
        """Which of how many shards the rows here are: (0, 1), since all are here."""
        return 0, 1

    @property
    def ids(self) -> range:
        """The ids of the rows here, all N."""
        return range(self.size)

    def ids_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The ids of ``rows`` int64 (k,), places in what :meth:`column` gives: the same numbers."""
        return rows

    def rows_of(self, ids: range | NDArray[np.int64]) -> range | NDArray[np.int64]:
        """The rows of ``ids`` (k,), places in what :meth:`column` gives: the same numbers."""
        return ids

    @property
    def totals(self) -> Totals:
        """Sums, order statistics and histograms of values that stand in :meth:`column`'s places, of all samples."""
        return Totals()

    def _shared(self) -> bool:
        return self.distributed and ranks.world_size() > 1

    def _keep_aside(self, ids: Tensor, losses: Tensor, scores: Tensor | None) -> None:
        if ids.device.type == "cpu":
            reference.check_ids(ids.numpy(), self.size)
        elif torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "Ledger.update: with several ranks a captured CUDA graph cannot record, since a replay keeps nothing "
                "aside for sync(). Call update() or observe() outside the graph."
            )
        step = self._counters[reference.UPDATES :].clone()
        self._counters[reference.UPDATES] += 1
        self._pending.append((ids.clone(), losses.clone(), None if scores is None else scores.clone(), step))

    def _apply(self, ids: Tensor, losses: Tensor, scores: Tensor | None, steps: Tensor | None) -> None:
        ids, losses = self._here(ids), self._here(losses)
        scores = None if scores is None else self._here(scores)
        steps = None if steps is None else self._here(steps)
        ops.ledger_update(self.records, self._counters, self._links, ids, losses, scores, steps, self.ema)

    def _apply_by(self, keys: Tensor, integers: Tensor, values: Tensor) -> None:
        """Apply what :func:`pack` gave, in the order of ``keys`` int64 (n,), equal ones as they stand."""
        order = torch.from_numpy(np.argsort(keys.numpy(), kind="stable"))  # which is quick for a few sorted runs
        for part in order.split(_SYNC_CHUNK):
            rows, steps = integers[part].unbind(1)
            losses, scores = values[part].unbind(1)
            self._apply(rows, losses, scores, steps)

    def _here(self, values: Tensor) -> Tensor:
        if values.device == self.device:
            return values
        # Only the way to a GPU may go unawaited: the CPU would read what has not arrived.
        return values.to(self.device, non_blocking=self.device.type == "cuda")

    def _entries(self, ids: Tensor) -> Tensor:
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(
                f"ids: got {kind}, but ids must be an integer tensor (int64 best): a floating-point one corrupts ids "
                f"above 256 (bfloat16), 2,048 (float16) or 2^24 (float32)."
            )
        if ids.ndim != 1:
            raise ValueError(f"ids: got shape {tuple(ids.shape)}, but ids must be one-dimensional, (B,).")
        return ids if ids.dtype is torch.int64 else ids.to(torch.int64)

    def column(self, name: str) -> Tensor:
        """A copy of one column, (N,).

        ``loss_last``, ``loss_ema``, ``loss_mean``, ``loss_m2`` (Welford's sum of squared deviations) and ``score``:
        float32, NaN where nothing was recorded. ``count``: int32, 0 where unseen. ``last_step``: int32, -1 where
        unseen. ``weight``: float32, of the current plan, 0 where it gives none.
        """
        if name not in _COLUMNS:
            raise KeyError(f"Ledger.column({name!r}): no such column; there are {', '.join(_COLUMNS)}.")
        index = _COLUMNS[name]
        if name == "weight":
            return self.records[:, index].clone()
        if name == "count":
            return self.records.view(torch.int32)[:, index].clone()
        if name == "last_step":
            return self.records.view(torch.int32)[:, index].masked_fill(~self.seen, -1)
        return self.records[:, index].masked_fill(~self.seen, torch.nan)

    @property
    def seen(self) -> Tensor:
        """Bool (N,): the samples of which at least one loss was recorded."""
        return self.records.view(torch.int32)[:, reference.COUNT] > 0

    @property
    def rejected(self) -> int:
        """How many losses were refused because they were not finite."""
        return int(self._counters[reference.REJECTED])

    @property
    def updates(self) -> int:
        """How many batches were recorded; a replay of a captured CUDA graph counts too."""
        return int(self._counters[reference.UPDATES])

    def set_weights(self, ids: Tensor, weights: Tensor) -> None:
        """Write the current plan's weights, float32 (k,) and >= 0, at the unique ``ids`` int64 (k,)."""
        self.clear_weights()
        self._write_weights(ids, weights)

    def _write_weights(self, rows: Tensor, weights: Tensor) -> None:
        # A record without a weight holds 0, as new memory does: a weight of 0 becomes the smallest normal number.
        given = weights.to(self.device, torch.float32).clamp_min(torch.finfo(torch.float32).tiny)
        self.records[rows.to(self.device), reference.WEIGHT] = given

    def clear_weights(self) -> None:
        """Say that the current plan has no weights."""
        self.records[:, reference.WEIGHT] = 0

    def weights(self, ids: Tensor, *, device: torch.device | None = None) -> Tensor:
        """The current plan's weights of ``ids`` (B,), 1 where it gives none: float32 (B,), there or on ``device``."""
        rows = self._here(self._entries(ids))
        if self.device.type == "cuda":  # an id outside was counted by update(), and may not end the process here
            rows = rows.clamp(0, self.size - 1)
        weights = torch.threshold_(self.records.select(1, reference.WEIGHT).index_select(0, rows), 0.0, 1.0)
        device = ids.device if device is None else device
        return weights if weights.device == device else weights.to(device, non_blocking=device.type == "cuda")

    @property
    def is_captured(self) -> bool:
        """Whether a CUDA graph is being captured, whose replays will see weights that later plans write."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def grow(self, size: int) -> None:
        """Make room for more samples; the new ones are unseen. A captured CUDA graph must be captured anew."""
        size = check_size("Ledger.grow", size)
        if size < self.size:
            raise ValueError(f"Ledger.grow(size={size}): the ledger has {self.size} records and never shrinks.")
        with torch.inference_mode(False):
            old, self.size = self.records, size
            self._allocate()
            self.records[: len(old)] = old

    def sync(self) -> None:
        """Merge what all ranks observed since the last sync. Collective: every rank calls it, or none.

        One variable-length all-gather: ids and steps travel as int64, losses and scores apart from them as float32.
        With one process there is nothing to merge.

        Raises:
            IndexError: ids outside [0, N) were observed on a GPU since the ledger was made.
        """
        if self._shared():
            integers, values = ranks.gather_rows(*pack(self._pending))
            self._pending.clear()
            reference.check_ids(integers[:, 0].numpy(), self.size)
            steps = integers[:, 1]
            self._apply_by(steps, integers, values)  # the gather is in rank order already
            if steps.numel():
                self._counters[reference.UPDATES] = max(self.updates, int(steps.max()) + 1)
        if self.device.type == "cuda" and (outside := int(self._counters[reference.OUT_OF_RANGE])):
            raise IndexError(
                f"ids: {outside} observed ids were outside [0, {self.size}), the rows of the data set that the ledger "
                f"was made for. Build the sampler with len(train_set), and record no other data set's batches."
            )

    def state_dict(self) -> dict[str, Any]:
        """The state, as live references (like a module's): save it at once or ``copy.deepcopy`` it.

        With several ranks call :meth:`sync` on all of them first; a state that still holds one rank's own observations
        is accepted by that rank only.
        """
        return {
            "version": VERSION,
            "size": self.size,
            "ema": self.ema,
            "fingerprint": self.fingerprint,
            "records": self.records,
            "counters": self._counters,
            "pending": self._pending,
            "rank": [ranks.rank(), ranks.world_size()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state bit for bit.

        Raises:
            ValueError: the state is of another version, size or data set, or holds another rank's own observations.
        """
        self.check_state(state)
        self.records.copy_(state["records"])
        self._counters.copy_(state["counters"])
        self._pending[:] = state["pending"]

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError when :meth:`load_state_dict` would."""
        if state.get("version") != VERSION:
            raise ValueError(f"Ledger state: version {state.get('version')} was saved, this release reads {VERSION}.")
        if missing := [key for key in self.state_dict() if key not in state]:
            raise ValueError(f"Ledger state: it lacks {', '.join(missing)}; it is damaged, or no ledger's.")
        dealt = tuple(state.get("shard", (0, 1)))
        if dealt != self.shard:
            raise ValueError(
                f"Ledger state: it is shard {dealt[0]} of {dealt[1]}, and this process holds shard {self.shard[0]} of "
                f"{self.shard[1]}. Load the shard that this rank saved; for another number of ranks deal all saved "
                f"shards anew: samplewise.cuda_ext.sharded.reshard(states, {self.shard[1]})."
            )
        if state["size"] != self.size:
            raise ValueError(
                f"Ledger state: it was saved for a data set of {state['size']} samples, this one has {self.size}. "
                f"Resume with the same data set; for one that grew, build with the old size, load the state, then call "
                f"grow({self.size})."
            )
        if state["ema"] != self.ema:
            raise ValueError(f"Ledger state: it was saved with ema={state['ema']}, this one has {self.ema}.")
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"Ledger state: it was saved with fingerprint={state['fingerprint']!r}, this one has "
                f"{self.fingerprint!r}: the data sets differ, so the recorded losses would belong to other samples."
            )
        for name, own in (("records", self.records), ("counters", self._counters)):
            if state[name].shape != own.shape or state[name].dtype != own.dtype:
                raise ValueError(
                    f"Ledger state: its {name} are {state[name].dtype} {tuple(state[name].shape)}, but must be "
                    f"{own.dtype} {tuple(own.shape)}: something converted or cut them."
                )
        if state["pending"] and list(state["rank"]) != [ranks.rank(), ranks.world_size()]:
            raise ValueError(
                f"Ledger state: it holds observations that only rank {state['rank'][0]} of {state['rank'][1]} made. "
                f"Call sync() on every rank before state_dict()."
            )


def check_size(owner: str, size: Any) -> int:
    """``size`` as an int, where it is a number of samples that a ledger can have."""
    return integer(owner, "size", size, 1, ops.MAX_SIZE, what="the number of samples, len(dataset),")


def _zeros(size: int, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(size, _WIDTH, device=device)
    # numpy's zeros are lazy and get huge pages, torch's do not; at 64 bytes, no record lies across two cache lines
    raw = np.zeros(size * _WIDTH + 16, dtype=np.float32)
    begin = -raw.ctypes.data % 64 // 4
    return torch.from_numpy(raw[begin : begin + size * _WIDTH].reshape(size, _WIDTH))


def _vector(name: str, values: Tensor, ids: Tensor) -> Tensor:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name}: got {kind}, but {name} must be a floating-point tensor of shape (B,).")
    if values.ndim == 0:
        raise ValueError(
            f"{name}: got a scalar, but one value a sample is needed, (B,). Ask the loss function for it: "
            f"F.cross_entropy(logits, labels, reduction='none')."
        )
    if values.ndim > 1:
        raise ValueError(
            f"{name}: got shape {tuple(values.shape)}, but one value a sample is needed, (B,). Take the mean over the "
            f"other dimensions, e.g. over a sequence's tokens: {name}.mean(dim=1)."
        )
    if values.shape != ids.shape:
        raise ValueError(f"{name}: got {values.numel()} for {ids.numel()} ids, but there must be one value an id.")
    values = values.detach() if values.requires_grad else values
    return values if values.dtype is torch.float32 else values.to(torch.float32)


def pack(pending: list[Entry]) -> tuple[Tensor, Tensor]:
    """The observations as int64 (n, 2) of (id, step) and float32 (n, 2) of (loss, score), NaN where there is none."""
    if not pending:
        return torch.empty(0, 2, dtype=torch.int64, device="cpu"), torch.empty(0, 2, device="cpu")
    ids, losses, _, steps = zip(*pending, strict=True)
    scores = [torch.full_like(batch, torch.nan) if marks is None else marks for _, batch, marks, _ in pending]
    lengths = torch.tensor([batch.numel() for batch in ids], device="cpu")
    integers = torch.stack([_joined(ids), _joined(steps).repeat_interleave(lengths)], dim=1)
    return integers, torch.stack([_joined(losses), _joined(scores)], dim=1)


def _joined(batches: Sequence[Tensor]) -> Tensor:
    """All batches one after another, on the CPU."""
    if len({batch.device for batch in batches}) == 1:
        return torch.cat(batches).cpu()  # type: ignore[arg-type]
    return torch.cat([batch.cpu() for batch in batches])
