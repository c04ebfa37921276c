"""TokenBuffer: what a model wrote in place of each sample's response, in versions on disk that workers re-open."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from samplewise.cuda_ext.checks import integer
from samplewise.cuda_ext.hashing import hash64
from samplewise.loaders.negatives import corpus_fingerprint
from samplewise.loaders.ragged import Ragged
from samplewise.loaders.table import Table, Version

IGNORED = -100
"""The label of what is not in the loss."""

_PROBES = 64  # tokens that a tokenizer's fingerprint looks at
_COPIED = 1 << 22  # elements at a time

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Kind = Literal["tokens", "attempts"]
"""At the places of the responses, one for one; or answers of any length."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A sample's tokens.

    Attributes:
        tokens: int64 (T,), ``input_ids`` without padding.
        targets: int64 (R,), the tokens of the response, in order.
        places: int64 (R,), where they are in ``tokens``; with an encoder and a decoder, in ``labels``.
        starts: int64 (D,), where each of the row's documents begins: 0, and where ``position_ids`` begin anew.
    """

    tokens: Ints
    targets: Ints
    places: Ints
    starts: Ints


def read_sample(item: Any, where: str, *, seq2seq: bool = False) -> Sample:
    """The tokens and the response of a data set's item, a mapping with ``input_ids`` and ``labels``.

    Args:
        item: ``labels`` are the response's tokens at their own places, not shifted, and -100 elsewhere;
            ``position_ids``, where there are some, tell the documents of a packed row apart, and an ``attention_mask``
            tells padding, which is left out.
        where: what it is, for errors.
        seq2seq: ``labels`` are the decoder's and need not be as long as ``input_ids``.

    Raises:
        TypeError: no mapping, or tokens that are no integers.
        ValueError: tokens or labels that are missing, shapes that disagree, labels that are shifted, or a response that
            begins with a document's first token, which nothing predicts.
    """
    if not isinstance(item, Mapping):
        raise TypeError(f"{where}: a mapping with input_ids and labels is needed, not {type(item).__name__}.")
    tokens, labels = (_row(item, name, where) for name in ("input_ids", "labels"))
    numbers = None if item.get("position_ids") is None else _row(item, "position_ids", where)
    if item.get("attention_mask") is not None:
        real = _row(item, "attention_mask", where) != 0
        if len(real) == len(tokens) == len(labels) and not seq2seq and (labels[~real] == IGNORED).all():
            labels = labels[real]
        if len(real) == len(tokens):
            numbers = numbers[real] if numbers is not None and len(numbers) == len(tokens) else numbers
            tokens = tokens[real]
    places = np.flatnonzero(labels != IGNORED)
    if seq2seq:
        return Sample(tokens, labels[places], places, np.zeros(1, np.int64))
    if len(labels) != len(tokens):
        raise ValueError(
            f"{where}: {len(tokens)} input_ids and {len(labels)} labels; a causal model's are equally many, with -100 "
            f"on the prompt."
        )
    starts = np.zeros(1, np.int64)
    if numbers is not None and len(numbers) == len(tokens):
        starts = np.union1d(starts, np.flatnonzero(numbers == 0))
    if (labels[starts[starts < len(labels)]] != IGNORED).any():
        raise ValueError(
            f"{where}: its labels hold a document's first token, which nothing predicts: mask the prompt with -100 (in "
            f"a text without a prompt, its first token)."
        )
    if (tokens[places] != labels[places]).any():
        raise ValueError(
            f"{where}: its labels are not the input_ids at the same places; give labels that are not shifted (the "
            f"model shifts them), and tokens that have not been replaced already."
        )
    return Sample(tokens, labels[places], places, starts)


def _row(item: Mapping[str, Any], name: str, where: str) -> Ints:
    if name not in item:
        hint = "labels are the response's tokens, and -100 on the prompt" if name == "labels" else "the tokens"
        raise ValueError(f"{where}: it has no {name!r} ({hint}); it has {', '.join(map(str, item))}.")
    values = item[name]
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise TypeError(f"{where}: {name} must be integers (T,), not {array.dtype} {array.shape}.")
    return array.astype(np.int64)


def digests(tokens: NDArray[Any], offsets: Ints) -> NDArray[np.uint64]:
    """A hash of each row of tokens, 0 of an empty one: uint64 (B,)."""
    inside = np.arange(len(tokens)) - np.repeat(offsets[:-1], np.diff(offsets))
    mixed = hash64(tokens.astype(np.uint64) + (inside.astype(np.uint64) << np.uint64(32)), 0)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    rows: NDArray[np.uint64] = sums[offsets[1:]] - sums[offsets[:-1]]  # both wrap, and so does the difference
    return rows


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a buffer, all from one version.

    Attributes:
        tokens: int32 (M,) in rows, :class:`~samplewise.loaders.Ragged`.
        replaced: bool (M,), where they stood in the context that they were generated from.
        digests: uint64 (B,), of each row's reference tokens.
        versions: int32 (B,), in which each row was generated; 0: not yet.
        meta: the version's notes; ``meta["settings"][str(version)]`` are those of the version >= 1 that a row is of,
            with its ``epoch``, and of tokens ``beta``, the share that was replaced.
    """

    tokens: Ragged
    replaced: Bools
    digests: NDArray[np.uint64]
    versions: NDArray[np.int32]
    meta: dict[str, Any]


class TokenBuffer:
    """The model's own tokens for each sample of a data set: int32 rows, memory-mapped, one version after another.

    A version is written beside the one before and becomes current at once; workers see it in their next batch. A sample
    that was not generated yet has its reference tokens. Nothing is written before the first refresh,
    :func:`~samplewise.plugins.refresh_self_tokens`.

    Args:
        path: the folder, of this run alone; the first version makes it.
        data: the training data, before ``with_ids``: items are mappings with ``input_ids`` and ``labels``, see
            :func:`read_sample`. It stays in this process: a copy in a worker has none.
        tokenizer: of transformers. Its special tokens are never replaced and never put in; one without any is fine.
        keep: versions that stay on disk, >= 1; for runs resumed from older checkpoints more.

    Attributes:
        table: the :class:`~samplewise.loaders.Table` under it.
        size: N, the number of samples.
        special: int64, ascending, the tokenizer's special tokens.
        end: the tokenizer's ``eos_token_id``, None where it has none.

    Raises:
        TypeError: an argument of another type.
        ValueError: an empty data set, or a folder that is the buffer of other data or of another tokenizer.
    """

    def __init__(self, path: str | os.PathLike[str], data: Any, tokenizer: Any, *, keep: int = 2):
        data = _bare(data)
        if not hasattr(tokenizer, "all_special_ids") or not hasattr(tokenizer, "convert_ids_to_tokens"):
            raise TypeError(
                f"TokenBuffer(tokenizer={type(tokenizer).__name__}): a tokenizer of transformers is needed."
            )
        self.data, self.size = data, len(data)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = set(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}
        self.special: Ints = np.array(sorted(special), dtype=np.int64)
        self.end: int | None = getattr(tokenizer, "eos_token_id", None)
        ids = np.unique(np.linspace(0, max(0, len(tokenizer) - 1), _PROBES).astype(np.int64)).tolist()
        vocabulary = [*map(str, tokenizer.convert_ids_to_tokens(ids)), str(len(tokenizer)), str(self.special.tolist())]
        self.table = Table(path, fingerprint=corpus_fingerprint(_Tokens(data), vocabulary), keep=keep)
        self._checked: Version | None = None

    def __repr__(self) -> str:
        return f"TokenBuffer({str(self.table.path)!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "data": None, "_checked": None}

    @property
    def version(self) -> int:
        """Number of the current version, 0 before the first refresh."""
        return self.table.version

    # --- reading ------------------------------------------------------------------------------------------------------

    def take(self, ids: Ints, kind: Kind = "tokens") -> Rows:
        """The rows of some samples, all from the current version.

        Args:
            ids: int64 (B,).
            kind: what they must be.

        Raises:
            RuntimeError: nothing has been written yet.
            IndexError: an id outside [0, N).
            ValueError: the buffer is of the other kind.
        """
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.size:
            raise IndexError(f"{self!r}: ids are rows in [0, {self.size}), not {ids.tolist()!r:.80}.")
        version = self.table.snapshot()
        self._check(version)
        self.check_kind(version.meta, kind)
        arrays = version.arrays
        offsets = np.concatenate(([0], np.cumsum(arrays["lengths"][ids], dtype=np.int64))).astype(np.int64)
        flat = _flat(arrays["offsets"][ids], np.diff(offsets))
        digest, versions = np.asarray(arrays["digests"][ids]), np.asarray(arrays["versions"][ids])
        replaced = (arrays["replaced"][flat >> 3] >> (flat & 7).astype(np.uint8)) & 1 == 1
        tokens = Ragged(np.asarray(arrays["tokens"][flat]), offsets)
        return Rows(tokens, replaced, digest, versions, version.meta)

    def check_kind(self, meta: Mapping[str, Any], kind: str) -> None:
        """Check that a version holds what is asked for.

        Raises:
            ValueError: it is of the other kind.
        """
        if meta["kind"] != kind:
            raise ValueError(
                f"{self!r}: it holds {meta['kind']}, not {kind}: a SelfTokenMixer has tokens, a CorrectionDataset "
                f"attempts; give each a buffer of its own, in a folder of its own."
            )

    def _check(self, version: Version) -> None:
        if version is self._checked:
            return
        if "replaced" not in version.arrays:
            raise ValueError(f"{self!r}: the folder is another table's, of {', '.join(version.arrays)}.")
        if len(version.arrays["offsets"]) != self.size + 1:
            raise ValueError(
                f"{self!r}: it has {len(version.arrays['offsets']) - 1} rows, the data {self.size}; take the folder "
                f"that belongs to these data."
            )
        self._checked = version

    # --- writing ------------------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self, capacities: Ints, reference: NDArray[np.uint64], meta: dict[str, Any]) -> Iterator[Writer]:
        """Write the next version: it begins as a copy of the current one, or, where there is none, empty.

        Args:
            capacities: int64 (N,), the most tokens that each row can hold, the same in every version.
            reference: uint64 (N,), :func:`digests` of the samples' reference tokens.
            meta: notes, see :meth:`samplewise.loaders.Table.writing`.
        """
        offsets = np.concatenate(([0], np.cumsum(capacities))).astype(np.int64)
        total, before = int(offsets[-1]), self.table.snapshot() if self.table.version else None
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "tokens": ((max(1, total),), np.int32), "replaced": ((total // 8 + 1,), np.uint8),
            "offsets": ((self.size + 1,), np.int64), "lengths": ((self.size,), np.int32),
            "digests": ((self.size,), np.uint64), "versions": ((self.size,), np.int32),
        }  # fmt: skip
        if before is not None:
            self._check(before)
            held = np.diff(before.arrays["offsets"])
            if (held != capacities).any():
                row = int((held != capacities).argmax())
                raise ValueError(
                    f"{self!r}: row {row} holds {held[row]} tokens, {capacities[row]} are asked for; delete the "
                    f"folder, or take another one."
                )
        with self.table.writing(shapes, meta=meta) as arrays:
            for name, values in arrays.items() if before is not None else ():
                for low in range(0, len(values), _COPIED):
                    values[low : low + _COPIED] = before.arrays[name][low : low + _COPIED]  # type: ignore[union-attr]
            arrays["offsets"][:], arrays["digests"][:] = offsets, reference
            yield Writer(arrays, self.table.version + 1)


@dataclass(frozen=True, eq=False)
class Writer:
    """The arrays of a version that is being written."""

    arrays: dict[str, Any]
    version: int

    def put(self, ids: Ints, tokens: Ragged, replaced: Bools | None = None) -> None:
        """Write some rows, as of this version.

        Args:
            ids: int64 (B,), distinct.
            tokens: a row each.
            replaced: bool (M,), see :class:`Rows`; None: nowhere.
        """
        arrays = self.arrays
        if (tokens.lengths > np.diff(arrays["offsets"])[ids]).any():
            raise ValueError("TokenBuffer: a row is longer than it may be; was it made of the data of all ranks?")
        flat = _flat(arrays["offsets"][ids], tokens.lengths)
        arrays["tokens"][flat] = tokens.values
        bits = np.uint8(1) << (flat & 7).astype(np.uint8)
        np.bitwise_and.at(arrays["replaced"], flat >> 3, ~bits)
        if replaced is not None:
            np.bitwise_or.at(arrays["replaced"], flat[replaced] >> 3, bits[replaced])
        arrays["lengths"][ids], arrays["versions"][ids] = tokens.lengths, self.version

    def fill(self, ids: Ints, tokens: Ragged) -> None:
        """Give rows their reference tokens, as not generated yet."""
        arrays = self.arrays
        arrays["tokens"][_flat(arrays["offsets"][ids], tokens.lengths)] = tokens.values
        arrays["lengths"][ids] = tokens.lengths


def _flat(begins: NDArray[Any], lengths: Ints) -> Ints:
    """The places of rows that begin at ``begins`` and are ``lengths`` long, one after another: int64 (M,)."""
    before = np.cumsum(lengths) - lengths
    places: Ints = np.arange(int(lengths.sum())) + np.repeat(np.asarray(begins) - before, lengths)
    return places


class _Tokens:
    """A data set's tokens and labels alone, which a fingerprint is made of."""

    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> list[Any]:
        item = self.data[row]
        if not isinstance(item, Mapping):
            read_sample(item, f"TokenBuffer(data), sample {row}")  # raises
        return [_row(item, name, f"TokenBuffer(data), sample {row}") for name in ("input_ids", "labels")]


def _bare(data: Any) -> Any:
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or isinstance(data, (str, bytes, Mapping)):
        raise TypeError(
            f"TokenBuffer(data={type(data).__name__}): a map-style data set is needed, with len() and [row]; the "
            f"samples of a stream have no rows."
        )
    integer("TokenBuffer", "len(data)", len(data), 1)
    return data
