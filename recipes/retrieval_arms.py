"""What the retrieval recipe compares: where the negatives of a query come from, and who chooses the queries."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from samplewise.loaders import PlannedSampler
from samplewise.loaders.arrange import DistinctBatches
from samplewise.loaders.negatives import known_positives
from samplewise.loaders.ragged import Ragged
from samplewise.plugins import RS2, InfoBatch, SeTa, Uniform, candidates
from samplewise.plugins.pools import bm25_candidates
from samplewise.plugins.star import star_loss
from samplewise.recipes.corpus import Collection

if TYPE_CHECKING:
    from samplewise.recipes.retrieval import RetrievalOptions


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: for files.
        label: for people.
        negatives: of each query's own: none, random documents, mined with the pretrained encoder (or BM25), or mined
            anew while the encoder learns.
        in_batch: whether the documents of the other queries are negatives too.
        adore: whether STAR is followed by training of the query encoder alone.
        softmax: whether the loss is a softmax over the documents of the batch, not STAR's over pairs.
        rs2: whether the queries are chosen by RS2, whatever the sampler of the other arms.
        trained: False for the pretrained encoder as it is.
    """

    name: str
    label: str
    negatives: Literal["none", "random", "mined", "bm25", "refreshed"] = "none"
    in_batch: bool = True
    adore: bool = False
    softmax: bool = False
    rs2: bool = False
    trained: bool = True

    @property
    def colour(self) -> int:
        """Its number in the plots."""
        return list(ARMS).index(self.name)

    def losses(self, queries: Tensor, documents: Tensor, batch: dict[str, Any], options: "RetrievalOptions") -> Tensor:
        """The loss, float32 `(B,)`, with this arm's negatives.

        Args:
            queries: `(B, E)`.
            documents: `(B + B n, E)`: the positives, then the negatives of each query.
            batch: of `CollateRetrieval`.
            options: of the recipe.
        """
        if self.softmax:
            return softmax_losses(queries, documents, batch, options.temperature)
        size, negatives = len(queries), batch["negative_ids"]
        return star_loss(
            queries,
            documents[:size],
            documents[size:].unflatten(0, negatives.shape) if negatives.numel() else None,
            positive_ids=batch["positive_ids"],
            negative_ids=negatives if negatives.numel() else None,
            known=batch["positives"],
            pooling=options.pooling,
            alpha=options.alpha if self.in_batch and negatives.numel() else float(self.in_batch),
            temperature=options.temperature,
            reduction="none",
        )


ARMS = {
    arm.name: arm
    for arm in (
        Arm("zero_shot", "Pretrained", trained=False),
        Arm("random", "Random negatives", "random", in_batch=False),
        Arm("in_batch", "In-batch negatives"),
        Arm("in_batch_random", "In-batch and random", "random"),
        Arm("static_hard", "Mined negatives only", "mined", in_batch=False),
        Arm("star", "STAR: in-batch and mined", "mined"),
        Arm("adore", "ADORE after STAR", "mined", adore=True),
        Arm("star_rs2", "STAR, queries by RS2", "mined", rs2=True),
        Arm("star_refresh", "STAR, mined anew", "refreshed"),
        Arm("bm25_hard", "In-batch and BM25", "bm25"),
        Arm("in_batch_softmax", "In-batch, softmax", softmax=True),
        Arm("star_softmax", "In-batch and mined, softmax", "mined", softmax=True),
    )
}


def softmax_losses(queries: Tensor, documents: Tensor, batch: dict[str, Any], temperature: float) -> Tensor:
    """Cross-entropy of each query's own document among all of the batch that are not relevant to it: float32 `(B,)`.

    Arguments as for `Arm.losses`. It is what most trainers use: beside STAR's loss, in which all pairs weigh the same,
    it looks at the hardest ones.
    """
    own, ids = batch["positive_ids"], torch.cat([batch["positive_ids"], batch["negative_ids"].flatten()])
    masked = known_positives(torch.cat([own[:, None], batch["positives"]], dim=1), ids)
    masked.fill_diagonal_(False)
    with torch.autocast(queries.device.type, enabled=False):
        scores = queries @ documents.T / temperature
        target = torch.arange(len(queries), device=queries.device)
        return F.cross_entropy(scores.masked_fill(masked, -torch.inf), target, reduction="none")


def make_sampler(arm: Arm, positives: Ragged, steps: int, seed: int, options: "RetrievalOptions") -> PlannedSampler:
    """What chooses the queries; no two of a batch share a positive where that can be."""
    size = len(positives)
    epochs = max(1, -(-steps * options.batch_size // size))
    common: dict[str, Any] = {"seed": seed, "arrange": DistinctBatches(positives, options.batch_size)}
    name = "rs2" if arm.rs2 else options.sampler
    if name == "rs2":
        return RS2(size, ratio=options.rs2_ratio, **common)
    if name == "infobatch":
        return InfoBatch(size, epochs=epochs, **common)
    if name == "seta":
        return SeTa(size, epochs=epochs, **common)
    return Uniform(size, **common)


def bm25_negatives(collection: Collection, depth: int) -> np.ndarray:
    """The documents that BM25 ranks highest for each training query and that are not relevant: int64 `(Q, depth)`."""
    train, size = collection.train, len(collection.documents)
    most = min(size, depth + int(train.positives.lengths.max()))
    ids, scores = bm25_candidates(collection.documents, train.texts, most, progress=False)
    ids, _ = candidates.keep(ids, scores, (ids >= 0) & ~candidates.is_in(ids, train.positives), depth)
    candidates.pad(ids, train.positives, size, 0, np.arange(len(ids)))
    return ids
