"""Random generators of our own, keyed by (seed, epoch, purpose): the global ones are never touched."""

from __future__ import annotations

from zlib import crc32

import numpy as np


def generator(seed: int, *key: int | str) -> np.random.Generator:
    """A generator that depends on nothing but ``seed`` and ``key``, e.g. ``generator(seed, epoch, "plan")``."""
    return np.random.default_rng(_sequence(seed, key))


def derive(seed: int, *key: int | str) -> int:
    """A 63-bit integer that depends on nothing but ``seed`` and ``key``: the key of an op such as ``permutation``."""
    return int(_sequence(seed, key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _sequence(seed: int, key: tuple[int | str, ...]) -> np.random.SeedSequence:
    words = tuple(crc32(part.encode()) if isinstance(part, str) else part for part in key)
    return np.random.SeedSequence(seed, spawn_key=words)  # as entropy they could collide: numpy pads it with zeros
