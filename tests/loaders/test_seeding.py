import itertools

import numpy as np
import pytest

from samplewise.loaders.seeding import derive, generator

KEYS = [(), (0,), (0, 0), (1,), ("plan",), ("plan", 0), (0, "plan"), ("order",), (2**32,), (5, "plan")]


def test_keys_never_collide():
    values = [derive(seed, *key) for seed in (0, 1, 3, 2**32, 2**32 + 1) for key in KEYS]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 2**63 for value in values)


@pytest.mark.parametrize("key", KEYS)
def test_a_generator_depends_on_seed_and_key_alone(key):
    assert generator(7, *key).random() == generator(7, *key).random()
    assert generator(7, *key).random() != generator(8, *key).random()


def test_generators_of_different_purposes_are_uncorrelated():
    """The correlation of n independent uniform pairs is 0 +- 1 / sqrt(n)."""
    streams = [generator(0, epoch, purpose).random(10_000) for epoch in (0, 1) for purpose in ("plan", "order")]
    for one, other in itertools.combinations(streams, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / 100
