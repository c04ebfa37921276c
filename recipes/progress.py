"""Progress of many short trainings: a bar over all of them, and one for the run in hand."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typing_extensions import Self, override

EVERY, FILE_WIDTH = 8, 110


class Bars:
    """The bars on a terminal; elsewhere only the lines given to `say`.

    Args:
        runs: how many trainings there will be.
        quiet: print nothing (all ranks but the first).
    """

    def __init__(self, runs: int, *, quiet: bool = False):
        self.console = Console(quiet=quiet)
        if not self.console.is_terminal:
            self.console.width = FILE_WIDTH
        shown = self.console.is_terminal and not quiet
        columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(
            *columns, TimeRemainingColumn(), console=self.console, transient=True, disable=not shown
        )
        self.all = self.progress.add_task("all runs", total=runs)
        self.run = self.progress.add_task("", total=None)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self.progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def begin(self, name: str) -> "BatchBar":
        """The callback that shows a run."""
        self.progress.reset(self.run, description=name, total=None)
        return BatchBar(self.progress, self.run)

    def count(self, name: str, total: int) -> Callable[[int], None]:
        """Show something else than a training; what it gives is to be told how many more are done."""
        self.progress.reset(self.run, description=name, total=total)
        return lambda done: self.progress.advance(self.run, done)

    def finish(self, line: str) -> None:
        """A run is over."""
        self.progress.advance(self.all)
        self.say(line)


class BatchBar(Callback):
    """Moves a bar once in `EVERY` batches, over the trainer's `max_steps` or else over an epoch's batches."""

    def __init__(self, progress: Progress, task: Any):
        self.progress, self.task = progress, task

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.max_steps > 0 and trainer.global_step % EVERY == 0:
            self.progress.update(self.task, completed=trainer.global_step, total=trainer.max_steps)
        elif trainer.max_steps <= 0 and batch_idx % EVERY == 0:
            self.progress.update(self.task, completed=batch_idx, total=trainer.num_training_batches)
