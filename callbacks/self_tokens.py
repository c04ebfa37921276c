"""RefreshSelfTokens: own tokens that keep up with the model, in a Lightning training run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import Unpack, override

from samplewise.callbacks.refreshing import Figures, Refresher, Target, TokenOptions
from samplewise.plugins.token_writing import model_of


class RefreshSelfTokens(Callback):
    """Has the model write its own tokens, or its attempts, anew: every n epochs or every n optimizer steps.

    By epochs, an epoch's tokens are generated at its start, before any of its batches is fetched, for the epoch that
    begins. By steps, batches that workers have fetched already keep their tokens; the next ones have the new. With
    ``drift``, at these moments the share of tokens that the model would write otherwise now is measured, and they are
    generated anew only where it is larger. An empty buffer is filled, at any cadence, before the first epoch that takes
    tokens from it.

    The model generates in evaluation mode, under the trainer's precision; modes and the global random generators are
    as before afterwards. Where the target follows no sampler, its epoch is set to the trainer's. With several ranks
    all of them generate.

    A run resumed from a checkpoint goes on with the buffer's version of that moment, if it is still there
    (``TokenBuffer(keep=...)``); else the tokens are generated anew from the checkpoint's weights, with a warning.

    It logs, under ``tokens/``, the figures of :func:`~samplewise.plugins.refresh_self_tokens` or
    :func:`~samplewise.plugins.refresh_attempts` that are not NaN (``agreement``, ``replaced``, ``unfinished``,
    ``changed``, ``refreshed``, ``tokens``, ``seconds``), ``drift`` where it was measured, and ``share_of_training``: of
    the seconds since training began, those spent here so far.

    Args:
        target: the loader's :class:`~samplewise.plugins.SelfTokenMixer`, or its
            :class:`~samplewise.plugins.CorrectionDataset`, before ``with_ids``.
        model: of transformers, the one in the LightningModule.
        every_n_epochs: epochs between two moments; or else
        every_n_steps: optimizer steps between two moments.
        drift: share of the tokens in [0, 1), of a SelfTokenMixer only; None: no measuring.
        probe: samples that the drift is measured on.
        at_start: generate before the first epoch too, whatever the buffer holds; False: begin with what it holds.
        **options: of ``refresh_self_tokens`` (``rollout``, ``passes``, ``span``) or ``refresh_attempts``
            (``max_new_tokens``), and of both: ``temperature``, ``batch_size``, ``ledger``, ``budget``, ``generate``,
            ``progress``.

    Attributes:
        history: what was logged, with the version, the step and the epoch, one dict a moment.

    Raises:
        TypeError: another target, no model of transformers, or an unknown option.
        ValueError: not exactly one of ``every_n_epochs`` and ``every_n_steps``, an argument outside its range, or, when
            training begins, a model that is not in the LightningModule.

    Example::

        mixer = SelfTokenMixer(TokenBuffer("own", data, tokenizer), beta=0.3, collate=pad, sampler=sampler)
        loader = DataLoader(with_ids(data), batch_size=8, sampler=sampler, collate_fn=mixer)
        refresh = RefreshSelfTokens(mixer, module.model, every_n_epochs=1)
        Trainer(callbacks=[SamplingCallback(sampler), refresh]).fit(module, loader)
    """

    def __init__(
        self,
        target: Target,
        model: Any,
        *,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        drift: float | None = None,
        probe: int = 64,
        at_start: bool = True,
        **options: Unpack[TokenOptions],
    ):
        self.refresher = Refresher(
            type(self).__name__,
            target,
            every_n_epochs=every_n_epochs,
            every_n_steps=every_n_steps,
            drift=drift,
            probe=probe,
            at_start=at_start,
            options=options,
        )
        self.target = target
        self.model = model_of(model)
        self._resumed = self._refuse_state = False

    @property
    def history(self) -> list[Figures]:
        """See above."""
        return self.refresher.history

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.refresher.begin()  # a checkpoint's state comes after this
            self._resumed = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if all(module is not self.model for module in pl_module.modules()):
            raise ValueError(
                f"RefreshSelfTokens(model): it is not in {type(pl_module).__name__}; give the very object that is "
                f"trained, such as module.model."
            )
        if not (trainer.strategy.restore_checkpoint_after_setup and trainer.ckpt_path):
            self._prepare(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepare(trainer)  # sharded strategies restore checkpoints after on_fit_start; else it is done

    def _prepare(self, trainer: Trainer) -> None:
        """The tokens of the first batches; the loader is iterated before any epoch's start."""
        epoch, step = trainer.current_epoch, trainer.global_step
        if self._resumed:
            epoch, step = self.refresher.epoch, self.refresher.step  # the trainer's are restored later
        self.target.set_epoch(epoch)
        epoch = self.target.epoch  # the sampler's, where it follows one
        self._log(trainer, "first", epoch=epoch, step=step, over=_is_over(trainer, epoch, step))

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, "epoch_begins", epoch=trainer.current_epoch, step=trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        epoch, step = trainer.current_epoch + trainer.is_last_batch, trainer.global_step
        self._log(trainer, "step_ends", epoch=epoch, step=step, over=_is_over(trainer, epoch, step))

    def _log(self, trainer: Trainer, moment: str, **position: Any) -> None:
        with trainer.strategy.precision_plugin.forward_context():
            figures = getattr(self.refresher, moment)(self.model, **position)
        for logger in trainer.loggers if figures else ():  # log() is not allowed before the first epoch
            logger.log_metrics({f"tokens/{name}": value for name, value in figures.items()}, step=position["step"])

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._refuse_state = trainer.state.fn != TrainerFn.FITTING  # `trainer.test(ckpt_path=...)` is no resume

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.refresher.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._refuse_state:
            self.refresher.load_state_dict(state_dict)
            self._resumed = True


def _is_over(trainer: Trainer, epoch: int, step: int) -> bool:
    """Whether the next batch would be beyond the training's end."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    return (epochs is not None and 0 <= epochs <= epoch) or 0 <= steps <= step
