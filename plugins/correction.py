"""RAC: train a model to correct what it wrote itself.

Cen et al., "Bridging the Training-Inference Gap in LLMs by Leveraging Self-Generated Tokens", TMLR 2025
(reference-answer correction). For a share gamma of the samples the input is prompt x, the model's own attempt a, a
connector c and the reference y, and only the reference is in the loss; the others are plain fine-tuning:

    [x][a][c][y]        loss = -sum_t log p(y_t | x, a, c, y_1 ... y_(t-1))

The model sees its own errors as context, and what they should have been. Which samples are corrections is a hash of
(seed, epoch, sample): the same in any worker, on any rank and after a resume.

The paper leaves open, and here are arguments: the connector, an attempt equal to the reference (nothing to correct),
and what is cut where the whole is too long: the attempt first, and then no correction is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from samplewise.cuda_ext.checks import choice, integer, share
from samplewise.loaders.epoch import SharedEpoch
from samplewise.loaders.negatives import epoch_of, fetched
from samplewise.loaders.sampler import PlannedSampler
from samplewise.loaders.seeding import derive
from samplewise.plugins.self_tokens import lots
from samplewise.plugins.token_buffer import IGNORED, Ints, Sample, TokenBuffer, digests, read_sample

REQUEST = "Check this answer, and write it again without its mistakes."
_ATTEMPT = "the-attempt-stands-here"
_PER_TOKEN: dict[str, Callable[[int], Ints]] = {
    "attention_mask": lambda length: np.ones(length, np.int64),
    "position_ids": np.arange,
    "token_type_ids": lambda length: np.zeros(length, np.int64),
}
"""What an item may have for each token, of a correction of so many."""


def correction_connector(tokenizer: Any, request: str = REQUEST) -> Ints:
    """The tokens between an attempt and the reference: int64 (C,).

    With a chat template they end the assistant's turn, hold ``request`` as the user's and begin the assistant's next;
    without one they are ``request`` on a line of its own.

    Args:
        tokenizer: of transformers.
        request: what the user says.

    Raises:
        ValueError: a chat template that does not write an answer as it is.
    """
    text = f"\n{request}\n"
    if getattr(tokenizer, "chat_template", None):
        turns = (("user", "?"), ("assistant", _ATTEMPT), ("user", request))
        messages = [{"role": role, "content": content} for role, content in turns]
        written = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        _, attempt, text = written.rpartition(_ATTEMPT)
        if not attempt:
            raise ValueError("correction_connector(tokenizer): its chat template does not write earlier answers.")
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)


class CorrectionDataset(Dataset[Mapping[str, Any]]):
    """Map-style data set in which a share of the samples are corrections of the model's own attempts.

    An item is ``{"input_ids", "labels"}``, (T,) each: a correction, or the sample as the data set has it. Where it has
    ``attention_mask``, ``position_ids`` or ``token_type_ids``, a correction has them, too; padding is left out of it.
    For models with an encoder, attempt and connector follow the encoder's input. A sample without an attempt yet is
    plain. All of a batch comes from one version of the attempts.

    Args:
        attempts: buffer of the data, which :func:`~samplewise.plugins.refresh_attempts` writes.
        connector: the tokens between attempt and reference, for example :func:`correction_connector`'s.
        correct_share: gamma, the share of the samples that are corrections, in [0, 1].
        equal: an attempt that equals the reference makes a plain sample (``"skip"``), or a correction all the same
            (``"keep"``), of which a model learns when to leave an answer as it is.
        max_length: tokens of a correction at the most: the attempt is cut, from its end, and where nothing of it would
            be left, the sample is plain; None: no limit.
        seed: key of the draws.
        sampler: the loader's sampler, whose epoch the draws follow; without it :meth:`set_epoch` sets the epoch.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument outside its range.

    Example::

        attempts = TokenBuffer("attempts", data, tokenizer)
        corrections = CorrectionDataset(attempts, correction_connector(tokenizer), sampler=sampler)
        loader = DataLoader(with_ids(corrections), batch_size=8, sampler=sampler, collate_fn=collate_with_ids(pad))
    """

    def __init__(
        self,
        attempts: TokenBuffer,
        connector: Sequence[int] | Ints,
        *,
        correct_share: float = 0.5,
        equal: Literal["skip", "keep"] = "skip",
        max_length: int | None = None,
        seed: int = 0,
        sampler: PlannedSampler | None = None,
    ):
        owner = "CorrectionDataset"
        if not isinstance(attempts, TokenBuffer):
            raise TypeError(f"{owner}(attempts={type(attempts).__name__}): a TokenBuffer is needed.")
        if attempts.data is None:
            raise ValueError(f"{owner}(attempts): the buffer has lost its data set; make it with the data, once.")
        tokens = np.asarray(connector)
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise TypeError(f"{owner}(connector={connector!r:.60}): token ids (C,) are needed: correction_connector().")
        self.buffer, self.data, self.connector = attempts, attempts.data, tokens.astype(np.int64)
        self.correct_share = share(owner, "correct_share", correct_share, what="the share of corrections")
        choice(owner, "equal", equal, "skip", "keep")
        self.equal = equal
        self.max_length = None if max_length is None else integer(owner, "max_length", max_length, 1)
        self.seed = integer(owner, "seed", seed, 0)
        self.follows = sampler is not None
        self.shared_epoch = SharedEpoch() if sampler is None else epoch_of(owner, sampler, attempts.size, "samples")

    def set_epoch(self, epoch: int) -> None:
        """Draw for ``epoch`` from now on. Where a sampler was given its epoch counts, and this does nothing."""
        if not self.follows:
            self.shared_epoch.value = integer("CorrectionDataset.set_epoch", "epoch", epoch, 0)

    @property
    def epoch(self) -> int:
        """The epoch that is drawn for."""
        return self.shared_epoch.value

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        """The items of a batch, their attempts from one version of the buffer."""
        ids = np.asarray(indices, dtype=np.int64)
        if not self.buffer.version:
            raise RuntimeError("CorrectionDataset: there are no attempts; call refresh_attempts(model, data) first.")
        rows = self.buffer.take(ids, "attempts")
        items = fetched(self.data, ids, "data")
        drawn = lots(ids, np.ones_like(ids), derive(self.seed, self.epoch, "corrections")) < self.correct_share
        for place in np.flatnonzero(drawn & (rows.versions > 0)).tolist():  # which have a response
            where = f"CorrectionDataset: sample {ids[place]}"
            sample = read_sample(items[place], where, seq2seq=bool(rows.meta["seq2seq"]))
            _check_columns(items[place], where)
            one = np.array([0, len(sample.targets)])
            if digests(sample.targets, one)[0] != rows.digests[place]:
                raise ValueError(
                    f"{where}: its response is not the one that the attempt was written for; the data have changed, or "
                    f"are in another order: write a new buffer for them."
                )
            attempt = rows.tokens[place].astype(np.int64)
            if self.equal == "keep" or not is_reference(attempt, sample.targets, self.buffer.special):
                items[place] = self._correction(items[place], sample, attempt, bool(rows.meta["seq2seq"]))
        return items

    def _correction(self, item: Mapping[str, Any], sample: Sample, attempt: Ints, seq2seq: bool) -> Mapping[str, Any]:
        tokens, connector = sample.tokens, self.connector
        if seq2seq:
            end = len(tokens) - int(len(tokens) > 0 and tokens[-1] in self.buffer.special)
            prompt, rest = tokens[:end], tokens[end:]
        else:
            prompt, rest = np.split(tokens, sample.places[:1])
        if self.max_length is not None:
            room = self.max_length - len(prompt) - len(connector) - len(rest)
            if room < min(1, len(attempt)):  # an attempt of nothing is one, too
                return item
            attempt = attempt[:room]
        inputs = np.concatenate([prompt, attempt, connector, rest])
        made: dict[str, Any] = {**item, "input_ids": _like(item["input_ids"], inputs)}
        if not seq2seq:
            labels = np.full(len(inputs), IGNORED)
            labels[sample.places + len(attempt) + len(connector)] = sample.targets
            made["labels"] = _like(item["labels"], labels)
        for name, values in _PER_TOKEN.items():
            if made.get(name) is not None:
                made[name] = _like(made[name], values(len(inputs)))
        return made


def _check_columns(item: Mapping[str, Any], where: str) -> None:
    """No other column may have a value for each token: it would not be that of a correction."""
    known = {"input_ids", "labels", *_PER_TOKEN}
    for name, values in item.items():
        each = isinstance(values, (list, np.ndarray)) or (isinstance(values, Tensor) and values.ndim > 0)
        if name not in known and each and len(values) == len(item["input_ids"]):
            raise ValueError(
                f"{where}: its column {name!r} has a value for each token, and a correction other tokens; "
                f"remove the column."
            )


def _like(given: Any, values: Ints) -> Any:
    """The values as the data set has its own: a tensor, a list or an array."""
    if isinstance(given, Tensor):
        return torch.from_numpy(values).to(given.dtype)
    return values.tolist() if isinstance(given, list) else values.astype(np.asarray(given).dtype)


def is_reference(attempt: Ints, targets: Ints, special: Ints) -> bool:
    """Whether an attempt is the reference, special tokens aside."""
    return np.array_equal(attempt[~np.isin(attempt, special)], targets[~np.isin(targets, special)])
