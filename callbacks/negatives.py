"""RefreshHardNegatives: hard negatives that keep up with the encoder, in a Lightning training run."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import Unpack, override

from samplewise.cuda_ext.checks import integer
from samplewise.cuda_ext.ranks import from_first_rank, rank
from samplewise.loaders import RetrievalDataset
from samplewise.plugins.hard_negatives import MiningOptions
from samplewise.plugins.refresh import Encoder, check_refresh, refresh_hard_negatives

VERSION = 1


class RefreshHardNegatives(Callback):
    """Mines a data set's hard negatives anew, every n epochs or every n optimizer steps.

    By epochs, an epoch's negatives are mined at its
    start, before any of its batches is fetched. By steps, batches that workers have fetched already keep their
    negatives; the next ones have the new. The model is in evaluation mode while it encodes, under the trainer's
    precision; the modules' modes are restored.

    A run resumed from a checkpoint goes on with the table's version of that moment, if it is still there
    (``Table(keep=...)``); else the negatives are mined anew from the checkpoint's weights, with a warning.

    It logs ``negatives/overlap`` with the version before, ``/removed`` (share of a plain top K kept out as known
    positives or by the filters), ``/padded``, ``/margin`` (mean similarity of the positive minus that of the hardest
    negative), ``/encode_seconds`` and ``/mine_seconds``, see
    :func:`~samplewise.plugins.refresh.refresh_hard_negatives`.

    Args:
        dataset: the training data set, before ``with_ids``; its ``negatives`` are a table.
        encode_queries: from a list of queries to embeddings (b, E), for example a method of the module.
        encode_documents: the same for documents; None: by ``encode_queries``.
        every_n_epochs: epochs between two minings; or else
        every_n_steps: optimizer steps between two minings.
        at_start: mine before the first epoch too, whatever the table holds; False: begin with what it holds.
        top_k: K, negatives kept for each query; None: as many as the version before has, or else 200.
        batch_size: queries or documents encoded at a time.
        **mining: more options of :func:`~samplewise.plugins.mine_hard_negatives`; similarity and filters that are not
            given are those of the version before.

    Attributes:
        history: what was logged, with the version and the step, one dict a mining.

    Raises:
        TypeError: the data set is no RetrievalDataset, or has no table.
        ValueError: not exactly one of ``every_n_epochs`` and ``every_n_steps``.

    Example::

        data = RetrievalDataset(queries, documents, positives, Table("negatives"), sampler=sampler)
        collate = CollateRetrieval(tokenize)
        loader = DataLoader(with_ids(data), batch_size=64, sampler=sampler, collate_fn=collate)
        Trainer(callbacks=[SamplingCallback(sampler), RefreshHardNegatives(data, model.encode, every_n_epochs=1)])
    """

    def __init__(
        self,
        dataset: RetrievalDataset,
        encode_queries: Encoder,
        encode_documents: Encoder | None = None,
        *,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        at_start: bool = True,
        top_k: int | None = None,
        batch_size: int = 256,
        **mining: Unpack[MiningOptions],
    ):
        owner = type(self).__name__
        self.dataset, self.table = dataset, check_refresh(owner, dataset, top_k, mining)
        if (every_n_epochs is None) == (every_n_steps is None):
            raise ValueError(
                f"{owner}(every_n_epochs={every_n_epochs}, every_n_steps={every_n_steps}): give one of the two."
            )
        self.every_n_epochs, self.every_n_steps = (
            None if value is None else integer(owner, name, value, 1)
            for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps))
        )
        self.encoders = (encode_queries, encode_documents)
        self.options: dict[str, Any] = {"top_k": top_k, "batch_size": batch_size, **mining}
        self.history: list[dict[str, float]] = []
        self._mined_epoch, self._mined_step = 0, 0  # the last ones for which negatives were mined
        self._step = 0
        self.at_start = at_start
        self._epoch, self._epoch_over = 0, False
        self._fresh = True
        self._restored: tuple[int, str] | None = None  # number and token of the version that a checkpoint names

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restored, self._fresh, self._mined_epoch = None, True, 0  # a checkpoint's state comes after this

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepare(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepare(trainer, pl_module)  # sharded strategies restore checkpoints after on_fit_start

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The negatives of the first batches; the loader is iterated before any epoch's start."""
        if self._restored is not None:
            self._restore(trainer, pl_module)
        elif self._fresh:
            self._step = self._mined_step = trainer.global_step
            if self.at_start or not self.table.version:
                self._refresh(trainer, pl_module)
        self._fresh = False

    def _restore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        version, self._restored = self._restored, None
        assert version is not None
        gone = ""
        if rank() == 0:
            try:
                self.table.restore(version[0], token=version[1])
            except ValueError as error:
                gone = str(error)
        gone = from_first_rank(gone)
        if gone:
            warnings.warn(f"RefreshHardNegatives: the checkpoint's negatives are mined anew: {gone}", stacklevel=2)
        if self._epoch_over and self._is_due(trainer, self._epoch + 1):  # saved at an epoch's end
            self._refresh(trainer, pl_module, epoch=self._epoch + 1)
        elif gone:
            self._refresh(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch, self._epoch_over = trainer.current_epoch, False
        if self._is_due(trainer, self._epoch):
            self._refresh(trainer, pl_module, epoch=self._epoch)

    def _is_due(self, trainer: Trainer, epoch: int) -> bool:
        every, end = self.every_n_epochs, trainer.max_epochs
        if every is None or epoch == 0 or epoch % every or epoch == self._mined_epoch:
            return False
        return end is None or end < 0 or epoch < end

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._epoch_over = trainer.is_last_batch
        self._step = step = trainer.global_step
        every = self.every_n_steps
        if every is not None and step // every != self._mined_step // every and not _is_over(trainer):
            self._refresh(trainer, pl_module)

    def _refresh(self, trainer: Trainer, pl_module: LightningModule, epoch: int | None = None) -> None:
        modes = [(module, module.training) for module in pl_module.modules()]
        pl_module.eval()
        try:
            with trainer.strategy.precision_plugin.forward_context():
                figures = refresh_hard_negatives(self.dataset, *self.encoders, device=pl_module.device, **self.options)
        finally:
            for module, mode in modes:
                module.training = mode
        self._mined_step = self._step
        self._mined_epoch = self._mined_epoch if epoch is None else epoch
        self.history.append({**figures, "version": self.table.version, "step": self._step})
        for logger in trainer.loggers:  # log() is not allowed before the first epoch
            logger.log_metrics({f"negatives/{key}": value for key, value in figures.items()}, step=self._step)

    @override
    def state_dict(self) -> dict[str, Any]:
        table = self.table.snapshot() if self.table.version else None
        return {
            "version": VERSION,
            "table": [table.number, table.token] if table else None,
            "epoch": self._epoch,
            "epoch_over": self._epoch_over,
            "mined_epoch": self._mined_epoch,
            "mined_step": self._mined_step,
            "step": self._step,
            "history": [dict(figures) for figures in self.history],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("version") != VERSION:
            raise ValueError(
                f"RefreshHardNegatives state: version {state_dict.get('version')} was saved, this release reads "
                f"{VERSION}."
            )
        self._restored = (0, "") if state_dict["table"] is None else tuple(state_dict["table"])
        self._epoch, self._epoch_over = state_dict["epoch"], state_dict["epoch_over"]
        self._mined_epoch, self._mined_step = state_dict["mined_epoch"], state_dict["mined_step"]
        self._step = state_dict["step"]
        self.history = [dict(figures) for figures in state_dict["history"]]


def _is_over(trainer: Trainer) -> bool:
    """Whether the batch that ends is the last one of the training."""
    return trainer.global_step == trainer.max_steps or (
        trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    )
