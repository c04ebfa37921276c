"""The keyed hash under every counter-based draw: what it gives depends on (seed, value) alone, on any machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 finaliser: a bijection of uint64 whose output bits all depend on all input bits."""
    mixed: NDArray[np.uint64] = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def hash64(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Keyed hash of uint64 values: ``mix64(mix64(seed) + (value + 1) * golden)``, the splitmix64 stream of the key."""
    key = mix64(np.array([seed & _MASK], dtype=np.uint64))
    return mix64(key + (values + np.uint64(1)) * np.uint64(_GOLDEN))
