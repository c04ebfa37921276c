"""Seven trajectories, and every mode of drawing them; importable as ``trajectories_support``."""

import numpy as np

RETURNS = np.array([3.0, 10.0, -2.0, 7.0, 10.0, 0.0, 5.0])
LENGTHS = np.array([4, 1, 30, 2, 6, 50, 7])
FIRST = np.random.default_rng(0).normal(size=(7, 2))
GIVEN = np.array([0.0, 2.0, 0.5, 0.0, 1.0, 0.0, 4.0])
MODES = {
    "rw": {"mode": "rw", "alpha": 0.4},
    "aw": {"mode": "aw", "alpha": 0.4, "first_obs": FIRST},
    "aw of the paper": {"mode": "aw", "alpha": 0.4, "first_obs": FIRST, "ridge": 0, "folds": 1},
    "top": {"mode": "top", "top": 0.2},
    "uniform": {"mode": "uniform"},
    "weights": {"mode": "weights", "weights": GIVEN},
    "clipped": {"mode": "rw", "alpha": 0.2, "clip_quantile": 0.2},
}
