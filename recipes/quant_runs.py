"""The runs of the quantisation recipe: quantize once, train the adapters of each arm, test at pinned widths, search."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from samplewise.loaders import FixedSchedule, Schedule
from samplewise.plugins.bit_adapters import add_adapters, get_bits, layer_sizes, pinned, stored_bits_per_weight
from samplewise.plugins.bit_search import BitSearch, average_bits, even_config, search_bits
from samplewise.plugins.multi_bit import quantize_model
from samplewise.recipes.language_model import find_language_model, load_language_model
from samplewise.recipes.progress import Bars
from samplewise.recipes.quant_arms import ARMS, Arm, Config, make_sampler, make_schedule
from samplewise.recipes.responses import pad_left, response_losses, response_scores
from samplewise.recipes.text_pairs import Pair, TokenizedPairs, choice_questions, load_pairs

if TYPE_CHECKING:
    from samplewise.recipes.quant import QuantOptions

CHUNK = 32


@dataclass(frozen=True)
class Score:
    """What a model got at one configuration.

    Attributes:
        average: bits of a layer, on average.
        loss: nats a token of the held-out responses.
        accuracy: share of the tokens of the responses that are the likeliest, given those before.
        choices: share of the questions answered rightly; NaN without questions.
    """

    average: float
    loss: float
    accuracy: float
    choices: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return float(np.exp(self.loss))


@dataclass(frozen=True)
class Run:
    """One arm, trained and tested.

    Attributes:
        arm, seed: which.
        scores: at each of the averages.
        steps: optimizer steps, of all its trainings.
        seconds: of training; `setup_seconds` of making adapters, `test_seconds` of the tests.
        averages: float64 `(steps,)`, the average width in each step.
        counts: int64 `(layers, widths)`, how often each was trained.
    """

    arm: Arm
    seed: int
    scores: Sequence[Score]
    steps: int = 0
    seconds: float = 0.0
    setup_seconds: float = 0.0
    test_seconds: float = 0.0
    averages: np.ndarray = field(default_factory=lambda: np.zeros(0))
    counts: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    def line(self) -> str:
        """The run in a line."""
        losses = "  ".join(f"{score.average:g}: {score.loss:.3f}" for score in self.scores)
        return f"seed {self.seed}  {self.arm.label:<32} loss at {losses}  {self.seconds:6.1f} s"

    def rows(self) -> list[dict[str, Any]]:
        """A row for each average."""
        return [
            {
                "arm": self.arm.name, "seed": self.seed, "average": score.average, "loss": score.loss,
                "perplexity": score.perplexity, "token_accuracy": score.accuracy, "choice_accuracy": score.choices,
                "steps": self.steps, "train_seconds": self.seconds, "setup_seconds": self.setup_seconds,
                "test_seconds": self.test_seconds,
            }
            for score in self.scores
        ]  # fmt: skip


class Widths(Callback):
    """Writes down the average width of each optimizer step, as it is trained."""

    def __init__(self) -> None:
        self.averages: list[float] = []

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.averages.append(average_bits(get_bits(pl_module)))


class Comparison:
    """All runs on one model and one set of pairs.

    Attributes:
        splits: the pairs.
        layers: names of the quantized layers; `sizes`: their numbers of weights.
        stored_bits: that a weight takes, at all widths.
        configs: average -> the configuration that is tested.
        full: the score of the model before it was quantized.
        search: the search in the first seed's balanced arm, and the scores of what it found.
    """

    def __init__(self, options: "QuantOptions", train: Callable[..., None], bars: Bars):
        self.options, self.train = options, train
        self.splits = load_pairs(options.data, say=bars.say)
        model, self.tokenizer = load_language_model(find_language_model(options.model, bars.say), bars.say)
        if not options.chat:
            self.tokenizer.chat_template = None
        self.model: nn.Module = model.to(options.device)
        held = self.splits.test if options.evaluate == "test" else self.splits.validation
        self.pairs, self.tests = self._tokenized(self.splits.train), self._tokenized(held, options.test_pairs)
        self.validation = self._tokenized(self.splits.validation, options.search_pairs)
        self.questions = choice_questions(held, count=options.questions, seed=0) if options.questions else []
        self.full = self._score(self.model, float("nan"))
        self.layers = quantize_model(self.model, bits=options.bits, group_size=options.group_size)
        self.sizes = layer_sizes(self.model)
        self.stored_bits = stored_bits_per_weight(self.model)
        self.configs: dict[float, Config] = {
            average: even_config(self.layers, average, options.bits) for average in options.averages
        }
        self.search: tuple[BitSearch, Score, Score] | None = None
        bars.say(
            f"{self.splits.source}: {len(self.pairs):,} pairs to train on, {len(self.tests)} to test on. "
            f"{len(self.layers)} layers at {options.bits} bits take {self.stored_bits:.2f} bits a weight; "
            f"loss before: {self.full.loss:.3f}"
        )

    def untrained(self, bars: Bars) -> Run:
        """Rounded to nearest."""
        begin = perf_counter()
        scores = self._scores(self.model, self.configs, "rounded to nearest", bars)
        return Run(ARMS["rtn"], 0, scores, test_seconds=perf_counter() - begin)

    def run(self, arm: Arm, seed: int, bars: Bars) -> Run:
        """Train and test one arm."""
        if arm.mapping is None:
            return self._single(arm, seed, bars)
        schedule = make_schedule(arm, self.layers, seed, self.options)
        return self._trained(arm, seed, schedule, self.options.steps, self.configs, f"seed {seed}: {arm.label}", bars)

    def _single(self, arm: Arm, seed: int, bars: Bars) -> Run:
        """A run for each average, with its share of the steps."""
        steps = self.options.steps // len(self.configs)
        runs = [
            self._trained(
                arm, seed, FixedSchedule([config]), steps, {average: config},
                f"seed {seed}: {arm.label}: {average:g} bits", bars,
            )
            for average, config in self.configs.items()
        ]  # fmt: skip
        return Run(
            arm, seed, [score for run in runs for score in run.scores], steps * len(runs),
            sum(run.seconds for run in runs), sum(run.setup_seconds for run in runs),
            sum(run.test_seconds for run in runs), np.concatenate([run.averages for run in runs]),
        )  # fmt: skip

    def _trained(
        self, arm: Arm, seed: int, schedule: Schedule, steps: int, configs: dict[float, Config], name: str, bars: Bars
    ) -> Run:
        options, begin = self.options, perf_counter()
        adapters: dict[str, Any] = {"rank": options.rank, "alpha": 2 * options.rank, "seed": seed, "shared": arm.shared}
        model: Any = add_adapters(self.model, **adapters)
        sampler = make_sampler(len(self.pairs), steps * options.accumulate, seed, options)
        ready = perf_counter()
        widths = Widths()
        given: dict[str, Any] = {"sampler": sampler, "schedule": schedule, "callbacks": [bars.begin(name), widths]}
        self.train(model, self.pairs, options, steps, **given)
        trained = perf_counter()
        scores = self._scores(model, configs, f"{name}: test", bars)
        tested = perf_counter()
        if arm.name == "balanced" and seed == 0 and options.search[0]:
            self._search(model, name, bars)
        self.model = model.unload()
        averages = np.array(widths.averages)
        return Run(
            arm, seed, scores, steps, trained - ready, ready - begin, tested - trained, averages, schedule.counts
        )  # fmt: skip

    # --- tests ---

    def _scores(self, model: nn.Module, configs: dict[float, Config], name: str, bars: Bars) -> list[Score]:
        done, scores = bars.count(name, len(configs)), []
        for average, config in configs.items():
            with pinned(model, config):
                scores.append(self._score(model, average))
            done(1)
        return scores

    @torch.no_grad()
    def _score(self, model: nn.Module, average: float) -> Score:
        model.eval()
        losses, right, count = 0.0, 0, 0
        for batch in self._batches(self.tests):
            found, hits = response_scores(model, batch)
            losses, right, count = losses + float(found.sum()), right + int(hits.sum()), count + found.numel()
        answers = self._answers(model)
        return Score(average, losses / count, right / count, float(np.mean(answers)) if answers else float("nan"))

    def _answers(self, model: nn.Module) -> list[bool]:
        """Whether the likeliest response of each question, by its mean loss, is the right one."""
        pairs = [Pair(question.prompt, response) for question in self.questions for response in question.responses]
        if not pairs:
            return []
        tokens = TokenizedPairs(pairs, self.tokenizer, 10**6)
        losses = torch.cat([response_losses(model, batch) for batch in self._batches(tokens)])
        answers, begin = [], 0
        for question in self.questions:
            end = begin + len(question.responses)
            answers.append(int(losses[begin:end].argmin()) == question.answer)
            begin = end
        return answers

    def _batches(self, data: TokenizedPairs) -> list[dict[str, Tensor]]:
        rows = [data[row] for row in range(len(data))]
        batches = [pad_left(rows[begin : begin + CHUNK]) for begin in range(0, len(rows), CHUNK)]
        return [{name: values.to(self.options.device) for name, values in batch.items()} for batch in batches]

    def _tokenized(self, pairs: Sequence[Pair], most: int | None = None) -> TokenizedPairs:
        tokens = TokenizedPairs(pairs, self.tokenizer, self.options.max_length)
        if most is None:
            return tokens
        return TokenizedPairs([pairs[row] for row in tokens.rows[:most]], self.tokenizer, self.options.max_length)

    # --- search ---

    def _search(self, model: nn.Module, name: str, bars: Bars) -> None:
        """The best configuration on validation pairs under the budget; it and an even one are tested."""
        options, batches = self.options, self._batches(self.validation)
        shown, before = bars.count(f"{name}: search", sum(options.search)), 0

        def watch(done: int) -> None:
            nonlocal before
            shown(done - before)
            before = done

        @torch.no_grad()
        def evaluate(config: Config) -> float:
            with pinned(model, config):
                return float(torch.cat([response_losses(model, batch) for batch in batches]).mean())

        first, second = options.search
        given: dict[str, Any] = {"sizes": self.sizes, "first": first, "second": second, "watch": watch}
        try:
            found = search_bits(evaluate, layers=self.layers, budget=options.budget, bits=tuple(options.bits), **given)
        except ValueError as error:  # a training that diverged: its results are still worth having
            bars.say(f"{name}: {error}")
            return
        even = even_config(self.layers, options.budget, options.bits)
        scores = []
        for config in (found.best_config, even):
            with pinned(model, config):
                scores.append(self._score(model, average_bits(config, self.sizes)))
        self.search = (found, scores[0], scores[1])
