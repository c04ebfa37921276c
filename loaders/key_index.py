"""KeyIndex: rows for the samples of a stream, by a key that stays the same from epoch to epoch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from hashlib import blake2b
from multiprocessing import context, get_context
from pathlib import Path
from struct import Struct
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samplewise.cuda_ext.checks import integer
from samplewise.cuda_ext.ranks import gather_rows
from samplewise.loaders.keys import PIECE, IntArray, Key, digest_pieces, expanded, key_digest, shard_keys

VERSION = 1
MOST_KEYS = (1 << 31) - 1
_COUNT, _RETIRED, _CLEARED = range(3)
_WORDS = Struct("<qq")
_LOCK_SECONDS = 120.0


def shared_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in memory that worker processes, forked or spawned, share; no page of it is touched before it is used."""
    elements = int(np.prod(shape))
    storage = torch.UntypedStorage._new_shared(max(1, elements) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload, no-any-return]


class KeyIndex:
    """Gives the samples of a stream their rows: the first key that is added gets row 0, the next one 1, and so on.

    Keys are compared by a 128-bit hash, which takes them apart with certainty (two of 1e9 keys agree with a probability
    of 1e-21). The table lies in shared memory, 24 to 32 bytes a key of ``capacity``, never in a Python dict: workers,
    forked or spawned, persistent or not, see and add the same keys. In a container that memory is ``/dev/shm``.

    The rows are those of ``sampler.ledger``, so they must stay: keep the index with the checkpoints
    (:meth:`state_dict`) or in a file (:meth:`save`), or build it from the same shards in the same order. Its
    :attr:`fingerprint` tells them apart: with ``sampler = Method(len(index), fingerprint=index.fingerprint)`` a
    checkpoint of another index is refused.

    Args:
        capacity: how many keys there is room for, in [1, 2^31).

    Raises:
        RuntimeError: there is too little shared memory.

    >>> index = KeyIndex(capacity=10)
    >>> index.add(["cat", "dog", "cat"])
    array([0, 1, 0])
    >>> index.rows(["dog", "bird"])
    array([ 1, -1])
    """

    def __init__(self, capacity: int = 1_000_000):
        self._lock: Any = get_context("spawn").Lock()  # a lock of the fork context cannot go to a spawned worker
        self._control = shared_zeros((3,), torch.int64)
        self._allocate(integer("KeyIndex", "capacity", capacity, 1, MOST_KEYS, what="the number of keys"))

    def _allocate(self, capacity: int) -> None:
        self._digests = shared_zeros((capacity, 2), torch.int64)  # by row
        self._slots = shared_zeros(
            (1 << (capacity + capacity // 2).bit_length(),), torch.int32
        )  # row + 1, 0 where free
        self._open()

    def _open(self) -> None:
        self._digest_rows: IntArray = self._digests.numpy()
        self._slot_rows: NDArray[np.int32] = self._slots.numpy()
        # A memoryview reads one number in a third of the time that numpy needs.
        self._digest_view = memoryview(self._digest_rows.reshape(-1))  # type: ignore[arg-type]
        self._slot_view = memoryview(self._slot_rows)  # type: ignore[arg-type]
        self._counts = memoryview(self._control.numpy())  # type: ignore[arg-type]
        self._mask = len(self._slot_rows) - 1

    # --- making one ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_keys(cls, keys: Iterable[Key], *, capacity: int | None = None) -> KeyIndex:
        """The index of all keys of a data set, for example of an id column.

        Args:
            keys: any iterable of keys; it is read once, and no list of it is made.
            capacity: room for at least so many keys; None for just these.

        Raises:
            ValueError: a key stands twice, or there is none.
        """
        index = cls(capacity or (max(1, len(keys)) if isinstance(keys, Sized) else PIECE))
        index._add_unique("KeyIndex.from_keys", keys, "")
        return index._trimmed(capacity)

    @classmethod
    def from_shards(cls, paths: str | os.PathLike[str] | Iterable[str], *, capacity: int | None = None) -> KeyIndex:
        """The index of webdataset shards: rows in the order of the shards, then of the samples in each.

        Only the tar headers are read where a shard is a plain local file; other URLs are read as webdataset reads them.

        Args:
            paths: of the shards, in the same order on all ranks, or one text with braces as ``WebDataset`` takes it.
            capacity: room for at least so many keys; None for just these.

        Raises:
            ValueError: two samples have the same key, or there is none. For keys that begin anew in each shard, make
                better ones, ``from_keys(f"{path}/{key}" for path in paths for key in shard_keys(path))``, and give the
                samples the same.
        """
        index = cls(capacity or PIECE)
        for path in expanded(paths):
            index._add_unique("KeyIndex.from_shards", shard_keys(path), f" (the second time in {path})")
        return index._trimmed(capacity)

    def _add_unique(self, owner: str, keys: Iterable[Key], where: str) -> None:
        for piece, digests in digest_pieces(owner, keys):
            before = len(self)
            rows = self._add(digests, may_grow=True)
            if len(self) - before < len(piece):
                place = int(np.argmax(rows != np.arange(before, before + len(piece))))
                raise ValueError(
                    f"{owner}: the key {piece[place]!r} stands twice{where}; each sample needs its own key."
                )

    def _trimmed(self, capacity: int | None) -> KeyIndex:
        if len(self) == 0:
            raise ValueError(
                "KeyIndex: there is no key; give at least one, or KeyIndex(capacity=...) for an empty one."
            )
        wanted = max(len(self), capacity or 0)
        if wanted != self.capacity:
            self._resize(wanted)
        return self

    def grow(self, capacity: int) -> None:
        """Make room for more keys; for the time before :func:`samplewise.loaders.streams.keep` and the loader.

        Raises:
            ValueError: ``capacity`` is smaller than it was.
        """
        self._resize(integer("KeyIndex.grow", "capacity", capacity, self.capacity, MOST_KEYS))

    def _resize(self, capacity: int) -> None:
        with self._locked():
            old, digests = self._counts, self._digest_rows[: len(self)]
            self._control = shared_zeros((3,), torch.int64)
            self._allocate(capacity)
            self._counts[_CLEARED] = old[_CLEARED]
            for start in range(0, len(digests), PIECE):
                self._append(digests[start : start + PIECE])
            old[_RETIRED] = 1

    def merge_ranks(self) -> None:
        """Make all ranks' indexes equal: rank 0's keys, then the new ones of rank 1, and so on. Collective.

        For ranks that index their own shards each. Rows change, so it comes before :func:`keep` and the first loss.
        """
        (digests,) = gather_rows(self._digests[: len(self)].clone())
        capacity = self.capacity
        self._clear()
        for piece in digests.split(PIECE):
            self._add(piece.numpy(), may_grow=True)
        if self.capacity > capacity:
            self._trimmed(capacity)

    # --- keys and rows ------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """How many keys there is room for."""
        return len(self._digest_rows)

    def __len__(self) -> int:
        return int(self._counts[_COUNT])

    @property
    def cleared(self) -> int:
        """How many times other rows took the place of those that were here (a state was loaded)."""
        return int(self._counts[_CLEARED])

    def __contains__(self, key: Key) -> bool:
        return self.row(key) >= 0

    @property
    def fingerprint(self) -> str:
        """What no other index has: 32 hexadecimal digits of all keys and their order."""
        return blake2b(self._digest_rows[: len(self)].tobytes(), digest_size=16).hexdigest()

    def row(self, key: Key) -> int:
        """The row of one key, -1 where it is unknown. Takes about a microsecond."""
        return self._probe(*_WORDS.unpack(key_digest(key)))[0]

    def rows(self, keys: Iterable[Key]) -> IntArray:
        """The rows of many keys (n,): int64 (n,), -1 where unknown.

        Raises:
            TypeError: a key that is no str, bytes or int.
        """
        parts = [self._find(digests) for _, digests in digest_pieces("KeyIndex.rows", keys)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def add(self, keys: Iterable[Key]) -> IntArray:
        """The rows of many keys (n,): int64 (n,); those that are unknown get the next rows, in their order.

        Raises:
            TypeError: a key that is no str, bytes or int.
            RuntimeError: there is no room for all of them; of these keys none, or only the first pieces, were added.
        """
        parts = [self._add(digests) for _, digests in digest_pieces("KeyIndex.add", keys)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def row_or_new(self, key: Key) -> int:
        """The row of one key, which is added where it is unknown; the quick form of :meth:`add` for one key.

        Raises:
            RuntimeError: there is no room for it.
        """
        low, high = _WORDS.unpack(key_digest(key))
        with self._locked():  # another worker may have added it meanwhile
            row, slot = self._probe(low, high)
            if row < 0:
                row = len(self)
                self._check_room(1)
                self._digest_view[2 * row], self._digest_view[2 * row + 1] = low, high
                self._slot_view[slot] = row + 1  # from here on it is found, so its digest must be there already
                self._counts[_COUNT] = row + 1
        return row

    def _probe(self, low: int, high: int) -> tuple[int, int]:
        """Row of a digest, or -1, and the slot where the search ended."""
        slots, digests, mask = self._slot_view, self._digest_view, self._mask
        slot = low & mask
        while found := slots[slot]:
            if digests[2 * found - 2] == low and digests[2 * found - 1] == high:
                return found - 1, slot
            slot = (slot + 1) & mask
        return -1, slot

    def _find(self, digests: IntArray) -> IntArray:
        """Rows of digests (n, 2): int64 (n,), -1 where unknown."""
        rows = np.full(len(digests), -1, dtype=np.int64)
        left, slots = np.arange(len(digests)), digests[:, 0] & self._mask
        while left.size:
            found = self._slot_rows[slots]
            used = found > 0
            left, slots, found = left[used], slots[used], found[used] - 1
            same = (self._digest_rows[found] == digests[left]).all(axis=1)
            rows[left[same]] = found[same]
            left, slots = left[~same], (slots[~same] + 1) & self._mask
        return rows

    def _add(self, digests: IntArray, *, may_grow: bool = False) -> IntArray:
        rows = self._find(digests)
        if not (rows < 0).any():
            return rows
        if may_grow and len(self) + len(digests) > self.capacity:
            self._resize(min(max(2 * self.capacity, len(self) + len(digests)), MOST_KEYS))
        with self._locked():
            rows = self._find(digests)
            unknown = np.flatnonzero(rows < 0)
            new = unknown[_firsts(digests[unknown])]
            self._check_room(len(new))
            self._append(digests[new])
            rows[unknown] = self._find(digests[unknown])
        return rows

    def _append(self, digests: IntArray) -> None:
        """Give digests (n, 2), none of which is there yet, the next rows."""
        start, count = len(self), len(digests)
        self._digest_rows[start : start + count] = digests
        rows, slots = np.arange(start + 1, start + 1 + count, dtype=np.int32), digests[:, 0] & self._mask
        while rows.size:
            free = self._slot_rows[slots] == 0
            self._slot_rows[slots[free]] = rows[free]  # of several for one slot, the last one stays
            lost = self._slot_rows[slots] != rows
            rows, slots = rows[lost], (slots[lost] + 1) & self._mask
        self._counts[_COUNT] = start + count

    def _check_room(self, more: int) -> None:
        if self._counts[_RETIRED]:
            raise RuntimeError(
                "KeyIndex: it was grown after this worker was started, which cannot add keys to it any more; grow it "
                "before the loader is iterated, or make a new loader."
            )
        if len(self) + more > self.capacity:
            raise RuntimeError(
                f"KeyIndex(capacity={self.capacity}): it is full, a new key cannot be added; make it with a larger "
                f"capacity, or call grow(capacity) before the loader's workers start."
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            raise RuntimeError("KeyIndex: its lock is held by a worker that was killed; make a new index and loader.")
        try:
            yield
        finally:
            self._lock.release()

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A copy as ``version``, ``capacity`` and ``digests``, int64 (n, 2), by row; ``weights_only=True`` loads it."""
        return {"version": VERSION, "capacity": self.capacity, "digests": self._digests[: len(self)].clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved index, rows and all, in place of what is in this one.

        Raises:
            ValueError: the state is damaged, of another version, or has more keys than there is room for; nothing is
                changed then.
        """
        digests = _checked_digests(state)
        if len(digests) > self.capacity:
            raise ValueError(
                f"KeyIndex state: {len(digests)} keys were saved, this index has room for {self.capacity}; make it "
                f"with capacity={state['capacity']}."
            )
        self._clear()
        for start in range(0, len(digests), PIECE):
            self._append(digests[start : start + PIECE])

    def _clear(self) -> None:
        self._counts[_COUNT] = 0
        self._counts[_CLEARED] += 1
        self._slots.zero_()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to a file, 16 bytes a key; what stood there before stays whole until then."""
        temporary = Path(path).with_name(f"{Path(path).name}.{uuid4().hex}")
        try:
            torch.save(self.state_dict(), temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> KeyIndex:
        """The index that :meth:`save` wrote.

        Raises:
            ValueError: the file is damaged or of another version.
        """
        return cls._from_state(torch.load(path, weights_only=True, mmap=True))

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> KeyIndex:
        _checked_digests(state)
        index = cls(state["capacity"])
        index.load_state_dict(state)
        return index

    def __reduce__(self) -> Any:
        if context.get_spawning_popen() is None:  # a copy, for nobody else: it has memory of its own
            return self._from_state, (self.state_dict(),)
        return _attached, (self._lock, self._control, self._digests, self._slots)


def _attached(lock: Any, control: Tensor, digests: Tensor, slots: Tensor) -> KeyIndex:
    """The index in a spawned worker: the same memory."""
    index = KeyIndex.__new__(KeyIndex)
    index._lock, index._control, index._digests, index._slots = lock, control, digests, slots
    index._open()
    return index


def _firsts(digests: IntArray) -> IntArray:
    """Where each distinct digest of (n, 2) stands first, ascending."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable
    ordered, first = digests[order], np.ones(len(order), dtype=np.bool_)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return np.sort(order[first])


def _checked_digests(state: dict[str, Any]) -> IntArray:
    if state.get("version") != VERSION:
        raise ValueError(f"KeyIndex state: version {state.get('version')} was saved, this release reads {VERSION}.")
    digests = state.get("digests")
    if isinstance(digests, Tensor) and digests.dtype == torch.int64 and digests.ndim == 2 and "capacity" in state:
        rows: IntArray = digests.numpy()
        if rows.shape[1] == 2:
            return rows
    raise ValueError("KeyIndex state: it is damaged, or no index's.")
