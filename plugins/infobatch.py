"""InfoBatch: leave out at random some of the samples that are already learnt, and weigh the others up for them.

Qin et al., "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning", ICLR 2024. With l_i the latest
loss of sample i, mu the mean over the seen samples, prune ratio r, E epochs and anneal_from delta, in epoch e:

    e < delta E:   l_i < mu           kept with probability 1 - r, weight 1 / (1 - r)
                   l_i >= mu, unseen  kept, weight 1
    e >= delta E:  all kept, weight 1

so that the expected sum of weight * loss over a plan is the sum over all samples. Quantile form: the losses below
quantile q_1 are kept with ratio c_1, those from there to q_2 with c_2, ..., the rest surely; each weighs 1 / c.

What differs from the public code: losses that are not finite never enter the mean; "unseen" is no magic loss value; the
draw does not depend on how many samples stand below the mean. Batch-loss fallback (BLS, CVPR 2026), for models that
give one scalar a batch: s_i <- a s_i + (1 - a) L_batch for the ids of the batch, a = 0.7, and s_i takes l_i's place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import Unpack

from samplewise.cuda_ext.checks import integer, share
from samplewise.cuda_ext.totals import Totals
from samplewise.loaders import Plan, PlannedSampler, SamplerOptions

Quantiles = Sequence[tuple[float, float]]
PAPER_QUANTILES: Quantiles = ((0.20, 0.25), (0.85, 0.5))
BATCH_LOSS_DECAY = 0.7


def infobatch_keep(
    losses: npt.NDArray[np.float32],
    rng: np.random.Generator,
    *,
    prune: float = 0.5,
    quantiles: Quantiles | None = None,
    totals: Totals | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Draw one epoch's samples and their weights.

    Args:
        losses: float32 (N,), NaN where unseen.
        rng: the generator.
        prune: probability r of leaving out a sample whose loss is strictly below the mean; not used with quantiles.
        quantiles: (upper quantile, keep ratio) pairs, ascending, in place of the mean.
        totals: finds the mean or the quantiles, where the losses are one rank's share of all (`ShardedLedger.totals`);
            the ids are places in the share then.

    Returns:
        ids int64 (k,), ascending, and weights float32 (k,): 1 / keep ratio for those that could have been left out,
        otherwise 1.
    """
    losses = np.asarray(losses, dtype=np.float32)
    bounds, ratios = _loss_bounds(losses, prune, quantiles, totals or Totals())
    lots = rng.integers(0, 1 << 32, size=losses.size, dtype=np.uint32)
    drop = np.zeros(losses.size, dtype=np.bool_)
    levels = []
    lower = np.float32(-np.inf)
    for bound, ratio in zip(bounds, ratios, strict=True):
        level = losses < bound  # False for NaN, so that unseen samples are in no level
        if lower > -np.inf:
            level &= losses >= lower
        levels.append(level)
        if ratio < 1:
            drop |= level & (lots >= min(round(ratio * 2**32), 2**32 - 1))
        lower = bound
    ids = np.flatnonzero(~drop)
    weights = np.ones(ids.size, dtype=np.float32)
    for level, ratio in zip(levels, ratios, strict=True):
        weights[level[ids]] = 1 / ratio
    return ids, weights


def _loss_bounds(
    losses: npt.NDArray[np.float32], prune: float, quantiles: Quantiles | None, totals: Totals
) -> tuple[npt.NDArray[np.float32], list[float]]:
    """Upper loss bound of each level, float32, and its keep ratio. Float32: equal losses are never below their mean."""
    count = totals.total(int(np.count_nonzero(np.isfinite(losses))))
    if count == 0:
        return np.empty(0, dtype=np.float32), []
    values = torch.from_numpy(losses)
    if quantiles is None:
        return np.array([totals.mean(values)], dtype=np.float32), [1 - prune]
    ranks = [int(quantile * count) for quantile, _ in quantiles]
    return totals.order_statistics(values, ranks), [ratio for _, ratio in quantiles]


class InfoBatch(PlannedSampler):
    """Unbiased dynamic pruning of the samples with a loss below the mean.

    Args:
        size: N, the number of samples.
        epochs: E, the epochs of the whole training, >= 1.
        prune: r, probability of leaving out a sample below the mean, in [0, 1).
        anneal_from: delta, share of the epochs after which everything is trained on, in [0, 1].
        quantiles: (upper quantile, keep ratio) pairs in place of the mean, quantiles ascending in (0, 1), keep ratios
            in (0, 1]; the paper's are `PAPER_QUANTILES`.
        batch_loss: `observe` also takes a scalar, the batch's loss, and plans read its moving average per sample
            (decay 0.7 unless `ema` is given) in place of the latest loss.
        **common: the options of every sampler, see :class:`samplewise.loaders.PlannedSampler`.

    Raises:
        ValueError: for an argument outside its range.
    """

    plans_shares = True

    def __init__(
        self,
        size: int,
        *,
        epochs: int,
        prune: float = 0.5,
        anneal_from: float = 0.875,
        quantiles: Quantiles | None = None,
        batch_loss: bool = False,
        **common: Unpack[SamplerOptions],
    ):
        owner = type(self).__name__
        epochs = integer(owner, "epochs", epochs, 1, what="the length of the whole training")
        prune = share(owner, "prune", prune, ends="[)", what="the probability of leaving out a sample below the mean")
        anneal_from = share(owner, "anneal_from", anneal_from, what="the share of the epochs before all are trained on")
        if not isinstance(batch_loss, bool):
            raise TypeError(f"{owner}(batch_loss={batch_loss!r}): batch_loss must be True or False.")
        checked = None if quantiles is None else _check_quantiles(quantiles)
        if batch_loss:
            common.setdefault("ema", BATCH_LOSS_DECAY)
        super().__init__(size, **common)
        self.epochs = epochs
        self.prune = prune
        self.anneal_from = anneal_from
        self.quantiles = checked
        self.batch_loss = batch_loss
        self.accepts_batch_loss = batch_loss

    def plan(self, epoch: int, rng: np.random.Generator) -> Plan:
        """Everything while nothing is seen and from delta E on; otherwise the unbiased draw."""
        if self.epoch >= round(self.anneal_from * self.epochs, 9):
            return Plan(self.ledger.ids)
        losses = self.ledger.column("loss_ema" if self.batch_loss else "loss_last").cpu().numpy()
        totals = self.ledger.totals
        if totals.total(not np.isnan(losses).all()) == 0:
            return Plan(self.ledger.ids)
        rows, weights = infobatch_keep(losses, rng, prune=self.prune, quantiles=self.quantiles, totals=totals)
        return Plan(self.ledger.ids_of(rows), weights)


def _check_quantiles(quantiles: Quantiles) -> Quantiles:
    try:
        pairs = tuple((float(quantile), float(ratio)) for quantile, ratio in quantiles)
    except (TypeError, ValueError):
        pairs = ()
    bounds = [quantile for quantile, _ in pairs]
    ascending = all(low < high for low, high in zip([0.0, *bounds], [*bounds, 1.0], strict=True))
    if not (pairs and ascending and all(0 < ratio <= 1 for _, ratio in pairs)):
        raise ValueError(
            f"InfoBatch(quantiles={quantiles}): quantiles are (upper quantile, keep ratio) pairs, the quantiles "
            f"ascending and in (0, 1), the ratios in (0, 1]; e.g. {PAPER_QUANTILES}"
        )
    return pairs
