"""The contract suite: every sampler that is registered, in every mode, keeps ``check_sampler``'s contract.

A registered sampler is found by itself. It needs a row in SETTINGS only if it cannot be built from its size, or has
modes that the contract should see.
"""

from importlib.metadata import entry_points
from inspect import signature

import numpy as np
import pytest

from samplewise.loaders import DistinctBatches, PlannedSampler
from samplewise.loaders.testing import check_sampler

SIZE = 97
LABELS = np.arange(SIZE) % 3
LENGTHS = [3, 1, 20, 9, 14, 2, 30, 18]  # SIZE in all
TRAJECTORIES = {"returns": [1, 5, 2, 9, 4, 4, 0, 3], "lengths": LENGTHS, "num_samples": 80}

SETTINGS = {
    "rs2": [
        {"ratio": 0.3},
        {"ratio": 0.3, "mode": "with_replacement"},
        {"ratio": 0.3, "mode": "stratified", "labels": LABELS},
        {"ratio": 0.3, "mode": "hash"},
    ],
    "infobatch": [
        {"epochs": 4},
        {"epochs": 3, "anneal_from": 0.5},
        {"epochs": 4, "quantiles": ((0.2, 0.25), (0.85, 0.5))},
        {"epochs": 4, "batch_loss": True},
    ],
    "seta": [{"epochs": 4}, {"epochs": 4, "groups": 5, "window": 0.5, "rounding": "paper", "revisit_every": 2}],
    "trajectories": [
        {**TRAJECTORIES, "first_obs": np.sin(LENGTHS), "mix": 0.7},
        {**TRAJECTORIES, "mode": "rw"},
        {**TRAJECTORIES, "mode": "top", "top": 0.3},
        {**TRAJECTORIES, "mode": "uniform", "unit": "trajectory"},
        {**TRAJECTORIES, "mode": "uniform", "priority": "loss_ema", "priority_beta": 1},
        {**TRAJECTORIES, "mode": "weights", "weights": LENGTHS, "priority": "loss_last", "mix": 0.9},
    ],
}
ARRANGED = {"arrange": DistinctBatches([[i // 3, SIZE + i % 30] for i in range(SIZE)], 7)}
COMMON = [
    {},
    {"epoch_length": 60},
    {"epoch_length": 150, "seed": 5},
    {"drop_last": True},
    {"shuffle": False},
    ARRANGED,
    {**ARRANGED, "epoch_length": 60},
]

samplers = {point.name: point for point in entry_points(group="samplewise.plugins")}


def test_the_methods_of_this_library_are_discovered():
    assert {"uniform", "rs2", "infobatch", "seta", "trajectories"} <= set(samplers)


def cases():
    """What keeps the contract; an arrangement, which knows nothing of modes, with the first one of each method."""
    for name in sorted(samplers):
        for number, settings in enumerate(SETTINGS.get(name, [{}])):
            for common in COMMON:
                if not number or "arrange" not in common:
                    mode = "-".join(settings) or "default"
                    yield pytest.param(name, settings, common, id=f"{name}-{number}-{mode}-{common}")


@pytest.mark.filterwarnings("ignore:DistinctBatches")  # small plans have no such order
@pytest.mark.parametrize(("name", "settings", "common"), list(cases()))
def test_contract(name, settings, common):
    kind = samplers[name].load()
    assert issubclass(kind, PlannedSampler)
    size = (SIZE,) if "size" in signature(kind).parameters else ()
    check_sampler(lambda: kind(*size, **settings, **common))
