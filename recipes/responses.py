"""Losses of the responses to prompts: a causal language model on batches that are padded on the left."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from samplewise.cuda_ext import sample_losses
from samplewise.loaders import SAMPLE_ID
from samplewise.recipes.text_pairs import IGNORED

Batch = Mapping[str, Tensor]
INPUTS = ("input_ids", "attention_mask", "position_ids")


def pad_left(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Items of `TokenizedPairs` as a batch in which all responses end in the last column.

    Gives `input_ids`, `labels` (-100 on the padding), `attention_mask` and `position_ids` (which count from each row's
    first token), int64 `(B, T)`, and the items' `"sample_id"`, int64 `(B,)`, where they have one.
    """
    tokens = [item["input_ids"] for item in items]
    padded = {
        "input_ids": _padded(tokens, 0),
        "labels": _padded([item["labels"] for item in items], IGNORED),
        "attention_mask": _padded([torch.ones_like(row) for row in tokens], 0),
        "position_ids": _padded([torch.arange(len(row)) for row in tokens], 0),
    }
    if SAMPLE_ID in items[0]:
        padded[SAMPLE_ID] = torch.tensor([int(item[SAMPLE_ID]) for item in items], dtype=torch.int64)
    return padded


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")


def response_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of the last columns alone, those that have responses in some row, and the column before.

    With a large vocabulary most of a small model's work is in the logits, and prompts need none.

    Returns:
        Logits `(B, R, V)` and labels int64 `(B, R)`, not shifted yet.
    """
    labels = batch["labels"]
    first = int((labels != IGNORED).any(0).int().argmax())
    keep = labels.shape[1] - max(first - 1, 0)
    inputs = {name: batch[name] for name in INPUTS}
    return model(**inputs, logits_to_keep=keep, use_cache=False).logits, labels[:, -keep:]


def response_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of the tokens of each response: float32 `(B,)`."""
    logits, labels = response_logits(model, batch)
    return sample_losses(logits, labels, causal=True)[0]


@torch.no_grad()
def response_scores(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss of each token of the responses, float32 `(n,)`, and whether it is the likeliest one, bool `(n,)`."""
    logits, labels = response_logits(model, batch)
    asked = labels[:, 1:] != IGNORED
    logits, wanted = logits[:, :-1][asked].float(), labels[:, 1:][asked]
    return F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1) == wanted
