"""Resumable: passes through a stream that go on where they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from torch.utils.data import IterableDataset

VERSION = 1


class Tally:
    """What a stage passes on in one pass.

    Attributes:
        passed: how many samples the stage has passed on, those that are left out included.
        skip: how many of them are left out at the start.
        begun: how many times the stage began, more than once where the pipeline repeats.
    """

    __slots__ = ("begun", "passed", "skip")

    def __init__(self) -> None:
        self.passed = self.skip = self.begun = 0


class Stage(Protocol):
    """A stage of a pipeline that counts, in :attr:`tally` as it is when the stage's iterator begins."""

    tally: Tally | None

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""


class Resumable(IterableDataset[Any]):
    """The end of a pipeline whose iterators have a state (torchdata's ``Stateful``), for its ``StatefulDataLoader``.

    A worker's state is its epoch and how many samples it has handed out. On resume it goes through the pass anew and
    leaves those out: before they are decoded, if until then each sample that the stage passed on came out of the
    pipeline before the next one was asked for; otherwise, with a shuffle buffer, with ``.with_epoch(n)`` or once the
    pipeline repeats, behind the pipeline. Another limit behind the stage, ``.slice(n)``, would count from there on.

    This is exact if the pass is the same again: the same shards in the same order, the same number of workers, and
    shuffling that depends on nothing but a seed and the stage's ``epoch`` (webdataset's own counts the passes of a
    process, or has no seed). Random augmentation is not part of the state. The sampler's state, and that of an index
    that grows, belong to the same checkpoint; load them before the loader is iterated. For the sampler an epoch is over
    when as many samples were trained on as its plan has: of a pipeline that repeats only the first repetition resumes.

    Args:
        pipeline: an iterable that contains the stage: ``wds.WebDataset(...).compose(stage).decode(...)``.
        stage: the stage itself, :func:`samplewise.loaders.streams.keep`.

    Raises:
        TypeError: the stage is none.
    """

    def __init__(self, pipeline: Iterable[Any], stage: Stage):
        if not hasattr(stage, "tally"):
            raise TypeError(f"Resumable(..., {type(stage).__name__}): the stage in the pipeline is needed, keep(...).")
        self.pipeline = pipeline
        self.stage = stage

    def __iter__(self) -> Iterator[Any]:
        return _Pass(self.pipeline, self.stage)


class _Pass(Iterator[Any]):
    """One pass through a pipeline."""

    def __init__(self, pipeline: Iterable[Any], stage: Stage):
        self._pipeline, self._stage = pipeline, stage
        self._iterator: Iterator[Any] | None = None
        self._epoch = stage.epoch
        self._tally = Tally()
        self._yielded = 0
        # Whether each sample came out before the stage was asked for the next one; a limit counts what comes out.
        self._in_step = getattr(pipeline, "nsamples", -1) <= 0
        self._ended = False

    def __next__(self) -> Any:
        if self._ended:
            raise StopIteration
        try:
            if self._iterator is None and self._yielded:
                self._pass_over()
            sample = self._draw()
        except StopIteration:
            self._ended = True
            raise
        self._yielded += 1
        # A repetition of which everything is left out would be the last one of webdataset's .repeat().
        self._in_step &= self._tally.passed == self._yielded and self._tally.begun == 1
        return sample

    def _pass_over(self) -> None:
        """Go to where the saved pass was."""
        try:
            if not self._in_step:
                for _ in range(self._yielded):
                    self._draw()
                return
            self._tally.skip = self._yielded - 1  # the last one comes out, so that a shorter pass is noticed
            self._draw()
        except StopIteration:
            raise RuntimeError(
                f"Resumable: {self._yielded} samples had been handed out, but the pass is shorter now: its shards or "
                f"its plan are others; resume with the same shards, workers and sampler state."
            ) from None

    def _draw(self) -> Any:
        self._stage.tally = self._tally  # the stage takes it when it begins, which is in here
        try:
            if self._iterator is None:
                self._iterator = iter(self._pipeline)
            return next(self._iterator)
        finally:
            self._stage.tally = None

    def state_dict(self) -> dict[str, Any]:
        """Where the pass is, as numbers."""
        return {
            "version": VERSION,
            "epoch": self._epoch,
            "yielded": self._yielded,
            "in_step": self._in_step,
            "ended": self._ended,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a pass was; the sampler must be at its epoch already.

        Where the sampler is at the start of the next one, as its state is when the saved epoch was over, the pass is
        that epoch's, from its start.

        Raises:
            ValueError: the state is of another version, or the sampler is at another epoch.
        """
        if state.get("version") != VERSION:
            raise ValueError(
                f"Resumable state: version {state.get('version')} was saved, this release reads {VERSION}."
            )
        if state["epoch"] == self._epoch - 1:
            return
        if state["epoch"] != self._epoch:
            raise ValueError(
                f"Resumable state: it is of epoch {state['epoch']}, the sampler is at epoch {self._epoch}: call "
                f"sampler.load_state_dict(...) with the state saved beside it before the loader is iterated."
            )
        self._yielded, self._in_step, self._ended = state["yielded"], state["in_step"], state["ended"]
