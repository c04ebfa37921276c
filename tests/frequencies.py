"""Whether draws come up as often as they should; importable as ``frequencies``."""

import numpy as np
from scipy.stats import chisquare


def assert_drawn_by(ids, probabilities):
    """Draws (k,) against probabilities (N,), which may be unscaled: never the impossible, and p > 1e-4 in chi-square.

    Items that should come up fewer than 5 times make one cell together.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    hits, expected = np.bincount(ids, minlength=p.size), len(ids) * p / p.sum()
    assert hits.size == p.size
    assert not hits[p == 0].any()
    often = expected >= 5
    rest = [hits[~often].sum()], [expected[~often].sum()]
    if rest[1][0] < 5:  # too few for a cell of their own: with the rarest of the others
        often[np.argmin(np.where(often, expected, np.inf))] = False
        rest = [hits[~often].sum()], [expected[~often].sum()]
    observed, wanted = np.append(hits[often], rest[0]), np.append(expected[often], rest[1])
    assert observed.size == 1 or chisquare(observed, wanted).pvalue > 1e-4
