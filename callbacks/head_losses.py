"""Losses of single samples from what a model of transformers, or of trl, gave for a batch.

Nothing here needs transformers. B is the number of samples, T of tokens, C of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from samplewise.cuda_ext import sample_losses

IGNORED = -100
"""The label of what counts nowhere."""


class HeadLosses(NamedTuple):
    """One row a sample.

    Attributes:
        losses: float32 (B,), the mean over what counts in a sample: its tokens, or itself.
        counts: (B,), how much of it counts, so that ``losses * counts`` are sums.
    """

    losses: Tensor
    counts: Tensor


def value(outputs: Any, name: str, place: int | None = None) -> Any:
    """An output of a model: the entry of that name, or in a tuple the one at ``place``; None where it has none."""
    if isinstance(outputs, Mapping):
        return outputs.get(name)
    if isinstance(outputs, tuple):
        return outputs[place] if place is not None and len(outputs) > place else None
    return getattr(outputs, name, None)


def of_head(
    outputs: Any,
    inputs: Mapping[str, Any],
    *,
    causal: bool,
    problem: str | None = None,
    lengths: Tensor | None = None,
) -> HeadLosses | None:
    """The losses of the usual heads, told apart by the shapes of logits and labels.

    Args:
        outputs: of the model, with their graph.
        inputs: the batch that it got, with ``labels``, or ``start_positions`` and ``end_positions``.
        causal: whether logits (B, T, C) at t are of the label at t + 1; ``shift_labels`` stand where they belong.
        problem: ``config.problem_type``, which tells a regression of several values from a choice of several labels.
        lengths: int64 (B,), tokens of each sample where they are laid end to end, in one row.

    Returns:
        None where it is another head.
    """
    starts, labels = value(outputs, "start_logits"), inputs.get("labels")
    if isinstance(starts, Tensor) and "start_positions" in inputs and "end_positions" in inputs:
        return spans(starts, outputs["end_logits"], inputs["start_positions"], inputs["end_positions"])
    logits = value(outputs, "logits", 1)
    if not (isinstance(logits, Tensor) and isinstance(labels, Tensor) and logits.is_floating_point()):
        return None
    whole = not labels.is_floating_point()
    if logits.dim() == 3 and labels.dim() == 2 and whole:
        shifted = inputs.get("shift_labels")
        return tokens(logits, labels, causal, lengths) if shifted is None else tokens(logits, shifted, False, lengths)
    if logits.dim() > 2 or not labels.numel() or lengths is not None:
        return None
    if problem == "regression" or (problem is None and logits[0].numel() == 1):
        return values(logits, labels)
    if whole and labels.numel() == len(logits):
        labels = labels.flatten().long()
        return HeadLosses(sample_losses(logits, labels).losses, labels != IGNORED)
    return choices(logits, labels) if labels.shape == logits.shape else None


def tokens(logits: Tensor, labels: Tensor, causal: bool, lengths: Tensor | None = None) -> HeadLosses:
    """Cross entropy of logits (B, T, C) and labels (B, T); a soft prompt in front of the labels is left out."""
    before = logits.shape[1] - labels.shape[1]
    labels = F.pad(labels.to(logits.device), (before, 0), value=IGNORED) if before > 0 else labels.to(logits.device)
    if lengths is not None:
        labels = (F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if causal else labels).flatten()
        return in_pieces(sample_losses(logits[0], labels).losses, labels != IGNORED, lengths, int(causal))
    counted = (labels[:, 1:] if causal else labels) != IGNORED
    return HeadLosses(sample_losses(logits, labels, causal=causal).losses, counted.sum(1))


def in_pieces(losses: Tensor, counted: Tensor, lengths: Tensor, ahead: int) -> HeadLosses:
    """The losses (T,) of tokens, of which ``counted`` (T,) count, in samples of ``lengths`` (B,) that lie end to end.

    The loss at t belongs to the sample of the token at ``t + ahead``. What is behind the last one fills a row up.
    """
    places = torch.arange(len(losses), device=losses.device) + ahead
    ends = lengths.to(losses.device).cumsum(0)
    sample = torch.searchsorted(ends, places, right=True).clamp_max(len(lengths) - 1)
    sums, counts = (torch.zeros(len(lengths), device=losses.device) for _ in range(2))
    counts = counts.index_add(0, sample, counted.float())
    return HeadLosses(sums.index_add(0, sample, losses.float() * counted) / counts.clamp_min(1), counts)


def log_probabilities(
    logs: Tensor, counted: Tensor, *, dynamic: bool = False, lengths: Tensor | None = None
) -> HeadLosses:
    """From each next label's log-probability (B, T - 1), 0 where it does not count, as trl's fused heads give it.

    Args:
        logs: with its graph.
        counted: bool (B, T - 1).
        dynamic: each token times its probability, without gradient (``loss_type="dft"``).
        lengths: see :func:`of_head`.
    """
    losses = -logs * logs.exp().detach() if dynamic else -logs
    if lengths is not None:
        return in_pieces(losses.flatten(), counted.flatten(), lengths, 1)
    counts = counted.sum(1)
    return HeadLosses(losses.float().sum(1) / counts.clamp_min(1), counts)


def values(logits: Tensor, labels: Tensor) -> HeadLosses:
    """Squared errors of (B, C) or (B,), their mean over C."""
    losses = (logits.reshape(len(logits), -1) - labels.reshape(len(logits), -1)).float().square().mean(1)
    return HeadLosses(losses, torch.ones_like(losses))


def choices(logits: Tensor, labels: Tensor) -> HeadLosses:
    """Binary cross entropy of logits and labels (B, C), its mean over C."""
    losses = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").mean(1)
    return HeadLosses(losses, torch.ones_like(losses))


def spans(starts: Tensor, ends: Tensor, first: Tensor, last: Tensor) -> HeadLosses:
    """The mean of two cross entropies over positions, logits (B, T), positions (B,); those outside count nowhere."""
    sums, counts = torch.zeros(len(starts), device=starts.device), torch.zeros(len(starts), device=starts.device)
    for logits, places in ((starts, first), (ends, last)):
        length = logits.shape[1]
        places = places.reshape(-1).to(logits.device).clamp(0, length)
        sums = sums + sample_losses(logits, places, ignore_index=length).losses / 2
        counts = counts + (places != length) / 2
    return HeadLosses(sums / counts.clamp_min(0.5), counts)


def row_by_row(function: Callable[..., Any], samples: int, *args: Any, **kwargs: Any) -> Tensor:
    """A loss function that gives one scalar, once for each sample: (B,).

    Args:
        function: gives a scalar, or a tuple that begins with one.
        samples: B. Of tensors and lists of that length, and of those in mappings, it gets one row each time.
        *args: its arguments for the whole batch.
        **kwargs: likewise.
    """
    losses = []
    for row in range(samples):
        some, named = ([_row(each, row, samples) for each in given] for given in (args, kwargs.values()))
        loss = function(*some, **dict(zip(kwargs, named, strict=True)))
        losses.append((loss[0] if isinstance(loss, tuple) else loss).float().reshape(()))
    return torch.stack(losses)


def _row(given: Any, row: int, samples: int) -> Any:
    if isinstance(given, Tensor):
        return given[row : row + 1] if given.dim() and len(given) == samples else given
    if isinstance(given, list):
        return given[row : row + 1] if len(given) == samples else given
    if isinstance(given, Mapping):
        rows = {key: _row(each, row, samples) for key, each in given.items()}
        return type(given)(**rows) if is_dataclass(given) else rows
    return given


def shares(
    rows: HeadLosses, loss: Tensor, items: Any, ranks: int, steps: int, *, means: bool = False
) -> tuple[Tensor, Tensor]:
    """What each sample adds to a batch's loss: (B,), with its graph, and how far their sum is from it.

    Losses are made of the samples' in one of few ways: the mean over all tokens of the batch, the sum of them over the
    tokens of an optimizer step, or the mean, or the sum, over samples. Models do not tell which, and some ignore the
    number that they are given; so the way is taken that comes to ``loss``, without waiting for a GPU.

    Args:
        rows: of the batch.
        loss: what the Trainer backpropagates of it, a scalar.
        items: tokens of the optimizer step, over all its batches, None where they were not counted.
        ranks: what the Trainer multiplies by where ``items`` are those of all ranks.
        steps: batches of the optimizer step.
        means: the mean over samples is known to be the way.
    """
    losses, counts = rows.losses, rows.counts
    sums, samples = losses * counts, len(losses)
    ways = [losses / samples, losses / (samples * steps)]
    if not means:
        ways = [sums / counts.sum().clamp_min(1), *ways, losses]
    if items is not None and not means:
        items = torch.as_tensor(items, device=losses.device).reshape(-1)[:1]
        ways = [sums * ranks / items, *ways]
    table = torch.stack(ways)
    gaps = (table.detach().sum(1) - loss.detach().to(table)).abs()
    best = gaps.nan_to_num(torch.inf).argmin().reshape(1)
    return table.index_select(0, best)[0], gaps.index_select(0, best)[0]
