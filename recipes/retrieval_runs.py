"""The runs of the retrieval recipe: encode, mine, train an arm, rank for the held-out queries; the time of each."""

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from samplewise.loaders.negatives import corpus_fingerprint
from samplewise.loaders.table import Table
from samplewise.plugins.exchange import to_columns, write_run
from samplewise.plugins.hard_negatives import mine_hard_negatives
from samplewise.plugins.search import search
from samplewise.recipes.corpus import Queries, load_collection
from samplewise.recipes.encoder import Encoder, embed, find_model, load_encoder
from samplewise.recipes.progress import Bars
from samplewise.recipes.retrieval_arms import ARMS, Arm, bm25_negatives, make_sampler
from samplewise.recipes.retrieval_results import DEPTH, Clock, Losses, Mined, Run, measure

if TYPE_CHECKING:
    from samplewise.recipes.retrieval import RetrievalOptions


class Comparison:
    """All runs on one collection, from one set of pretrained weights.

    Args:
        options: of the recipe.
        train, train_queries: the recipe's functions.

    Attributes:
        collection, queries: what is searched, and the queries that are not trained on.
        mined: what the pretrained encoder finds.
    """

    def __init__(self, options: "RetrievalOptions", train: Callable[..., Any], train_queries: Callable[..., Any]):
        self.options, self.out = options, Path(options.out)
        self.train, self.train_queries = train, train_queries
        self.collection = load_collection(options.data, documents=options.documents)
        self.pretrained, self.tokenizer = load_encoder(find_model(options.model), options.max_length)
        self.queries: Queries = getattr(self.collection, options.evaluate)

    def prepare(self, bars: Bars) -> Run:
        """Encode with the pretrained encoder, mine, and rank with it."""
        clock = Clock()
        with clock("encoding"):
            documents = self._embed(self.pretrained, self.collection.documents, "mining: documents", bars)
            queries = self._embed(self.pretrained, self.collection.train.texts, "mining: queries", bars)
        shutil.rmtree(self.out / "negatives", ignore_errors=True)  # of an earlier run, maybe on other data
        with clock("mining"):
            table = self._mine(documents, queries, self.out / "negatives")
        self._export(table)
        self.mined = Mined(table, documents, queries, clock.seconds)
        return self._tested(ARMS["zero_shot"], 0, self.pretrained, documents, Clock(), Losses(), bars)

    def run(self, arm: Arm, seed: int, bars: Bars) -> Run:
        """Train one arm, and rank the documents for the held-out queries."""
        options, clock, losses = self.options, Clock(), Losses()
        encoder, name = copy.deepcopy(self.pretrained), f"seed {seed}: {arm.label}"
        alone = round(options.adore_share * options.steps) if arm.adore else 0
        steps, positives = options.steps - alone, self.collection.train.positives
        common = (encoder, self.tokenizer, self.collection, options)
        with TemporaryDirectory() as folder:
            negatives = self._negatives(arm, Path(folder), clock)
            sampler = make_sampler(arm, positives, steps, seed, options)
            given = {"arm": arm, "negatives": negatives, "sampler": sampler, "callbacks": [losses, bars.begin(name)]}
            with clock("training"):
                history = self.train(*common, steps, **given)
        for figures in history:  # minings while it trained
            clock.move(figures["encode_seconds"], "training", "encoding")
            clock.move(figures["mine_seconds"], "training", "mining")
        with clock("encoding" if alone else "testing"):
            documents = self._embed(encoder, self.collection.documents, f"{name}: documents", bars)
        if alone:
            sampler = make_sampler(arm, positives, alone, seed + options.seeds, options)
            given = {"documents": documents, "sampler": sampler, "callbacks": [losses, bars.begin(f"{name}: queries")]}
            with clock("training"):
                self.train_queries(*common, alone, **given)
        return self._tested(arm, seed, encoder, documents, clock, losses, bars)

    def _negatives(self, arm: Arm, folder: Path, clock: Clock) -> Any:
        """The mined negatives of an arm, None where it has none; what they took is counted."""
        if arm.negatives == "bm25":
            with clock("mining"):
                return bm25_negatives(self.collection, self.options.depth)
        if arm.negatives not in ("mined", "refreshed"):
            return None
        for part, seconds in self.mined.seconds.items():
            clock.seconds[part] += seconds
        if arm.negatives == "refreshed":  # a table of its own, to be replaced
            return self._mine(self.mined.documents, self.mined.queries, folder)
        return self.mined.table

    def _mine(self, documents: Tensor, queries: Tensor, folder: Path) -> Table:
        train, options = self.collection.train, self.options
        table = Table(folder, fingerprint=corpus_fingerprint(train.texts, self.collection.documents), keep=1)
        given: dict[str, Any] = {"device": options.device, "progress": False, **options.mining}
        return mine_hard_negatives(documents, queries, train.positives, top_k=options.depth, out=table, **given)

    def _export(self, table: Table) -> None:
        """The mined negatives as columns for sentence-transformers, a line of `triplets.jsonl` for each."""
        train = self.collection.train
        columns = to_columns(train.texts, self.collection.documents, train.positives, table["negatives"])
        with (self.out / "triplets.jsonl").open("w", encoding="utf-8") as file:
            for row in zip(*columns.values(), strict=True):
                file.write(json.dumps(dict(zip(columns, row, strict=True))) + "\n")

    def _tested(
        self, arm: Arm, seed: int, encoder: Encoder, documents: Tensor, clock: Clock, losses: Losses, bars: Bars
    ) -> Run:
        with clock("testing"):
            queries = self._embed(encoder, self.queries.texts, f"seed {seed}: {arm.label}: test", bars)
            found = search(documents, queries, min(DEPTH, len(documents)), device=self.options.device)
            scores, first = measure(self.queries, self.collection.document_ids, found)
        if seed == 0:
            names: Any = {"query_names": self.queries.ids, "document_names": self.collection.document_ids}
            write_run(
                self.out / "runs" / f"{arm.name}.trec", found.ids.numpy(), found.scores.numpy(), tag=arm.name, **names
            )
        return Run(arm, seed, scores, first, clock.seconds, torch.tensor(losses.values).tolist())

    def _embed(self, encoder: Encoder, texts: Sequence[str], name: str, bars: Bars) -> Tensor:
        options = self.options
        mixed, watch = options.precision == "bf16-mixed", bars.count(name, len(texts))
        return embed(encoder, self.tokenizer, texts, device=options.device, mixed=mixed, watch=watch)
