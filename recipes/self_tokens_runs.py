"""The runs of the recipe of self-generated tokens: new adapters for each arm, training, answers to held-out prompts."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from samplewise.callbacks import RefreshSelfTokens
from samplewise.loaders.seeding import derive
from samplewise.plugins import SelfTokenMixer
from samplewise.recipes.language_model import find_language_model, load_language_model
from samplewise.recipes.progress import Bars
from samplewise.recipes.self_tokens_arms import (
    UNTRAINED,
    Arm,
    data_and_collate,
    make_sampler,
    make_target,
    refresh_options,
)
from samplewise.recipes.self_tokens_scores import Score, score
from samplewise.recipes.text_pairs import Pair, TokenizedPairs, load_pairs

if TYPE_CHECKING:
    from samplewise.recipes.self_tokens import SelfTokensOptions


@dataclass(frozen=True)
class Run:
    """One arm, trained and tested.

    Attributes:
        arm, seed: which.
        score: on the held-out pairs.
        steps: optimizer steps.
        seconds: of training, with `refresh_seconds` of them for the model's own tokens; `test_seconds` of the test.
        refreshes: the figures of each refresh.
    """

    arm: Arm
    seed: int
    score: Score
    steps: int = 0
    seconds: float = 0.0
    refresh_seconds: float = 0.0
    test_seconds: float = 0.0
    refreshes: Sequence[dict[str, float]] = ()

    def line(self) -> str:
        """The run in a line."""
        found = self.score
        return (
            f"seed {self.seed}  {self.arm.label:<30} perplexity {found.perplexity:6.3f}  tokens right after references "
            f"{found.token_accuracy:.3f}, own {found.own_accuracy:.3f}  ROUGE-L {found.rouge_l:.3f}  "
            f"{self.seconds:6.1f} s"
        )

    def row(self) -> dict[str, Any]:
        """The run's numbers."""
        return {
            "arm": self.arm.name, "seed": self.seed, **self.score.row(), "steps": self.steps,
            "train_seconds": self.seconds, "refresh_seconds": self.refresh_seconds, "refreshes": len(self.refreshes),
            "test_seconds": self.test_seconds,
        }  # fmt: skip


class Comparison:
    """All runs on one model and one set of pairs.

    Attributes:
        splits: the pairs, as texts.
        pairs: those that are trained on; `tests`: those that are answered.
        shown: the texts of `tests`.
    """

    def __init__(self, options: "SelfTokensOptions", train: Callable[..., None], bars: Bars):
        self.options, self.train = options, train
        self.splits = load_pairs(options.data, say=bars.say)
        model, self.tokenizer = load_language_model(find_language_model(options.model, bars.say), bars.say)
        if not options.chat:
            self.tokenizer.chat_template = None
        if not self.tokenizer.all_special_ids:
            raise ValueError("its tokenizer has no special token, so that no answer ends; set eos_token")
        self.model: Any = model.to(options.device)
        held = self.splits.test if options.evaluate == "test" else self.splits.validation
        self.pairs, _ = self._tokenized(self.splits.train, options.train_pairs)
        self.tests, self.shown = self._tokenized(held, options.test_pairs)
        self.steps = options.epochs * -(-len(self.pairs) // options.batch_size)
        bars.say(
            f"{self.splits.source}: {len(self.pairs):,} pairs to train on for {self.steps} steps, {len(self.tests)} to "
            f"answer"
        )

    def untrained(self, bars: Bars) -> Run:
        """The model as it is."""
        begin = perf_counter()
        found = self._score(self.model, UNTRAINED.label, bars)
        return Run(UNTRAINED, 0, found, test_seconds=perf_counter() - begin)

    def run(self, arm: Arm, seed: int, runs: Sequence[Run], bars: Bars) -> Run:
        """Train and test one arm; `runs` are those before it."""
        options, name = self.options, f"seed {seed}: {arm.label}"
        steps = self._timed_steps(arm.timed, seed, runs) if arm.timed else self.steps
        model = self._adapted(seed)
        sampler = make_sampler(arm, len(self.pairs), seed, options)
        with tempfile.TemporaryDirectory(prefix="samplewise-") as folder:
            target = make_target(arm, self.pairs, self.tokenizer, Path(folder) / "tokens", sampler, options)
            data, collate = data_and_collate(target, self.pairs)
            refresh = None
            if target is not None:
                needed = not isinstance(target, SelfTokenMixer) or target.beta(0) > 0
                refresh = RefreshSelfTokens(target, model, at_start=needed, **refresh_options(arm, options))
            given: dict[str, Any] = {"callbacks": [bars.begin(name)], "sampler": sampler, "data": data}
            begin = perf_counter()
            self.train(model, self.pairs, options, steps, collate=collate, refresh=refresh, **given)
            trained = perf_counter()
        found = self._score(model, f"{name}: answers", bars)
        self.model = model.unload()
        refreshes = [] if refresh is None else refresh.history
        spent = sum(figures["seconds"] for figures in refreshes)
        return Run(arm, seed, found, steps, trained - begin, spent, perf_counter() - trained, refreshes)

    def _timed_steps(self, kind: str, seed: int, runs: Sequence[Run]) -> int:
        """Plain steps that take as long as the slowest arm of a kind."""
        own = [run for run in runs if run.seed == seed]
        plain = next(run.seconds for run in own if run.arm.kind == "plain")
        return round(self.steps * max(1.0, max(run.seconds for run in own if run.arm.kind == kind) / plain))

    def _adapted(self, seed: int) -> Any:
        """The model with new adapters, whose first values depend on the seed alone."""
        import peft

        settings: Any = {"r": self.options.rank, "lora_alpha": 2 * self.options.rank, "target_modules": "all-linear"}
        with torch.random.fork_rng():
            torch.manual_seed(derive(seed, "adapters"))
            return peft.get_peft_model(self.model, peft.LoraConfig(**settings))

    def _score(self, model: Any, name: str, bars: Bars) -> Score:
        most, size = self.options.max_new_tokens, 2 * self.options.batch_size
        done = bars.count(name, len(self.tests))
        return score(model, self.tests, self.tokenizer, most=most, batch_size=size, done=done)

    def _tokenized(self, pairs: Sequence[Pair], most: int) -> tuple[TokenizedPairs, list[Pair]]:
        kept = [pairs[row] for row in TokenizedPairs(pairs, self.tokenizer, self.options.max_length).rows[:most]]
        return TokenizedPairs(kept, self.tokenizer, self.options.max_length), kept
