"""A pretrained text encoder for retrieval: mean over the tokens, length 1. Queries and documents share it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samplewise.plugins.refresh import encode
from samplewise.recipes.assets import ASSETS, Asset, Hub, Say, resolve

Tokens = Mapping[str, Tensor]
"""`input_ids` and `attention_mask`, int64 `(B, T)`."""


class Tokenizer:
    """From a list of texts to `Tokens`, padded to the longest; picklable, so that workers can do it.

    Args:
        tokenizer: of transformers.
        max_length: longer texts are cut, in tokens.
    """

    def __init__(self, tokenizer: Any, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Tokenise."""
        options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        return dict(self.tokenizer(list(texts), return_token_type_ids=False, **options))


class Encoder(nn.Module):
    """Embeddings of tokenised texts.

    Args:
        body: a model of transformers that gives `last_hidden_state`.
        chunk: texts that go through it at a time, sorted by length: on a CPU a batch of short texts with a few long
            ones takes half the time, since little of it is padding.
    """

    def __init__(self, body: nn.Module, chunk: int = 64):
        super().__init__()
        self.body, self.chunk = body, chunk

    def forward(self, tokens: Tokens) -> Tensor:
        """Float32 `(B, E)`, of length 1."""
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        lengths = mask.sum(1)
        order = lengths.argsort()
        parts = [self._pooled(ids[rows], mask[rows], int(lengths[rows[-1]])) for rows in order.split(self.chunk)]
        return F.normalize(torch.cat(parts)[order.argsort()], dim=1)

    def _pooled(self, ids: Tensor, mask: Tensor, width: int) -> Tensor:
        """The mean over the tokens; `width` is the number of columns that hold any."""
        mask = mask[:, :width]
        states: Tensor = self.body(input_ids=ids[:, :width], attention_mask=mask).last_hidden_state
        return (states.float() * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


def find_model(name: str, say: Say = print) -> Path:
    """The folder of a model: a folder, a name in `ASSETS`, or a name on the hub.

    Raises:
        AssetError: it could not be had; the message lists what was tried.
    """
    if Path(name).is_dir():
        return Path(name)
    return resolve(name if name in ASSETS else Asset(name, (Hub(name, "model"),)), say=say)


def load_encoder(folder: Path, max_length: int) -> tuple[Encoder, Tokenizer]:
    """The encoder with its pretrained weights, in evaluation mode, and its tokenizer.

    Raises:
        ValueError: the folder holds no model that transformers can read.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of reading the weights
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        body = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"model={str(folder)!r}: no model that transformers can read: {error}") from error
    return Encoder(body.eval()), Tokenizer(tokenizer, max_length)


def embed(
    encoder: Encoder,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    device: str,
    mixed: bool,
    watch: Callable[[int], None],
) -> Tensor:
    """The embeddings of many texts, float32 `(N, E)` on the CPU; the encoder is in evaluation mode afterwards.

    Args:
        encoder: of `load_encoder`.
        tokenizer: of `load_encoder`.
        texts: N of them.
        device: where to compute.
        mixed: in bfloat16, where autocast does.
        watch: is told the number of texts after each batch.
    """
    encoder.eval().to(device)

    def embedded(batch: list[str]) -> Tensor:
        tokens = {name: values.to(device) for name, values in tokenizer(batch).items()}
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            vectors: Tensor = encoder(tokens)
        watch(len(batch))
        return vectors

    return encode(texts, embedded)
