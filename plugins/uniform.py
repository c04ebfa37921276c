"""Uniform: every sample once an epoch, in random order. The baseline that any other method has to beat."""

from __future__ import annotations

import numpy as np

from samplewise.loaders import Plan, PlannedSampler


class Uniform(PlannedSampler):
    """All samples, each once, weight 1; no list of ids is stored.

    Args:
        size: N, the number of samples.
        **common: the options of every sampler, see :class:`samplewise.loaders.PlannedSampler`.
    """

    uses_losses = False
    plans_shares = True

    def plan(self, epoch: int, rng: np.random.Generator) -> Plan:
        """The whole data set."""
        return Plan(self.ledger.ids)
