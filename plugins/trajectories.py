"""Offline RL on data of mixed quality: transitions of the trajectories that went well are drawn more often.

Hong et al., "Harnessing Mixed Offline RL Datasets via Trajectory Weighting", ICLR 2023. The formulas, and what differs
from the public code, are in `trajectory_weights`; a draw takes a trajectory i from an alias table, with probability
T_i q_i / sum_j T_j q_j, then one of its T_i transitions uniformly. The paper's alpha is 0.2 for CQL, 0.1 for IQL and
TD3+BC. Priorities on top of it (`priorities`) make it prioritised replay, with mode "uniform" the published one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import inf
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from typing_extensions import Unpack, override

from samplewise.cuda_ext.checks import choice, integer, share
from samplewise.loaders import Plan, PlannedSampler, SamplerOptions
from samplewise.plugins import priorities as replay
from samplewise.plugins import trajectory_weights as formulas
from samplewise.plugins.alias import AliasTable
from samplewise.plugins.trajectory_data import Trajectories
from samplewise.plugins.weights import draw_with_replacement

Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Mode = Literal["rw", "aw", "top", "uniform", "weights"]
Unit = Literal["transition", "trajectory"]
Priority = Literal["loss_last", "loss_ema", "loss_mean", "score"]


class _Distribution:
    """How often each id is drawn, from the weights q (n,) of trajectories that have `counts` ids each."""

    def __init__(self, q: Float64Array, counts: IntArray, mix: float):
        self.counts = counts
        self.base = formulas.transition_probabilities(q, counts)
        self.probabilities = mix * self.base + (1 - mix) / counts.sum()
        self._table = AliasTable(self.probabilities * counts)
        self._offsets, self._widths = np.cumsum(counts) - counts, counts.astype(np.float64)

    def draw(self, count: int, rng: np.random.Generator) -> IntArray:
        lots = rng.random(2 * count)
        drawn, steps = self._table.at(lots[:count]), lots[count:]
        steps *= self._widths[drawn]  # below the width after rounding too
        ids = steps.astype(np.int64)
        ids += self._offsets[drawn]
        return ids


class TrajectorySampler(PlannedSampler):
    """Draws with replacement, by the weights of trajectories and, where wanted, by priorities of transitions.

    An id is a row of the transitions, trajectory i having T_i of them behind those of trajectory i - 1. For sequence
    models it stands for a window that begins or ends there: the sampler is the same, over a data set of windows. With
    ``unit="trajectory"`` an id is a whole trajectory, drawn with probability q_i / sum(q).

    The changed distribution is what is wanted, so that losses have no weights, except those of priorities. All ranks
    and workers, resumed or not, draw the same.

    Args:
        returns: G, undiscounted, real numbers (n,), finite.
        lengths: T, integers (n,), >= 1.
        first_obs: s_0, real numbers (n, ...), for mode "aw"; the others do not use it.
        num_samples: draws of a plan, on all ranks together.
        mode: q_i is exp(x_i / alpha), with x_i the min-max of returns ("rw") or of advantages over the value of s_0
            ("aw"), 1 for the best ``top`` and 0 for the others ("top"), 1 ("uniform"), or given ("weights").
        alpha: temperature, > 0.
        top: share of the trajectories, in (0, 1], those included that tie with the last of them.
        weights: q, (n,), finite and >= 0, not all 0: for mode "weights", and only there.
        clip_quantile: c, in [0, 0.5): returns or advantages are clipped to their quantiles c and 1 - c.
        ridge: of the value regression, >= 0, see `trajectory_weights.state_values`.
        folds: of its cross-fitting, >= 1, the parts drawn by ``seed``; ``ridge=0, folds=1`` is the paper's, for many
            trajectories a feature.
        mix: defensive share: P = mix P_q + (1 - mix) / N, in [0, 1].
        unit: "transition" or "trajectory".
        priority: column of the ledger, "loss_last", "loss_ema", "loss_mean" or "score" (temporal-difference errors, as
            ``observe(ids, losses, scores=errors)`` records them), whose magnitude makes an id's priority; ids that
            were not seen yet (or only with losses that are not finite) have the largest. They are read once a plan,
            which draws as if they stood still: keep ``num_samples`` short where they move fast.
        priority_alpha: how much priorities count, in [0, 1]; with 0 they do not.
        priority_beta: how much of that the losses' weights make up for, in [0, 1], or a function that gives it for the
            number of a plan.
        **common: the options of every sampler, see :class:`samplewise.loaders.SamplerOptions`. ``fingerprint`` is that
            of returns and lengths unless it is given.

    Attributes:
        trajectory_weights: float64 (n,), q with the defensive share in it, the largest being 1.
        probabilities: float64 (n,), P(i, t), of each id of trajectory i, priorities aside.
        statistics: what `trajectory_weights.summary` says, and in mode "aw" ``value_r2``, the share of the returns'
            variance that the first observations explain (of trajectories held out, if ``folds`` > 1): at or below 0
            they say nothing, and mode "rw" is the better choice.

    Raises:
        TypeError: for an argument that is no number.
        ValueError: for one outside its range, returns that are not finite, trajectories without transitions, lengths
            that differ, or first_obs or weights that the mode lacks.
    """

    def __init__(
        self,
        *,
        returns: Any,
        lengths: Any,
        first_obs: Any = None,
        num_samples: int,
        mode: Mode = "aw",
        alpha: float = 0.1,
        top: float = 0.1,
        weights: Any = None,
        clip_quantile: float = 0.0,
        ridge: float = 1.0,
        folds: int = 5,
        mix: float = 1.0,
        unit: Unit = "transition",
        priority: Priority | None = None,
        priority_alpha: float = 0.6,
        priority_beta: float | Callable[[int], float] = 0.4,
        **common: Unpack[SamplerOptions],
    ):
        owner = type(self).__name__
        choice(owner, "mode", mode, *get_args(Mode))
        choice(owner, "unit", unit, *get_args(Unit))
        if priority is not None:
            choice(owner, "priority", priority, *get_args(Priority))
        self.mode, self.unit, self.priority = mode, unit, priority
        self.draws = integer(owner, "num_samples", num_samples, 1, what="the draws of a plan")
        self.alpha = share(owner, "alpha", alpha, high=inf, ends="()", what="the temperature")
        self.top = share(owner, "top", top, ends="(]", what="the share of the trajectories that are drawn")
        self.clip_quantile = share(owner, "clip_quantile", clip_quantile, high=0.5, ends="[)")
        self.ridge = share(owner, "ridge", ridge, high=inf, ends="[)")
        self.folds = integer(owner, "folds", folds, 1)
        self.mix = share(owner, "mix", mix, what="the weights' share, the rest being uniform,")
        self.priority_alpha = share(owner, "priority_alpha", priority_alpha)
        self.priority_beta = priority_beta
        if not callable(priority_beta):
            share(owner, "priority_beta", priority_beta)
        self._data = Trajectories.checked(owner, mode, returns, lengths, first_obs, weights)
        self._is_own_fingerprint = not common.get("fingerprint")
        if self._is_own_fingerprint:
            common["fingerprint"] = self._data.fingerprint(unit)
        super().__init__(int(self._counts(self._data).sum()), **common)
        self.uses_losses = priority is not None
        self._take(self._data, *self._weighed(self._data))

    def plan(self, epoch: int, rng: np.random.Generator) -> Plan:
        """``num_samples`` draws; with priorities, those that the ledger has now."""
        if self.priority is None:
            return Plan(self.draw(self.draws, rng))
        beta = self.priority_beta
        if callable(beta):
            beta = share(type(self).__name__, f"priority_beta({epoch})", beta(epoch))
        base, target = (np.repeat(each, self._now.counts) for each in (self._now.base, self.probabilities))
        values, seen = self.ledger.column(self.priority).cpu().numpy(), self.ledger.seen.cpu().numpy()
        p = replay.priorities(values, seen)
        if seen.any() and np.isnan(values).all():
            self._warn(
                f"no {self.priority!r} was recorded with the losses, so that priorities are equal; call "
                f"observe(ids, losses, scores=errors)."
            )
        drawn = replay.prioritised(base, p, self.priority_alpha, mix=self.mix)
        ids = draw_with_replacement(drawn, self.draws, rng)
        rng.shuffle(ids)
        return Plan(ids, replay.importance_weights(target, drawn, ids, beta))

    def draw(self, count: int, rng: np.random.Generator) -> IntArray:
        """Independent draws by the weights of trajectories, priorities aside: int64 (count,), in constant time each."""
        return self._now.draw(count, rng)

    @override
    def grow(self, size: int) -> None:
        """Not without the new trajectories' returns, see `extend`."""
        owner = type(self).__name__
        raise ValueError(f"{owner}.grow(size={size}): what is new has returns and lengths; call {owner}.extend.")

    def extend(self, *, returns: Any, lengths: Any, first_obs: Any = None, weights: Any = None) -> None:
        """Append trajectories, a whole lot at once: all weights are made anew, and count from the next plan on.

        What is new is unseen, and so of the largest priority. To go on from a state that was saved before the data
        grew, make the sampler as it was then, load the state, and extend.

        Args:
            returns: of the m new ones, as when the sampler was made, like all that follows.
            lengths: integers (m,).
            first_obs: (m, ...).
            weights: (m,), on the scale of the first ones.

        Raises:
            TypeError: as the constructor.
            ValueError: as the constructor; nothing is changed then.
        """
        owner = f"{type(self).__name__}.extend"
        more = Trajectories.checked(owner, self.mode, returns, lengths, first_obs, weights)
        data = self._data.joined(owner, more)
        weighed = self._weighed(data)
        super().grow(int(self._counts(data).sum()))  # makes the current plan from what was, if need be
        self._take(data, *weighed)
        if self._is_own_fingerprint:
            self.ledger.fingerprint = data.fingerprint(self.unit)

    def _counts(self, data: Trajectories) -> IntArray:
        """Ids of each trajectory: int64 (n,)."""
        return data.lengths if self.unit == "transition" else np.ones_like(data.lengths)

    def _take(self, data: Trajectories, q: Float64Array, fit: dict[str, float]) -> None:
        self._data = data
        self._now = _Distribution(q, self._counts(data), self.mix)
        self.probabilities = self._now.probabilities
        self.trajectory_weights = self.probabilities / self.probabilities.max()
        self.statistics = {**formulas.summary(self.trajectory_weights, data.returns), **fit}

    def _weighed(self, data: Trajectories) -> tuple[Float64Array, dict[str, float]]:
        """The weights q, float64 (n,), and what is to be said of the value regression."""
        if data.weights is not None:
            if not data.weights.any():
                raise ValueError(f"{type(self).__name__}(weights=...): at least one must be positive; all are 0.")
            return data.weights, {}
        ones, fit = np.ones(data.returns.size), {}
        if self.mode == "uniform":
            return ones, {}
        values, what = data.returns, "returns"
        if data.first_obs is not None:
            count, width = len(data.first_obs), int(np.any(data.first_obs != data.first_obs[0], axis=0).sum())
            if self._is_exact(count, width):
                self._warn(
                    f"{count} trajectories are too few for the value of {width} features, so that mode 'rw' takes its "
                    f"place; set ridge > 0 and folds > 1, or give fewer features."
                )
            else:
                expected = formulas.state_values(
                    values, data.first_obs, ridge=self.ridge, folds=self.folds, seed=self.seed
                )
                fit = {"value_r2": formulas.value_r2(values, expected)}
                if fit["value_r2"] < -1:
                    self._warn(
                        f"the first observations foretell the returns worse than their mean does (value_r2 = "
                        f"{fit['value_r2']:.2g}), so that advantages are mostly noise; use mode 'rw' or a larger ridge."
                    )
                values, what = formulas.advantages(values, expected), "advantages"
        clip = 0.0 if self.mode == "top" else self.clip_quantile
        if not formulas.min_max(values, clip_quantile=clip).any():
            between = f" between their quantiles {clip:g} and {1 - clip:g}" if clip else ""
            if ones.size > 1:
                self._warn(f"all {what} are equal{between}, so that none is better than another: draws are uniform.")
            return ones, fit
        if self.mode == "top":
            return formulas.top_weights(values, self.top), fit
        return formulas.exponential_weights(values, self.alpha, clip_quantile=clip), fit

    def _is_exact(self, count: int, width: int) -> bool:
        """Whether the value regression would go through all returns, so that advantages were noise."""
        folds = min(self.folds, count)
        fitted = count - count // folds if folds > 1 else count
        return count > 1 and fitted <= width + 1 and (folds == 1 or self.ridge == 0)

    def _warn(self, what: str) -> None:
        warnings.warn(f"{type(self).__name__}(mode={self.mode!r}): {what}", stacklevel=4)
