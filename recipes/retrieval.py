"""Dense retrieval with and without hard negatives: what mining gives on real judgements, and where it gives nothing.

    python -m samplewise.recipes.retrieval           # ICD-10-CM, 3 seeds, about half an hour on 2 CPU cores
    samplewise run retrieval --data DIR --model NAME --accelerator gpu --steps 2000 --batch_size 256

Fine-tunes a pretrained sentence encoder with each kind of negatives (random documents, the other queries' documents,
mined ones, both: STAR; and ADORE after STAR) from the same weights, for as many optimizer steps each, seed by seed, and
ranks all documents for queries that were held out. Writes `results.json`, `runs.csv`, `summary.csv`, `report.html`,
`plots/*.png`, seed 0's rankings as TREC run files, and the mined negatives as a table and as `triplets.jsonl` (which
`datasets` reads and sentence-transformers trains on) into `--out`, and prints a table: nDCG@10, MRR@10 and Recall@100
(mean, sd), seconds of training, with encoding and mining apart.

`BiEncoder` and `train` are an ordinary training script: delete the lines marked `# samplewise` and it still is one,
with in-batch negatives.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from samplewise.callbacks import SamplingCallback  # samplewise
from samplewise.callbacks.negatives import RefreshHardNegatives
from samplewise.loaders import collate_with_ids, with_ids  # samplewise
from samplewise.loaders.negatives import CollateRetrieval, RetrievalDataset  # samplewise
from samplewise.plugins.adore import AdoreLoss
from samplewise.recipes.common import Rule, check_options, surroundings
from samplewise.recipes.corpus import Collection
from samplewise.recipes.encoder import Encoder, Tokenizer
from samplewise.recipes.fitting import fit, warmed_adamw
from samplewise.recipes.progress import Bars
from samplewise.recipes.retrieval_arms import ARMS, Arm
from samplewise.recipes.retrieval_results import write_results
from samplewise.recipes.retrieval_runs import Comparison

Name = Literal[
    "random", "in_batch", "in_batch_softmax", "static_hard", "star", "star_softmax", "adore",
    "in_batch_random", "star_rs2", "star_refresh", "bm25_hard",
]  # fmt: skip
DEFAULT_ARMS: tuple[Name, ...] = (
    "random", "in_batch", "in_batch_softmax", "static_hard", "star", "star_softmax", "adore",
)  # fmt: skip


@dataclass
class RetrievalOptions:
    """What to compare, on what, and how.

    Args:
        data: icd10, or a folder with corpus.jsonl, queries.jsonl and qrels/{train,test}.tsv (the layout of BEIR)
        model: all-minilm-l6-v2, a folder that transformers reads, or a hub name
        documents: of icd10, so many codes: the 6,805 with queries in any case, then siblings of them; 0 takes all
            46,881
        arms: what is compared, and with the pretrained encoder as it is; the two of softmax have the loss of most
            trainers in place of STAR's. Others are in_batch_random (random documents beside the batch's: more of them,
            not harder ones), star_refresh (mined anew as it learns), bm25_hard, and star_rs2, which differs from star
            only where the steps are more than an epoch
        steps: optimizer steps of each arm
        seeds: number of repeats; repeat s uses seed s for the order of the queries and for what is drawn
        batch_size: queries in a batch
        negatives: documents of its own that each query gets in a step, mined or random
        depth: they are drawn from so many mined ones, the hardest
        skip: hardest documents that are passed over when mining: the likeliest to be relevant, though not judged so
        margin: least distance of a mined document's similarity from that of the relevant one, null for none
        pooling: pairs (all weigh the same) or split (in-batch and own negatives have a mean each), see star_loss
        alpha: weight of the in-batch negatives beside mined ones
        temperature: what cosine similarities are divided by
        lr: highest learning rate, of AdamW with gradients clipped at norm 1; up over 10 % of the steps, then down to 0
        adore_share: ADORE: share of the steps that train the query encoder alone, after STAR; in (0, 1)
        adore_lr: ADORE: highest learning rate of those
        adore_top_k: ADORE: documents retrieved in each step
        refresh: star_refresh: steps between two minings
        sampler: what chooses the queries, in all arms; all but uniform need steps for more than one epoch
        rs2_ratio: RS2: share of the queries in an epoch, in (0, 1]
        max_length: longer texts are cut, in tokens
        evaluate: test, or validation to try settings out
        accelerator: cpu, gpu or mps
        precision: as Lightning calls it
        workers: processes that load data
        threads: threads of torch on the CPU; 0 leaves torch's choice
        out: folder for the results
    """

    data: str = "icd10"
    model: str = "all-minilm-l6-v2"
    documents: int = 10_000
    arms: list[Name] = field(default_factory=lambda: list(DEFAULT_ARMS))
    steps: int = 80
    seeds: int = 3
    batch_size: int = 32
    negatives: int = 2
    depth: int = 10
    skip: int = 0
    margin: float | None = None
    pooling: Literal["pairs", "split"] = "pairs"
    alpha: float = 1.0
    temperature: float = 0.05
    lr: float = 1e-4
    adore_share: float = 0.25
    adore_lr: float = 5e-5
    adore_top_k: int = 200
    refresh: int = 50
    sampler: Literal["uniform", "rs2", "infobatch", "seta"] = "uniform"
    rs2_ratio: float = 0.1
    max_length: int = 32
    evaluate: Literal["test", "validation"] = "test"
    accelerator: Literal["cpu", "gpu", "mps"] = "cpu"
    precision: Literal["32-true", "bf16-mixed"] = "bf16-mixed"
    workers: int = 0
    threads: int = 0
    out: str = "runs/retrieval"

    def validate(self) -> None:
        """Check all options.

        Raises:
            ValueError: one line for each option that breaks its rule.
        """
        rules: list[Rule] = [
            ("documents", self.documents >= 0, "is a number of documents, 0 for all"),
            ("arms", bool(self.arms), f"needs at least one of {', '.join(ARMS)}"),
            ("arms", len(set(self.arms)) == len(self.arms), "names an arm twice"),
            ("arms", set(self.arms) <= set(get_args(Name)), f"there are {', '.join(ARMS)}"),
            ("steps", self.steps >= 2, "must be >= 2"),
            ("batch_size", self.batch_size >= 2, "must be >= 2: the other queries' documents are negatives"),
            ("negatives", 1 <= self.negatives <= self.depth, "must be in [1, depth]"),
            ("skip", self.skip >= 0, "is a number of documents and must be >= 0"),
            ("margin", self.margin is None or self.margin >= 0, "must be >= 0, or null"),
            ("alpha", self.alpha > 0, "must be > 0; the arm static_hard has no in-batch negatives"),
            ("temperature", self.temperature > 0, "must be > 0"),
            ("lr", self.lr > 0, "must be > 0"),
            ("adore_share", 0 < self.adore_share < 1, "is a share of the steps and must be in (0, 1)"),
            ("adore_lr", self.adore_lr > 0, "must be > 0"),
            ("adore_top_k", self.adore_top_k >= 1, "must be >= 1"),
            ("refresh", self.refresh >= 1, "must be >= 1"),
            ("rs2_ratio", 0 < self.rs2_ratio <= 1, "is the share of the queries in an epoch and must be in (0, 1]"),
            ("max_length", self.max_length >= 3, "must be >= 3"),
            ("workers", self.workers >= 0, "must be >= 0"),
            ("threads", self.threads >= 0, "must be >= 0; 0 leaves torch's choice"),
        ]
        check_options(self, rules)

    @property
    def device(self) -> str:
        """As torch calls it."""
        return "cuda" if self.accelerator == "gpu" else self.accelerator

    @property
    def mining(self) -> dict[str, Any]:
        """The filters of every mining."""
        return {"similarity": "cosine", "margin": self.margin, "ranks": (self.skip, None)}


class BiEncoder(LightningModule):
    """One encoder for queries and documents, trained to tell each query's document from those of the batch."""

    def __init__(self, encoder: Encoder, options: RetrievalOptions, steps: int, arm: Any, sampler: Any):
        super().__init__()
        self.encoder, self.options, self.steps, self.lr = encoder, options, steps, options.lr
        self.arm, self.sampler = arm, sampler  # samplewise

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        queries, documents = self.encoder(batch["queries"]), self.encoder(batch["documents"])
        scores = queries @ documents[: len(queries)].T / self.options.temperature
        loss: Tensor = F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))
        losses = self.arm.losses(queries, documents, batch, self.options)  # samplewise
        loss = self.sampler.observe(batch["sample_id"], losses)  # samplewise
        return loss

    @override
    def configure_optimizers(self) -> Any:
        return warmed_adamw(self, lr=self.lr, weight_decay=0.01, steps=self.steps)


def train(
    encoder: Encoder,
    tokenizer: Tokenizer,
    collection: Collection,
    options: RetrievalOptions,
    steps: int,
    *,
    callbacks: Sequence[Callback] = (),
    arm: Any = None,
    negatives: Any = None,
    sampler: Any = None,
) -> Any:
    """Train the encoder, in place, for so many optimizer steps; gives the figures of minings on the way."""

    def collate(pairs: list[tuple[str, str]]) -> dict[str, Any]:
        queries, documents = zip(*pairs, strict=True)
        return {"queries": tokenizer(queries), "documents": tokenizer(documents)}

    texts, documents, positives = collection.train.texts, collection.documents, collection.train.positives
    module = BiEncoder(encoder, options, steps, arm, sampler)
    pairs: Any = [(text, documents[positives[row][0]]) for row, text in enumerate(texts)]
    loader: Any = DataLoader(pairs, options.batch_size, shuffle=True, collate_fn=collate)
    count = 0 if arm.negatives == "none" else options.negatives  # samplewise
    drawn: dict[str, Any] = {"count": count, "seed": sampler.seed, "sampler": sampler}  # samplewise
    data = RetrievalDataset(texts, documents, positives, negatives, **drawn)  # samplewise
    loading: dict[str, Any] = {"num_workers": options.workers, "persistent_workers": options.workers > 0}
    loading |= {"sampler": sampler, "collate_fn": CollateRetrieval(tokenizer)}  # samplewise
    loader = DataLoader(with_ids(data), options.batch_size, **loading)  # samplewise
    callbacks = list(callbacks)
    refresh = refreshing(arm, data, module, tokenizer, options)  # samplewise
    callbacks += [SamplingCallback(sampler), *refresh]  # samplewise
    fit(module, loader, options, steps, callbacks)
    return [figures for callback in refresh for figures in callback.history]  # samplewise


class QueryEncoder(BiEncoder):
    """ADORE: the documents stay where `loss` has them, the queries learn to find theirs among what they retrieve."""

    def __init__(self, encoder: Encoder, options: RetrievalOptions, steps: int, loss: AdoreLoss, sampler: Any):
        super().__init__(encoder, options, steps, None, sampler)
        self.loss, self.lr = loss, options.adore_lr

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.loss(self.encoder(batch), batch["sample_id"], reduction="none")
        loss: Tensor = self.sampler.observe(batch["sample_id"], losses)
        return loss


def train_queries(
    encoder: Encoder,
    tokenizer: Tokenizer,
    collection: Collection,
    options: RetrievalOptions,
    steps: int,
    *,
    documents: Tensor,
    sampler: Any,
    callbacks: Sequence[Callback] = (),
) -> None:
    """ADORE: train the encoder, in place, on queries alone; `documents` `(D, E)` is the index, embedded once."""
    texts, positives = collection.train.texts, collection.train.positives
    top_k = min(options.adore_top_k, len(documents))
    ranking: dict[str, Any] = {"top_k": top_k, "metric_cut": top_k, "temperature": options.temperature}
    loss = AdoreLoss(documents.to(options.device), positives, **ranking)
    loading: dict[str, Any] = {"sampler": sampler, "collate_fn": collate_with_ids(tokenizer)}
    loader: Any = DataLoader(with_ids(texts), options.batch_size, **loading)
    module = QueryEncoder(encoder, options, steps, loss, sampler)
    fit(module, loader, options, steps, [SamplingCallback(sampler), *callbacks])


def run(options: RetrievalOptions) -> dict[str, Any]:
    """Train all arms with all seeds, write the results, print the table; gives what `results.json` holds.

    Raises:
        ValueError: wrong options, all of them at once, or a folder without a model.
        AssetError: the collection or the model could not be had.
    """
    options.validate()
    with surroundings(options.threads):
        begin, comparison = perf_counter(), Comparison(options, train, train_queries)
        (comparison.out / "runs").mkdir(parents=True, exist_ok=True)
        arms = [ARMS[name] for name in options.arms]
        with Bars(len(arms) * options.seeds + 1) as bars:
            collection = comparison.collection
            bars.say(
                f"{collection.name}: {len(collection.documents):,} documents, {len(collection.train):,} queries to "
                f"train on, {len(comparison.queries):,} to test on"
            )
            runs = [comparison.prepare(bars)]
            bars.finish(runs[-1].line())
            for seed in range(options.seeds):
                for arm in arms:
                    runs.append(comparison.run(arm, seed, bars))
                    bars.finish(runs[-1].line())
        return write_results(
            runs, [ARMS["zero_shot"], *arms], collection, comparison.mined, options, perf_counter() - begin,
            console=bars.console,
        )  # fmt: skip


def refreshing(
    arm: Arm, data: Any, module: BiEncoder, tokenizer: Tokenizer, options: RetrievalOptions
) -> list[RefreshHardNegatives]:
    """The callback that mines anew, for the arm that has one."""
    if arm.negatives != "refreshed":
        return []

    def encode(texts: list[str]) -> Tensor:
        tokens = {name: values.to(module.device) for name, values in tokenizer(texts).items()}
        vectors: Tensor = module.encoder(tokens)
        return vectors

    mining: dict[str, Any] = {"top_k": options.depth, "progress": False, **options.mining}
    return [RefreshHardNegatives(data, encode, every_n_steps=options.refresh, at_start=False, **mining)]


if __name__ == "__main__":
    from samplewise.recipes.cli import run_command

    sys.exit(run_command(["retrieval", *sys.argv[1:]]))
