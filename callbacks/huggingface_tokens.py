"""RefreshSelfTokens for the HF Trainer: own tokens that keep up with the model."""

from __future__ import annotations

import json
import warnings
from typing import Any

from typing_extensions import Unpack, override

from samplewise.callbacks.huggingface_state import checkpoint_of, transformers, write_state
from samplewise.callbacks.refreshing import Figures, Refresher, Target, TokenOptions
from samplewise.cuda_ext.ranks import rank
from samplewise.loaders.ids import SAMPLE_ID
from samplewise.plugins.self_tokens import SelfTokenMixer
from samplewise.plugins.token_writing import model_of

STATE_FILE = "samplewise_tokens.json"


class RefreshSelfTokens(transformers.TrainerCallback):  # type: ignore[misc]
    """Has the model of a ``transformers.Trainer`` write its own tokens, or its attempts, anew.

    See :class:`samplewise.callbacks.RefreshSelfTokens`, the same for Lightning: cadence, ``drift``, options and figures
    are as there. What differs here:

    - The target's epoch is set to the trainer's at each epoch's start, before its first batch is fetched.
    - The figures go to ``trainer.state.log_history``, as ``tokens/...``, and into the checkpoints with it; a callback
      cannot reach the trainer's reporters. ``history`` holds them too.
    - The state is ``samplewise_tokens.json`` in each checkpoint. It is looked for in
      ``TrainingArguments(resume_from_checkpoint=...)``, and in ``output_dir``; to resume from another folder, name it
      in the arguments as well.
    - By steps, the Trainer has fetched the next batch already, and workers more of them: these keep their tokens. A run
      resumed just after a refresh fetches them anew, with the new ones. By epochs, resuming is exact.
    - A Trainer collates evaluation data by the same function; the mixer leaves them as they are unless they are in
      ``with_ids``.

    Args:
        target: see there. The mixer has ``keep_ids=False``, since a model takes no ids.
        model: of transformers; None: the trainer's.
        every_n_epochs: epochs between two moments; or else
        every_n_steps: optimizer steps between two moments.
        drift: share of the tokens in [0, 1), of a SelfTokenMixer only; None: no measuring.
        probe: samples that the drift is measured on.
        at_start: generate before the first epoch too, whatever the buffer holds; False: begin with what it holds.
        **options: of the refresh.

    Attributes:
        history: the figures with the version, the step and the epoch, one dict a moment.

    Raises:
        TypeError: another target, no model of transformers, or an unknown option.
        ValueError: not exactly one of ``every_n_epochs`` and ``every_n_steps``, an argument outside its range, or, when
            training begins, a mixer whose ids are missing, or given to the model, or a target that follows a sampler.

    Example::

        mixer = SelfTokenMixer(TokenBuffer("own", data, tokenizer), beta=0.3, collate=pad, keep_ids=False)
        arguments = TrainingArguments(..., remove_unused_columns=False)
        refresh = RefreshSelfTokens(mixer, every_n_epochs=1)
        Trainer(model, arguments, data_collator=mixer, train_dataset=with_ids(data), callbacks=[refresh]).train()
    """

    def __init__(
        self,
        target: Target,
        model: Any = None,
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
        self.model = None if model is None else model_of(model)
        self._epoch = 0  # the one that begins next

    @property
    def history(self) -> list[Figures]:
        """See above."""
        return self.refresher.history

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self.target, SelfTokenMixer):
            if args.remove_unused_columns:
                raise ValueError(
                    "RefreshSelfTokens: the Trainer would remove the samples' ids before the mixer sees them; set "
                    "TrainingArguments(remove_unused_columns=False)."
                )
            if self.target.keep_ids:
                raise ValueError(
                    "RefreshSelfTokens(target): the Trainer would give the ids to the model; set "
                    "SelfTokenMixer(keep_ids=False)."
                )
            if SAMPLE_ID not in kwargs["train_dataloader"].dataset[0]:
                raise ValueError(
                    "RefreshSelfTokens: the items have no ids; give Trainer(train_dataset=with_ids(data))."
                )
        if self.target.follows:
            raise ValueError(
                "RefreshSelfTokens(target): the Trainer draws with a sampler of its own, so that the epoch of the one "
                "given to the target would stay 0; leave sampler out there."
            )
        model_of(self._model(kwargs))
        self.refresher.begin()
        updates = -(-len(kwargs["train_dataloader"]) // args.gradient_accumulation_steps)
        self._epoch = state.global_step // max(1, updates)  # as the Trainer itself counts
        if state.global_step:
            self._load(args, state)

    def _load(self, args: Any, state: Any) -> None:
        files = [checkpoint_of(given, args, state) / STATE_FILE for given in (args.resume_from_checkpoint, None)]
        for file in files:
            saved = json.loads(file.read_text()) if file.is_file() else {"step": None}
            if saved["step"] == state.global_step:
                self.refresher.load_state_dict(saved)
                return
        warnings.warn(
            f"RefreshSelfTokens: there is no {files[-1]} of step {state.global_step}, so that the cadence begins anew; "
            f"name the checkpoint in TrainingArguments(resume_from_checkpoint=...), too.",
            stacklevel=2,
        )

    @override
    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        position, model = {"epoch": self._epoch, "step": state.global_step}, self._model(kwargs)
        self._log(state, self.refresher.first(model, **position))
        self._log(state, self.refresher.epoch_begins(model, **position))

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, over = state.global_step, control.should_training_stop or state.global_step >= state.max_steps
        epoch = max(self._epoch, int(state.epoch))  # the next one after an epoch's last step
        self._log(state, self.refresher.step_ends(self._model(kwargs), epoch=epoch, step=step, over=over))

    @override
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._epoch += 1

    @override
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if rank() == 0:
            write_state(args, state, STATE_FILE, self.refresher.state_dict())

    def _model(self, given: dict[str, Any]) -> Any:
        return given["model"] if self.model is None else self.model

    def _log(self, state: Any, figures: Figures | None) -> None:
        if figures:
            row = {f"tokens/{name}": value for name, value in figures.items()}
            state.log_history.append({**row, "epoch": state.epoch, "step": state.global_step})
