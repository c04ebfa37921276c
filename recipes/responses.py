"""Losses of the responses to prompts: a causal language model on batches that are padded on the left (`PadLeft`)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samplewise.cuda_ext import sample_losses

Batch = Mapping[str, Tensor]
INPUTS = ("input_ids", "attention_mask", "position_ids")


def response_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of the last columns alone, those that have responses in some row, and the column before.

    With a large vocabulary most of a small model's work is in the logits, and prompts need none.

    Returns:
        Logits `(B, R, V)` and labels int64 `(B, R)`, not shifted yet.
    """
    labels = batch["labels"]
    first = int((labels != -100).any(0).int().argmax())
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
    asked = labels[:, 1:] != -100
    logits, wanted = logits[:, :-1][asked].float(), labels[:, 1:][asked]
    return F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1) == wanted
