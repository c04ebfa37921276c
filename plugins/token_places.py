"""Where the responses are in a collated batch, whatever its padding, and whether they are those of a buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from samplewise.plugins.token_buffer import IGNORED, Ints, Rows, digests


class ResponsePlaces:
    """Where a batch's responses are: flat places, sample after sample.

    Attributes:
        name: of the inputs that are mixed.
        targets: int64 (M,), the reference tokens.
        offsets: int64 (B + 1,), of each sample among them.
        labels: int64 (M,), their places in the labels.
        inputs: int64 (M,), their places in the inputs, -1 where they are no input.
    """

    def __init__(self, batch: Mapping[str, Any], samples: int):
        labels = batch["labels"]
        self.name = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
        tokens = batch.get(self.name)
        if (
            not (isinstance(labels, Tensor) and isinstance(tokens, Tensor))
            or labels.ndim != 2
            or labels.shape != tokens.shape
        ):
            shapes = f"labels {_shape(labels)} and {self.name} {_shape(tokens)}"
            raise ValueError(
                f"SelfTokenMixer: a batch must have {self.name} and labels (B, T), not {shapes}; for a model with an "
                f"encoder DataCollatorForSeq2Seq(tokenizer, model=model) makes the decoder_input_ids that are needed."
            )
        flat, width = labels.cpu().numpy().ravel(), labels.shape[1]
        self.labels = np.flatnonzero(flat != IGNORED)
        self.targets: Ints = flat[self.labels].astype(np.int64)
        owners = self._owners(batch, samples, width)
        self.offsets: Ints = np.concatenate(([0], np.cumsum(np.bincount(owners, minlength=samples)))).astype(np.int64)
        self.inputs = self.labels
        if self.name == "decoder_input_ids":  # which are the labels, one place later
            self.inputs = np.where((self.labels + 1) % width > 0, self.labels + 1, -1)
        known = self.inputs >= 0
        if (tokens.cpu().numpy().ravel()[self.inputs[known]] != self.targets[known]).any():
            raise ValueError(
                f"SelfTokenMixer: a batch's {self.name} are not its labels' tokens; labels must not be shifted, and a "
                f"batch must be mixed once only."
            )

    def _owners(self, batch: Mapping[str, Any], samples: int, width: int) -> Ints:
        """Of each response token the sample in the batch."""
        rows: Ints = self.labels // width
        if len(batch["labels"]) == samples:
            return rows
        numbers = batch.get("position_ids")
        begins = np.zeros(0) if numbers is None else numbers.cpu().numpy().ravel() == 0
        if int(begins.sum()) != samples:
            raise ValueError(
                f"SelfTokenMixer: a batch of {samples} samples has {len(batch['labels'])} rows and "
                f"{int(begins.sum())} documents; a packed batch needs position_ids that begin at 0 with each sample."
            )
        owners: Ints = np.cumsum(begins)[self.labels] - 1
        return owners

    def check(self, rows: Rows, ids: Ints) -> None:
        """Check that the buffer's rows were generated for these responses."""
        lengths, found = rows.tokens.lengths, np.diff(self.offsets)
        if (lengths != found).any():
            row = int((lengths != found).argmax())
            raise ValueError(
                f"SelfTokenMixer: sample {ids[row]} has {found[row]} response tokens in the batch and {lengths[row]} "
                f"in the buffer. The collate must keep the data set's labels, all of them (cut long samples in the "
                f"data set), and the buffer must be of these data."
            )
        differ = digests(self.targets, self.offsets) != rows.digests
        if differ.any():
            raise ValueError(
                f"SelfTokenMixer: the response of sample {ids[int(differ.argmax())]} is not the one that the buffer "
                f"was written for; the data have changed, or are in another order: write a new buffer for them."
            )

    def after(self, tokens: Ints) -> Ints:
        """Places of the labels right after those of response tokens (n,), where they are of the same response."""
        following = tokens[tokens + 1 < len(self.labels)] + 1
        inside = ~np.isin(following, self.offsets) & (self.labels[following] == self.labels[following - 1] + 1)
        places: Ints = self.labels[following[inside]]
        return places


def _shape(values: Any) -> Any:
    return tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
