"""The keys of a stream's samples: their digests, and how tar shards hold them."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from hashlib import blake2b
from itertools import islice
from operator import index as as_integer
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from samplewise.cuda_ext.checks import optional_import

Key: TypeAlias = str | bytes | int
IntArray: TypeAlias = NDArray[np.int64]
PIECE = 1 << 16  # keys handled at once: what stays in the cache

_STR, _BYTES, _INT = (blake2b(kind, digest_size=16) for kind in (b"s", b"b", b"i"))
_KEY_AND_SUFFIX = re.compile(r"((?:.*/|)[^.]+)[.][^/]*")
_META = re.compile(r"__[^/]*__($|/)")


def key_digest(key: Key) -> bytes:
    """128 bits of blake2b of a key and its kind, so that ``1``, ``"1"`` and ``b"1"`` are three keys.

    Raises:
        TypeError: the key is no str, bytes or int.
    """
    if isinstance(key, str):
        digest, text = _STR.copy(), key.encode("utf-8", "surrogatepass")
    elif isinstance(key, bytes):
        digest, text = _BYTES.copy(), key
    else:
        digest, text = _INT.copy(), b"%d" % _whole(key)
    digest.update(text)
    return digest.digest()


def _whole(key: Any) -> int:
    try:
        if not isinstance(key, bool):
            return as_integer(key)
    except TypeError:
        pass
    raise TypeError(f"KeyIndex: a key must be a str, bytes or int, not {type(key).__name__} ({key!r}).")


def digest_pieces(owner: str, keys: Iterable[Key]) -> Iterator[tuple[list[Key], IntArray]]:
    """At most ``PIECE`` keys at a time, and their digests, int64 (n, 2).

    Raises:
        TypeError: the keys are one str or bytes, or a set, or one of them is no key.
    """
    if isinstance(keys, str | bytes):
        raise TypeError(f"{owner}({keys!r}): this is one key, but an iterable of keys is needed; give [{keys!r}].")
    if isinstance(keys, set | frozenset):
        raise TypeError(
            f"{owner}: a set's order is another one in each process; give the keys in one that stays, sorted(keys)."
        )
    if isinstance(keys, np.ndarray | Tensor):
        keys = keys.tolist()
    iterator = iter(keys)
    while piece := list(islice(iterator, PIECE)):
        yield piece, np.frombuffer(b"".join([key_digest(key) for key in piece]), "<i8").reshape(-1, 2)


def expanded(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[str]:
    """The shards' paths; a text is expanded as webdataset does it (``"train-{000..099}.tar"``)."""
    if isinstance(paths, str):
        shardlists = optional_import("KeyIndex.from_shards", "webdataset.shardlists", "stream")
        return [str(path) for path in shardlists.expand_urls(paths)]
    if isinstance(paths, os.PathLike):
        return [os.fspath(paths)]
    return [os.fspath(path) for path in paths]


def shard_keys(path: str | os.PathLike[str]) -> Iterator[str]:
    """The ``__key__`` of each sample of a tar shard, in order, as webdataset groups its files.

    A sample is a run of files with the same path up to the first dot of their base name. A local file's payload is
    passed over, not read (where it is not compressed); other URLs are opened by webdataset.

    Raises:
        tarfile.ReadError: it is no tar file, or cut off.
    """
    path = os.fspath(path)
    with ExitStack() as stack:
        if ":" in path and not os.path.exists(path):
            gopen = optional_import("shard_keys", "webdataset.gopen", "stream")
            stream = stack.enter_context(gopen.gopen(path))
            tar = stack.enter_context(tarfile.open(fileobj=stream, mode="r|*"))
        else:
            tar = stack.enter_context(tarfile.open(path))
        last = None
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            found = _KEY_AND_SUFFIX.fullmatch(member.name) if member.isreg() else None
            if found is None or _META.match(member.name) or found[1] == last:
                continue
            last = found[1]
            yield last
