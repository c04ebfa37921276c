"""Pretrained language models for fine-tuning, from an ordinary folder of transformers or from a GGUF file.

transformers reads GGUF slowly, so a folder with nothing but such a file is converted once, into the cache.
"""

import contextlib
import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from samplewise.recipes.assets import Asset, AssetError, Say, resolve
from samplewise.recipes.encoder import find_model


@dataclass(frozen=True)
class Gguf:
    """A GGUF file as the source of a folder with `config.json`, float32 safetensors and the tokenizer.

    Args:
        path: the file.
        size: in bytes.
        changed: when it was written, in ns; with the path and the size it names the folder in the cache.
    """

    path: str
    size: int
    changed: int

    def __str__(self) -> str:
        """The source in words."""
        return f"conversion of {self.path}"

    def fetch(self, folder: Path) -> None:
        """Read it with transformers and write it to `folder`."""
        missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
        if missing:
            raise AssetError(f"reading it needs more packages: pip install {' '.join(missing)}")
        from transformers import AutoModelForCausalLM, AutoTokenizer

        file = Path(self.path)
        options = {"gguf_file": file.name, "local_files_only": True}
        try:
            with _quiet():
                AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(folder)
                model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
                del model.config.quantization_config  # as ordinary weights; transformers would not save them as GGUF
                model.hf_quantizer, model.is_quantized = None, False
                model.save_pretrained(folder)
        except Exception as error:  # its errors have no common base class
            raise AssetError(f"{type(error).__name__}: {error}") from error


def find_language_model(name: str, say: Say = print) -> Path:
    """The folder of a language model, with safetensors.

    Args:
        name: a folder, a name in `ASSETS` ("smollm2-135m-instruct"), or a name on the hub.
        say: gets a line on each thing tried.

    Raises:
        AssetError: it could not be had or not be converted; the message lists what was tried.
        ValueError: several GGUF files to choose from.
    """
    return _ordinary(find_model(name, say), say)


def load_language_model(folder: Path, say: Say = print) -> tuple[Any, Any]:
    """The model with its pretrained weights, float32 on the CPU and in evaluation mode, and its tokenizer.

    Args:
        folder: what `find_language_model` gave; a GGUF file alone is converted as there.
        say: gets a line on the conversion.

    Raises:
        AssetError: a GGUF file could not be converted.
        ValueError: the folder holds no language model that transformers can read, or several GGUF files.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = _ordinary(folder, say)
    options = {"local_files_only": True, "output_loading_info": True}
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
            loaded: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
            model, report = loaded
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model={str(folder)!r}: no language model that transformers can read; give a folder with config.json, "
            f"*.safetensors and a tokenizer, or with one .gguf file: {error}"
        ) from error
    if report["missing_keys"]:
        names = ", ".join(sorted(report["missing_keys"])[:3])
        raise ValueError(f"model={str(folder)!r}: its weights are no language model's, {names} missing; give another")
    return model.eval(), tokenizer


def _ordinary(folder: Path, say: Say) -> Path:
    """The folder itself, or that of its GGUF file's conversion in the cache."""
    files = sorted(folder.glob("*.gguf"))
    if (folder / "config.json").is_file() or not files:
        return folder
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"model={str(folder)!r}: {len(files)} GGUF files ({names}); give a folder with one of them")
    file = files[0].resolve()
    facts = file.stat()
    return resolve(Asset(file.stem, (Gguf(str(file), facts.st_size, facts.st_mtime_ns),)), say=say)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and warnings of transformers, which writes one kind of each to stderr itself."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
