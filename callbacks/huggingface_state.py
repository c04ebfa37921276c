"""What the callbacks of the HF Trainer share: transformers itself, and files in its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from samplewise.cuda_ext.checks import optional_import

transformers: Any = optional_import("samplewise.callbacks.huggingface", "transformers", "hf")


def note_checkpoint(trainer: Any, callback: Any) -> None:
    """Have ``callback.given`` say what ``train`` is told to resume from, which the Trainer tells no callback."""
    train = trainer.train

    def train_from(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        callback.given = resume_from_checkpoint
        return train(resume_from_checkpoint, *args, **kwargs)

    trainer.train = train_from


def checkpoint_of(given: Any, args: Any, state: Any) -> Path:
    """The folder that training is resumed from: the one that was given, or the output folder's of that step."""
    if isinstance(given, str | PathLike):
        return Path(given)
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def write_state(args: Any, state: Any, name: str, content: dict[str, Any]) -> None:
    """Put a file of JSON into the checkpoint that is being saved."""
    write_file(args, state, name, lambda path: path.write_text(json.dumps(content)))


def write_file(args: Any, state: Any, name: str, write: Callable[[Path], Any]) -> None:
    """Put a file into the checkpoint that is being saved: all of it, or nothing."""
    folder = checkpoint_of(None, args, state)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}"
    write(temporary)
    temporary.replace(folder / name)
