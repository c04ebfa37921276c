"""Refresher: when a model's own tokens are written anew during training, shared by Lightning and the HF Trainer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from samplewise.cuda_ext.checks import integer, share
from samplewise.cuda_ext.ranks import from_first_rank, rank
from samplewise.plugins.correction import CorrectionDataset
from samplewise.plugins.self_tokens import SelfTokenMixer
from samplewise.plugins.token_refresh import (
    RefreshOptions,
    Rollout,
    check_rollout,
    refresh_attempts,
    refresh_self_tokens,
    refresh_settings,
    token_drift,
)
from samplewise.plugins.token_writing import on_all_ranks

VERSION = 1
Target = SelfTokenMixer | CorrectionDataset
Figures = dict[str, float]


class TokenOptions(RefreshOptions, total=False):
    """The options of :func:`~samplewise.plugins.refresh_self_tokens` and :func:`~samplewise.plugins.refresh_attempts`.

    ``rollout``, ``passes`` and ``span`` are the former's, ``max_new_tokens`` is the latter's.
    """

    rollout: Rollout
    passes: int
    span: int
    max_new_tokens: int


class Refresher:
    """A buffer that is written anew at certain moments of a training, and brought back when the training is resumed.

    Its position is that of the next batch: its epoch, and the optimizer steps done before it.

    Args:
        owner: the callback, for messages.
        target: whose buffer it is.
        every_n_epochs: epochs between two moments; or else
        every_n_steps: optimizer steps between two moments.
        drift: share of the tokens, in [0, 1), that must have become others for a refresh; None: refresh at each moment.
        probe: samples that the drift is measured on.
        at_start: refresh before the first batch too, whatever the buffer holds.
        options: of the refresh, see :class:`TokenOptions`.

    Attributes:
        history: the figures of each moment, with ``version``, ``step`` and ``epoch``; those that are NaN are left out.
        epoch: of the next batch.
        step: optimizer steps before it.

    Raises:
        TypeError: another target, or an unknown option.
        ValueError: not exactly one of ``every_n_epochs`` and ``every_n_steps``, or an argument outside its range.
    """

    def __init__(
        self,
        owner: str,
        target: Target,
        *,
        every_n_epochs: int | None,
        every_n_steps: int | None,
        drift: float | None,
        probe: int,
        at_start: bool,
        options: Mapping[str, Any],
    ):
        if not isinstance(target, SelfTokenMixer | CorrectionDataset):
            raise TypeError(
                f"{owner}(target={type(target).__name__}): a SelfTokenMixer or a CorrectionDataset is needed: the "
                f"loader's collate_fn, or its data set before with_ids."
            )
        if (every_n_epochs is None) == (every_n_steps is None):
            raise ValueError(
                f"{owner}(every_n_epochs={every_n_epochs}, every_n_steps={every_n_steps}): give one of the two."
            )
        self.every_n_epochs, self.every_n_steps = (
            None if value is None else integer(owner, name, value, 1)
            for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps))
        )
        if drift is not None:
            share(owner, "drift", drift, ends="[)", what="the share of tokens that must have changed")
            if not isinstance(target, SelfTokenMixer):
                raise ValueError(f"{owner}(drift={drift}): it is measured for a SelfTokenMixer only; leave it out.")
        self.owner, self.target, self.drift, self.at_start = owner, target, drift, at_start
        self.probe = integer(owner, "probe", probe, 1, what="the samples that the drift is measured on")
        self.options = _checked(owner, target, options)
        self.history: list[Figures] = []
        self.begin()

    def begin(self) -> None:
        """A training begins; the state of a checkpoint comes after this."""
        self.epoch, self.step = 0, 0
        self._epoch, self._step = -1, 0  # the last moment
        self._fresh = True
        self._restored: tuple[int, str] | None = None  # number and token of the version that a checkpoint names
        self._foreign = False  # the buffer holds what a later part of the run has written
        self._seconds, self._before, self._began = 0.0, 0.0, perf_counter()

    # --- moments ------------------------------------------------------------------------------------------------------

    def first(self, model: Any, *, epoch: int, step: int, over: bool = False) -> Figures | None:
        """Before the first batch is fetched: bring back the version of the checkpoint, or refresh. Collective.

        Args:
            model: of transformers.
            epoch: of the first batch.
            step: optimizer steps before it.
            over: nothing is left to train.

        Returns:
            The figures, where something was measured or refreshed.
        """
        if not self._fresh:
            return None
        resumed, gone, self._fresh = self._restored is not None, self._restore(over), False
        self._move(epoch, step)
        if not resumed:
            self._step = step
        if over:
            return None
        if gone or self._needed() or (not resumed and self.at_start):
            return self._refresh(model)
        if resumed and self._is_due():
            return self._moment(model)
        self._epoch = epoch
        return None

    def epoch_begins(self, model: Any, *, epoch: int, step: int) -> Figures | None:
        """Before an epoch's first batch is fetched; see :meth:`first`. Collective."""
        self._move(epoch, step)
        return self._refresh(model) if self._needed() else self._moment(model) if self._is_due() else None

    def step_ends(self, model: Any, *, epoch: int, step: int, over: bool) -> Figures | None:
        """After a batch; ``epoch`` is the next one's. See :meth:`first`. Collective."""
        self.epoch, self.step = epoch, step  # the target's epoch stays, for batches that are fetched already
        every = self.every_n_steps
        if every is None or step // every == self._step // every or over:
            return None
        return self._moment(model)

    def _move(self, epoch: int, step: int) -> None:
        self.epoch, self.step = epoch, step
        self.target.set_epoch(epoch)

    def _is_due(self) -> bool:
        every = self.every_n_epochs
        return every is not None and self.epoch > 0 and self.epoch % every == 0 and self.epoch != self._epoch

    def _needed(self) -> bool:
        """Whether this epoch's batches take tokens of an empty buffer."""
        if self.target.buffer.version and not self._foreign:
            return False
        return not isinstance(self.target, SelfTokenMixer) or self.target.beta(self.epoch) > 0

    # --- what is done -------------------------------------------------------------------------------------------------

    def _moment(self, model: Any) -> Figures:
        """Refresh, or measure the drift first."""
        target = self.target
        if self.drift is None or self._foreign or not target.buffer.version or not isinstance(target, SelfTokenMixer):
            return self._refresh(model)
        begin, size = perf_counter(), int(self.options.get("batch_size", 16))
        work = on_all_ranks(lambda: token_drift(model, target, samples=self.probe, batch_size=size))
        drift = from_first_rank(work)
        self._seconds += perf_counter() - begin
        figures = {"drift": drift}
        return self._noted(figures) if drift <= self.drift else self._refresh(model, figures)  # NaN: none generated

    def _refresh(self, model: Any, figures: Mapping[str, float] | None = None) -> Figures:
        begin, target = perf_counter(), self.target
        if isinstance(target, SelfTokenMixer):
            found = refresh_self_tokens(model, target, epoch=self.epoch, **self.options)
        else:
            found = refresh_attempts(model, target, epoch=self.epoch, **self.options)
        self._seconds += perf_counter() - begin
        self._foreign = False
        return self._noted({**(figures or {}), **found})

    def _noted(self, figures: Figures) -> Figures:
        self._epoch, self._step = self.epoch, self.step
        figures = {name: value for name, value in figures.items() if not math.isnan(value)}
        figures["share_of_training"] = self._seconds / max(self._elapsed(), 1e-9)
        self.history.append({**figures, "version": self.target.buffer.version, "step": self.step, "epoch": self.epoch})
        return figures

    def _elapsed(self) -> float:
        """Seconds since training began, without those between a checkpoint and its resumption."""
        return self._before + perf_counter() - self._began

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _restore(self, over: bool) -> str:
        """Make the checkpoint's version current; why that cannot be done. Collective."""
        version, self._restored = self._restored, None
        if version is None:
            return ""
        if not version[0]:
            self._foreign = self.target.buffer.version > 0
            return ""
        gone = from_first_rank(on_all_ranks(lambda: self._restore_table(*version)))
        if gone and not over:
            warnings.warn(f"{self.owner}: the checkpoint's tokens are generated anew: {gone}", stacklevel=3)
        return gone

    def _restore_table(self, number: int, token: str) -> str:
        if rank() == 0:
            try:
                self.target.buffer.table.restore(number, token=token)
            except ValueError as error:
                return str(error)
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Numbers, texts, lists and dicts only."""
        table = self.target.buffer.table
        version = table.snapshot() if table.version and not self._foreign else None
        return {
            "version": VERSION,
            "table": None if version is None else [version.number, version.token],
            "epoch": self.epoch,
            "step": self.step,
            "last": [self._epoch, self._step],
            "seconds": self._seconds,
            "elapsed": self._elapsed(),
            "history": [dict(figures) for figures in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state; the buffer follows at :meth:`first`.

        Raises:
            ValueError: a state of another release.
        """
        if state.get("version") != VERSION:
            raise ValueError(
                f"{self.owner} state: version {state.get('version')} was saved, this release reads {VERSION}."
            )
        number, token = state["table"] or (0, "")
        self._restored, self._fresh = (int(number), str(token)), True
        self.epoch, self.step = state["epoch"], state["step"]
        self._epoch, self._step = state["last"]
        self._seconds, self._before, self._began = state["seconds"], state["elapsed"], perf_counter()
        self.history = [dict(figures) for figures in state["history"]]


def _checked(owner: str, target: Target, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, where the target's refresh will take them."""
    shared = list(RefreshOptions.__annotations__)
    mixes = isinstance(target, SelfTokenMixer)
    known = [*(("rollout", "passes", "span") if mixes else ("max_new_tokens",)), *shared]
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"{owner}({unknown[0]}=...): there are, for a {type(target).__name__}, {', '.join(known)}.")
    settings, running = refresh_settings(owner, {name: value for name, value in options.items() if name in shared})
    if mixes:
        rollout, passes, span = (options.get(*pair) for pair in (("rollout", "parallel"), ("passes", 1), ("span", 8)))
        check_rollout(owner, rollout, passes, span, settings)  # type: ignore[arg-type]
    elif "max_new_tokens" in options:
        integer(owner, "max_new_tokens", options["max_new_tokens"], 1)
    ledger, size = running.ledger, target.buffer.size
    if ledger is not None and ledger.size != size:
        raise ValueError(f"{owner}(ledger): it has {ledger.size} samples, the data {size}; give the sampler's.")
    if target.buffer.data is None:
        raise ValueError(
            f"{owner}(target): its buffer is a copy without the data; give the one that was made with them."
        )
    return dict(options)
