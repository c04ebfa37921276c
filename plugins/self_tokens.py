"""BASH: train on contexts in which some of the reference tokens are replaced by the model's own.

Cen et al., "Bridging the Training-Inference Gap in LLMs by Leveraging Self-Generated Tokens", TMLR 2025. Teacher
forcing shows a model only contexts that people wrote; when it writes, the context is its own. Offline, for batches at a
time, tokens of a response y are replaced as input for the next prediction, and the labels stay:

    u_t = own_t with probability beta, else y_t        loss = -sum_t log p(y_(t+1) | x, u_1 ... u_t)

Only tokens of the response are replaced, never the prompt, padding or special tokens, and never by special tokens, so
that the length stays. The model's own tokens are in a :class:`~samplewise.plugins.TokenBuffer`, which
:func:`~samplewise.plugins.refresh_self_tokens` writes anew as the model learns. What is replaced is a hash of (seed,
epoch, sample, place): the same in any worker, on any rank, in any batch and after a resume, and what is replaced at one
beta is replaced at any larger one.

The paper leaves open, and here are arguments: how beta grows, whole sequences without replacements, what becomes of the
labels after a wrong token, and how own tokens are generated.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from samplewise.cuda_ext.checks import choice, integer, share
from samplewise.cuda_ext.hashing import hash64
from samplewise.loaders.epoch import SharedEpoch
from samplewise.loaders.ids import SAMPLE_ID, collate_with_ids
from samplewise.loaders.negatives import epoch_of
from samplewise.loaders.sampler import PlannedSampler
from samplewise.loaders.seeding import derive
from samplewise.plugins.token_buffer import IGNORED, Bools, Ints, TokenBuffer
from samplewise.plugins.token_places import ResponsePlaces

AfterError = Literal["gold", "mask_next", "mask_replaced"]
Beta = float | Callable[[int], float]
Shape = Literal["constant", "linear", "exponential", "inverse_sigmoid"]


@dataclass(frozen=True)
class BetaSchedule:
    """The probability that a token is replaced, by epoch: from 0 in the first one up to ``cap`` in the last.

    With z = epoch / (epochs - 1), at most 1, and k the steepness: ``"constant"``: cap in all epochs; ``"linear"``: cap
    z; ``"exponential"``: cap (1 - e^(-k z)) / (1 - e^(-k)), steep at first; ``"inverse_sigmoid"``: cap (s(z) - s(0)) /
    (s(1) - s(0)) with s(z) = 1 / (1 + e^(-k (z - 1/2))). Training of few epochs gets more steps of it from a sampler
    with ``epoch_length``.

    Args:
        cap: the highest probability, in [0, 1].
        epochs: until it is reached, >= 1.
        shape: see above.
        steepness: k, > 0.

    Raises:
        ValueError: an argument outside its range.

    >>> [BetaSchedule(0.5, epochs=3)(epoch) for epoch in range(4)]
    [0.0, 0.25, 0.5, 0.5]
    """

    cap: float
    epochs: int
    shape: Shape = "linear"
    steepness: float = 5.0

    def __post_init__(self) -> None:
        share("BetaSchedule", "cap", self.cap, what="the highest probability that a token is replaced")
        integer("BetaSchedule", "epochs", self.epochs, 1, what="after how many epochs the cap is reached")
        choice("BetaSchedule", "shape", self.shape, "constant", "linear", "exponential", "inverse_sigmoid")
        share("BetaSchedule", "steepness", self.steepness, high=700, ends="()")

    def __call__(self, epoch: int) -> float:
        """The probability in an epoch, from 0."""
        z, k = min(1.0, epoch / (self.epochs - 1)) if self.epochs > 1 else 1.0, self.steepness
        if self.shape == "constant":
            return self.cap
        if self.shape == "exponential":
            z = math.expm1(-k * z) / math.expm1(-k)
        elif self.shape == "inverse_sigmoid":
            z = (1 + math.tanh(k * (z - 0.5) / 2) / math.tanh(k / 4)) / 2
        return self.cap * z


def lots(ids: Ints, lengths: Ints, key: int, *, span: int = 1) -> NDArray[np.float64]:
    """A number in [0, 1) for each token, which depends on (key, id, place) alone: float64 (M,), row after row.

    Args:
        ids: int64 (B,), of the samples.
        lengths: int64 (B,), their tokens, M in all.
        key: from :func:`samplewise.loaders.seeding.derive`.
        span: tokens one after another that have the same number; the first span of a row may be shorter.
    """
    streams = hash64(ids.astype(np.uint64), key)
    inside = (np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)).astype(np.uint64)
    if span > 1:
        inside = (inside + np.repeat(streams % np.uint64(span), lengths)) // np.uint64(span)
    drawn: NDArray[np.float64] = (hash64(np.repeat(streams, lengths) + inside, key) >> np.uint64(11)) * 2.0**-53
    return drawn


def draw_replaced(
    ids: Ints, lengths: Ints, *, beta: float, seed: int, epoch: int, span: int = 1, clean_share: float = 0.0
) -> Bools:
    """Which tokens are replaced: bool (M,), row after row.

    Args:
        ids: int64 (B,), of the samples.
        lengths: int64 (B,), the tokens of their responses.
        beta: the probability of each.
        seed: key of the draws, with
        epoch: the epoch.
        span: tokens one after another that are replaced together.
        clean_share: the probability that a row is left as it is.
    """
    drawn = lots(ids, lengths, derive(seed, epoch, "self-tokens"), span=span) < beta
    clean = lots(ids, np.ones_like(lengths), derive(seed, epoch, "clean")) < clean_share
    return drawn & ~np.repeat(clean, lengths)


class SelfTokenMixer:
    """Collate function that puts the model's own tokens into some of a batch's inputs; it wraps any other.

    Items come from a data set in ``with_ids``; a batch is a mapping with ``input_ids`` and ``labels``, (B, T), padded
    on any side, and gets ``sample_id`` int64 (B,). Packed batches, several samples in one row, have ``position_ids``
    that begin anew with each. For models with a decoder of their own the batch has ``decoder_input_ids`` (for example
    from ``DataCollatorForSeq2Seq(tokenizer, model=model)``), and these are what is mixed. Each batch comes from one
    version of the buffer, and each sample's reference is compared with the one that its tokens were generated for.

    Args:
        buffer: the model's own tokens.
        beta: probability that a token is replaced: a number, or a function of the epoch such as :class:`BetaSchedule`.
            While it is 0 the buffer may be empty.
        collate: the function that makes a batch of items without ids; None: torch's default.
        after_error: which labels leave the loss where a token was replaced by a wrong one: ``"gold"``: none,
            ``"mask_next"``: that of the token after it, ``"mask_replaced"``: its own.
        clean_share: share of sequences that are left as they are.
        redraw: draw what is replaced anew in each epoch; False: what was replaced when the tokens were generated, so
            that each one stands after just the context that it was generated from.
        seed: key of the draws.
        sampler: the loader's sampler, whose epoch the draws follow; without it :meth:`set_epoch` sets the epoch.
        keep_ids: False, for the HF Trainer: batches have no ``sample_id``, which the model would be given, and items
            without ids, such as evaluation data that are not in ``with_ids``, are collated and left as they are.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument outside its range.

    Example::

        buffer = TokenBuffer("self-tokens", data, tokenizer)
        mixer = SelfTokenMixer(buffer, beta=BetaSchedule(0.3, epochs=3), collate=pad, sampler=sampler)
        loader = DataLoader(with_ids(data), batch_size=8, sampler=sampler, collate_fn=mixer)
    """

    def __init__(
        self,
        buffer: TokenBuffer,
        *,
        beta: Beta,
        collate: Callable[[Any], Any] | None = None,
        after_error: AfterError = "gold",
        clean_share: float = 0.0,
        redraw: bool = True,
        seed: int = 0,
        sampler: PlannedSampler | None = None,
        keep_ids: bool = True,
    ):
        if not isinstance(buffer, TokenBuffer):
            raise TypeError(f"SelfTokenMixer(buffer={type(buffer).__name__}): a TokenBuffer is needed.")
        choice("SelfTokenMixer", "after_error", after_error, "gold", "mask_next", "mask_replaced")
        self.buffer, self.after_error = buffer, after_error
        self._beta = beta if callable(beta) else _probability(beta)
        self.clean_share = share("SelfTokenMixer", "clean_share", clean_share, what="the share of sequences left clean")
        self.seed = integer("SelfTokenMixer", "seed", seed, 0)
        self.collate = collate if isinstance(collate, collate_with_ids) else collate_with_ids(collate)
        self.redraw, self.keep_ids = redraw, keep_ids
        self.follows = sampler is not None
        self.shared_epoch = (
            SharedEpoch() if sampler is None else epoch_of("SelfTokenMixer", sampler, buffer.size, "samples")
        )

    def set_epoch(self, epoch: int) -> None:
        """Draw for ``epoch`` from now on. Where a sampler was given its epoch counts, and this does nothing."""
        if not self.follows:
            self.shared_epoch.value = integer("SelfTokenMixer.set_epoch", "epoch", epoch, 0)

    @property
    def epoch(self) -> int:
        """The epoch that is drawn for."""
        return self.shared_epoch.value

    def beta(self, epoch: int) -> float:
        """The probability in an epoch."""
        return _probability(self._beta(epoch), epoch) if callable(self._beta) else self._beta

    def replaced(self, ids: Ints, lengths: Ints, epoch: int, span: int) -> Bools:
        """What is drawn to be replaced in an epoch: bool (M,), see :func:`draw_replaced`."""
        given: dict[str, Any] = {"seed": self.seed, "epoch": epoch, "clean_share": self.clean_share}
        return draw_replaced(ids, lengths, beta=self.beta(epoch), span=span, **given)

    def __call__(self, items: Any) -> Any:
        """Collate the items of one batch and mix them."""
        if not self.keep_ids and isinstance(items, list) and SAMPLE_ID not in items[0]:
            return (self.collate.collate or default_collate)(items)
        batch = self.mix(self.collate(items))
        if not self.keep_ids:
            del batch[SAMPLE_ID]
        return batch

    def mix(self, batch: Any) -> MutableMapping[str, Any]:
        """A copy of a collated batch with other inputs, for loops that mix after loading.

        Args:
            batch: a mapping with ``input_ids``, ``labels`` and ``sample_id``; nothing in it is changed.

        Raises:
            TypeError: no such mapping.
            ValueError: samples that are not those that the buffer was written for, or shapes that disagree.
        """
        if not isinstance(batch, MutableMapping) or SAMPLE_ID not in batch or "labels" not in batch:
            raise TypeError(
                f"SelfTokenMixer: a batch must be a mapping with input_ids, labels and {SAMPLE_ID!r}, not "
                f"{type(batch).__name__}; items must be mappings, from with_ids(data)."
            )
        mixed = copy.copy(batch)
        if not self.buffer.version:
            if self.beta(self.epoch) == 0:  # as in the first epoch of most schedules
                return mixed
            raise RuntimeError("SelfTokenMixer: the buffer is empty; call refresh_self_tokens(model, mixer) first.")
        ids: Ints = batch[SAMPLE_ID].cpu().numpy()
        places = ResponsePlaces(batch, len(ids))
        rows = self.buffer.take(ids)
        places.check(rows, ids)
        replaced = rows.replaced
        if self.redraw:
            replaced = self.replaced(ids, rows.tokens.lengths, self.epoch, int(rows.meta["span"]))
        own = rows.tokens.values
        wrong = np.flatnonzero(replaced & (own != places.targets))
        inputs = torch.from_numpy(places.inputs[wrong])
        mixed[places.name] = _changed(batch[places.name], inputs[inputs >= 0], own[wrong][places.inputs[wrong] >= 0])
        if self.after_error != "gold":
            hidden = places.labels[wrong] if self.after_error == "mask_replaced" else places.after(wrong)
            mixed["labels"] = _changed(batch["labels"], torch.from_numpy(hidden), IGNORED)
        return mixed


def _changed(values: Tensor, places: Tensor, new: Any) -> Tensor:
    changed = values.clone(memory_format=torch.contiguous_format)
    new = torch.as_tensor(new, dtype=values.dtype, device=values.device)
    changed.view(-1)[places.to(values.device)] = new
    return changed


def _probability(beta: Any, epoch: int | None = None) -> float:
    where = "" if epoch is None else f", of epoch {epoch},"
    return share("SelfTokenMixer", "beta", beta, what=f"the probability that a token is replaced{where}")
